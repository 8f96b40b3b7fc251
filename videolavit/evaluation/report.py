"""Figures as a document for people and as records for programs.

Contract: the document says how it was made, on what machine and in what time; every target is shown reached or missed
with its interval, and of what went wrong enough is listed to make it again.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from textwrap import shorten
from typing import Any

from runtime.bundle import Bundle
from runtime.engines import processors
from videolavit.evaluation.figures import Figure
from videolavit.evaluation.record import Part, Record

LISTED = 8  # failures per part in the document
COLUMNS = ("what", "figure", "95 % interval", "n", "target", "")


@dataclass(frozen=True, kw_only=True)
class Run:
    """How the figures came about.

    Attributes:
        command: that makes them again.
        workers: processes that measured at once.
    """

    bundle: Bundle
    command: str
    seconds: float
    workers: int


def failures(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Everything with a wrong check: what was asked, what is seen, and which checks are wrong."""
    return [
        {
            "part": record.part,
            "index": record.index,
            "seed": record.seed,
            "prompt": record.prompt,
            "expected": record.expected,
            "seen": record.seen,
            "wrong": record.wrong,
        }
        for record in records
        if record.wrong
    ]


def records_of(figures: Iterable[Figure]) -> list[dict[str, Any]]:
    """Every figure as one flat record; what is not known is None."""
    return [
        {
            "part": figure.part,
            "what": figure.measure.label,
            "key": figure.measure.key,
            "unit": figure.measure.unit,
            "value": None if isnan(figure.value) else figure.value,
            "low": None if isnan(figure.low) else figure.low,
            "high": None if isnan(figure.high) else figure.high,
            "count": figure.count,
            "target": figure.measure.target,
            "reached": figure.reached,
        }
        for figure in figures
    ]


def markdown(
    run: Run, parts: Sequence[Part], figures: Sequence[Figure], records: Sequence[Record], sheet: str | None
) -> str:
    """The document; `sheet` is the address of the contact sheet, if there is one."""
    lines = [*_head(run), ""]
    if sheet is not None:
        lines += ["The first items of each part, unchosen:", "", f"![Frames, prompts and verdicts]({sheet})", ""]
    lines += ["## Targets", "", *table([figure for figure in figures if figure.measure.target is not None], parts), ""]
    wrong = failures(records)
    for part in parts:
        lines += [f"## {part.title}", "", part.about, ""]
        lines += [*table([figure for figure in figures if figure.part == part.name]), ""]
        lines += _listed([one for one in wrong if one["part"] == part.name])
    return "\n".join(lines).rstrip() + "\n"


def table(figures: Sequence[Figure], parts: Sequence[Part] = ()) -> list[str]:
    """Lines of a table of `figures`, with the titles of their parts if `parts` are given."""
    titles = {part.name: f"{part.title}: " for part in parts}
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    rows += [row(figure, titles.get(figure.part, "")) for figure in figures]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in rows]


def row(figure: Figure, title: str = "") -> tuple[str, ...]:
    """The cells of a figure under `COLUMNS`."""
    measure = figure.measure
    interval = f"{_amount(figure.low, measure.unit)} to {_amount(figure.high, measure.unit)}" if figure.count else "–"
    if measure.target is None:
        target = "–"
    else:
        sign = "≥" if measure.unit == "share" else ">"
        target = f"{sign} {_amount(measure.target, measure.unit)}"
    value = f"{_amount(figure.value, measure.unit)} {measure.unit if measure.unit != 'share' else ''}".strip()
    return title + measure.label, value if figure.count else "–", interval, str(figure.count), target, verdict(figure)


def verdict(figure: Figure) -> str:
    """`reached` or `missed`, and whether the interval holds the target."""
    if figure.reached is None:
        return ""
    word = "reached" if figure.reached else "**missed**"
    return word if figure.sure else f"{word}, uncertain"


def machine() -> str:
    """The processor and how many of it this process may use."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {processors()} processors, {platform.system()} {platform.machine()}"


def _head(run: Run) -> list[str]:
    manifest = run.bundle.manifest
    source = f"weights {manifest.source[:12]}, manifest {run.bundle.digest[:12]}"
    lines = [
        "# Quality: what the shapes model makes, measured",
        "",
        f"Written by `{run.command}`; do not edit. Bundle `{manifest.name}` ({source}).",
    ]
    if not manifest.trained:
        lines += ["", "**This bundle has random, untrained weights; the figures only show that everything runs.**"]
    lines += [
        "",
        "Everything is made by the runtime with its default settings unless the command says otherwise, from scenes",
        "whose combinations of colour, kind and direction training never showed, written as mp4 and decoded again.",
        "What is seen in the decoded frames is found by colour thresholds, overlap with the four outlines, and the",
        "path of the centroid; nothing that judges is learned. Shares have Wilson intervals, means bootstrap ones; a",
        "verdict is uncertain where the interval holds the target.",
        "",
        f"{run.seconds / 60:.1f} minutes on {machine()}; processes: {run.workers}.",
    ]
    return lines


def _listed(wrong: Sequence[dict[str, Any]]) -> list[str]:
    """The first failures of one part."""
    if not wrong:
        return []
    more = f", the first {LISTED} of {len(wrong)}" if len(wrong) > LISTED else ""
    lines = [f"What went wrong{more} (`--json` lists all):", ""]
    for one in wrong[:LISTED]:
        lines.append(
            f"- `{one['prompt']}` (seed {one['seed']}): expected {one['expected']}; "
            f"seen {shorten(one['seen'], 80)}; wrong: {', '.join(one['wrong'])}"
        )
    return [*lines, ""]


def _amount(value: float, unit: str) -> str:
    if unit == "share":
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if unit == "" else f"{round(value, 2) + 0.0:.2f}"  # adding 0 takes the sign off -0


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
