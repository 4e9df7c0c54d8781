"""The array library that an array belongs to (https://data-apis.org/array-api)."""

from __future__ import annotations

from typing import Any

import array_api_compat
import numpy


def array_namespace(values: Any) -> Any:
    """The array-API functions for `values`: of NumPy 2 itself for its arrays (array_api_compat's wrapper of NumPy imports all
    of NumPy, which takes longer than starting fastgen), else array_api_compat's."""
    return numpy if isinstance(values, numpy.ndarray) else array_api_compat.array_namespace(values)
