"""Options and arguments of every command: what is no value is refused in one line that names the option."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from attacks import Attack

from fastgen.cli import parameters
from fastgen.cli.commands import cli
from fastgen.cli.parameters import Choice, Device, FilePath, Location, Number, Whole, spelling

LONG = "n" * 300
URL = "s3://bucket/x"
DEVICES = ["nope", "cpu:7", "cuda:-1", "cuda:", "CUDA:0:1", "meta", "mps", "gpu", " ", "0", "cuda:1e3", "é"]


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


PARAMETERS = [(path, param) for path, command in commands() for param in command.params]
VALUED = [(path, param) for path, param in PARAMETERS if not (isinstance(param, click.Option) and param.is_flag)]


def kinds(param: click.Parameter) -> list[click.ParamType]:
    return list(param.type.types) if isinstance(param.type, click.Tuple) else [param.type]


def typed(path: tuple[str, ...], param: click.Parameter, value: str) -> list[str]:
    """The command line with this value of the parameter, and with values for the arguments before it."""
    values = [value] * len(kinds(param))
    if isinstance(param, click.Option):
        if param._flag_needs_value:  # its value is optional
            return [*path, f"{spelling(param)}={value}"]
        return [*path, spelling(param), *values]
    before = [p for q, p in PARAMETERS if q == path and isinstance(p, click.Argument)]
    return [*path, *["x"] * before.index(param), value]


def rows() -> Iterator[tuple[str, tuple[str, ...], click.Parameter, str]]:
    """(value, command, parameter, word) that no parameter of its type takes."""
    for path, param in VALUED:
        kind, name = kinds(param)[0], spelling(param)
        yield "", path, param, f"{name}: found an empty text"
        if isinstance(kind, Whole | Number):
            yield "1e400" if isinstance(kind, Whole) else "1e309", path, param, f"{name}: found"
        elif isinstance(kind, Choice):
            yield "nope", path, param, f"unknown {name.lstrip('-')} 'nope'"
        elif isinstance(kind, Location):
            yield LONG, path, param, f"{name}: found a path with a name of 300 bytes"
            if isinstance(kind, FilePath):
                yield URL, path, param, f"{name}: found '{URL}', expected a path on this machine"
        elif not isinstance(kind, Device):
            yield "a\0b", path, param, f"{name}: found 'a\\x00b'"


EACH = [
    Attack(f"{'-'.join(path)}:{spelling(p)}={value[:8]!r}", typed(path, p, value), word)
    for value, path, p, word in rows()
]
NUMBERS = ["nan", "inf", "-inf", "1e999", "0x10", "--1", "1_000", "１", "9" * 5000, "-1", "9223372036854775808", "1.5e"]
GENERATE = ["generate", "--prompt", "a dragon"]
ABSENT = [
    "generate",
    "--model",
    "iclevr-64",
    "--engine",
    "eager",
    "--labels",
    "red cube",
    "--count",
    "4",
    "--out",
    "out",
]
HAND = [
    *[Attack(f"seed={n[:20]}", ["data", "iclevr", "out", "--seed", n], "--seed: found") for n in NUMBERS],
    *[Attack(f"guidance={n[:20]}", [*GENERATE, "--guidance-scale", n], "--guidance-scale: found") for n in NUMBERS[:6]],
    *[Attack(f"strength={n}", [*GENERATE, "--strength", n], "--strength: found") for n in ("0", "1.01", "-0.5", "nan")],
    *[
        Attack(f"{option}={value}", [*GENERATE, option, value], f"{option}: found")
        for option, value in [
            ("--threads", "1025"),
            ("--threads", "1000000000"),
            ("--count", "1000001"),
            ("--batch-size", "65537"),
            ("--num-inference-steps", "10001"),
            ("--height", "16385"),
            ("--width", "0"),
            ("--limit", "0"),
            ("--rag-top-k", "0"),
            ("--noise-steps", "-1"),
            ("--seed", "18446744073709551616"),
        ]
    ],
    *[Attack(f"minutes={n}", ["sweep", "r.json", "--minutes", n], "--minutes: found") for n in ("0", "nan", "1e7")],
    *[
        Attack(f"unused-days={n}", ["engines", "gc", "--unused-days", n], "--unused-days: found")
        for n in ("-1", "inf", "nan", "1e300")
    ],
    *[
        Attack(f"{path[0]}:device={name}", [*path, "--device", name], "--device: found")
        for path, param in VALUED
        if isinstance(param.type, Device)
        for name in DEVICES
    ],
    *[
        Attack(f"devices={names}", [*GENERATE, "--devices", names], "--devices")
        for names in [
            "nope",
            "0,0",
            "0,,1",
            ",",
            "cuda:0,0",
            "cuda,0",
            "0,nope",
            "-1",
            "cuda",
            "cpu,",
            "99999",
            "0;1",
        ]
    ],
    *[
        Attack(f"out={url}", [*GENERATE, "--out", url], word)
        for url, word in [
            ("nope://bucket/x", "--out nope://bucket/x: found the protocol 'nope', expected one of s3, "),
            ("https://example.org/x?token=secret", "--out https://example.org/x?...: found the protocol 'https'"),
            ("s3://key:secret@bucket/x", "--out s3://key:***@bucket/x: found a password"),
            ("s3://", "expected s3://BUCKET/FOLDER"),
            ("s3://bucket/../x", "without empty parts, . and .."),
            ("s3://bucket/x.jpg", "give s3://bucket/x.png, or a folder"),
        ]
    ],
    Attack("grid", [*GENERATE, "--grid=1001"], "--grid: found '1001'"),
    Attack("devices:absent", [*ABSENT, "--devices", "cuda:98,cuda:99"], "found cuda:99"),
    Attack("surrogate", ["score", "a\ud800b"], "IMAGES: found"),
    Attack("long path", ["copies", "a/" * 3000, "--index", "i"], "IMAGES: found a path of 6,000 bytes"),
    Attack("long text", ["train", "--set", "x=" + "y" * 120_000], "--set: found 120,002 characters"),
    Attack("long tracker", ["train", "iclevr-64", "--data", ".", "--tracker", "t" * 5000], ""),
    Attack("shard", [*GENERATE, "--shard", "0/4"], "shard"),
    Attack("shard", [*GENERATE, "--shard", "5/4"], "shard"),
    Attack("shard", [*GENERATE, "--shard", "1/9999999"], "shard"),
    Attack("auto", [*GENERATE, "--shard", "auto"], "JOB_COMPLETION_INDEX (with --of N), SLURM_ARRAY_TASK_ID and RANK"),
    Attack("auto", [*GENERATE, "--shard", "auto"], "add --of N", env={"JOB_COMPLETION_INDEX": "0"}),
    Attack("auto", [*GENERATE, "--shard", "auto"], "RANK: found ''", env={"RANK": "", "WORLD_SIZE": "2"}),
    Attack("of", [*GENERATE, "--shard", "1/2", "--of", "2"], "--of: found 2, which only --shard auto takes"),
    *[
        Attack(f"ray={value}", [*GENERATE, f"--ray={value}"], word)
        for value, word in [
            ("nonsense", "--ray: found 'nonsense', expected no value, auto, or HOST:PORT"),
            ("host:", "--ray: found 'host:'"),
            (":6379", "--ray: found ':6379'"),
            ("host:99999", "--ray: found 'host:99999'"),
            ("host:１", "--ray: found"),
            ("ray://host:10001", "ray job submit"),
        ]
    ],
    *[
        Attack(f"ray+{words[0]}", [*GENERATE, *words, "--ray"], f"leave {words[0]} out")
        for words in [("--devices", "0,1"), ("--shard", "1/2"), ("--dry-run",)]
    ],
    Attack("ray+device", [*GENERATE, "--device", "cuda:1", "--ray"], "give cpu or cuda"),
    Attack("ray+single", [*GENERATE, "--ray"], "--ray belongs to a folder of images"),
    Attack("no ray", [*GENERATE, "--cpus-per-worker", "2"], "--cpus-per-worker belongs to --ray"),
    Attack("no ray", [*GENERATE, "--allow-mixed"], "--allow-mixed belongs to --ray"),
    Attack("interval", [*GENERATE, "--guidance-interval", "0", "-4"], "--guidance-interval: found"),
    Attack("option", ["generate", "--" + "o" * 4000], "No such option"),
    Attack("command", ["g" * 4000], "No such command"),
    Attack("triton", ["export", "iclevr-64", "--triton", "."], "--triton .: is not apart from the bundle"),
    Attack(
        "triton", ["export", "iclevr-64", "--triton", "x"], "--triton x: is not a folder", lambda w: (w / "x").touch()
    ),
    Attack("triton", ["export", "iclevr-64", "--triton", "r", "--dtype", "bf16"], "--triton: found --dtype bf16"),
    Attack("max-size", ["engines", "gc", "--max-size", "9" * 400 + "GB"], "--max-size"),
    Attack("max-size", ["engines", "gc", "--max-size", "nanGB"], "--max-size"),
    Attack("max-size", ["engines", "gc", "--max-size", "-1"], "--max-size"),
    Attack("capabilities", ["export", "m", "--rtx", "--capabilities", ",,"], "capabilit"),
    Attack("batch-sizes", ["export", "m", "--rtx", "--batch-sizes", "1," + "9" * 400], "--batch-sizes"),
    Attack("batch-sizes", ["export", "m", "--trt", "--batch-sizes", "0"], "--batch-sizes"),
]


@pytest.mark.parametrize("attack", [*EACH, *HAND], ids=str)
def test_a_value_that_no_option_takes_is_refused(attack, refused):
    refused(attack)


@pytest.mark.parametrize(
    ("path", "param"), PARAMETERS, ids=lambda x: x if isinstance(x, str) else getattr(x, "name", None)
)
def test_every_parameter_has_a_type_of_the_boundary(path, param):
    for kind in kinds(param):
        assert isinstance(kind, parameters.TYPES), f"{' '.join(path)} {spelling(param)}: {kind}"


@pytest.mark.parametrize("seed", ["0", "9223372036854775807"])
def test_seeds_up_to_the_largest_are_accepted(fork_server, tmp_path, seed):
    arguments = ["data", "iclevr", "out", "--count", "2", "--size", "32", "--workers", "1", "--seed", seed]
    outcome = fork_server.run(arguments, tmp_path, {})
    assert outcome.code == 0, outcome.stderr
