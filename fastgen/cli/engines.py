"""Commands about engines: which can run here (`doctor`), and the compiled ones on disk (`engines`)."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fastgen.cli.parameters import BATCH, DEVICE, DTYPE, ENGINE, MODEL, Number, argument, option
from fastgen.errors import FastgenError


@click.command()
@argument("bundle", type=MODEL, required=False)
@option("--json", "as_json", is_flag=True, help="Print everything that was found as JSON.")
def doctor(bundle: Path | None, as_json: bool) -> None:
    """Show GPU, driver, libraries and caches, and for each engine `ready` or what is in its way and what helps.

    With BUNDLE verify every file of that bundle instead, and show what it states about itself: the digest over bundle.json,
    the weights, the versions that exported it.

    Exits with 1 when no engine can run.
    """
    from fastgen.engines.doctor import examine
    from fastgen.engines.doctor.bundle_report import examine_bundle

    if bundle is not None:
        found = examine_bundle(bundle)
        click.echo(json.dumps(found.to_json(), indent=2) if as_json else "\n".join(found.lines()))
        return
    report = examine()
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else "\n".join(report.lines()))
    if not report.ready:
        raise FastgenError("no engine can run here (see above)")


@click.group()
def engines() -> None:
    """Look after the compiled engines on disk: list them, find out why one is missing, delete old ones."""


@engines.command("ls")
@option("--engine", type=ENGINE, help="Only this engine's.")
@option("--json", "as_json", is_flag=True, help="Print all fields as JSON.")
def list_engines(engine: str | None, as_json: bool) -> None:
    """List the compiled engines: network, batch (rows), precision, device, versions, size, build time, last use (UTC)."""
    from fastgen.engines.cache import artifacts
    from fastgen.engines.cache.listing import check_engine, row, size_text, table

    check_engine(engine)
    sound, damaged = artifacts.scan(engine)
    rows = [row(artifact) for artifact in sound]
    if as_json:
        broken = [{"folder": str(one.folder), "engine": one.engine, "reason": one.reason} for one in damaged]
        click.echo(json.dumps({"engines": rows, "damaged": broken}, indent=2))
        return
    for line in table(rows) if rows else []:
        click.echo(line)
    for one in damaged:
        click.echo(f"damaged: {one.reason}")
    click.echo(f"{len(rows)} compiled engines, {size_text(sum(a.bytes for a in sound))}")


@engines.command()
@argument("model", metavar="[BUNDLE|MODEL]", type=MODEL, required=False)
@option("--engine", type=ENGINE, required=True, help="The engine that is asked about.")
@option("--dtype", type=DTYPE, help="fp32, bf16, fp16, int8 or fp8.  [default: the engine's]")
@option("--batch-size", type=BATCH, help="Images per batch that must be there.  [default: any]")
@option("--device", type=DEVICE, help="cpu, cuda, cuda:1, ...")
def why(model: Path | None, engine: str, dtype: str | None, batch_size: int | None, device: str | None) -> None:
    """Say for each network that generation needs whether its compiled engine is found, or what differs from the nearest.

    BUNDLE or MODEL is the latest run's by default. Exits with 1 when an engine is missing that must be built beforehand.
    """
    from fastgen.engines.cache.listing import build_command, check_engine, explain

    check_engine(engine)
    from fastgen.engines import built_by, source_kind
    from fastgen.generate.pipeline import load
    from fastgen.models.runs import latest_model

    folder = model or latest_model(source_kind(engine), built_by(engine))
    pipeline = load(folder, engine, device=device, dtype=dtype)
    findings = explain(pipeline.engine, pipeline.spec, batch_size)
    for finding in findings:
        click.echo(str(finding))
    missing = [finding.network for finding in findings if finding.problem]
    if missing and pipeline.engine.built_by:
        raise FastgenError(
            f"not ready: {', '.join(missing)}; run `{build_command(folder, pipeline.engine, batch_size)}`"
        )
    if missing:
        click.echo("what is missing is built when it is first needed, by the same `fastgen generate`")


@engines.command()
@option("--all", "everything", is_flag=True, help="Delete every compiled engine.")
@option("--engine", type=ENGINE, help="Only this engine's.")
@option("--unused-days", type=Number(0, 100_000), help="Delete what was not used for so many days.")
@option("--max-size", metavar="SIZE", help="Delete what was used longest ago until SIZE (5GB, 500MB) is left.")
@option("--damaged", is_flag=True, help="Verify every file, and delete what is damaged.")
@option("--dry-run", is_flag=True, help="Only list what would be deleted.")
def gc(
    everything: bool, engine: str | None, unused_days: float | None, max_size: str | None, damaged: bool, dry_run: bool
) -> None:
    """Delete compiled engines that are of no use any more; never one that another process is building.

    By default: leftovers of killed builds, damaged records, and what another version of a library than the installed one made.
    """
    from fastgen.engines.cache.gc import Selection, collect, parse_size
    from fastgen.engines.cache.listing import check_engine, size_text

    check_engine(engine)
    selection = Selection(everything, damaged, unused_days, None if max_size is None else parse_size(max_size))
    freed = count = 0
    for deletion, gone in collect(selection, engine, dry_run=dry_run):
        line = f"{deletion.what} ({size_text(deletion.bytes)}): {deletion.why}"
        click.echo(line if gone else f"{line}; in use, left alone")
        freed, count = freed + gone * deletion.bytes, count + gone
    click.echo(
        f"{count} {'would be deleted' if dry_run else 'deleted'}, {size_text(freed)} {'in all' if dry_run else 'freed'}"
    )
