"""The solver tables of all images that are being made, as one table: each image stands at a row of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastgen.sampling.clean import clean_coefficients
from fastgen.sampling.loop import SCALARS, PackedRows, coefficient_rows
from fastgen.sampling.tables import SolverTable

Array = Any
IDLE = 0  # the row that changes nothing: padding stands there
FIRST_ROWS, FIRST_DEPTH = 1024, 3


@dataclass
class Place:
    """Where a table's rows lie. `images`: how many of them use it."""

    offset: int
    rows: int
    images: int = 0


class RowStore:
    """Tables one after the other, with histories as deep as the deepest asks for. A table that no image uses stays until its
    place is needed. `take` may replace the arrays by larger ones; `generation` counts that. `array`: NumPy -> the device."""

    def __init__(self, array: Callable[[np.ndarray], Array], scheduler_config: Mapping[str, Any]) -> None:
        self._array, self._config = array, scheduler_config
        self._places: dict[str, Place] = {}  # by a table's key, the latest used at the end
        self.depth, self.generation = FIRST_DEPTH, 0
        self._values = np.zeros((FIRST_ROWS, len(SCALARS) + self.depth), np.float64)
        self._values[IDLE, [SCALARS.index("scale"), SCALARS.index("a")]] = 1.0
        self._streams = np.zeros(FIRST_ROWS, np.int64)
        self._clip = np.full(FIRST_ROWS, np.inf)
        self._clean = np.zeros((FIRST_ROWS, 2), np.float64)
        self._upload()

    def take(self, table: SolverTable) -> Place:
        """The place of a table for one more image; give it back with `release`."""
        place = self._places.pop(table.key, None) or self._stored(table)
        self._places[table.key] = place
        place.images += 1
        return place

    def release(self, table: SolverTable) -> None:
        self._places[table.key].images -= 1

    @property
    def packed(self) -> PackedRows:
        return PackedRows(self.coefficients, self.streams, self.clip)

    def has_clean(self, offset: int) -> bool:
        """Whether `clean` predicts the clean sample of the table that begins there."""
        return bool(self._clean[offset].any())

    def _stored(self, table: SolverTable) -> Place:
        if table.depth > self.depth:
            more = np.zeros((len(self._values), table.depth - self.depth))
            self._values, self.depth = np.concatenate([self._values, more], axis=1), table.depth
            self._upload()
        place = Place(self._room(len(table)), len(table))
        rows = slice(place.offset, place.offset + place.rows)
        values = coefficient_rows(table)
        self._values[rows] = 0.0
        self._values[rows, : values.shape[1]] = values
        self._streams[rows] = table.streams
        self._clip[rows] = np.inf if table.clip is None else table.clip
        clean = clean_coefficients(table, self._config)
        self._clean[rows] = 0.0 if clean is None else clean  # (0, 0): not known
        self._write(rows)
        return place

    def _room(self, rows: int) -> int:
        """Where so many rows are free: in a gap, else where unused tables lie, else behind the end."""
        for drop in (False, True):
            if drop:
                self._places = {key: place for key, place in self._places.items() if place.images}
            end = 1  # behind the idle row
            for place in sorted(self._places.values(), key=lambda place: place.offset):
                if place.offset - end >= rows:
                    return end
                end = place.offset + place.rows
            if end + rows <= len(self._values):
                return end
        self._grow(end + rows)
        return end

    def _grow(self, rows: int) -> None:
        more = max(rows - len(self._values), len(self._values))
        self._values = np.concatenate([self._values, np.zeros((more, self._values.shape[1]))])
        self._streams = np.concatenate([self._streams, np.zeros(more, np.int64)])
        self._clip = np.concatenate([self._clip, np.full(more, np.inf)])
        self._clean = np.concatenate([self._clean, np.zeros((more, 2))])
        self._upload()

    def _upload(self) -> None:
        """New arrays on the device."""
        self.generation += 1
        self.coefficients, self.clip, self.clean = (
            self._array(values.astype(np.float32)) for values in (self._values, self._clip, self._clean)
        )
        self.streams = self._array(self._streams.copy())

    def _write(self, rows: slice) -> None:
        """These rows into the arrays on the device."""
        self.coefficients[rows] = self._array(self._values[rows].astype(np.float32))
        self.streams[rows] = self._array(self._streams[rows].copy())
        self.clip[rows] = self._array(self._clip[rows].astype(np.float32))
        self.clean[rows] = self._array(self._clean[rows].astype(np.float32))
