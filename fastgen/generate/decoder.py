"""Final latents -> pictures: decoded, looked at for broken ones, and quantised; on a GPU beside the next batch's sampling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastgen.engines.batches import cut
from fastgen.errors import FastgenError, first_line
from fastgen.generate.quantise import ImageProblem, problem_of, quantised
from fastgen.sampling import streams

if TYPE_CHECKING:
    from fastgen.engines.base import Array, Engine
    from fastgen.models.spec import Spec


@dataclass(frozen=True)
class Pictures:
    """Finished images (B, H, W, 3) uint8, and for each what is wrong with it: not finite, or flat; None for a picture.
    `strips`: for each its denoising side by side, where that was asked for."""

    pixels: np.ndarray
    problems: list[ImageProblem | None]
    strips: list[np.ndarray] | None = None


class Decoder:
    """Latents -> images on an engine. `open_exact` makes the same engine in fp32, for what comes out broken in less."""

    def __init__(self, engine: Engine, spec: Spec, open_exact: Callable[[], Engine] | None = None) -> None:
        self._engine, self._spec, self._open_exact = engine, spec, open_exact
        self._exact: Decoder | None = None

    @property
    def most(self) -> int:
        """Images that the engine decodes at once."""
        return max(1, self._engine.decode_pixels // self._spec.image_size**2)

    def decode(self, x: Array, limit: int | None = None) -> Array:
        """(B, C, h, w) -> (B, 3, H, W) float32, nominally in [-1, 1], in forwards of at most `limit` images (default: `most`).

        An engine that compiles a network for each number of rows decodes larger batches in parts of exactly `limit` images,
        the last one padded, so that it compiles once; others decode in parts as even as can be.
        """
        engine = self._engine
        if self._spec.family == "labels":
            return x
        x = x / self._spec.scaling_factor
        sizes = engine.batch_sizes("vae_decoder")
        limit = limit or self.most
        if sizes is None and engine.static_shapes:
            sizes = [min(limit, len(x))]
        parts = []
        for batch in cut(len(x), limit if sizes is None else max(limit, min(sizes)), sizes):
            rows = x[batch.rows]
            if engine.static_shapes:
                rows = engine.padded(rows, batch.bucket)
            parts.append(engine.run("vae_decoder", rows)[0][: len(batch)])
        return parts[0] if len(parts) == 1 else engine.xp.concatenate(parts)

    @np.errstate(over="ignore", invalid="ignore")  # broken images are looked for in the end
    def start(self, x: Array, normalize: str = "clamp", limit: int | None = None) -> Callable[[], Pictures]:
        """Begin to decode x (B, C, h, w); the call that is returned waits for the pictures. `normalize`: see `quantised`.
        `limit`: see `decode`.

        On a GPU everything is queued on a stream of its own behind what is queued already, down to the copy into the host's
        memory; elsewhere the pictures are ready at once.
        """
        if not self._engine.device.startswith("cuda"):
            ready = quantised(self._engine.numpy(self.decode(x, limit)), normalize)
            return lambda: self._finish(x, normalize, limit, *ready)
        import torch

        device = self._engine.device
        stream = streams.stream(device, streams.DECODE)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream):
            found = quantised(self.decode(x, limit), normalize)
            host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in found]
            done = torch.cuda.Event()
            done.record(stream)

        def wait() -> Pictures:
            done.synchronize()
            return self._finish(x, normalize, limit, *(t.numpy() for t in host))  # and x lives until here

        return wait

    def _finish(
        self,
        x: Array,
        normalize: str,
        limit: int | None,
        pixels: np.ndarray,
        broken: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
    ) -> Pictures:
        size = pixels[0].size
        problems = [problem_of(size, *values) for values in zip(broken, low, high, strict=True)]
        retry = [i for i, problem in enumerate(problems) if problem]
        if not retry or self._spec.family == "labels" or self._engine.dtype == "fp32" or self._open_exact is None:
            return Pictures(pixels, problems)
        pixels = np.array(pixels)
        try:
            again = self._decoded_exactly(x, retry, normalize, limit)
        except Exception as error:
            if not isinstance(error, FastgenError) and not self._engine.is_out_of_memory(error):
                raise
            for i, problem in enumerate(problems):
                if problem:
                    text = f"{problem}; decoding in fp32 instead failed: {first_line(error)}"
                    problems[i] = problem._replace(text=text)
            return Pictures(pixels, problems)
        for j, i in enumerate(retry):
            pixels[i], problems[i] = again.pixels[j], again.problems[j]
        return Pictures(pixels, problems)

    def _decoded_exactly(self, x: Array, rows: list[int], normalize: str, limit: int | None) -> Pictures:
        """These rows of x decoded in fp32, beside what is queued. An engine that compiles for each number of rows takes them
        one by one: how many are broken differs from batch to batch."""
        assert self._open_exact is not None
        self._exact = self._exact or Decoder(self._open_exact(), self._spec)
        one_by_one, device = self._engine.static_shapes, self._engine.device
        with contextlib.ExitStack() as stack:
            if device.startswith("cuda"):
                import torch

                stack.enter_context(torch.cuda.device(device))
                stack.enter_context(torch.cuda.stream(streams.stream(device, streams.DECODE)))
            broken = self._engine.xp.stack([x[i] for i in rows])
            return self._exact.start(broken, normalize, 1 if one_by_one else limit)()
