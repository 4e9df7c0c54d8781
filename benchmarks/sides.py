"""The sides of a comparison, written `NAME[:DTYPE][:channels_last|:graphs|:nographs][@BATCH]`:
this package's engines, and what people use today."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass

from fastgen.engines import engine_class, engine_names, missing_packages
from fastgen.engines.machine import cpu, has_half
from fastgen.errors import InputError, unknown

DTYPES = ("fp32", "bf16", "fp16", "int8")
PEERS = {
    "diffusers": "diffusers' own pipeline, one UNet call for both halves of guidance; `channels_last` is its networks' layout",
    "diffusers-compile": "the same with torch.compile on its UNet, in channels_last",
    "two-calls": "a loop written by hand: a prompt at a time, conditional and unconditional UNet calls apart",
    "optimum-onnx": "ORTStableDiffusionPipeline, exported by optimum, in an environment of its own",
    "optimum-intel": "OVStableDiffusionPipeline, exported, and for int8 quantised, by optimum, in an environment of its own",
}
FOREIGN = ("optimum-onnx", "optimum-intel")
REFERENCE = "eager:fp32"  # of parity
# What an informed user writes, diffusers and two lines more: the first where the device computes in bf16.
INFORMED = ("diffusers:bf16:channels_last", "diffusers:fp32:channels_last")


@dataclass(frozen=True)
class Side:
    """One way to generate the same images."""

    name: str  # an engine, or one of PEERS
    dtype: str | None = None  # None: the side's own default
    channels_last: bool = False  # memory format of diffusers' UNet and VAE
    graphs: bool | None = None  # whole-loop CUDA graphs; None: the engine's default
    batch: int | None = None  # its own batch size, whatever the others have

    @staticmethod
    def parse(text: str) -> Side:
        """Raises InputError for an unknown name, precision or flag."""
        spelled, at, batch = text.partition("@")
        if at and not (batch.isdecimal() and int(batch)):
            raise InputError(f"side {text!r}: {batch!r} after the @, expected a batch size")
        name, *rest = spelled.split(":")
        if name not in (*engine_names(), *PEERS):
            raise unknown("side", name, [*engine_names(), *PEERS])
        dtype, channels_last, graphs = None, False, None
        for part in rest:
            if part not in _options(name):
                raise InputError(f"side {text!r}: {part!r} is none of {', '.join(_options(name))}")
            if part in DTYPES:
                dtype = part
            elif part == "channels_last":
                channels_last = True
            else:
                graphs = part == "graphs"
        return Side(name, dtype, channels_last, graphs, int(batch) if at else None)

    def __str__(self) -> str:
        flags = {None: [], True: ["graphs"], False: ["nographs"]}[self.graphs]
        layout = ["channels_last"] if self.channels_last else []
        dtype = [self.dtype] if self.dtype else []
        return ":".join([self.name, *dtype, *layout, *flags]) + (f"@{self.batch}" if self.batch else "")

    @property
    def is_peer(self) -> bool:
        return self.name in PEERS

    @property
    def needs_bundle(self) -> bool:
        return self.name not in PEERS and engine_class(self.name).source_kind == "bundle"


def _options(name: str) -> tuple[str, ...]:
    """What may follow the colons of a side."""
    if name not in PEERS:
        return (*DTYPES, "graphs", "nographs")
    more = {"diffusers": ("channels_last",), "optimum-intel": ("int8",)}
    return (*(dtype for dtype in DTYPES if dtype != "int8"), *more.get(name, ()))


def informed(sides: Iterable[str]) -> str | None:
    """The informed user's side among these, as it is spelled; None where there is none."""
    given = set(sides)
    return next((side for side in INFORMED if side in given), None)


def default_sides(device: str) -> list[str]:
    """Every side that makes sense on this device; the first is what the others' speed is compared with."""
    if device.startswith("cuda"):
        own = ["eager:fp32", "eager:bf16", "eager:fp16:nographs", "eager:fp16:graphs", "compile:fp16:nographs"]
        own += ["compile:fp16:graphs", "ort:fp16", "trt:fp16"]
        return ["diffusers:fp16", *own, "diffusers:fp32", "diffusers-compile:fp16", "two-calls:fp32@1", "optimum-onnx"]
    low = "bf16" if has_half(cpu(), "bf16") else "fp32"
    own = ["openvino:int8", f"openvino:{low}", "ort:fp32", f"compile:{low}", "eager:fp32"]
    peers = ["optimum-intel:int8", "optimum-intel", f"diffusers-compile:{low}", "two-calls:fp32@1", "optimum-onnx"]
    return ["diffusers:fp32", f"diffusers:{low}:channels_last", *own, *peers]


def missing(side: Side, device: str) -> str | None:
    """Why the side cannot run here, as far as that can be seen before anything is exported or loaded."""
    if side.name in FOREIGN:
        from benchmarks.environments import interpreter

        if interpreter(side.name) is None:
            return f"no environment: python -m benchmarks.environments {side.name}"
        return None
    if side.name in PEERS:
        absent = [p for p in ("torch", "diffusers", "transformers") if importlib.util.find_spec(p) is None]
    else:
        absent = missing_packages(side.name)
    if absent:
        return f"not installed: {', '.join(absent)}"
    if side.name == "ort" and device.startswith("cuda"):
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return f"onnxruntime {onnxruntime.__version__} has no CUDA provider here"
    return None
