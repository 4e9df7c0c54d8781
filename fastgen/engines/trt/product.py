"""NVIDIA's two TensorRT products as data: the differences between them."""

from __future__ import annotations

from dataclasses import dataclass

ARCHITECTURES = {
    "7.5": "Turing",
    "9.0": "Hopper",
    "10.0": "Blackwell for data centres",
    "10.3": "Blackwell for data centres",
}


@dataclass(frozen=True)
class Product:
    """One of NVIDIA's TensorRT products, and the engine of this package that runs its plans.

    `module`: its import name, which is also the field of a plan's recipe that holds its version. `minimum`: the oldest version
    that is used. `wheels`: its name on PyPI without `-cuN`. `option`: what tells `fastgen export` to build its plans.
    `capabilities`: the compute capabilities that it compiles for without a GPU; empty where it compiles for the GPU it runs on.
    """

    engine: str
    title: str
    module: str
    minimum: tuple[int, int]
    wheels: str
    option: str
    capabilities: tuple[str, ...] = ()

    def refusal(self, capability: str) -> str | None:
        """Why no plan can run on a card of this compute capability; None where one can."""
        if not self.capabilities or capability in self.capabilities:
            return None
        kind = f" ({ARCHITECTURES[capability]})" if capability in ARCHITECTURES else ""
        return f"{self.title} compiles for {', '.join(self.capabilities)}, not for {capability}{kind}"

    def wheel(self, cuda: int) -> str:
        """The name on PyPI for this CUDA major."""
        return f"{self.wheels}-cu{cuda}"


TENSORRT = Product("trt", "TensorRT", "tensorrt", (10, 13), "tensorrt", "--trt")
RTX = Product(
    "trt-rtx",
    "TensorRT for RTX",
    "tensorrt_rtx",
    (1, 7),
    "tensorrt-rtx",
    "--rtx",
    ("8.0", "8.6", "8.9", "12.0", "12.1"),
)
PRODUCTS = {product.module: product for product in (TENSORRT, RTX)}
