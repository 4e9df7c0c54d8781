"""docs/serving.md says what the code says: fields, errors, metrics, limits. Its unit, container file and figure are right."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from documents import REPO, check_words
from msgspec import inspect

from fastgen.cli import serve

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
prometheus = pytest.importorskip("prometheus_client.metrics")

from fastgen.serving import app, follow, http, keeper, policy, security, service, wire  # noqa: E402
from fastgen.serving.metrics import OUTCOMES, Metrics  # noqa: E402

PAGE = (REPO / "docs/serving.md").read_text(encoding="utf-8")
FILES = REPO / "docs" / "serving"


def rows(heading: str) -> list[list[str]]:
    """The cells of the tables below a heading, without their heads."""
    (section,) = re.findall(rf"^#+ {heading}\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line for line in section.splitlines() if line.startswith("|")]
    heads = {i + j for i, line in enumerate(lines) if line.startswith("|---") for j in (-1, 0)}
    below = [line for i, line in enumerate(lines) if i not in heads]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in below]


def codes(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def between(low: object, high: object, above: object = None) -> str:
    def told(value):
        return f"{value:,}" if isinstance(value, int | float) else ""

    return f"above {told(above)} to {told(high)}" if above is not None else f"{told(low)} to {told(high)}"


def type_told(kind: inspect.Type) -> str:
    """A field's type and bounds in the words of the page."""
    match kind:
        case inspect.UnionType(types=types):
            shown = sorted((type_told(t) for t in types if not isinstance(t, inspect.NoneType)), reverse=True)
            return ", or ".join([shown[0].partition(",")[0], *shown[1:]]) if len(shown) > 1 else shown[0]
        case inspect.NoneType():
            return "null"
        case inspect.BoolType():
            return "true or false"
        case inspect.LiteralType(values=values):
            return " or ".join(f'"{value}"' for value in values)
        case inspect.IntType(ge=low, le=high):
            return f"integer, {between(low, high)}"
        case inspect.FloatType(gt=above, ge=low, le=high):
            return f"number, {between(low, high, above)}"
        case inspect.StrType(min_length=None, max_length=most):
            return f"text, at most {most:,} characters"
        case inspect.StrType(min_length=least, max_length=most):
            return f"text, {between(least, most)} characters"
        case inspect.TupleType(item_types=(first, second)):
            assert first == second
            words = type_told(first).partition(", ")
            return f"[{words[0]}, {words[0]}], each {words[2]}"
        case inspect.ListType(min_length=least, max_length=most):
            return f"list of {between(least, most)} texts"
    raise AssertionError(f"the page's test knows no words for {kind}")


def test_all_fields_are_listed_with_their_types_bounds_and_defaults():
    info = inspect.type_info(wire.Body)
    assert isinstance(info, inspect.StructType)
    found = {codes(row[0])[0]: row for row in rows("Fields")}
    assert list(found) == list(wire.FIELDS)
    for field in info.fields:
        assert found[field.name][1] == type_told(field.type), field.name
        default = f"`{json.dumps(field.default)}`" if field.default is not None else ""
        assert found[field.name][2] == default, field.name
    assert f"below {wire.MAX_RANDOM_SEED:,}" in found["seed"][3]
    assert f"for {service.KEPT_S / 60:g} minutes" in found["response_format"][3]


def test_all_error_codes_of_the_server_are_listed_and_no_others():
    text = "\n".join(file.read_text(encoding="utf-8") for file in Path(wire.__file__).parent.glob("*.py"))
    known = set(re.findall(r'code(?:: str)? ?= ?"(\w+)"', text)) | set(re.findall(r'"(missing_\w+)"\)', text))
    known |= set(re.findall(r'Failed\([^"\n]*(?:"[\w ]+", )?"(\w+)"\)', text)) | set(
        re.findall(r', "(invalid_json|unknown_parameter)"', text)
    )
    table = rows("Errors")
    assert sorted(code for row in table for code in codes(row[1])) == sorted(known)
    statuses = {int(status) for row in table for status in re.findall(r"\d{3}", row[0])}
    assert statuses == {int(s) for s in re.findall(r"(?:ApiError\(\s*|_code == |status = )([45]\d\d)\b", text)}


def test_all_metrics_are_listed_with_kind_and_labels_and_no_others():
    metrics = [value for value in vars(Metrics()).values() if isinstance(value, prometheus.MetricWrapperBase)]
    known = {}
    for metric in metrics:
        (family,) = metric.describe()
        name = family.name + ("_total" if family.type == "counter" else "")
        assert metric._labelnames[0] == "model"
        known[name] = family.type, list(metric._labelnames[1:])
    table = rows("Metrics")
    assert {codes(row[0])[0]: (row[1], codes(row[2])) for row in table} == known
    assert codes(table[0][3]) == list(OUTCOMES)
    for name in re.findall(r"fastgen_[a-z_]+", PAGE):
        assert name.removesuffix("_bucket") in known, name


def test_limits_and_times_are_those_of_the_code():
    body, kept = f"{app.BODY_S:g} s", f"{service.KEPT_S / 60:g} minutes"
    assert http.HEADER_S == http.KEEP_ALIVE_S
    assert [row[1] for row in rows("Limits")] == [
        f"{wire.MAX_BODY:,} bytes",
        body,
        f"{http.HEADER_S:g} s",
        f"{http.MAX_HEADERS:,} bytes",
        f"{http.WRITE_S:g} s",
        f"{http.MAX_CONNECTIONS}, or half of the files that may be open",
        f"{serve.MAX_KEYS:,}, of 8 to 200 characters",
        f"{1 / follow.SHORTEST_S:g} a second",
    ]
    assert f"does not read: {http.LEAST_READ:,} bytes" in rows("Limits")[4][0]
    assert security._KEY.pattern == "[!-~]{8,200}"
    steps, m = keeper.STEPS, keeper
    options = {option.name: option.default for option in serve.serve.params}
    assert (options["max_wait"], options["drain"]) == (policy.MAX_WAIT_S, service.DRAIN_S)
    assert [row[1] for row in rows("Operation")] == [
        f"{m.ANSWER_S:g} s without an answer, or {steps:g} of its steps if that is longer",
        f"{m.HANG_S:g} s without an answer, or {2 * steps:g} of its steps if that is longer",
        f"at once, then after {', '.join(f'{2**i}' for i in range(m.DEATHS - 3))} and {2 ** (m.DEATHS - 3)} s",
        f"{m.DEATHS} deaths within {m.WINDOW_S / 60:g} minutes and no picture between",
        f"{policy.HEADROOM} of {policy.MAX_WAIT_S:g} s",
        f"{service.DRAIN_S:g} s",
        f"{kept} after its end; at most {service.KEPT_IMAGES} images in all",
    ]


def test_all_routes_are_listed():
    known = {(path.replace(":int", ""), method) for path, method in routes()}
    shown = {
        (path, method) for row in rows("Routes") for method, path in re.findall(r"`(GET|POST|DELETE) ([^`]+)`", row[0])
    }
    aliases = {(path, "GET") for path in codes(rows("Routes")[6][1])}
    assert shown | aliases == known
    assert {path for path, method in known if "health" in path} | {"/", "/favicon.ico"} == set(security.OPEN_PATHS)


def routes() -> list[tuple[str, str]]:
    found = app.Api(SimpleNamespace(), None).routes()  # type: ignore[arg-type]
    return [(route.path, method) for route in found for method in (route.methods or ()) if method != "HEAD"]


def test_the_figure_is_what_the_policy_gives():
    drawn = runpy.run_path(str(FILES / "joins.py"))
    assert (FILES / "joins.svg").read_text(encoding="utf-8") == drawn["svg"](), "run python docs/serving/joins.py"
    ticks = drawn["played"]()
    long = drawn["IMAGES"][0]
    assert any(long not in places.values() for places in ticks[: long.last]), "no image rests"
    assert "http" not in (FILES / "joins.svg").read_text().replace("http://www.w3.org/2000/svg", "")


@pytest.fixture
def unit() -> str:
    return (FILES / "fastgen.service").read_text(encoding="utf-8")


def test_the_systemd_unit_starts_a_command_that_exists_and_lets_it_drain(unit):
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    program, *arguments = shlex.split(line)
    assert Path(program).name == "fastgen"
    check_words(["fastgen", *arguments])
    drain = float(arguments[arguments.index("--drain") + 1])
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert float(stop) > drain + http.CLOSE_S
    assert "KillMode=mixed" in unit.splitlines()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(unit, tmp_path):
    file = tmp_path / "fastgen.service"
    file.write_text(unit.replace("/opt/fastgen/bin/fastgen", f"{sys.executable} -m fastgen"))
    done = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_container_file_copies_what_there_is_and_starts_commands_that_exist():
    text = (FILES / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if re.match(r"[A-Z]+ ", line)]
    found: dict[str, list[str]] = {}
    for word, rest in steps:
        found.setdefault(word, []).append(rest)
    assert found["FROM"] == ["python:3.12-slim"]
    for copied in found["COPY"]:
        assert all((REPO / name).exists() for name in copied.split()[:-1])
    check_words(shlex.split(found["RUN"][0].partition(" && ")[0].replace("--no-cache-dir ", "")))
    (command,), (health,) = found["CMD"], found["HEALTHCHECK"]
    words = json.loads(command)
    check_words(words)
    assert words[words.index("--port") + 1] == found["EXPOSE"][0]
    assert "http://127.0.0.1:8000/health/ready" in health
    compile(json.loads(health.partition("CMD ")[2])[2], "HEALTHCHECK", "exec")
    assert [word for word, _ in steps].index("USER") < [word for word, _ in steps].index("CMD")
    assert found["USER"] == ["fastgen"]
    assert f"FASTGEN_CACHE={found['VOLUME'][0]}" in found["ENV"]
