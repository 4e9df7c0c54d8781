"""The preset that `fastgen train` takes where none is named."""

from __future__ import annotations

DEFAULTS = {"text": "monsters-64", "labels": "iclevr-64"}  # what a dataset holds (`Dataset.kind`) -> name of a preset
