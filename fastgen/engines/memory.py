"""The GPU memory of a network: measured, as it depends on libraries and hardware."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fastgen.engines.base import Engine

PROBED_ROWS = 2, 8


class Memory(NamedTuple):
    """GPU memory of a network in bytes: `fixed`, and `row` for each row. `limit`: most rows, if more ran out of memory."""

    fixed: float
    row: float
    limit: int | None = None

    def rows_in(self, room: float) -> int:
        """How many rows fit into so many bytes; at least 1."""
        rows = max(1, int((room - self.fixed) / self.row))
        return rows if self.limit is None else min(rows, self.limit)


def measure_memory(engine: Engine, network: str) -> Memory:
    """Measure the free memory of the GPU while a network runs with a few rows and with more.

    Both run once before: the first call loads the library's kernels and workspaces, which do not depend on the rows.
    """
    few, many = PROBED_ROWS
    if not _fits(engine, network, few):
        return Memory(0.0, 1.0, limit=1)
    if not _fits(engine, network, many):
        return Memory(0.0, 1.0, limit=few)
    less, more = (_used(engine, network, rows) for rows in PROBED_ROWS)
    row = max((more - less) / (many - few), more / many / 4, 1.0)
    return Memory(max(0.0, less - few * row), row)


def _fits(engine: Engine, network: str, rows: int) -> bool:
    """Whether the memory holds so many rows."""
    try:
        engine.probe(network, rows)
        engine.synchronize()
    except Exception as error:
        if not engine.is_out_of_memory(error):
            raise
    else:
        return True
    engine.release_memory()
    return False


def _used(engine: Engine, network: str, rows: int) -> int:
    """Bytes that so many rows take at their peak: allocators keep it until it is released."""
    engine.release_memory()
    before = free_memory(engine)
    engine.probe(network, rows)
    engine.synchronize()
    used = before - free_memory(engine)
    engine.release_memory()
    return used


def free_memory(engine: Engine) -> int:
    """Bytes that are free on the engine's GPU."""
    import torch

    return torch.cuda.mem_get_info(engine.device)[0]
