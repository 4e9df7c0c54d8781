"""Final latents -> pictures: decode, quantise, and check for broken ones; on a GPU while the next batch is sampled."""

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
    """Images (B, H, W, channels) uint8, the problem of each (not finite, or flat; None for a good one), and with --strip the
    denoising strip of each."""

    pixels: np.ndarray
    problems: list[ImageProblem | None]
    strips: list[np.ndarray] | None = None


class Decoder:
    """Latents -> images on an engine. `open_exact` builds this engine in fp32: broken images are decoded again on it."""

    def __init__(self, engine: Engine, spec: Spec, open_exact: Callable[[], Engine] | None = None) -> None:
        self._engine, self._spec, self._open_exact = engine, spec, open_exact
        self._exact: Decoder | None = None

    @property
    def most(self) -> int:
        """How many images the engine decodes in one forward by default."""
        return max(1, self._engine.decode_pixels // self._spec.space.pixels)

    def decode(self, x: Array, limit: int | None = None) -> Array:
        """(B, C, h, w) -> (B, channels, H, W) float32, nominally in [-1, 1], in forwards of at most `limit` images (default:
        `most`).

        An engine with static shapes decodes a larger batch in parts of exactly `limit` images, the last one padded, so that
        it compiles once. Other engines decode parts of nearly equal size.
        """
        engine = self._engine
        if not self._spec.space.latent:
            return x
        x = self._spec.space.to_vae(x, engine.array)
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

    @np.errstate(over="ignore", invalid="ignore")  # `_finish` checks for broken images
    def start(self, x: Array, normalize: str = "clamp", limit: int | None = None) -> Callable[[], Pictures]:
        """Begin to decode x (B, C, h, w), and return a function that waits for the pictures. `normalize`: see `quantised`.
        `limit`: see `decode`.

        On a GPU the decoding, and the copy to the host, are queued on the stream DECODE after all work that is queued already.
        On a CPU the pictures are ready when this returns.
        """
        if not self._engine.device.startswith("cuda"):
            arrays = quantised(self._engine.numpy(self.decode(x, limit)), normalize)
            return lambda: self._finish(x, normalize, limit, *arrays)
        import torch

        device = self._engine.device
        stream = streams.stream(device, streams.DECODE)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream):
            tensors = quantised(self.decode(x, limit), normalize)
            host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
            event = torch.cuda.Event()
            event.record(stream)

        def wait() -> Pictures:
            event.synchronize()
            return self._finish(x, normalize, limit, *(t.numpy() for t in host))  # keeps x alive until here

        return wait

    def _finish(
        self, x: Array, normalize: str, limit: int | None, pixels: np.ndarray, *statistics: np.ndarray
    ) -> Pictures:
        """The pictures of x from what `quantised` returned; broken ones are decoded again in fp32."""
        problems = [problem_of(pixels[0].size, *values) for values in zip(*statistics, strict=True)]
        broken = {i: problem for i, problem in enumerate(problems) if problem}
        if not broken or not self._spec.space.latent or self._engine.dtype == "fp32" or self._open_exact is None:
            return Pictures(pixels, problems)
        pixels = np.array(pixels)
        try:
            exact = self._decode_exactly(x, list(broken), normalize, limit)
        except Exception as error:
            if not isinstance(error, FastgenError) and not self._engine.is_out_of_memory(error):
                raise
            for i, problem in broken.items():
                problems[i] = problem._replace(text=f"{problem}; decoding in fp32 instead failed: {first_line(error)}")
            return Pictures(pixels, problems)
        for j, i in enumerate(broken):
            pixels[i], problems[i] = exact.pixels[j], exact.problems[j]
        return Pictures(pixels, problems)

    def _decode_exactly(self, x: Array, rows: list[int], normalize: str, limit: int | None) -> Pictures:
        """These rows of x, decoded in fp32 on the stream DECODE. An engine with static shapes decodes them one by one, as their
        number differs from batch to batch."""
        assert self._open_exact is not None
        self._exact = self._exact or Decoder(self._open_exact(), self._spec)
        one_by_one, device = self._engine.static_shapes, self._engine.device
        with contextlib.ExitStack() as stack:
            if device.startswith("cuda"):
                import torch

                stack.enter_context(torch.cuda.device(device))
                stack.enter_context(torch.cuda.stream(streams.stream(device, streams.DECODE)))
            x = self._engine.xp.stack([x[i] for i in rows])
            return self._exact.start(x, normalize, 1 if one_by_one else limit)()
