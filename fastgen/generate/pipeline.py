"""From conditions and seeds to images: encode -> initial latents -> sample -> decode, on any engine."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastgen.engines import built_by, check_installed, create_engine, engine_class
from fastgen.engines.choose import default_engine
from fastgen.engines.unready import check_ready, export_command, obstacle
from fastgen.errors import InputError
from fastgen.files.names import check_labels
from fastgen.files.png import to_image
from fastgen.generate.requests import Request
from fastgen.generate.run import Run
from fastgen.generate.runner import ModelRunner
from fastgen.generate.start import StartSource, late_start
from fastgen.models.checkpoint_choice import check_bundle_of
from fastgen.models.find import ModelFolder, find_model, name_of

if TYPE_CHECKING:
    from PIL import Image

    from fastgen.engines.base import Engine
    from fastgen.models.bundle import Bundle
    from fastgen.models.lora import Lora
    from fastgen.models.spec import Source


class Pipeline(ModelRunner):
    """A model on an engine, as `load` opens it: `generate` makes images."""

    def generate(
        self,
        prompts: Sequence[str] | None = None,
        labels: Sequence[Sequence[str] | str | int] | None = None,
        seeds: Sequence[int] | None = None,
        *,
        count: int | None = None,
        batch_size: int = 16,
        rag: StartSource | str | os.PathLike[str] | None = None,
        noise_steps: int | None = None,
        strength: float | None = None,
        rag_top_k: int | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Images for prompts, label lists (or a class each, by name or number), or both, as PIL images.

        `count`: how many images of a model without conditions. `seeds`: one per image, by default derived from `seed` and the
        position. `rag`: an index, or its folder; images start from its nearest training images. `noise_steps`, `strength`,
        `rag_top_k`: see `start.late_start`. Other keywords: see `settings`. Raises InputError for conditions of the wrong kind,
        unknown labels, settings out of range and another model's index, and FloatingPointError for an image with values that
        are not finite."""
        import fastgen

        requests = _requests(prompts, labels, seeds, count)
        source = fastgen.open_index(rag) if isinstance(rag, str | os.PathLike) else rag
        late: dict[str, Any] = {"noise_steps": noise_steps, "strength": strength, "rag_top_k": rag_top_k}
        run = Run(self, requests, *late_start(source, self, requests, self.settings(**settings), **late))
        images: list[Image.Image] = []
        for batch in run.batches(batch_size):
            pictures = run.begin(batch)()
            for request, problem in zip(requests[batch.rows], pictures.problems, strict=True):
                if problem and not problem.finite:
                    raise FloatingPointError(f"image {request.id}: {problem}")
            images += [to_image(p) for p in pictures.pixels]
        return images


def _requests(
    prompts: Sequence[str] | None,
    labels: Sequence[Sequence[str] | str | int] | None,
    seeds: Sequence[int] | None,
    count: int | None,
) -> list[Request]:
    """The arguments of `Pipeline.generate` as requests; ids are positions."""
    lengths = {len(values) for values in (prompts, labels) if values is not None and not isinstance(values, str)}
    if isinstance(prompts, str) or isinstance(labels, str) or len(lengths | ({count} - {None})) > 1:
        raise InputError("generate() takes lists of prompts, of label lists, or both of the same length")
    images = max(lengths, default=count if count is not None else len(seeds or ()))
    if images < 1:
        raise InputError("generate() needs prompts, labels, or for a model without conditions a count; at least one")
    if seeds is not None and len(seeds) != images:
        raise InputError(f"{len(seeds)} seeds for {images} images")
    return [
        Request(
            str(i),
            f"{i}.png",
            prompt=None if prompts is None else prompts[i],
            labels=None if labels is None else _label_list(labels[i]),
            seed=None if seeds is None else operator.index(seeds[i]),
        )
        for i in range(images)
    ]


def _label_list(value: Sequence[str] | str | int) -> tuple[str, ...]:
    return check_labels([str(value)] if isinstance(value, str | int) else value)


def load(
    path: str | os.PathLike[str] | ModelFolder,
    engine: str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    graphs: bool | None = None,
    checkpoint: str | None = None,
    size: tuple[int, int] | None = None,
    loras: Sequence[Lora] | None = None,
    allow_pickle: bool = False,
) -> Pipeline:
    """Load a bundle, a model folder or a shipped model, by its name, onto an engine.

    `engine`: by default that of `choose.default_engine`. `dtype`: fp32, bf16, fp16, int8 or fp8, by default what suits the
    engine and the hardware, never eight bits, unless engine trt-rtx finds plans in nothing else. `graphs`: see Pipeline.
    `checkpoint`, `size` (height and width), `loras`, `allow_pickle`: see `models.folder.load_model`; a bundle has the size and
    weights that it was exported with. Raises InputError when the folder is no model or bundle, is damaged, or does not suit the
    engine."""
    model = path if isinstance(path, ModelFolder) else find_model(path, checkpoint)
    name = choose_engine(model, engine, device)

    def open_source() -> Source:
        return load_source(model, checkpoint, size=size, loras=loras, allow_pickle=allow_pickle)

    source = open_source()
    source.spec.space.check_writable()
    options: dict[str, Any] = {"device": device, "threads": threads}

    def open_exact() -> Engine:
        return create_engine(name, open_source(), dtype="fp32", **options)

    try:
        opened = create_engine(name, source, dtype=dtype, **options)
    except InputError as error:  # of an engine with plans: as the doctor says it, with the command that builds them
        found = obstacle(name)
        raise found.refusal(name_of(model.folder)) if found else error from None
    return Pipeline(source, opened, graphs=graphs, open_exact=open_exact)


def load_source(
    path: str | os.PathLike[str] | ModelFolder,
    checkpoint: str | None = None,
    *,
    size: tuple[int, int] | None = None,
    loras: Sequence[Lora] | None = None,
    allow_pickle: bool = False,
) -> Source:
    """The model of `load` before it is on an engine: its spec, and its solver tables. Raises InputError as `load` does."""
    model = path if isinstance(path, ModelFolder) else find_model(path, checkpoint)
    if model.bundle is None:
        from fastgen.models.folder import load_model

        return load_model(model.folder, checkpoint, size=size, loras=loras, allow_pickle=allow_pickle)
    _check_bundle(model.bundle, size, loras)
    check_bundle_of(model.folder, model.bundle.spec.checkpoint, checkpoint)
    model.bundle.verify()
    return model.bundle


def choose_engine(model: ModelFolder, engine: str | None = None, device: str | None = None) -> str:
    """The engine that `load` runs a model on: `engine`, or the default one. Nothing is loaded. Raises InputError for an engine
    that does not run such a model, that is not installed, or that this machine cannot run."""
    name = engine or default_engine(model.folder, device)
    check_ready(name, name_of(model.folder))
    kind = engine_class(name).source_kind
    if kind == "bundle" and model.bundle is None:
        command = f"{export_command(name_of(model.folder), built_by(name))} --out BUNDLE"
        raise InputError(f"engine {name} runs bundles; `{command}` makes one of this model folder")
    if kind == "model" and model.bundle is not None:
        raise InputError(
            f"engine {name} runs model folders; {model.folder} is a bundle: give --model the folder it was exported from"
        )
    check_installed(name)
    return name


def _check_bundle(bundle: Bundle, size: tuple[int, int] | None, loras: Sequence[Lora] | None) -> None:
    """InputError where a bundle was exported for another size of images, and for weights to fuse into its graphs."""
    if size is not None and size != bundle.spec.space.image[1:]:
        height, width = size
        command = f"fastgen export MODEL --height {height} --width {width} --out BUNDLE"
        raise InputError(
            f"{bundle.folder}: was exported for images of {bundle.spec.space.size}; `{command}` makes another"
        )
    if loras:
        raise InputError(
            f"{bundle.folder}: a bundle's weights are fixed; `fastgen export MODEL --lora FILE` fuses LoRA weights"
        )
