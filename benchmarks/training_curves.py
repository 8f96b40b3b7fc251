"""How a trained model came about: a page with settings, time and curves of every stage, from the folders of its runs.

    PYTHONPATH=. python benchmarks/training_curves.py build/runs -o docs/shapes-model.md --machine "2 cores"

Contract: reads `settings.json`, `versions.json`, `metrics.csv` and `validation.csv` of each run and nothing else, so
the page says what was run, not what a recipe says. Stages stand in the order in which they are trained. Those whose
runs are gone are taken as they stand on an earlier page, `--before`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from dataclasses import dataclass
from datetime import date, datetime, timezone
from pathlib import Path

# Stage -> its curve: a column of validation.csv, or of metrics.csv where a stage validates nothing.
STAGES = {
    "vision": "shapes_named",
    "visual-tokenizer": "shapes_named",
    "motion-tokenizer": "error",
    "keyframe-vae": "psnr",
    "video-vae": "psnr",
    "keyframe-detokenizer": "psnr",
    "keyframe-detokenizer-more": "psnr",
    "language-model": "loss",
    "instruct": "loss",
    "instruct-more": "answers",
    "instruct-binding": "answers colour",
    "instruct-last": "answers",
    "instruct-binding-directions": "answers direction",
    "instruct-binding-both": "answers direction",
    "instruct-binding-written": "image",
    "instruct-together": "answers",
    "instruct-directions": "direction",
    "instruct-longest": "answers",
    "keyframe-detokenizer-third": "psnr",
    "video-detokenizer-short": "psnr",
    "video-detokenizer": "psnr",
    "video-detokenizer-scattered": "error",
    "video-detokenizer-scattered-more": "error",
    "video-detokenizer-more": "psnr",
    "video-detokenizer-scattered-third": "error",
    "video-detokenizer-scenery": "psnr",
    "video-detokenizer-noisy": "error",
    "video-detokenizer-noisy-more": "error",
    "video-detokenizer-whole": "psnr",
    "video-detokenizer-noisy-third": "error",
    "video-detokenizer-whole-more": "psnr",
    "keyframe-detokenizer-fourth": "psnr",
    "instruct-deep": "answers",
    "instruct-pairs": "answers",
    "video-detokenizer-noisy-fourth": "error",
    "video-detokenizer-whole-third": "psnr",
    "instruct-negatives": "negatives",
    "instruct-told": "answers",
    "instruct-told-more": "answers",
    "instruct-places": "negatives",
    "instruct-placed": "motion",
    "instruct-ordered": "negatives",
    "instruct-answered": "motion",
    "instruct-answered-more": "motion",
    "video-detokenizer-whole-fourth": "psnr",
    "video-detokenizer-rebuilt": "psnr",
    "video-detokenizer-rebuilt-more": "psnr",
}
POINTS = 12  # of a curve
ROWS = 8  # of a table


@dataclass(frozen=True)
class Run:
    """One stage's run: settings and versions as stored; rows of its two tables as text."""

    stage: str
    settings: dict[str, object]
    versions: dict[str, str]
    metrics: list[dict[str, str]]
    validation: list[dict[str, str]]
    ended: date

    @property
    def seconds(self) -> float:
        """Spent in steps and validations, over all parts of an interrupted run."""
        return float(self.metrics[-1]["seconds"])


def read(folder: Path, stage: str) -> Run:
    """The run of `stage` under `folder`."""
    run = folder / stage

    def table(name: str) -> list[dict[str, str]]:
        path = run / name
        return list(csv.DictReader(path.open())) if path.is_file() else []

    return Run(
        stage,
        json.loads((run / "settings.json").read_text()),
        json.loads((run / "versions.json").read_text()),
        table("metrics.csv"),
        table("validation.csv"),
        datetime.fromtimestamp((run / "metrics.csv").stat().st_mtime, timezone.utc).date(),
    )


@dataclass(frozen=True)
class Part:
    """What the page says of one stage: its row of the table and its section; the seconds that the row names."""

    row: str
    section: str
    seconds: float


def part(run: Run) -> Part:
    """What there is to say of a run."""
    last = run.validation[-1] if run.validation else run.metrics[-1]
    shown = ", ".join(f"{name} {_short(value)}" for name, value in last.items() if name != "step")
    steps, batch = run.metrics[-1]["step"], run.settings["batch_size"]
    row = f"| [{run.stage}](#{run.stage}) | {steps} | {batch} | {run.seconds:.0f} | {shown} |"
    return Part(row, "\n".join([f"## {run.stage}", *_curve(run), *_table(run)]), run.seconds)


def parts_of(text: str) -> dict[str, Part]:
    """What an earlier page says of its stages."""
    head, *sections = text.rstrip().split("\n\n## ")
    rows = {stage: line for line in head.splitlines() for stage in STAGES if line.startswith(f"| [{stage}]")}
    by_stage = {section.partition("\n")[0]: f"## {section}" for section in sections}
    return {stage: Part(row, by_stage[stage], float(row.split(" | ")[3])) for stage, row in rows.items()}


def page(runs: list[Run], before: dict[str, Part], machine: str) -> str:
    """The document: stages of `runs`, and those of `before` that are none of them."""
    versions = " ".join(f"{name} {version}" for name, version in runs[-1].versions.items() if name != "videolavit")
    own = {run.stage: part(run) for run in runs}
    parts = [(own.get(stage) or before[stage]) for stage in STAGES]
    return "\n".join(
        [
            "# The shapes model, as it was trained",
            "",
            f"By `benchmarks/training_curves.py` from the folders of the runs, {max(run.ended for run in runs)}.",
            f"Machine: {machine}. {versions}.",
            "What the model can do is measured in [quality.md](quality.md), what the stages are is in",
            "[training.md](training.md), and `make shapes-model` trains it again.",
            "",
            "| stage | steps | batch | seconds | end of the run |",
            "|---|---|---|---|---|",
            *(each.row for each in parts),
            "",
            f"In all {sum(each.seconds for each in parts) / 3600:.1f} hours in steps, without the tokenising of data.",
            *(f"\n{each.section}" for each in parts),
            "",
        ]
    )


def _curve(run: Run) -> list[str]:
    column = STAGES[run.stage]
    rows = run.validation if run.validation and column in run.validation[0] else run.metrics
    if column not in rows[0]:
        column, rows = "loss", run.metrics
    rows = _thinned(rows, POINTS)
    steps = ", ".join(row["step"] for row in rows)
    values = ", ".join(_short(row[column]) for row in rows)
    return [
        "",
        "```mermaid",
        "xychart-beta",
        f'    x-axis "step" [{steps}]',
        f'    y-axis "{column}"',
        f"    line [{values}]",
        "```",
    ]


def _table(run: Run) -> list[str]:
    if not run.validation:
        return []
    names = list(run.validation[0])
    rows = [[_short(row[name]) for name in names] for row in _thinned(run.validation, ROWS)]
    return ["", "| " + " | ".join(names) + " |", "|---" * len(names) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _thinned(rows: list[dict[str, str]], most: int) -> list[dict[str, str]]:
    """At most `most` rows, evenly spread, first and last among them."""
    if len(rows) <= most:
        return rows
    return [rows[round(index * (len(rows) - 1) / (most - 1))] for index in range(most)]


def _short(value: str) -> str:
    return f"{float(value):.4g}" if value else ""


def main() -> None:
    parser = argparse.ArgumentParser(description="A page on how a model was trained.")
    parser.add_argument("runs", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--machine", required=True, help="what it was trained on, in words")
    parser.add_argument("--before", type=Path, help="earlier page with the stages that have no run")
    given = parser.parse_args()
    before = parts_of(given.before.read_text()) if given.before else {}
    there = [stage for stage in STAGES if (given.runs / stage / "metrics.csv").is_file()]
    missing = [stage for stage in STAGES if stage not in there and stage not in before]
    if missing or not there:
        sys.exit(f"error: {given.runs}: has no run of {', '.join(missing or STAGES)}; train those stages first")
    given.output.write_text(page([read(given.runs, stage) for stage in there], before, given.machine))


if __name__ == "__main__":
    main()
