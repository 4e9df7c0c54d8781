"""One ONNX graph -> one serialised TensorRT plan, by either product, its network checked for the precision it asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from export.trt_layers import Products, check_network
from export.trt_progress import Progress, cancelled_by_ctrl_c
from fastgen.engines.trt.platform import TrtLibrary
from fastgen.errors import InputError, Say, unknown
from fastgen.generate.conditions import ENCODE_BATCH
from fastgen.models.signatures import EIGHT_BITS, Signature

if TYPE_CHECKING:
    from fastgen.models.bundle import Bundle

DTYPES = ("fp16", "bf16", "fp32", *EIGHT_BITS)
DECODE_PIXELS = 2**20  # per forward of the VAE decoder, as engines on a GPU decode: 16 images of 256 px fill any card
LEAST_CAPABILITY = {"bf16": 8.0, "fp8": 8.9}  # that compute in this precision


class Rows(NamedTuple):
    """A plan's profile: the fewest rows that it runs, those that it is tuned for, and the most."""

    least: int
    best: int
    most: int


class BuiltPlan(NamedTuple):
    plan: Any  # serialised
    products: Products
    config: Any  # the IBuilderConfig after the build


def build_plan(
    library: TrtLibrary,
    graph: Path,
    signature: Signature,
    dtype: str,
    rows: Rows,
    what: str,
    say: Say,
    prepare: Callable[[Any], None],
    current: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> BuiltPlan:
    """Compile a graph.

    `what`: its name in progress and errors. `prepare`: sets further options of an IBuilderConfig. `current`: a context in which
    the GPU is the thread's current one, where the product needs a GPU. Ctrl-C stops a build. Raises FastgenError when TensorRT
    refuses the graph or the profile, or the graph does not compute in `dtype`.
    """
    builder = library.create(library.trt.Builder, "builder")
    network = builder.create_network(1 << int(library.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = _parse(library, network, graph)
    products = check_network(library.trt, network, dtype, what)
    config = builder.create_builder_config()
    config.clear_flag(library.trt.BuilderFlag.TF32)  # else TensorRT computes fp32 with 10 bits of mantissa
    _add_profile(library, builder, config, signature, rows, what)
    prepare(config)
    plan = _build(library, builder, network, config, what, say, current)
    del parser  # until here: it owns the weights
    return BuiltPlan(plan, products, config)


def network_rows(network: str, batch_sizes: Sequence[int], pixels: int) -> list[int]:
    """The numbers of rows that a network is run with when batches of `batch_sizes` images are generated, ascending.

    The UNet sees 2B rows where it is guided, and B where it is not: guidance scale 1, or outside the guidance interval. The
    text encoder takes prompts in batches of its own, whatever the images'. The VAE decodes a batch in chunks. `pixels`: of an
    image."""
    if network == "text_encoder":
        return [ENCODE_BATCH]
    if network == "unet":
        return sorted({rows for size in batch_sizes for rows in (size, 2 * size)})
    return sorted({min(size, max(1, DECODE_PIXELS // pixels)) for size in batch_sizes})


def check_networks(bundle: Bundle, names: Sequence[str] | None) -> list[str]:
    """The networks to build: `names`, each once; by default all that generation runs, so not the VAE encoder.

    Raises InputError for a name that the bundle does not have.
    """
    known = list(bundle.spec.signatures)
    for name in names or ():
        if name not in known:
            raise unknown("network", name, known)
    return list(dict.fromkeys(names)) if names else [name for name in known if name != "vae_encoder"]


def card_refusal(card: str, capability: str, dtype: str) -> str | None:
    """Why a card of this compute capability cannot compute in `dtype`; None where it can."""
    least = LEAST_CAPABILITY.get(dtype, 0.0)
    if float(capability) >= least:
        return None
    return f"{card} (compute capability {capability}) has no {dtype}, which needs {least}: use --dtype fp16"


def check_settings(dtype: str, batch_sizes: Sequence[int]) -> None:
    """InputError for an unknown precision, and for batch sizes below 1 or none at all."""
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if not batch_sizes or min(batch_sizes) < 1:
        raise InputError(f"batch sizes are {list(batch_sizes)}, expected one or more positive integers")


def _parse(library: TrtLibrary, network: Any, path: Path) -> Any:
    """Read a graph and its weights into the network; returns the parser, which owns them."""
    parser = library.create(library.trt.OnnxParser, "ONNX parser", network)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        lines = [f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors]
        library.log.errors[:] = lines or library.log.errors
        raise library.failure(f"{path}: cannot be parsed")
    return parser


def _add_profile(library: TrtLibrary, builder: Any, config: Any, signature: Signature, rows: Rows, what: str) -> None:
    profile = builder.create_optimization_profile()
    for tensor in signature.inputs:
        least, best, most = (tensor.with_batch(count) for count in rows)
        profile.set_shape(tensor.name, least, best, most)
    if config.add_optimization_profile(profile) != 0:
        raise library.failure(f"{what}: the profile is refused")


def _build(
    library: TrtLibrary,
    builder: Any,
    network: Any,
    config: Any,
    what: str,
    say: Say,
    current: Callable[[], AbstractContextManager[Any]],
) -> Any:
    """The serialised plan. It is built in another thread: while TensorRT runs in the main one, Python sees no Ctrl-C."""
    progress = Progress(what, say)
    config.progress_monitor = progress.monitor(library.trt)

    def build() -> Any:
        with current():  # each thread has a current GPU of its own
            return builder.build_serialized_network(network, config)

    with progress, cancelled_by_ctrl_c(progress), ThreadPoolExecutor(1) as pool:
        plan = pool.submit(build).result()
    if progress.cancelled:
        raise KeyboardInterrupt
    if plan is None:
        raise library.failure(f"{what}: cannot be built")
    return plan
