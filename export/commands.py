"""`videolavit export` and `videolavit verify`.

Contract: both end in a table on stdout, or in JSON lines with `--json`. A disagreement with torch ends an export at
once with ParityError; `verify` compares and shows everything, and then raises the first one it found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
import msgspec
from rich.console import Console
from rich.table import Table

from export.settings import TASKS, Backend, ExportSettings, parse_precision, read_profile
from runtime.bundle import Bundle, Parity, find
from runtime.commands.report import Report
from runtime.errors import BundleError, ParityError, UsageError

if TYPE_CHECKING:
    from export.end_to_end import Agreement, Bounds
    from export.plan import Planned

MIB = 2**20


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Bundle folder to write.")
@click.option("--profile", help="Machine to build for: a name under engines/profiles, or a TOML file.")
@click.option("--backend", type=click.Choice(get_args(Backend)), help="Kind of engines.  [default: onnx]")
@click.option(
    "--precision",
    help="fp32, fp16, bf16, fp8, int8 or int4; ENGINE=PRECISION for one engine; several separated by commas.  "
    "[default: fp32]",
)
@click.option("--tasks", help="What the bundle is for, separated by commas.  [default: generate,understand]")
@click.option("--plan", "plan_only", is_flag=True, help="Only say what would be built and what it takes.")
@click.option("--no-compare", is_flag=True, help="Do not compare with torch, which takes the most memory.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--json", "as_json", is_flag=True, help="Events and result as JSON lines on stdout.")
def export(
    checkpoint: Path,
    output: Path,
    profile: str | None,
    backend: Backend | None,
    precision: str | None,
    tasks: str | None,
    plan_only: bool,
    no_compare: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Turn CHECKPOINT into a bundle of engines; each is compared with torch before anything is published.

    CHECKPOINT is a checkpoint of this project or a folder with the official weights. An export that was ended goes on
    where it stopped when it is run again. What each precision costs a trained model, in size, distance from torch and
    task scores, stands in docs/benchmarks/precisions.md.
    """
    from export.build import export_bundle, plan
    from export.plan import check_fits
    from videolavit.checkpoints import load

    settings = choose(profile, backend, precision, tasks)
    source = load(checkpoint)
    compare = not no_compare
    with Report(as_json) as report:
        parts = plan(source, settings.tasks, settings, compare=compare)
        if plan_only:
            report.result(_plan_text(parts), plan=[asdict(part) for part in parts])
        check_fits(parts, output)
        if plan_only:
            return
        if not source.trained:
            report.note(f"{checkpoint} has random weights, it is not trained")
        built = export_bundle(
            source,
            output,
            tasks=settings.tasks,
            settings=settings,
            force=force,
            compare=compare,
            observer=report.progress,
        )
        table = _table("engine", "precision", "MiB", "largest error", "allowed", "export s", "load s", "compare s")
        for one in built:
            seconds = (one.export_seconds, one.load_seconds, one.parity_seconds)
            times = ["kept", "", ""] if one.reused else [f"{second:.2f}" for second in seconds]
            table.add_row(one.name, one.entry.precision, f"{one.bytes / MIB:.2f}", *_bounds(one.parity), *times)
        total = f"{output}: {len(built)} engines, {sum(one.bytes for one in built) / MIB:.1f} MiB"
        if settings.memory_budget is not None:
            total += f"; run it with --memory-budget {settings.memory_budget // MIB}M"
        report.result(
            f"{_text(table)}\n{total}",
            bundle=str(output),
            memory_budget=settings.memory_budget,
            engines=[
                {
                    "name": one.name,
                    "bytes": one.bytes,
                    "precision": one.entry.precision,
                    "max_abs_error": one.parity and one.parity.max_abs_error,
                    "tolerance": one.parity and one.parity.tolerance,
                    "reused": one.reused,
                    "export_seconds": one.export_seconds,
                    "load_seconds": one.load_seconds,
                    "parity_seconds": one.parity_seconds,
                }
                for one in built
            ],
        )


def choose(profile: str | None, backend: Backend | None, precision: str | None, tasks: str | None) -> ExportSettings:
    """Settings of a profile, or the defaults, changed by the flags that were given. Raises UsageError."""
    settings = read_profile(profile) if profile else ExportSettings()
    engines = dict(settings.engines)
    default = settings.default
    if backend:
        default = replace(default, backend=backend)
    if precision:
        common, single = parse_precision(precision)
        default = replace(default, precision=common or default.precision)
        for name, choice in single.items():
            engines[name] = msgspec.structs.replace(engines.get(name, choice), precision=choice.precision)
    chosen = [task.strip() for task in tasks.split(",")] if tasks else settings.tasks
    unknown = [task for task in chosen if task not in TASKS]
    if unknown:
        raise UsageError(f"--tasks {tasks}: {unknown[0]!r} is no task; choose from {', '.join(TASKS)}")
    return replace(settings, default=default, engines=engines, tasks=tuple(t for t in TASKS if t in chosen))


def _plan_text(parts: Sequence[Planned]) -> str:
    table = _table("component", "parameters", "disk MiB", "memory MiB", "seconds", "engines")
    for part in parts:
        engines = [f"{name} ({precision})" for name, precision in zip(part.engines, part.precisions, strict=True)]
        table.add_row(
            part.component,
            f"{part.parameters:,}",
            f"{part.bytes / MIB:.1f}",
            f"{part.memory / MIB:.0f}",
            f"{part.seconds:.0f}",
            ", ".join(engines),
        )
    disk, memory = sum(part.bytes for part in parts), max(part.memory for part in parts)
    seconds = sum(part.seconds for part in parts)
    return f"{_text(table)}\nin all: {disk / MIB:.1f} MiB of disk, {memory / MIB:.0f} MiB of memory, {seconds:.0f} s"


@click.command()
@click.argument("bundle")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--engines-only", is_flag=True, help="Leave out the comparison of whole tasks.")
@click.option("--json", "as_json", is_flag=True, help="Events and result as JSON lines on stdout.")
def verify(bundle: str, checkpoint: Path, engines_only: bool, as_json: bool) -> None:
    """Compare every engine of BUNDLE, and every task, with CHECKPOINT in torch."""
    from export.build import verify_engines
    from runtime.engines import EngineSet
    from videolavit.checkpoints import load

    opened, source = Bundle.open(find(bundle)), load(checkpoint)
    if opened.manifest.source != source.digest:
        raise BundleError(
            f"{bundle}: was not made from the weights in {checkpoint}; export these or name their own checkpoint"
        )
    engine_table = _table("engine", "largest error", "allowed", "scale", "")
    task_table = _table("task", "ids", "the same", "latents, relative", "PSNR dB", "SSIM", "")
    results: dict[str, Any] = {"engines": [], "tasks": []}
    misses: list[ParityError] = []

    def engine_compared(name: str, found: Parity | ParityError) -> None:
        if isinstance(found, ParityError):
            misses.append(found)
            error, problem = found.measured, str(found)
            engine_table.add_row(name, f"{error:.2g}", f"{found.tolerance:.2g}", "", "missed")
        else:
            error, problem = found.max_abs_error, None
            engine_table.add_row(name, *_bounds(found), f"{found.scale:.3g}", "")
        results["engines"].append(
            {"name": name, "max_abs_error": error, "tolerance": found.tolerance, "problem": problem}
        )

    with Report(as_json) as report, EngineSet(opened) as engines:
        try:
            verify_engines(engines, source, engine_compared)
            if not engines_only:
                from export.end_to_end import BOUNDS, check, compare, precision_of

                precision = precision_of(opened)
                bounds = BOUNDS[precision]
                results["allowed"] = asdict(bounds)
                _add_task(task_table, f"allowed in {precision}", "", bounds, "")
                for agreement in compare(opened, source):
                    problem = None
                    try:
                        check(agreement, bounds)
                    except ParityError as miss:
                        misses.append(miss)
                        problem = str(miss)
                    _add_task(task_table, agreement.task, str(agreement.tokens), agreement, "missed" if problem else "")
                    results["tasks"].append({**asdict(agreement), "share": agreement.share, "problem": problem})
        finally:
            report.result(_text(engine_table, task_table), **results)
    if misses:
        raise misses[0]


def _add_task(table: Table, task: str, tokens: str, found: Agreement | Bounds, verdict: str) -> None:
    similar = f"{found.latent_error:.2g}", f"{found.psnr:.1f}", f"{found.ssim:.4f}"
    table.add_row(task, tokens, f"{found.share:.1%}", *similar, verdict)


def _bounds(parity: Parity | None) -> tuple[str, str]:
    """Error and tolerance as cells; integers have no tolerance."""
    if parity is None:
        return "not measured", ""
    return f"{parity.max_abs_error:.2g}", f"{parity.tolerance:.2g}" if parity.tolerance else "equal"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i and column != "engines" else "left")
    return table


def _text(*tables: Table) -> str:
    """The tables that have rows, as plain text as wide as they need."""
    console = Console(width=160, no_color=True)
    with console.capture() as capture:
        for table in tables:
            if table.row_count:
                console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
