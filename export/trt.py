"""ONNX graphs of a bundle -> TensorRT plans in the cache of compiled engines, each checked for the precision it executes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.trt_layers import check_layers, check_network
from export.trt_progress import Progress
from export.trt_timing import load_timings, save_timings, timing_file
from fastgen.artifacts import Artifact, Recipe, obtain
from fastgen.conditions import ENCODE_BATCH
from fastgen.engines.base_trt import Platform, create, open_platform
from fastgen.engines.base_trt_plan import LAYERS, PLAN, make_recipe, open_plan
from fastgen.errors import InputError, unknown
from fastgen.signatures import Signature

if TYPE_CHECKING:
    from fastgen.bundle import Bundle

DECODE_PIXELS = 2**20  # per forward of the VAE decoder, as engines on a GPU decode: 16 images of 256 px fill any card
OPTIMIZATION_LEVEL = 3  # of 0 to 5, TensorRT's default; 4 and 5 time more kernels, for several times the build time
WORKSPACE_GIB = 4.0  # scratch memory of one layer; unlimited, a plan may claim what larger batches need
Say = Callable[[str], None]


def build_engines(
    bundle: Bundle,
    *,
    dtype: str = "fp16",
    batch_sizes: Sequence[int],
    networks: Sequence[str] | None = None,
    device: str = "cuda",
    optimization_level: int = OPTIMIZATION_LEVEL,
    workspace_gib: float = WORKSPACE_GIB,
    timing_cache: Path | None = None,
    say: Say = lambda line: None,
) -> list[Artifact]:
    """Build what generating batches of `batch_sizes` images needs and the cache does not hold yet; returns all of it.

    `networks`: by default all that generation runs, so not the VAE encoder. `timing_cache`: the file in which TensorRT keeps
    how long kernels take, by default one per TensorRT and GPU in the cache. Ctrl-C stops a build; plans that are complete
    stay. Raises InputError when TensorRT, the GPU, its driver or the graphs in this precision are missing, FastgenError when
    TensorRT refuses a graph or builds a plan that does not execute the precision asked for.
    """
    names = _networks(bundle, networks)
    _check_settings(dtype, batch_sizes, optimization_level, workspace_gib)
    platform = open_platform(device)
    _check_card(platform, dtype)
    settings = {"optimization_level": optimization_level, "workspace_gib": workspace_gib}
    wanted = [(name, rows) for name in names for rows in network_rows(name, batch_sizes, bundle.spec.image_size)]
    recipes = [make_recipe(bundle, name, rows, dtype, platform, **settings) for name, rows in wanted]
    timings = timing_cache or timing_file(platform)
    return [obtain(recipe, partial(_make, bundle, platform, recipe, timings, say), say) for recipe in recipes]


def network_rows(network: str, batch_sizes: Sequence[int], image_size: int) -> list[int]:
    """The numbers of rows that a network is run with when batches of `batch_sizes` images are generated, ascending.

    The UNet sees 2B rows where it is guided, and B where it is not: guidance scale 1, or outside the guidance interval. The
    text encoder takes prompts in batches of its own, whatever the images'. The VAE decodes a batch in chunks.
    """
    if network == "text_encoder":
        return [ENCODE_BATCH]
    if network == "unet":
        return sorted({rows for size in batch_sizes for rows in (size, 2 * size)})
    return sorted({min(size, max(1, DECODE_PIXELS // image_size**2)) for size in batch_sizes})


def _networks(bundle: Bundle, asked: Sequence[str] | None) -> list[str]:
    known = list(bundle.spec.signatures)
    for name in asked or ():
        if name not in known:
            raise unknown("network", name, known)
    return list(dict.fromkeys(asked)) if asked else [name for name in known if name != "vae_encoder"]


def _check_settings(dtype: str, batch_sizes: Sequence[int], level: int, workspace_gib: float) -> None:
    if dtype not in ("fp16", "bf16", "fp32"):
        raise unknown("dtype", dtype, ("fp16", "bf16", "fp32"))
    if not batch_sizes or min(batch_sizes) < 1:
        raise InputError(f"batch sizes are {list(batch_sizes)}, expected at least one, each 1 or more")
    if not 0 <= level <= 5:
        raise InputError(f"optimization level is {level}, expected 0 to 5")
    if not workspace_gib > 0:
        raise InputError(f"workspace is {workspace_gib} GiB, expected more than 0")


def _check_card(platform: Platform, dtype: str) -> None:
    gpu = platform.gpu
    if dtype == "bf16" and float(gpu.compute_capability) < 8:
        raise InputError(
            f"{gpu.name} (compute capability {gpu.compute_capability}) has no bf16, which needs 8.0: use --dtype fp16"
        )


def _make(bundle: Bundle, platform: Platform, recipe: Recipe, timings: Path, say: Say, folder: Path) -> None:
    """Build one plan, prove what it executes, and write it into `folder` with the inspector's report beside it."""
    name, rows, dtype = str(recipe.fields["network"]), int(recipe.fields["batch"] or 0), str(recipe.fields["dtype"])
    signature, what = bundle.spec.signatures[name], f"{bundle.folder}: {recipe}"
    with platform.gpu.active():
        builder = create(platform.trt.Builder, platform.log, "TensorRT's builder")
        network = builder.create_network(1 << int(platform.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = _parse(platform, network, bundle.network(name, dtype))
        islands = check_network(platform.trt, network, dtype, what)
        config = _configure(platform, builder, signature, recipe)
        load_timings(config, timings, say)
        plan = _build(platform, builder, network, config, recipe, say)
        save_timings(config, timings)
        del parser  # until here: it owns the weights
        report = _inspect(platform, plan, what, signature, rows)
    check_layers(report, dtype, islands, what, say)
    (folder / PLAN).write_bytes(plan)
    (folder / LAYERS).write_text(report, encoding="utf-8")


def _parse(platform: Platform, network: Any, path: Path) -> Any:
    """Read a graph and its weights into the network; returns the parser, which owns them."""
    parser = create(platform.trt.OnnxParser, platform.log, "TensorRT's ONNX parser", network)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        told = [f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors]
        platform.log.errors[:] = told or platform.log.errors
        raise platform.failure(f"{path}: cannot be parsed")
    return parser


def _configure(platform: Platform, builder: Any, signature: Signature, recipe: Recipe) -> Any:
    """The build's settings: a static profile of `batch` rows, and fp32 that is fp32 (TensorRT would round it to TF32)."""
    trt, fields = platform.trt, recipe.fields
    config = builder.create_builder_config()
    config.builder_optimization_level = fields["optimization_level"]
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)
    workspace = min(int(float(fields["workspace_gib"] or 0) * 2**30), platform.gpu.memory // 2)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    profile = builder.create_optimization_profile()
    for tensor in signature.inputs:
        shape = tensor.with_batch(int(fields["batch"] or 0))
        profile.set_shape(tensor.name, shape, shape, shape)
    if config.add_optimization_profile(profile) != 0:
        raise platform.failure(f"{recipe}: the profile is refused")
    return config


def _build(platform: Platform, builder: Any, network: Any, config: Any, recipe: Recipe, say: Say) -> Any:
    """The serialised plan. It is built in a thread, as no signal reaches Python while TensorRT holds the main one."""
    progress = Progress(str(recipe), say)
    config.progress_monitor = progress.monitor(platform.trt)

    def build() -> Any:
        with platform.gpu.active():  # is the thread's own
            return builder.build_serialized_network(network, config)

    with progress, ThreadPoolExecutor(1) as pool:
        future = pool.submit(build)
        try:
            plan = future.result()
        except KeyboardInterrupt:
            progress.cancel()  # then the pool waits until TensorRT has stopped
            raise
    if plan is None:
        raise platform.failure(f"{recipe}: cannot be built")
    return plan


def _inspect(platform: Platform, plan: Any, what: str, signature: Signature, rows: int) -> str:
    """TensorRT's report on a plan's layers, as JSON text."""
    engine, context = open_plan(platform, plan, what, signature, rows)
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context  # without it, it tells no datatypes
    report: str = inspector.get_engine_information(platform.trt.LayerInformationFormat.JSON)
    return report
