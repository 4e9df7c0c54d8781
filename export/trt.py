"""ONNX graphs of a bundle -> TensorRT plans in the cache of compiled engines; each plan's precision is checked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.trt_build import Rows, build_plan, card_refusal, check_networks, check_settings, network_rows
from export.trt_layers import check_layers
from export.trt_timing import load_timings, save_timings, timing_file
from fastgen.engines.cache.artifacts import Artifact, Recipe, obtain
from fastgen.engines.trt.plan import LAYERS, PLAN, make_recipe, open_context, open_engine
from fastgen.engines.trt.platform import Platform, open_platform
from fastgen.engines.trt.product import TENSORRT
from fastgen.errors import InputError, Say
from fastgen.models.bundle import plan_graph
from fastgen.models.signatures import Signature

if TYPE_CHECKING:
    from fastgen.models.bundle import Bundle

OPTIMIZATION_LEVEL = 3  # of 0 to 5, TensorRT's default; 4 and 5 time more kernels, for several times the build time
WORKSPACE_GIB = 4.0  # scratch memory of one layer; without a limit a plan may take what larger batches need


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
    names = check_networks(bundle, networks)
    check_settings(dtype, batch_sizes)
    _check_effort(optimization_level, workspace_gib)
    platform = open_platform(device)
    _check_card(platform, dtype)
    bound = platform.fields | {"optimization_level": optimization_level, "workspace_gib": workspace_gib}
    recipes = [
        make_recipe(bundle, name, rows, dtype, TENSORRT, bound)
        for name in names
        for rows in network_rows(name, batch_sizes, bundle.spec.space.pixels)
    ]
    timings = timing_cache or timing_file(platform)
    return [obtain(recipe, partial(_make, bundle, platform, recipe, timings, say), say) for recipe in recipes]


def _check_effort(level: int, workspace_gib: float) -> None:
    if not 0 <= level <= 5:
        raise InputError(f"optimization level is {level}, expected 0 to 5")
    if not workspace_gib > 0:
        raise InputError(f"workspace is {workspace_gib} GiB, expected more than 0")


def _check_card(platform: Platform, dtype: str) -> None:
    gpu = platform.gpu
    if refusal := card_refusal(gpu.name, gpu.compute_capability, dtype):
        raise InputError(refusal)


def _make(bundle: Bundle, platform: Platform, recipe: Recipe, timings: Path, say: Say, folder: Path) -> None:
    """Build one plan, check what precision it executes, and write it and the inspector's report into `folder`."""
    name, rows, dtype = str(recipe.fields["network"]), int(recipe.fields["batch"] or 0), str(recipe.fields["dtype"])
    signature, what = bundle.spec.signatures[name], f"{bundle.folder}: {recipe}"

    def prepare(config: Any) -> None:
        _configure(platform, config, recipe)
        load_timings(config, timings, say)

    with platform.gpu.active():
        graph, profile, current = bundle.network(name, plan_graph(dtype)), Rows(rows, rows, rows), platform.gpu.active
        built = build_plan(platform, graph, signature, dtype, profile, str(recipe), say, prepare, current)
        save_timings(built.config, timings)
        report = _inspect(platform, built.plan, what, signature, rows)
    check_layers(report, dtype, built.products.islands, what, say, built.products.quantised)
    (folder / PLAN).write_bytes(built.plan)
    (folder / LAYERS).write_text(report, encoding="utf-8")


def _configure(platform: Platform, config: Any, recipe: Recipe) -> None:
    """Set the build's effort and scratch memory; the plan keeps the layers' details for the inspector."""
    trt, fields = platform.trt, recipe.fields
    config.builder_optimization_level = fields["optimization_level"]
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    workspace = min(int(float(fields["workspace_gib"] or 0) * 2**30), platform.gpu.memory // 2)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)


def _inspect(platform: Platform, plan: Any, what: str, signature: Signature, rows: int) -> str:
    """TensorRT's report on a plan's layers, as JSON text."""
    engine = open_engine(platform, plan, what, signature)
    strategy = platform.trt.ExecutionContextAllocationStrategy.USER_MANAGED
    context = open_context(platform, engine, strategy, what, signature, rows)
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context  # without a context the report has no datatypes
    report: str = inspector.get_engine_information(platform.trt.LayerInformationFormat.JSON)
    return report
