"""From conditions and seeds to images: encode -> initial latents -> sample -> decode, on any engine."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen.bundle import is_bundle, read_bundle
from fastgen.engines import check_installed, create_engine, engine_class, missing_packages
from fastgen.errors import InputError
from fastgen.images import to_uint8
from fastgen.names import check_labels, read_objects
from fastgen.requests import Request, multi_hot, resolve_seed
from fastgen.sampling import initial_latents, sample
from fastgen.solver import SolverTable

if TYPE_CHECKING:
    from PIL import Image

    from fastgen.engines.base import Array, Engine
    from fastgen.spec import Source

ENCODE_BATCH = 16  # prompts per forward of the text encoder
DECODE_PIXELS = 2**16  # pixels per forward of the VAE decoder: larger batches are slower per image, and cost memory


@dataclass(frozen=True)
class Settings:
    """How images are sampled. `guidance_interval` limits guidance to the steps lo <= i < hi."""

    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    guidance_interval: tuple[int, int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.scheduler or ":" in self.scheduler:
            raise InputError(f"scheduler is {self.scheduler!r}, expected a name such as ddim (steps are given apart)")
        if self.num_inference_steps < 1:
            raise InputError(f"num_inference_steps is {self.num_inference_steps}, expected at least 1")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise InputError(f"guidance_scale is {self.guidance_scale}, expected a finite number, 0 or more")

    @property
    def solver(self) -> str:
        """The key of the solver table."""
        return f"{self.scheduler}:{self.num_inference_steps}"

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1.0

    def check_interval(self, table: SolverTable) -> None:
        """InputError for a guidance interval outside the table's rows."""
        lo, hi = self.guidance_interval or (0, len(table))
        if not 0 <= lo < hi <= len(table):
            raise InputError(
                f"guidance_interval is {lo} {hi}, expected 0 <= LO < HI <= {len(table)}, the solver's rows"
            )


class Pipeline:
    """A model on an engine, ready to generate."""

    def __init__(self, source: Source, engine: Engine) -> None:
        self.source, self.engine, self.spec = source, engine, source.spec
        self.tokenizer = source.prompt_tokenizer() if self.spec.family == "text" else None

    def settings(
        self,
        *,
        scheduler: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[int, int] | None = None,
        seed: int = 0,
    ) -> Settings:
        """Settings with the model's own defaults for what is None."""
        default = self.spec.sampling
        return Settings(
            scheduler or default.scheduler,
            default.num_inference_steps if num_inference_steps is None else num_inference_steps,
            default.guidance_scale if guidance_scale is None else guidance_scale,
            guidance_interval,
            seed,
        )

    def generate(
        self,
        prompts: Sequence[str] | None = None,
        labels: Sequence[Sequence[str]] | None = None,
        seeds: Sequence[int] | None = None,
        *,
        batch_size: int = 16,
        **settings: Any,
    ) -> list[Image.Image]:
        """Images for prompts (text family) or label lists (label family), as PIL images of spec.image_size.

        `seeds`: one per image; without them they follow from `seed` and the position. Other keywords are those of
        `settings`. Raises InputError for conditions of the wrong kind, unknown labels, settings out of range, and
        FloatingPointError where the network produces values that are not finite.
        """
        from PIL import Image

        requests = _requests(prompts, labels, seeds)
        chosen = self.settings(**settings)
        encoder = self.encoder(requests, chosen.guided)
        table = self.source.table(chosen.solver)
        images: list[Image.Image] = []
        cuts = list(even_cuts(len(requests), batch_size))
        for cut in cuts:
            pixels = self.sample_batch(requests[cut], encoder, table, chosen, size=cuts[0].stop)
            if not np.isfinite(pixels).all():
                raise FloatingPointError(f"images {cut.start} to {cut.stop - 1}: values that are not finite")
            images += [Image.fromarray(p) for p in to_uint8(pixels)]
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

    @np.errstate(over="ignore", invalid="ignore")  # the caller looks for values that are not finite
    def sample_batch(
        self,
        requests: Sequence[Request],
        encoder: Conditions,
        table: SolverTable,
        settings: Settings,
        *,
        size: int | None = None,
        on_step: Callable[[int, Array], None] | None = None,
    ) -> np.ndarray:
        """One batch of requests -> images (B, 3, H, W) float32, nominally in [-1, 1].

        `size`: the job's batch size, to which an engine with static shapes pads a shorter batch.
        """
        engine, count = self.engine, len(requests)
        if engine.static_shapes and size is not None:
            requests = [*requests, *[requests[-1]] * (size - count)]
        seeds = [resolve_seed(r, settings.seed) for r in requests]
        x = initial_latents(table, seeds, self.spec.latent_shape, xp=engine.xp, device=engine.device)
        x = sample(
            lambda *inputs: engine.run("unet", *inputs)[0],
            table,
            x,
            encoder(requests),
            seeds=seeds,
            guidance_scale=settings.guidance_scale,
            uncond=encoder.uncond() if settings.guided else None,
            guidance_interval=settings.guidance_interval,
            on_step=on_step,
        )
        return self.decode(x)[:count]

    def decode(self, x: Array) -> np.ndarray:
        """Final latents (B, C, h, w) -> images (B, 3, H, W) float32 in NumPy."""
        engine = self.engine
        if self.spec.family == "labels":
            return engine.numpy(x)
        x = x / self.spec.scaling_factor
        chunk = max(1, DECODE_PIXELS // self.spec.image_size**2)
        cuts = list(even_cuts(len(x), chunk))
        parts = [engine.run("vae_decoder", _padded(engine, x[cut], cuts[0]))[0][: cut.stop - cut.start] for cut in cuts]
        return np.concatenate([engine.numpy(part) for part in parts])


class LabelConditions:
    """Label lists -> multi-hot rows (B, K); the unconditional row is all zero."""

    def __init__(self, engine: Engine, objects: dict[str, int] | Any) -> None:
        self._engine, self._objects = engine, objects

    def __call__(self, requests: Sequence[Request]) -> Array:
        return self._engine.array(multi_hot(requests, self._objects))

    def uncond(self) -> Array:
        return self._engine.array(np.zeros((1, len(self._objects)), np.float32))


class PromptConditions:
    """Prompts -> text states (B, tokens, D), each distinct prompt encoded once; the unconditional row is the empty prompt.

    Distinct prompts are encoded in fixed batches of the whole job, so that a resumed job encodes them in the same company.
    """

    def __init__(self, engine: Engine, tokenizer: Any, prompts: Sequence[str], guided: bool) -> None:
        distinct = dict.fromkeys([*([""] if guided else []), *prompts])
        self._engine = engine
        self._row = {prompt: i for i, prompt in enumerate(distinct)}
        self._ids, counts = tokenizer.encode(list(distinct))
        self._states: dict[int, Array] = {}
        self.truncated = {p: n for p, n in zip(distinct, counts, strict=True) if n > tokenizer.length}

    def __call__(self, requests: Sequence[Request]) -> Array:
        return self._engine.xp.stack([self._state(r.prompt or "") for r in requests])

    def uncond(self) -> Array:
        return self._state("")[None]

    def _state(self, prompt: str) -> Array:
        row = self._row[prompt]
        cuts = list(even_cuts(len(self._ids), ENCODE_BATCH))
        size = cuts[0].stop
        index = row // size
        if index not in self._states:
            ids = _padded(self._engine, self._engine.array(self._ids[cuts[index]]), cuts[0])
            self._states[index] = self._engine.run("text_encoder", ids)[0]
        return self._states[index][row % size]


Conditions = LabelConditions | PromptConditions


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


def even_cuts(count: int, size: int) -> Iterator[slice]:
    """Slices of range(count) of one length <= `size`, as few as can be; only the last may be shorter."""
    if size < 1:
        raise InputError(f"batch_size is {size}, expected at least 1")
    length = math.ceil(count / math.ceil(count / size))
    for start in range(0, count, length):
        yield slice(start, min(start + length, count))


def _padded(engine: Engine, batch: Array, cut: slice) -> Array:
    """Engines with static shapes get every batch at the length of the first: the last row is repeated."""
    short = (cut.stop - cut.start) - len(batch)
    if not engine.static_shapes or short <= 0:
        return batch
    return engine.xp.concatenate([batch, *[batch[-1:]] * short])


def load(
    path: str | os.PathLike[str],
    engine: str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
) -> Pipeline:
    """Load a bundle or a model folder onto an engine.

    `engine`: for a bundle `openvino` or `ort`, the first that is installed; for a model folder `eager`. `dtype`: fp32,
    bf16 or fp16, by default what suits the engine. Raises InputError when the folder is neither, is damaged, or does not
    suit the engine.
    """
    folder = Path(path)
    bundled = is_bundle(folder)
    if not bundled and not (folder / "model_index.json").is_file():
        raise InputError(f"{folder}: neither a bundle (bundle.json) nor a model folder (model_index.json)")
    name = engine or default_engine(bundled)
    kind = engine_class(name).source_kind
    if kind == "bundle" and not bundled:
        raise InputError(
            f"engine {name} runs bundles; `fastgen export {folder} --out BUNDLE` makes one of this model folder"
        )
    if kind == "model" and bundled:
        raise InputError(
            f"engine {name} runs model folders; {folder} is a bundle: give --model the folder it was exported from"
        )
    source: Source
    check_installed(name)
    if bundled:
        source = bundle = read_bundle(folder)
        bundle.verify()
    else:
        from fastgen.networks import load_model

        source = load_model(folder)
    return Pipeline(source, create_engine(name, source, device=device, dtype=dtype, threads=threads))


def model_objects(path: str | os.PathLike[str]) -> Mapping[str, int] | None:
    """The label names of a bundle or model folder and their indices, read without loading it; None where it has none."""
    folder = Path(path)
    if is_bundle(folder):
        return read_bundle(folder).spec.objects
    file = folder / "labels.json"
    return read_objects(file) if file.is_file() else None


def default_engine(bundled: bool) -> str:
    """The fastest installed engine that runs a bundle, or `eager` for a model folder."""
    if not bundled:
        return "eager"
    installed = [name for name in ("openvino", "ort") if not missing_packages(name)]
    if not installed:
        raise InputError(f"no engine for bundles is installed: {engine_class('ort').install}")
    return installed[0]
