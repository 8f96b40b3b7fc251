"""Figures and tables of a measurement.

Contract: `figures` gives everything as plain values for JSON; `table` and `markdown` say the same to people. A share
of a roof compares a median with the best the machine did: it is above 100 % only where a stage multiplies in a narrower
type than the roof was measured in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from runtime.bench.roofs import Roofs
from runtime.bench.run import Measurement
from runtime.bench.settings import OURS, Row, StageResult

MIB, GIB = 2**20, 2**30
_COLUMNS = ("stage", "", "who", "mean ± spread", "median", "rate", "of the roof", "ratio", "peak MiB")
_RIGHT = {"mean ± spread", "median", "rate", "of the roof", "ratio", "peak MiB"}


def figures(measurement: Measurement) -> dict[str, Any]:
    """The measurement as plain values; seconds and bytes."""
    settings = asdict(measurement.settings)
    settings["video"] = measurement.settings.video and str(measurement.settings.video)
    roofs = measurement.roofs
    return {
        "bundle": measurement.bundle,
        "model": measurement.model,
        "trained": measurement.trained,
        "precisions": measurement.precisions,
        "settings": settings,
        "machine": asdict(measurement.machine),
        "roofs": None if roofs is None else {**asdict(roofs), "bandwidth": roofs.bandwidth},
        "stages": [stage_figures(stage, roofs) for stage in measurement.stages],
    }


def stage_figures(stage: StageResult, roofs: Roofs | None = None) -> dict[str, Any]:
    """One stage as plain values; shares of roofs only where these are given."""
    return {
        "stage": stage.stage,
        "peak_rss": stage.peak_rss,
        "load_seconds": stage.load_seconds,
        "notes": list(stage.notes),
        "rows": [_row_figures(row, roofs) for row in stage.rows],
    }


def _row_figures(row: Row, roofs: Roofs | None) -> dict[str, Any]:
    roof = share(row, roofs)
    return {
        "detail": row.detail,
        "contender": row.contender,
        "unit": row.unit,
        "mean": row.times.mean,
        "spread": row.times.spread,
        "median": row.times.median,
        "seconds": list(row.times.seconds),
        "rate": rate(row),
        "rate_of": row.of,
        "flops": row.flops,
        "bytes": row.bytes,
        "roof": None if roof is None else roof[0],
        "share_of_roof": None if roof is None else roof[1],
        "ratio": row.ratio,
        "ratio_to": row.ratio_to,
    }


def rate(row: Row) -> float | None:
    """How much a second, by the median: tokens, frames; None where nothing is counted."""
    return row.amount / row.times.median if row.of and row.times.median else None


def share(row: Row, roofs: Roofs | None) -> tuple[str, float] | None:
    """The roof a row is under, `bandwidth` or `matmul`, and the share of it that was reached by the median."""
    if roofs is None or not row.times.median:
        return None
    if row.bytes is not None:
        return "bandwidth", row.bytes / row.times.median / roofs.bandwidth
    if row.flops is not None:
        return "matmul", row.flops / row.times.median / roofs.matmul
    return None


def table(measurement: Measurement) -> str:
    """The table as plain text, and below it what was measured where."""
    drawn = Table(box=None, pad_edge=False)
    for column in _COLUMNS:
        drawn.add_column(column, justify="right" if column in _RIGHT else "left", no_wrap=True)
    for cells in _cells(measurement):
        drawn.add_row(*cells)
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(drawn, markup=False)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    return "\n".join([*lines, "", *_remarks(measurement)])


def markdown(measurement: Measurement, command: str) -> str:
    """The table as a section of a document. `command` made it."""
    lines = [
        f"## {measurement.model}, {measurement.machine.processor}",
        "",
        f"Made by `{command}` on {measurement.machine.date}.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + "|".join("---:" if column in _RIGHT else "---" for column in _COLUMNS) + "|",
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in _cells(measurement)),
        "",
        *(f"- {remark}" for remark in _remarks(measurement)),
    ]
    return "\n".join(lines) + "\n"


def _cells(measurement: Measurement) -> Iterator[tuple[str, ...]]:
    for stage in measurement.stages:
        for index, row in enumerate(stage.rows):
            per_second, roof = rate(row), share(row, measurement.roofs)
            yield (
                row.stage if not index else "",
                row.detail,
                row.contender,
                f"{_duration(row.times.mean)} ± {_duration(row.times.spread)}",
                f"{_duration(row.times.median)}/{row.unit}",
                "" if per_second is None else f"{_number(per_second)} {row.of}/s",
                "" if roof is None else f"{roof[1]:.0%} {roof[0]}",
                "" if row.ratio is None else f"{row.ratio:.2f}× {row.ratio_to}",
                f"{stage.peak_rss / MIB:.0f}" if not index else "",
            )


def _remarks(measurement: Measurement) -> list[str]:
    machine, settings, roofs = measurement.machine, measurement.settings, measurement.roofs
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    memory = f", {machine.memory / GIB:.0f} GiB of memory" if machine.memory else ""
    remarks = [
        f"{machine.processor}, {machine.cores} processors, {machine.threads} threads used{memory}, {machine.system}; "
        f"Python {machine.python}, {versions}",
        f"{settings.repeats} runs after {settings.warm_up} to warm up; spread is the standard deviation; peak MiB is "
        f"of a process that ran the stage alone with {OURS}",
    ]
    if roofs is not None:
        read = "" if roofs.read is None else f"read {roofs.read / 1e9:.1f} GB/s, "
        remarks.append(
            f"roofs of the {roofs.device} in this run: {read}copy {roofs.copy / 1e9:.1f} GB/s, "
            f"{roofs.dtype} matrix product {roofs.matmul / 1e9:.0f} GFLOP/s"
        )
    used = _used(measurement.precisions)
    remarks.append(f"{measurement.model}: {used}" + ("" if measurement.trained else "; random, untrained weights"))
    remarks += [f"{stage.stage}: {note}" for stage in measurement.stages for note in stage.notes]
    return remarks


def _used(precisions: dict[str, str]) -> str:
    """Engines by precision."""
    by: dict[str, list[str]] = {}
    for name, precision in precisions.items():
        by.setdefault(precision, []).append(name)
    if len(by) == 1:
        return f"all engines in {next(iter(by))}"
    return "; ".join(f"{', '.join(names)} in {precision}" for precision, names in by.items())


def _number(value: float) -> str:
    """With three digits, or all of them before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    """With three digits, in the unit that reads best."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"
