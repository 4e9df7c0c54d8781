"""Every name, signature and enum of TensorRT that fastgen uses, against the real bindings of both products; no GPU needed.

The wheels `tensorrt-cu13-bindings` hold TensorRT's bindings without the libraries, and are imported over stubs of those;
TensorRT for RTX is installed whole. What is used is read from the sources: constants `trt.X.Y`, and attributes of variables
that hold TensorRT's objects. Sources with `rtx` in their file's or folder's name are used with that product alone.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[2]
VERSIONS, RTX = ("10.13.3.9", "10.16.1.11", "11.4.0.106"), "tensorrt_rtx"
ALL = [
    *sorted((REPO / "fastgen" / "engines").glob("trt*/*.py")),
    *sorted((REPO / "export").glob("trt*.py")),
]
SOURCES = {
    RTX: ALL,
    "tensorrt_bindings": [source for source in ALL if "rtx" not in f"{source.parent.name}/{source.name}"],
}
STUBS = [
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry"),
    *("getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins"),
]
# The variables of the sources that hold TensorRT's objects, by the last word of their name.
HOLDS = {
    "runtime": "Runtime",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "error": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "layer": "ILayer",
    "runtime_config": "IRuntimeConfig",
    "kernels": "IRuntimeCache",
}
# Methods of Python subclasses that TensorRT calls.
CALLBACKS = {
    "ILogger": {"log": ["severity", "msg"]},
    "IProgressMonitor": {
        "phase_start": ["phase_name", "parent_phase", "num_steps"],
        "step_complete": ["phase_name", "step"],
        "phase_finish": ["phase_name"],
    },
}
DUMP = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[1])

def describe(value):
    members = getattr(value, "__members__", None)
    if members is not None:
        return {"members": list(members)}
    found = {}
    for name in dir(value):
        attribute = getattr(value, name)
        if isinstance(attribute, property):
            found[name] = {"settable": attribute.fset is not None}
        elif callable(attribute) and (not name.startswith("_") or name == "__init__"):
            found[name] = {"doc": attribute.__doc__ or ""}
    return {"attributes": found}

classes = {name: describe(getattr(trt, name)) for name in dir(trt) if isinstance(getattr(trt, name), type)}
classes["ILogger.Severity"] = describe(trt.ILogger.Severity)

class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
    def log(self, severity, msg):
        pass

class Monitor(trt.IProgressMonitor):
    def __init__(self):
        trt.IProgressMonitor.__init__(self)

errors = []
for make in (lambda: trt.Runtime(Log()), lambda: trt.Builder(Log())):
    try:
        make()
    except Exception as error:
        errors.append(type(error).__name__)
Monitor()
dims = trt.Dims([2, 3])
print(json.dumps({
    "version": trt.__version__, "classes": classes, "null": errors, "dims": tuple(dims) == (2, 3),
    "flag": int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED), "equal": trt.DataType.HALF == trt.DataType.HALF,
    "hashable": len({trt.LayerType.CONVOLUTION, trt.LayerType.EINSUM}), "name": trt.DataType.HALF.name,
}))
"""


@pytest.fixture(scope="module", params=[*VERSIONS, RTX])
def bindings(request, tmp_path_factory) -> dict[str, Any]:
    """What the real bindings of one product and version declare, and the sources that use it."""
    if request.param == RTX:
        pytest.importorskip(RTX)
        return declared(RTX, dict(os.environ))
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler for the stub libraries")
    version, folder = request.param, tmp_path_factory.mktemp("bindings")
    _download(version, folder)
    code = folder / "stubs.c"
    code.write_text("\n".join(f"void *{name}(void) {{ return 0; }}" for name in STUBS))
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        target = folder / f"lib{library}.so.{version.partition('.')[0]}"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", target, code], check=True)
    environment = {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)}
    found = declared("tensorrt_bindings", environment)
    assert found["version"] == version
    return found


def declared(module: str, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-c", DUMP, module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"product": module, "sources": SOURCES[module]}


def _download(version: str, folder: Path) -> None:
    """Unpack the wheel of one version; skip where the package index or this platform does not have it."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--retries=1",
        "--timeout=10",
    ]
    command += ["--disable-pip-version-check", f"--dest={folder}", f"tensorrt-cu13-bindings=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        pytest.skip(f"tensorrt-cu13-bindings {version} cannot be downloaded: {reason}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)


def _last_name(node: ast.expr) -> str | None:
    """`config` of `config` and of `self._config`."""
    if isinstance(node, ast.Attribute):
        return node.attr.lstrip("_")
    return node.id if isinstance(node, ast.Name) else None


def _dotted(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Attribute):
        return [*_dotted(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else []


def used_names(sources: list[Path]) -> set[str]:
    """`X` and `X.Y` wherever a source says `trt.X.Y`, and the members that are looked up by name."""
    from export.trt_layers import PRODUCTS, TYPES
    from fastgen.engines.trt.plan import DTYPES

    names = {f"DataType.{n}" for n in (*TYPES.values(), *DTYPES.values())} | {f"LayerType.{n}" for n in PRODUCTS}
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            parts = _dotted(node) if isinstance(node, ast.Attribute) else []
            if "trt" in parts[:-1]:
                names.add(".".join(parts[parts.index("trt") + 1 :]))
    return names - {"__version__"}


def used_attributes(sources: list[Path]) -> list[tuple[str, str, ast.expr, str]]:
    """(class, attribute, the call or access, place) for everything done with a variable of HOLDS."""
    found: list[tuple[str, str, ast.expr, str]] = []
    for source in sources:
        tree = ast.parse(source.read_text())
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            kind = HOLDS.get(_last_name(node.value) or "")
            if kind:
                place = f"{source.name}:{node.lineno}"
                found.append((kind, node.attr, calls.get(id(node), node), place))
    return found


def signatures(doc: str) -> list[list[tuple[str, bool]]]:
    """The overloads in a pybind11 docstring: for each the parameters after self, and whether they have a default."""
    found = []
    for line in doc.splitlines():
        match = re.match(r"(?:\d+\. )?\w+\((.*)\)(?: -> .*)?$", line.strip())
        if match and "*args" not in match[1]:
            parameters = re.findall(r"(\w+): ((?:[^,\[<]|\[[^\]]*\]|<[^>]*>)*)", match[1])
            found.append([(name, "=" in kind) for name, kind in parameters if name != "self"])
    return found


def accepts(overload: list[tuple[str, bool]], positional: int, keywords: set[str]) -> bool:
    names = [name for name, _ in overload]
    given = {*names[:positional], *keywords}
    needed = {name for name, default in overload if not default}
    return positional <= len(names) and needed <= given <= set(names)


def test_every_constant_and_class_exists(bindings):
    classes = bindings["classes"]
    assert len(used_names(bindings["sources"])) > 20
    for name in sorted(used_names(bindings["sources"])):
        if name in classes:
            continue
        owner, _, member = name.rpartition(".")
        assert owner in classes, f"TensorRT {bindings['version']} has no {name}"
        there = classes[owner].get("members") or classes[owner]["attributes"]
        assert member in there, f"TensorRT {bindings['version']} has no {name}"


def test_every_method_takes_what_it_is_given_and_every_set_property_can_be_set(bindings):
    used = used_attributes(bindings["sources"])
    assert len(used) > 40
    for kind, name, node, place in used:
        where = f"{place}: {kind}.{name} in TensorRT {bindings['version']}"
        attribute = bindings["classes"][kind]["attributes"].get(name)
        assert attribute is not None, f"{where} does not exist"
        if not isinstance(node, ast.Call):
            assert isinstance(node, ast.Attribute)
            assert "settable" in attribute or isinstance(node.ctx, ast.Load), f"{where} is no property"
            assert isinstance(node.ctx, ast.Load) or attribute["settable"], f"{where} cannot be set"
            continue
        overloads = signatures(attribute["doc"])
        keywords = {keyword.arg or "" for keyword in node.keywords}
        assert any(accepts(o, len(node.args), keywords) for o in overloads), f"{where} takes {overloads}"


def test_no_use_of_tensorrt_escapes_the_check(bindings):
    """A method of TensorRT on a variable that HOLDS does not list would be checked by nothing."""
    classes = [bindings["classes"][kind] for kind in HOLDS.values() if kind in bindings["classes"]]
    own = {name for kind in classes for name in kind["attributes"] if "_" in name.strip("_")}
    for source in bindings["sources"]:
        defined = {n.name for n in ast.walk(ast.parse(source.read_text())) if isinstance(n, ast.FunctionDef)}
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in own - defined:
                assert _last_name(node.value) in HOLDS, f"{source.name}:{node.lineno}: add {ast.unparse(node.value)}"


def test_callbacks_have_the_parameters_that_tensorrt_declares(bindings):
    for kind, methods in CALLBACKS.items():
        for method, names in methods.items():
            declared = signatures(bindings["classes"][kind]["attributes"][method]["doc"])
            assert [name for name, _ in declared[0]] == names
            ours = [
                [a.arg for a in node.args.args[1:]]
                for source in bindings["sources"]
                for parent in ast.walk(ast.parse(source.read_text()))
                if isinstance(parent, ast.ClassDef) and any(kind in ast.unparse(base) for base in parent.bases)
                for node in parent.body
                if isinstance(node, ast.FunctionDef) and node.name == method
            ]
            assert ours == [names]


def test_objects_behave_as_the_code_expects(bindings):
    if bindings["product"] != RTX:  # whose libraries are there, and need no GPU for these
        assert bindings["null"] == ["TypeError", "TypeError"]  # what `Library.create` turns into one line
    assert bindings["dims"]
    assert bindings["equal"]
    assert bindings["hashable"] == 2
    assert bindings["name"] == "HALF"
    assert bindings["flag"] == (1 if bindings["version"].startswith("10.") else 0)  # so it is shifted by its value


def test_the_double_has_the_signatures_of_the_real_bindings(bindings):
    import tensorrt_double
    import tensorrt_rtx_double

    own = tensorrt_rtx_double.OWN if bindings["product"] == RTX else {}
    constructors = {"OnnxParser", "Builder", "Runtime", "ILogger", "IProgressMonitor"}  # the rest is made by TensorRT
    for name, value in (tensorrt_double.PUBLIC | own).items():
        real = bindings["classes"][name]
        if hasattr(value, "__members__"):
            ours = set(value.__members__)
            assert ours - set(real["members"]) <= ({"EXPLICIT_BATCH"} if bindings["version"] >= "11" else set()), name
            continue
        for method, function in inspect.getmembers(value, inspect.isfunction):
            if method.startswith("_") and not (method == "__init__" and name in constructors):
                continue
            if method in ("load", "report"):  # the double's own
                continue
            overloads = [[n for n, _ in o] for o in signatures(real["attributes"][method]["doc"])]
            assert list(inspect.signature(function).parameters)[1:] in overloads, f"{name}.{method}"
