"""From conditions and seeds to images: encode -> initial latents -> sample -> decode, on any engine."""

from __future__ import annotations

import gc
import operator
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastgen.engines import check_installed, create_engine, engine_class
from fastgen.engines.choose import default_engine
from fastgen.errors import InputError
from fastgen.files.names import check_labels
from fastgen.generate.decoder import Decoder
from fastgen.generate.requests import Request
from fastgen.generate.run import Run
from fastgen.generate.settings import Settings
from fastgen.generate.start import StartSource, late_start
from fastgen.models.checkpoint_choice import check_bundle_of
from fastgen.models.find import ModelFolder, find_model, name_of
from fastgen.sampling.device_loop import DeviceLoop
from fastgen.sampling.tables import SolverTable

if TYPE_CHECKING:
    from PIL import Image

    from fastgen.engines.base import Array, Engine
    from fastgen.engines.memory import Memory
    from fastgen.models.spec import Source


class Pipeline:
    """A model on an engine, ready to generate.

    `graphs`: record the loop as CUDA graphs; by default on a GPU, except with the reference engine. `open_exact` builds this
    engine in fp32; NaN or flat images are decoded again on it.
    """

    def __init__(
        self,
        source: Source,
        engine: Engine,
        *,
        graphs: bool | None = None,
        open_exact: Callable[[], Engine] | None = None,
    ) -> None:
        self.source, self.engine, self.spec = source, engine, source.spec
        self.tokenizer = source.prompt_tokenizer() if self.spec.family == "text" else None
        self.decoder = Decoder(engine, self.spec, open_exact)
        self.on_gpu = engine.device.startswith("cuda")
        if graphs and not self.on_gpu:
            raise InputError(f"CUDA graphs need a GPU; engine {engine.name} runs on {engine.device}")
        self._graphs = self.on_gpu and not engine.reference if graphs is None else graphs
        self._loops: dict[tuple[str, int], DeviceLoop] = {}
        self.memory: dict[str, Memory] = {}  # of each network on a GPU, once a job has measured it

    def settings(
        self,
        *,
        scheduler: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[int, int] | None = None,
        seed: int = 0,
        normalize: str = "clamp",
    ) -> Settings:
        """Settings of a run that starts from noise; None: the model's default."""
        default = self.spec.sampling
        return Settings(
            scheduler or default.scheduler,
            default.num_inference_steps if num_inference_steps is None else num_inference_steps,
            default.guidance_scale if guidance_scale is None else guidance_scale,
            guidance_interval,
            seed,
            normalize=normalize,
        )

    def generate(
        self,
        prompts: Sequence[str] | None = None,
        labels: Sequence[Sequence[str]] | None = None,
        seeds: Sequence[int] | None = None,
        *,
        batch_size: int = 16,
        rag: StartSource | str | os.PathLike[str] | None = None,
        noise_steps: int | None = None,
        strength: float | None = None,
        rag_top_k: int | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Images for prompts (text family) or label lists (label family), as PIL images of spec.image_size.

        `seeds`: one per image, by default derived from `seed` and the position. `rag`: an index, or its folder; images start
        from its nearest training images. `noise_steps`, `strength`, `rag_top_k`: see `start.late_start`. Other keywords:
        see `settings`. Raises InputError for conditions of the wrong kind, unknown labels, settings out of range and another
        model's index, and FloatingPointError for an image with values that are not finite.
        """
        from PIL import Image

        import fastgen

        requests = _requests(prompts, labels, seeds)
        source = fastgen.open_index(rag) if isinstance(rag, str | os.PathLike) else rag
        late: dict[str, Any] = {"noise_steps": noise_steps, "strength": strength, "rag_top_k": rag_top_k}
        run = Run(self, requests, *late_start(source, self, requests, self.settings(**settings), **late))
        images: list[Image.Image] = []
        for batch in run.batches(batch_size):
            pictures = run.begin(batch)()
            for request, problem in zip(requests[batch.rows], pictures.problems, strict=True):
                if problem and not problem.finite:
                    raise FloatingPointError(f"image {request.id}: {problem}")
            images += [Image.fromarray(p) for p in pictures.pixels]
        return images

    def loop(self, table: SolverTable, x: Array, cond: Array) -> DeviceLoop:
        """The loop on a GPU for this table and batch size; loops of other tables are dropped with their memory."""
        if any(other != table.key for other, _ in self._loops):
            self._drop_loops()
        key = (table.key, len(x))
        if key not in self._loops:
            pool = next((loop.pool for loop in self._loops.values() if loop.pool), None)
            self._loops[key] = DeviceLoop(self.engine, table, x.shape, cond.shape, graphs=self._graphs, pool=pool)
        return self._loops[key]

    def _drop_loops(self) -> None:
        """Drop all loops and free their memory; the collector is needed for those in reference cycles."""
        self.engine.synchronize()  # none of them is running
        self._loops.clear()
        gc.collect()

    def buckets(self, settings: Settings) -> Sequence[int] | None:
        """Batch sizes in images that the engine was compiled for; None for any. With a guidance interval those that it has for
        guided and for other rows."""
        sizes = self.engine.buckets(settings.guided)
        if sizes is None or not settings.guided or settings.guidance_interval is None:
            return sizes
        both = sorted(set(sizes) & set(self.engine.buckets(False) or ()))
        if not both:
            raise InputError(
                f"engine {self.engine.name} has no batch size for both guided and unguided rows; build for more"
            )
        return both

    def free_memory(self) -> None:
        """Drop recorded graphs and give unused device memory back."""
        self._drop_loops()
        self.engine.release_memory()


def _requests(
    prompts: Sequence[str] | None, labels: Sequence[Sequence[str]] | None, seeds: Sequence[int] | None
) -> list[Request]:
    """The arguments of `Pipeline.generate` as requests; ids are positions."""
    conditions: Any = prompts if labels is None else labels
    if (prompts is None) == (labels is None) or isinstance(conditions, str) or not len(conditions):
        raise InputError("generate() takes either a list of prompts or a list of label lists, at least one")
    if seeds is not None and len(seeds) != len(conditions):
        raise InputError(f"{len(seeds)} seeds for {len(conditions)} images")
    return [
        Request(
            str(i),
            f"{i}.png",
            prompt=condition if labels is None else None,
            labels=None if labels is None else check_labels(condition),
            seed=None if seeds is None else operator.index(seeds[i]),
        )
        for i, condition in enumerate(conditions)
    ]


def load(
    path: str | os.PathLike[str] | ModelFolder,
    engine: str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    graphs: bool | None = None,
    checkpoint: str | None = None,
) -> Pipeline:
    """Load a bundle, a model folder or a shipped model, by its name, onto an engine.

    `engine`: by default that of `choose.default_engine`. `dtype`: fp32, bf16 or fp16, by default what suits the engine and the
    hardware. `graphs`: see Pipeline. `checkpoint`: which of a training run's weights, see `checkpoint_choice`. Raises
    InputError when the folder is no model or bundle, is damaged, or does not suit the engine.
    """
    model = path if isinstance(path, ModelFolder) else find_model(path, checkpoint)
    name = engine or default_engine(model.folder, device)
    kind = engine_class(name).source_kind
    if kind == "bundle" and model.bundle is None:
        command = f"fastgen export {name_of(model.folder)} --out BUNDLE"
        raise InputError(f"engine {name} runs bundles; `{command}` makes one of this model folder")
    if kind == "model" and model.bundle is not None:
        raise InputError(
            f"engine {name} runs model folders; {model.folder} is a bundle: give --model the folder it was exported from"
        )
    check_installed(name)

    def open_source() -> Source:
        if model.bundle is None:
            from fastgen.models.folder import load_model

            return load_model(model.folder, checkpoint)
        check_bundle_of(model.folder, model.bundle.spec.checkpoint, checkpoint)
        model.bundle.verify()
        return model.bundle

    source = open_source()
    options: dict[str, Any] = {"device": device, "threads": threads}

    def open_exact() -> Engine:
        return create_engine(name, open_source(), dtype="fp32", **options)

    return Pipeline(source, create_engine(name, source, dtype=dtype, **options), graphs=graphs, open_exact=open_exact)
