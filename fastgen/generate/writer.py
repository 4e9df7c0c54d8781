"""Threads that write images while others are generated, and the progress bar."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from fastgen.files.png import png_bytes
from fastgen.files.store import Store
from fastgen.generate.shards import Shard

UNWRITTEN = 512  # images that may wait for the writers


class Writer:
    """Writes PNGs into a folder in the background while others are generated; an error surfaces at the next step, or at the
    end."""

    def __init__(self, store: Store, threads: int) -> None:
        self._store, self._threads = store, max(threads, store.writers)

    def __enter__(self) -> Writer:
        self._pool = ThreadPoolExecutor(max_workers=self._threads)
        self._futures: deque[Future[None]] = deque()
        return self

    def submit(self, file: str, pixels: np.ndarray, metadata: dict[str, Any]) -> None:
        """Write an image (H, W, 3) uint8, see `png_bytes`."""
        self._submit(self._write, file, pixels, metadata)

    def submit_file(self, file: str, data: bytes) -> None:
        """Write a file of this content."""
        self._submit(self._store.write, file, data)

    def _submit(self, write: Callable[..., None], *arguments: Any) -> None:
        self._futures.append(self._pool.submit(write, *arguments))
        while len(self._futures) > UNWRITTEN:
            self._futures.popleft().result()

    def raise_error(self) -> None:
        """Raise the error of a file that could not be written, if there is one by now."""
        while self._futures and self._futures[0].done():
            self._futures.popleft().result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._futures:
                future.result()

    def _write(self, file: str, pixels: np.ndarray, metadata: dict[str, Any]) -> None:
        self._store.write(file, png_bytes(pixels, metadata))


class StepBar:
    """A progress bar in images that moves with every step of a batch."""

    def __init__(self, bar: Any, writer: Writer, steps: int) -> None:
        self._bar, self._writer, self._steps = bar, writer, steps
        self._done = 0  # images of finished batches

    def step(self, images: int, row: int) -> None:
        """This row of a batch of `images` is done; -1 before the first."""
        self._writer.raise_error()
        self._move(self._done + images * (row + 1) / self._steps)

    def to(self, images: int) -> None:
        """A batch of `images` is finished."""
        self._writer.raise_error()
        self._done += images
        self._move(self._done)

    def _move(self, position: float) -> None:
        if self._bar is not None:
            self._bar.update(min(position, self._bar.total) - self._bar.n)


def progress_bar(count: int, show: bool, shard: Shard | None) -> AbstractContextManager[Any]:
    """A bar on stderr, or None where that is no terminal: importing tqdm takes a tenth of the time to a first small image."""
    if not (show and count and sys.stderr.isatty()):
        return nullcontext()
    from tqdm import tqdm

    layout = "{desc} {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"
    place = {} if shard is None else {"position": shard.index - 1}
    name = "generating" if shard is None else f"shard {shard}"
    return tqdm(total=count, desc=name, unit="image", bar_format=layout, **place)
