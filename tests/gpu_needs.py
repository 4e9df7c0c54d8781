"""What a test for a GPU needs, and why it cannot run where that is not there.

`@pytest.mark.gpu` needs a CUDA device; `@pytest.mark.gpu("tensorrt")` names what else it needs, one of NEEDS.
tests/conftest.py skips with the reason that is found here. `bin/test --gpu` runs these tests, and collects no other files.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence


def lacking(needs: Sequence[str] = ()) -> str | None:
    """Why a test with these needs cannot run on this machine; None where it can. KeyError for a need that is not known."""
    checks = [_cuda, *(NEEDS[need] for need in needs)]
    return next((reason for check in checks if (reason := check())), None)


def _cuda() -> str | None:
    if reason := _package("torch"):
        return reason
    import torch

    return None if torch.cuda.is_available() else f"needs a CUDA GPU; torch {torch.__version__} sees none"


def _package(name: str) -> str | None:
    return None if importlib.util.find_spec(name) else f"needs {name}, not installed here"


def _onnxruntime_gpu() -> str | None:
    if reason := _package("onnxruntime"):
        return reason
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return None
    return f"needs onnxruntime-gpu; onnxruntime {onnxruntime.__version__} has no CUDA provider here"


def _compilers() -> str | None:
    """Of engine compile: C++, triton, CUDA's headers."""
    from fastgen.engines.compile.package import check_tools
    from fastgen.errors import InputError

    try:
        check_tools(on_gpu=True)
    except InputError as error:
        return str(error)
    return None


def _tensorrt() -> str | None:
    return _package("tensorrt")


def _tensorrt_rtx() -> str | None:
    """The package, and a card that it compiles for."""
    from fastgen.engines.trt.product import RTX

    if reason := _package(RTX.module):
        return reason
    import torch

    return RTX.refusal("{}.{}".format(*torch.cuda.get_device_capability()))


NEEDS: dict[str, Callable[[], str | None]] = {
    "compilers": _compilers,
    "onnxruntime-gpu": _onnxruntime_gpu,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt_rtx,
}
