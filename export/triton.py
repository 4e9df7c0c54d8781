"""A bundle -> a model repository of Triton Inference Server: a model for each network, and one that makes images."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from export.extend import file_names
from export.triton_config import graph_config, model_config, plan_config
from export.trt_build import network_rows
from fastgen.engines.cache.artifacts import Artifact
from fastgen.engines.trt.plan import PLAN
from fastgen.errors import InputError, Say
from fastgen.files.folders import make_folder, new_folder
from fastgen.files.hashes import sha256_file
from fastgen.files.jsonfiles import brief, read_json, write_json
from fastgen.files.outputs import check_output_folder
from fastgen.models.bundle import CERTIFICATES, MANIFEST, Bundle
from fastgen.models.onnx_graph import read_graph
from fastgen.models.signatures import network_dtype

MODEL, VERSION = "fastgen", "1"  # of the model that makes images
RECORD = f"{MODEL}/{VERSION}/repository.json"  # whose the repository is, and the files that were written
BUNDLE = f"{MODEL}/{VERSION}/bundle"
FILES = "files"
TEXT = (".pbtxt", ".py")  # files that a user may edit
DTYPES = ("fp32", "fp16")  # that onnxruntime runs
OPTION = "--triton"
MODEL_PY = '''"""Makes images: fastgen.serving.triton_model, which needs fastgen in Triton's Python."""

from fastgen.cli.certifying import ensure_certified
from fastgen.serving.triton_model import TritonPythonModel as Base


class TritonPythonModel(Base):
    check = staticmethod(ensure_certified)
'''
Plans = Mapping[str, Mapping[int, Artifact]]  # network -> rows -> TensorRT plan


def write_repository(
    bundle: Bundle,
    repository: Path,
    *,
    dtype: str = "fp32",
    batch_sizes: Sequence[int],
    plans: Plans | None = None,
    overwrite: bool = False,
    say: Say = lambda line: None,
) -> None:
    """Write the model repository of a bundle, whole or not at all; one that holds the same already is left as it is.

    For each network a folder with its ONNX graph in `dtype`, which takes as many rows as batches of `batch_sizes` images have;
    or with `plans` a folder NETWORK-ROWS for each TensorRT plan. And the folder `fastgen`, whose model makes images with the
    bundle, which lies in it. All files are copies.

    Raises InputError where `repository` holds anything else, or without `overwrite` another repository; for a damaged bundle,
    and for graphs that it lacks.
    """
    what: dict[str, Any] = {
        "bundle_sha256": bundle.sha256,
        "dtype": dtype,
        "batch_sizes": sorted(set(batch_sizes)),
        "plans": {name: sorted(rows) for name, rows in (plans or {}).items()},
    }
    if _holds(repository, what, overwrite):
        say(f"{repository} holds this bundle already")
        return
    with new_folder(repository, existing="replace" if overwrite else "refuse") as folder:
        if plans is None:
            _write_graphs(bundle, folder, dtype, batch_sizes)
        else:
            _write_plans(bundle, folder, plans)
        _write_model(bundle, folder)
        write_json(folder / RECORD, {**what, FILES: _record(folder)})


def check_repository(repository: Path, bundle: Path, dtype: str, plans: bool) -> None:
    """InputError where the repository of the bundle at `bundle` cannot be written: see `write_repository`."""
    if dtype not in DTYPES and not plans:
        raise InputError(f"{OPTION}: found --dtype {dtype}; onnxruntime in Triton runs {' and '.join(DTYPES)}")
    check_output_folder(repository, OPTION)
    folders = repository.resolve(), bundle.resolve()
    if folders[0].is_relative_to(folders[1]) or folders[1].is_relative_to(folders[0]):
        raise InputError(f"{OPTION} {repository}: is not apart from the bundle {bundle}; choose another folder")
    if _is_filled(repository):
        _check_ours(repository)


def _is_filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _holds(repository: Path, what: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether the folder is this repository. Raises InputError where it is another one, without `overwrite`."""
    if not _is_filled(repository):
        return False
    record = _check_ours(repository)
    if different := [name for name in what if record.get(name) != what[name]]:
        if not overwrite:
            found = f"holds another repository ({different[0]} differs)"
            raise InputError(f"{OPTION} {repository}: {found}; choose another folder, or --overwrite")
        return False
    return True


def _check_ours(repository: Path) -> dict[str, Any]:
    """The record of a repository. InputError for a folder that is none, or holds other files than were written, or texts that
    were edited since."""
    record = repository / RECORD
    if not record.is_file():
        raise InputError(f"{OPTION} {repository}: is not empty and no repository of fastgen; choose another folder")
    value = read_json(record)
    files = value.get(FILES) if isinstance(value, dict) else None
    if not isinstance(files, dict):
        raise InputError(f"{record}: found no list of files; choose another folder for {OPTION}")
    now = _record(repository)
    if changed := [name for name in now if name != RECORD and (name not in files or now[name] != files[name])]:
        raise InputError(f"{OPTION} {repository}: {brief(changed[0])} is not as it was written; choose another folder")
    return value


def _record(folder: Path) -> dict[str, str | None]:
    """All files below a folder; of those that a user may edit the SHA-256."""
    return {name: sha256_file(folder / name) if name.endswith(TEXT) else None for name in file_names(folder)}


def _write_graphs(bundle: Bundle, folder: Path, dtype: str, batch_sizes: Sequence[int]) -> None:
    for name, signature in bundle.spec.signatures.items():
        graph = bundle.network(name, network_dtype(name, dtype))
        version = folder / name / VERSION
        _copy(graph, version / "model.onnx")
        for data in read_graph(graph).data:  # the graph knows it by this name
            _copy(graph.parent / data, version / data)
        rows = max(network_rows(name, batch_sizes, bundle.spec.space.pixels))
        (folder / name / "config.pbtxt").write_text(graph_config(signature, rows), encoding="utf-8")


def _write_plans(bundle: Bundle, folder: Path, plans: Plans) -> None:
    for name, by_rows in plans.items():
        for rows, artifact in by_rows.items():
            model = folder / f"{name}-{rows}"
            _copy(artifact.file(PLAN), model / VERSION / "model.plan")
            config = plan_config(bundle.spec.signatures[name], rows)
            (model / "config.pbtxt").write_text(config, encoding="utf-8")


def _write_model(bundle: Bundle, folder: Path) -> None:
    for name in bundle.files:
        _copy(bundle.file(name), folder / BUNDLE / name)
    certificates = sorted((bundle.folder / CERTIFICATES).glob("*.json"))
    for file in (bundle.folder / MANIFEST, *certificates):
        _copy(file, folder / BUNDLE / file.relative_to(bundle.folder))
    (folder / MODEL / VERSION / "model.py").write_text(MODEL_PY, encoding="utf-8")
    (folder / MODEL / "config.pbtxt").write_text(model_config(bundle.spec.condition, {}), encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    """A copy, and no link: the onnx library takes no weights of a file with several hard links, also not of the bundle's."""
    make_folder(target.parent)
    shutil.copyfile(source, target)
