"""The CUDA streams that fastgen uses beside the caller's: one for each use on each device, made once.

torch has 32 streams and hands them out in rotation. A new stream for every recording would sooner or later be one that
something else uses. All work on a stream shares one cuBLAS workspace, and a recorded graph keeps its address: two users of
one stream would overwrite each other's results. Recordings share a memory pool only if they are on the same stream.
"""

from __future__ import annotations

from functools import cache
from typing import Any

CAPTURE = "capture"  # CUDA graphs are recorded here
NOISE = "noise"  # a row's noise is drawn here, inside a recorded graph, while the network runs
DECODE = "decode"  # finished latents become pictures here, beside the next batch
NETWORKS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")  # all that a model may have
TENSORRT = "tensorrt"  # in place of the default stream, on which TensorRT would wait for the device


def onnxruntime(network: str) -> str:
    """The use of a network's stream: onnxruntime runs each network on a stream of its own."""
    return f"onnxruntime {network}"


USES = (CAPTURE, NOISE, DECODE, TENSORRT, *map(onnxruntime, NETWORKS))


def stream(device: str, use: str) -> Any:
    """The torch.cuda.Stream of a device (`cuda` is the current one, as `cuda:N`) for one of USES."""
    import torch

    index = torch.device(device).index
    return _streams(torch.cuda.current_device() if index is None else index)[use]


@cache
def _streams(index: int) -> dict[str, Any]:
    """Use -> stream, for one device; made together, as only 32 in a row are sure to differ."""
    import torch

    return {use: torch.cuda.Stream(index) for use in USES}
