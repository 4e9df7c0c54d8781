"""`fastgen export`: a model folder becomes a bundle, or a bundle gets what it lacks; then engines are built and certified."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from export.certificate import Certificate, certify
from export.options import BundleOptions
from export.task_score import Task
from export.triton import check_repository, write_repository
from export.trt_build import card_refusal, check_settings
from export.write import write_bundle
from fastgen.engines import bundle_engines, check_installed, create_engine, engine_class, no_engine
from fastgen.engines.base import choose_dtype
from fastgen.engines.machine import gpus
from fastgen.engines.trt.product import RTX, TENSORRT
from fastgen.engines.unready import Obstacle, export_command, obstacle
from fastgen.errors import FastgenError, InputError, Say, unknown
from fastgen.models.bundle import Bundle, graph_name, is_bundle, plan_graph, read_bundle
from fastgen.models.bundle_record import Weights
from fastgen.models.checkpoint_choice import check_bundle_of
from fastgen.models.signatures import EIGHT_BITS, network_dtype

if TYPE_CHECKING:
    from fastgen.engines.base import Engine
    from fastgen.engines.cache.artifacts import Artifact
    from fastgen.models.lora import Lora

BATCH_SIZES = (1, 8, 64)


def export(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    calibration: str | os.PathLike[str] | None = None,
    requests: str | os.PathLike[str] | None = None,
    evaluator: str | None = None,
    feature_cache: bool = False,
    weights: Weights | None = None,
    trt: bool = False,
    rtx: bool = False,
    capabilities: Sequence[str] | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    solvers: Sequence[str] = (),
    engines: Sequence[str] | None = None,
    overwrite: bool = False,
    checkpoint: str | None = None,
    size: tuple[int, int] | None = None,
    loras: Sequence[Lora] | None = None,
    allow_pickle: bool = False,
    triton: str | os.PathLike[str] | None = None,
    say: Say = lambda line: None,
    show: Callable[[Certificate], None] = lambda certificate: None,
) -> list[Certificate]:
    """Export a model folder to a bundle, build TensorRT engines if asked to, and certify engines on it.

    `dtype`: fp16, bf16 or int8 adds graphs in that precision to the fp32 ones. int8 is for engines openvino and ort, which are
    certified in it too. With `trt` or `rtx` `dtype` is the engines' precision too, by default fp16, which every card has; int8
    and fp8 add graphs for TensorRT then. `calibration`: a request file whose images eight bits are calibrated with; `requests`
    and `evaluator`: a request file and an evaluator, as `fastgen score` takes it, whose score they must keep.

    `trt`: TensorRT plans for the GPU of this machine, one per batch size, in the cache. `rtx`: plans of TensorRT for RTX in the
    bundle, for the cards of `capabilities` (compute capabilities such as "8.6"; None: those of `trt_rtx.DEFAULT_CAPABILITIES`
    that have `dtype`), which need not be here; the first `fastgen generate` on such a card certifies them. Where `trt` cannot
    work on this machine, `say` gets the reason first of all, everything else is done, and then FastgenError says what is
    missing.
    `weights`: fp16 stores the weights of graphs that compute in fp32 in half the bytes; they are rounded, so the certificate
    decides. None: fp32 in a new bundle, and in one that is written over another; as they are in a bundle that is kept.
    `feature_cache`: add the networks of a split UNet, for `Settings.cache_interval`.
    `batch_sizes`: images per batch that both are built for. `solvers`: further tables to store, `NAME:STEPS[:NOISE_STEPS]`.
    `engines`: what to certify, as `NAME` or `NAME:DTYPE`, by default every installed engine that runs bundles and is not built
    beforehand, in its default precision.

    `triton`: a new folder, which becomes a model repository of Triton from the bundle, see `triton.write_repository`; with
    `trt` it holds the plans instead of ONNX graphs. Where `model` is a bundle, and neither engines nor plans are asked for,
    that is all that is done.

    `checkpoint`: which of a training run's weights, see `fastgen.models.checkpoint_choice`. `size` (height and width of the
    images), `loras`, `allow_pickle`: see `fastgen.models.folder.load_model`.

    A bundle of the same weights at `out` is kept, gets the graphs that it lacks, and is certified; another one is replaced
    with `overwrite`, which also builds plans of TensorRT for RTX again. Where `model` is a bundle itself, which must be `out`
    too, only engines are built and certified. `show` gets each certificate as soon as it is there; all are returned, and the
    caller decides what a miss means. Raises InputError for wrong options, a `model` that is neither a model folder nor a
    bundle, or an `out` that must not be replaced; FastgenError when engines cannot be built here: the bundle is kept.
    """
    model, out = Path(model), Path(out)
    dtype = dtype or ("fp16" if trt or rtx else "fp32")
    task = _task(requests, evaluator)
    check_settings(dtype, batch_sizes)
    if weights not in (None, *get_args(Weights)):
        raise unknown("weights", str(weights), get_args(Weights))
    if dtype in EIGHT_BITS:
        _check_eight_bits(dtype, trt or rtx, triton is not None)
    elif calibration is not None or task is not None:
        option = "--calibration is" if calibration is not None else "--requests and --evaluator are"
        raise InputError(f"{option} for graphs in eight bits; give --dtype int8 too")
    if trt:
        _check_cards(dtype)
    if rtx:
        _check_rtx(capabilities, dtype)
    if triton is not None:
        check_repository(Path(triton), out, dtype, trt)
    repository_only = triton is not None and is_bundle(model) and not (engines or trt or rtx)
    certified = [] if repository_only else _engines(engines, model, trt or rtx, dtype)
    _check_graphs(certified, _made(dtype, plans=trt or rtx), None if overwrite and not is_bundle(model) else out)
    how: dict[str, Any] = {"checkpoint": checkpoint, "size": size, "loras": loras, "allow_pickle": allow_pickle}
    hindered = obstacle(TENSORRT.engine) if trt else None
    if hindered:
        say(f"engine {TENSORRT.engine} is not ready: {hindered.reasons}")
        say("TensorRT engines cannot be built here; the bundle is written and certified all the same")
    if not is_bundle(model):
        calibrated = None if calibration is None else Path(calibration)
        contents = BundleOptions(solvers, dtype, trt or rtx, calibrated, task, feature_cache, weights)
        write_bundle(model, out, contents, overwrite, say, **how)
        bundle = read_bundle(out)
    elif calibration is not None:
        raise InputError(f"--calibration: {model} is a bundle already; give the model folder")
    elif model.resolve() != out.resolve():
        raise InputError(f"{model} is a bundle already; to certify engines on it give it as --out too")
    else:
        bundle = read_bundle(out)
        if loras or size not in (None, bundle.spec.space.image[1:]):
            raise InputError(
                f"{model} is a bundle already, of images of {bundle.spec.space.size}; give the model folder"
            )
        _check_holds(bundle, dtype, RTX.option if rtx and not trt else TENSORRT.option if trt else None)
        if weights not in (None, bundle.weights):
            raise InputError(
                f"{model} is a bundle with weights in {bundle.weights}; give the model folder and --overwrite"
            )
        if feature_cache:
            bundle.check_split()
        check_bundle_of(model, bundle.spec.checkpoint, checkpoint)
        if task is not None:
            task.check(bundle.spec.condition)
    certificates = []

    def add(name: str, precision: str | None, networks: Sequence[str] | None = None) -> None:
        engine = _open(name, precision, bundle, model, how)
        say(f"certifying {name} {engine.dtype} against eager fp32")
        certificates.append(certify(engine, bundle, networks, task=task))
        show(certificates[-1])

    for name, precision in certified:
        add(name, precision)
    failure, plans = None, None
    if trt:
        try:
            plans = _build_trt(bundle, dtype, batch_sizes, say)
        except FastgenError as error:
            failure = _no_engines(bundle, error, hindered, _build_options(dtype, batch_sizes), rtx)
        else:
            generating = [n for n in bundle.spec.signatures if n != "vae_encoder"]
            add(TENSORRT.engine, dtype, generating)
    if rtx:
        _build_rtx(bundle, dtype, batch_sizes, capabilities, overwrite, say)
    if failure is not None:
        raise failure
    if triton is not None:
        options: dict[str, Any] = {"dtype": dtype, "batch_sizes": batch_sizes, "plans": plans, "overwrite": overwrite}
        write_repository(bundle, Path(triton), **options, say=say)
    return certificates


def _check_cards(dtype: str) -> None:
    """InputError, before anything is exported, where no card of this machine computes in `dtype`."""
    cards = gpus()[0]
    refusals = [card_refusal(c.name, c.compute_capability, dtype) if c.compute_capability else None for c in cards]
    if refusals and all(refusals):
        raise InputError(str(refusals[0]))


def _check_rtx(capabilities: Sequence[str] | None, dtype: str) -> None:
    """InputError, before anything is exported, where plans of TensorRT for RTX cannot be built as they are asked for."""
    check_installed(RTX.engine)
    from export.trt_rtx import check_capabilities
    from fastgen.engines.trt.platform import open_library

    check_capabilities(capabilities, dtype)
    open_library(RTX)


def _check_holds(bundle: Bundle, dtype: str, option: str | None) -> None:
    """InputError, with the command that adds them, when a bundle lacks graphs in this precision. `option`: what tells
    `fastgen export` to build TensorRT plans from them; None where it builds none."""
    if dtype != "fp32":
        for name in bundle.spec.signatures:
            executed = network_dtype(name, dtype)
            bundle.network(name, plan_graph(executed) if option else executed, option or "")


def _made(dtype: str, plans: bool) -> str:
    """The precision of the graphs for engines without plans that are made. In eight bits TensorRT has graphs of its own."""
    return "fp32" if plans and dtype in EIGHT_BITS else dtype


def _check_graphs(engines: Sequence[tuple[str, str | None]], dtype: str, out: Path | None) -> None:
    """InputError, before anything is exported, where an engine needs graphs that the bundle will not have.

    `dtype`: of the graphs that this export writes; `out`: the bundle that is kept and extended, None where it is a new one.
    """
    for name, precision in engines:
        if precision is not None and precision in engine_class(name).lowered_graphs and precision != dtype:
            if out is not None and is_bundle(out) and graph_name("unet", precision) in read_bundle(out).files:
                continue
            more = "" if precision not in EIGHT_BITS else ", without --trt and --rtx"
            help_ = f"`--dtype {precision}`{more} adds them"
            raise InputError(f"--engine {name}:{precision}: the bundle has no graphs in {precision}; {help_}")


def _task(requests: str | os.PathLike[str] | None, evaluator: str | None) -> Task | None:
    """InputError for one without the other."""
    if requests is None and evaluator is None:
        return None
    if requests is None or evaluator is None:
        raise InputError("--requests and --evaluator go together: the images of one are what the other judges")
    return Task(Path(requests), str(evaluator))


def _check_eight_bits(dtype: str, plans: bool, repository: bool) -> None:
    """InputError where eight bits are asked for together with what has none, or their quantiser is not installed."""
    if repository:
        raise InputError(f"--dtype {dtype} is for fastgen's own engines; --triton takes fp16, bf16 or fp32")
    if dtype == "fp8" and not plans:
        raise InputError("--dtype fp8 is for TensorRT engines; give --trt or --rtx too")
    if not plans:
        check_installed("ort")


def _engines(texts: Sequence[str] | None, model: Path, plans: bool, dtype: str) -> list[tuple[str, str | None]]:
    """(engine, precision or None for its default) to certify: those that `texts` name, else all that are installed and need
    nothing built beforehand, in `dtype` too where that is int8. `plans`: TensorRT plans are built and certified besides, so
    there may be no other engine, and eight bits are theirs alone.

    Raises InputError for an engine that is unknown, not installed, or cannot be certified on this model.
    """
    if not texts:
        names = [engine.name for engine in bundle_engines() if engine.built_by is None]
        if not names and not plans:
            raise no_engine()
        eight = dtype in EIGHT_BITS and not plans
        lower = [(name, dtype) for name in names if eight and dtype in engine_class(name).dtypes]
        return [*((name, None) for name in names), *lower]
    engines = []
    for text in dict.fromkeys(texts):
        name, _, dtype = text.partition(":")
        cls = engine_class(name)
        if cls.reference:
            raise InputError(f"engine {name} runs model folders and is the reference itself; it is not certified")
        if cls.source_kind != "bundle" and is_bundle(model):
            raise InputError(f"engine {name} runs model folders; give MODEL, the folder that {model} was exported from")
        check_installed(name)
        engines.append((name, choose_dtype(cls, dtype, "") if dtype else None))
    return engines


def _open(name: str, dtype: str | None, bundle: Bundle, model: Path, how: Mapping[str, Any]) -> Engine:
    if engine_class(name).source_kind == "bundle":
        return create_engine(name, bundle, dtype=dtype)
    from fastgen.models.folder import load_model

    return create_engine(name, load_model(model, **how), dtype=dtype)


def _build_trt(bundle: Bundle, dtype: str, batch_sizes: Sequence[int], say: Say) -> dict[str, dict[int, Artifact]]:
    """Network -> rows -> plan in this precision."""
    check_installed(TENSORRT.engine)
    from export.trt import build_engines

    sizes = sorted(set(batch_sizes))
    plans: dict[str, dict[int, Artifact]] = {}
    for artifact in build_engines(bundle, dtype=dtype, batch_sizes=sizes, say=say):
        fields = artifact.recipe.fields
        plans.setdefault(str(fields["network"]), {})[int(fields["batch"] or 0)] = artifact
    if dtype != "fp32" and bundle.spec.space.latent:  # NaN or flat images are decoded again in fp32
        build_engines(bundle, dtype="fp32", batch_sizes=sizes, networks=["vae_decoder"], say=say)
    return plans


def _no_engines(
    bundle: Bundle, error: FastgenError, hindered: Obstacle | None, options: str, rtx: bool
) -> FastgenError:
    """The error that says of a complete bundle why it got no TensorRT engines, with the command that builds them on a machine
    where that can work. `error`: of the build; `hindered`: what the doctor has said. `rtx`: plans for RTX are asked for too."""
    what = f"{bundle.folder} is complete, but no TensorRT engines were built"
    if hindered is None or not isinstance(error, InputError):
        return type(error)(f"{what}: {error}")
    command = f"`{export_command(str(bundle.folder), TENSORRT.option)}{options}`"
    if hindered.gpu:
        where = f"{hindered.reasons}; then run {command}"
    else:
        where = f"{hindered.problems[0].what}; run {command} on a machine with the GPU"
    if hindered.rtx and not rtx:
        where += f", or `{export_command(str(bundle.folder), RTX.option)}` here, which builds plans for RTX cards"
    return FastgenError(f"{what}: {where}")


def _build_options(dtype: str, batch_sizes: Sequence[int]) -> str:
    """The options of `fastgen export --trt` that differ from its defaults."""
    sizes = "" if tuple(batch_sizes) == BATCH_SIZES else f" --batch-sizes {','.join(map(str, batch_sizes))}"
    return ("" if dtype == "fp16" else f" --dtype {dtype}") + sizes


def _build_rtx(
    bundle: Bundle,
    dtype: str,
    batch_sizes: Sequence[int],
    capabilities: Sequence[str] | None,
    overwrite: bool,
    say: Say,
) -> None:
    from export.trt_rtx import build_plans

    try:
        build_plans(
            bundle, dtype=dtype, batch_sizes=batch_sizes, capabilities=capabilities, overwrite=overwrite, say=say
        )
    except FastgenError as error:
        raise type(error)(f"{bundle.folder} is complete, but has no new plans for RTX cards: {error}") from None
