"""From conditions and seeds to images: encode -> initial latents -> sample -> decode, on any engine."""

from __future__ import annotations

import gc
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen.buckets import cut
from fastgen.bundle import is_bundle, read_bundle
from fastgen.checkpoint_choice import check_bundle_of, model_parts
from fastgen.choose import default_engine
from fastgen.conditions import Conditions, LabelConditions, PromptConditions
from fastgen.device_loop import DeviceLoop
from fastgen.engines import check_installed, create_engine, engine_class
from fastgen.errors import InputError
from fastgen.names import check_labels, read_objects
from fastgen.pictures import Decoder, Pictures
from fastgen.requests import Request, resolve_seed
from fastgen.retrieval import COMMAND, Index, Start, open_index, retrieve
from fastgen.sampling import initial_latents, sample
from fastgen.settings import Settings, late_steps
from fastgen.shipped import find_model, name_of, shipped_names
from fastgen.strips import Frames, StripPlan
from fastgen.tables import SolverTable

if TYPE_CHECKING:
    from PIL import Image

    from fastgen.engines.base import Array, Engine
    from fastgen.engines.base_memory import Memory
    from fastgen.spec import Source


class Pipeline:
    """A model on an engine, ready to generate.

    `graphs`: record the loop as CUDA graphs; by default on a GPU, except with the reference engine. `open_exact` makes the
    same engine in fp32, in which images are decoded again that come out broken.
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
        self.measured: dict[str, Memory] = {}  # network -> what it takes on a GPU, once a job has measured it

    def settings(
        self,
        *,
        scheduler: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[int, int] | None = None,
        seed: int = 0,
        normalize: str = "clamp",
        rag: bool = False,
        noise_steps: int | None = None,
        strength: float | None = None,
        rag_top_k: int | None = None,
    ) -> Settings:
        """Settings with the model's own defaults for what is None. With `rag` images start from training images' latents:
        `noise_steps`, or the share `strength`, of the steps run, see `settings.late_steps`."""
        default = self.spec.sampling
        steps = default.num_inference_steps if num_inference_steps is None else num_inference_steps
        if not rag and (noise_steps, strength, rag_top_k) != (None, None, None):
            raise InputError(
                f"noise_steps, strength and rag_top_k belong to an index; give --rag INDEX too ({COMMAND})"
            )
        return Settings(
            scheduler or default.scheduler,
            steps,
            default.guidance_scale if guidance_scale is None else guidance_scale,
            guidance_interval,
            seed,
            noise_steps=late_steps(steps, noise_steps, strength) if rag else None,
            rag_top_k=1 if rag_top_k is None else rag_top_k,
            normalize=normalize,
        )

    def generate(
        self,
        prompts: Sequence[str] | None = None,
        labels: Sequence[Sequence[str]] | None = None,
        seeds: Sequence[int] | None = None,
        *,
        batch_size: int = 16,
        rag: Index | str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Images for prompts (text family) or label lists (label family), as PIL images of spec.image_size.

        `seeds`: one per image; without them they follow from `seed` and the position. `rag`: an index, from whose nearest
        training images they start. Other keywords are those of `settings`. Raises InputError for conditions of the wrong
        kind, unknown labels, settings out of range and another model's index, and FloatingPointError where the network
        produces values that are not finite.
        """
        from PIL import Image

        requests = _requests(prompts, labels, seeds)
        index = rag if rag is None or isinstance(rag, Index) else open_index(rag)
        if index is not None:
            index.check(self.spec)
        chosen = self.settings(rag=index is not None, **settings)
        encoder = self.encoder(requests, chosen.guided)
        table = self.source.table(chosen.solver)
        start = self.retrieve(requests, chosen, index)
        images: list[Image.Image] = []
        for batch in cut(len(requests), batch_size, self.buckets(chosen)):
            rows = requests[batch.rows]
            pictures = self.start_batch(rows, encoder, table, chosen, start, bucket=batch.bucket)()
            for request, problem in zip(rows, pictures.problems, strict=True):
                if problem and "finite" in problem:
                    raise FloatingPointError(f"image {request.id}: {problem}")
            images += [Image.fromarray(p) for p in pictures.pixels]
        return images

    def encoder(self, requests: Sequence[Request], guided: bool) -> Conditions:
        """The conditions of all requests of a job, encoded when they are first needed, once each."""
        wrong = [r for r in requests if r.kind != self.spec.family]
        if wrong:
            expected = "prompts" if self.spec.family == "text" else "labels"
            raise InputError(f"request {wrong[0].id} holds {wrong[0].kind}; this model takes {expected}")
        if self.spec.family == "text":
            return PromptConditions(self.engine, self.tokenizer, [r.prompt or "" for r in requests], guided)
        return LabelConditions(self.engine, self.spec.objects or {})

    def retrieve(self, requests: Sequence[Request], settings: Settings, index: Index | None) -> Start | None:
        """The training images that requests start from; None without an index."""
        return None if index is None else retrieve(self.engine, self.tokenizer, index, requests, settings)

    def start_batch(
        self,
        requests: Sequence[Request],
        encoder: Conditions,
        table: SolverTable,
        settings: Settings,
        start: Start | None = None,
        *,
        bucket: int | None = None,
        on_step: Callable[[int, Array], None] | None = None,
        strip: StripPlan | None = None,
        decode_batch_size: int | None = None,
    ) -> Callable[[], Pictures]:
        """Begin with one batch of requests; the call that is returned waits for its pictures.

        On a GPU this returns when everything is queued: start the next batch before waiting for this one. `bucket`: the size
        to which an engine with static shapes pads the batch. `start`: what `retrieve` found. `on_step(i, x)` sees the state
        after each row, and with i = -1 the one that a run starts from. `strip`: keep the states that it names, for the
        pictures' strips. `decode_batch_size`: images that the VAE decodes together, by default what the engine takes at once.
        """
        frames = None if strip is None else Frames(strip, len(requests), on_step)
        x = self.latents(requests, encoder, table, settings, start, bucket=bucket, on_step=frames or on_step)
        decode = partial(self.decoder.start, normalize=settings.normalize, limit=decode_batch_size)
        wait = decode(x)
        return wait if frames is None else frames.start(decode, wait)

    def sample_batch(
        self,
        requests: Sequence[Request],
        encoder: Conditions,
        table: SolverTable,
        settings: Settings,
        start: Start | None = None,
        *,
        bucket: int | None = None,
    ) -> np.ndarray:
        """One batch of requests -> images (B, 3, H, W) float32, nominally in [-1, 1], whatever they look like."""
        x = self.latents(requests, encoder, table, settings, start, bucket=bucket)
        return self.engine.numpy(self.decoder.decode(x))

    @np.errstate(over="ignore", invalid="ignore")  # broken images are looked for in the end
    def latents(
        self,
        requests: Sequence[Request],
        encoder: Conditions,
        table: SolverTable,
        settings: Settings,
        start: Start | None = None,
        *,
        bucket: int | None = None,
        on_step: Callable[[int, Array], None] | None = None,
    ) -> Array:
        """The final state (B, C, h, w) of a batch of requests, as an array of the engine; arguments as in `start_batch`."""
        engine, count = self.engine, len(requests)
        if engine.static_shapes and bucket is not None:
            requests = [*requests, *[requests[-1]] * (bucket - count)]
        seeds = engine.array(np.array([resolve_seed(r, settings.seed) for r in requests], np.int64))
        clean = None if start is None else engine.array(start.latents(requests))
        x = initial_latents(table, seeds, self.spec.latent_shape, clean)
        if on_step is not None:
            on_step(-1, x)
        cond = encoder(requests)
        options: dict[str, Any] = {
            "seeds": seeds,
            "guidance_scale": settings.guidance_scale,
            "uncond": encoder.uncond() if settings.guided else None,
            "guidance_interval": settings.guidance_interval,
            "on_step": on_step,
        }
        if self.on_gpu:
            x = self._loop(table, x, cond).run(x, cond, **options)
        else:
            x = sample(lambda *a: engine.run("unet", *a)[0], table, x, cond, guided=engine.run_guided, **options)
        return x[:count]

    def _loop(self, table: SolverTable, x: Array, cond: Array) -> DeviceLoop:
        """The loop for this table and batch size; those of other tables are dropped with their memory."""
        if any(held != table.key for held, _ in self._loops):
            self._drop_loops()
        key = (table.key, len(x))
        if key not in self._loops:
            pool = next((loop.pool for loop in self._loops.values() if loop.pool), None)
            self._loops[key] = DeviceLoop(self.engine, table, x.shape, cond.shape, graphs=self._graphs, pool=pool)
        return self._loops[key]

    def _drop_loops(self) -> None:
        """Let go of all loops, and of what else nobody uses any more but has references to itself, with their memory."""
        self.engine.synchronize()  # none of them is running
        self._loops.clear()
        gc.collect()

    def buckets(self, settings: Settings) -> Sequence[int] | None:
        """The batch sizes that the engine was compiled for, if it was; with a guidance interval for both kinds of rows."""
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
        """Let go of recorded graphs and unused device memory: the next batch allocates anew."""
        self._drop_loops()
        self.engine.release_memory()


def _requests(
    prompts: Sequence[str] | None, labels: Sequence[Sequence[str]] | None, seeds: Sequence[int] | None
) -> list[Request]:
    """The arguments of `Pipeline.generate` as requests that are named by their position."""
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
    path: str | os.PathLike[str],
    engine: str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    graphs: bool | None = None,
    checkpoint: str | None = None,
) -> Pipeline:
    """Load a bundle, a model folder or a shipped model, by its name, onto an engine.

    `engine`: by default what `choose.default_engine` says. `dtype`: fp32, bf16 or fp16, by default what suits the engine and
    the hardware. `graphs`: see Pipeline. `checkpoint`: which of a training run's weights, see `checkpoint_choice`. Raises
    InputError when the folder is neither, is damaged, or does not suit the engine.
    """
    folder = find_model(path)
    bundled = is_bundle(folder)
    if not bundled and not (model_parts(folder, checkpoint) / "model_index.json").is_file():
        shipped = ", ".join(shipped_names()) or "there are none"
        names = "" if folder.exists() else f", nor the name of a model that comes with fastgen ({shipped})"
        raise InputError(f"{folder}: neither a bundle (bundle.json) nor a model folder (model_index.json){names}")
    name = engine or default_engine(folder, device)
    kind = engine_class(name).source_kind
    if kind == "bundle" and not bundled:
        raise InputError(
            f"engine {name} runs bundles; `fastgen export {name_of(folder)} --out BUNDLE` makes one of this model folder"
        )
    if kind == "model" and bundled:
        raise InputError(
            f"engine {name} runs model folders; {folder} is a bundle: give --model the folder it was exported from"
        )
    check_installed(name)

    def open_source() -> Source:
        if not bundled:
            from fastgen.networks import load_model

            return load_model(folder, checkpoint)
        bundle = read_bundle(folder)
        check_bundle_of(folder, bundle.spec.checkpoint, checkpoint)
        bundle.verify()
        return bundle

    source = open_source()
    options: dict[str, Any] = {"device": device, "threads": threads}
    created = create_engine(name, source, dtype=dtype, **options)
    return Pipeline(
        source,
        created,
        graphs=graphs,
        open_exact=lambda: create_engine(name, open_source(), dtype="fp32", **options),
    )


def model_objects(path: str | os.PathLike[str], checkpoint: str | None = None) -> Mapping[str, int] | None:
    """The label names of a bundle or model folder and their indices, read without loading it; None where it has none."""
    folder = Path(path)
    if is_bundle(folder):
        return read_bundle(folder).spec.objects
    file = model_parts(folder, checkpoint) / "labels.json"
    return read_objects(file) if file.is_file() else None
