"""`fastgen export`: a model folder becomes a bundle, or a bundle gets what it lacks; then engines are built and certified."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.certificate import Certificate, certify
from export.write import Wanted, write_bundle
from fastgen.bundle import LOWERED, Bundle, is_bundle, read_bundle
from fastgen.checkpoint_choice import check_bundle_of
from fastgen.engines import check_installed, create_engine, engine_class, engine_names, missing_packages
from fastgen.engines.base import choose_dtype
from fastgen.errors import FastgenError, InputError, unknown

if TYPE_CHECKING:
    from fastgen.engines.base import Engine

BATCH_SIZES = (1, 8, 64)
Say = Callable[[str], None]


def export(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    trt: bool = False,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    solvers: Sequence[str] = (),
    engines: Sequence[str] | None = None,
    overwrite: bool = False,
    checkpoint: str | None = None,
    say: Say = lambda line: None,
    show: Callable[[Certificate], None] = lambda certificate: None,
) -> list[Certificate]:
    """Export a model folder to a bundle, build TensorRT engines if asked to, and certify engines on it.

    `dtype`: fp16 or bf16 adds graphs in that precision to the fp32 ones; with `trt` it is the engines' precision too, by
    default fp16, which every card has. `batch_sizes`: images per batch that TensorRT engines are built for. `solvers`: further
    tables to store, `NAME:STEPS[:NOISE_STEPS]`. `engines`: what to certify, as `NAME` or `NAME:DTYPE`, by default every
    installed engine that runs bundles, in its default precision.

    `checkpoint`: which of a training run's weights, see `fastgen.checkpoint_choice`.

    A bundle of the same weights at `out` is kept, gets the graphs that it lacks, and is certified; another one is replaced
    with `overwrite`. A `model` that is a bundle itself is only built for and certified. `show` gets each certificate as it is
    made; all are returned, and the caller decides what a miss means. Raises InputError for wrong options, a folder that is
    neither, or an `out` that must not be replaced; FastgenError when engines cannot be built here: the bundle is kept.
    """
    model, out = Path(model), Path(out)
    dtype = _check_dtype(dtype, trt)
    _check_batch_sizes(batch_sizes)
    chosen = _engines(engines, model, trt)
    if not is_bundle(model):
        write_bundle(model, out, Wanted(solvers, dtype), overwrite, say, checkpoint)
    elif model.resolve() != out.resolve():
        raise InputError(f"{model} is a bundle already; to certify engines on it give it as --out too")
    else:
        _check_holds(read_bundle(model), dtype)
        check_bundle_of(model, read_bundle(model).spec.checkpoint, checkpoint)
    certificates = []

    def add(name: str, precision: str | None, networks: Sequence[str] | None = None) -> None:
        say(f"certifying {name} against eager fp32")
        bundle = read_bundle(out)
        engine = _open(name, precision, bundle, model, checkpoint)
        certificates.append(certify(engine, bundle, networks))
        show(certificates[-1])

    for name, precision in chosen:
        add(name, precision)
    if trt:
        _build_trt(read_bundle(out), dtype, batch_sizes, say)
        generating = [n for n in read_bundle(out).spec.signatures if n != "vae_encoder"]
        add("trt", dtype, generating)
    return certificates


def _check_dtype(dtype: str | None, trt: bool) -> str:
    if dtype not in (None, "fp32", *LOWERED):
        raise unknown("dtype", str(dtype), ("fp32", *LOWERED))
    return dtype or ("fp16" if trt else "fp32")


def _check_batch_sizes(batch_sizes: Sequence[int]) -> None:
    if not batch_sizes or min(batch_sizes) < 1:
        raise InputError(f"batch sizes are {list(batch_sizes)}, expected one or more positive integers")


def _check_holds(bundle: Bundle, dtype: str) -> None:
    """InputError, with the command that adds them, when a bundle lacks graphs in this precision."""
    if dtype != "fp32":
        from fastgen.precision import network_dtype

        for name in bundle.spec.signatures:
            bundle.network(name, network_dtype(name, dtype))


def _engines(asked: Sequence[str] | None, model: Path, trt: bool) -> list[tuple[str, str | None]]:
    """(engine, precision or None for its default) to certify: those asked for, if they can be, else all that are installed
    and need nothing built beforehand."""
    if not asked:
        names = [n for n in engine_names() if engine_class(n).source_kind == "bundle" and n != "trt"]
        names = [n for n in names if not missing_packages(n)]
        if not names and not trt:
            raise InputError(f"no engine for bundles is installed: {engine_class('ort').install}")
        return [(name, None) for name in names]
    chosen = []
    for text in dict.fromkeys(asked):
        name, _, dtype = text.partition(":")
        cls = engine_class(name)
        if cls.reference:
            raise InputError(f"engine {name} runs model folders and is the reference itself; it is not certified")
        if cls.source_kind != "bundle" and is_bundle(model):
            raise InputError(f"engine {name} runs model folders; give MODEL, the folder that {model} was exported from")
        check_installed(name)
        chosen.append((name, choose_dtype(cls, dtype, "") if dtype else None))
    return chosen


def _open(name: str, dtype: str | None, bundle: Bundle, model: Path, checkpoint: str | None) -> Engine:
    if engine_class(name).source_kind == "bundle":
        return create_engine(name, bundle, dtype=dtype)
    from fastgen.networks import load_model

    return create_engine(name, load_model(model, checkpoint), dtype=dtype)


def _build_trt(bundle: Bundle, dtype: str, batch_sizes: Sequence[int], say: Say) -> None:
    try:
        check_installed("trt")
        from export.trt import build_engines

        sizes = sorted(set(batch_sizes))
        build_engines(bundle, dtype=dtype, batch_sizes=sizes, say=say)
        if dtype != "fp32" and bundle.spec.family == "text":  # in which pictures that come out broken are decoded again
            build_engines(bundle, dtype="fp32", batch_sizes=sizes, networks=["vae_decoder"], say=say)
    except FastgenError as error:
        raise type(error)(f"{bundle.folder} is complete, but no TensorRT engines were built: {error}") from None
