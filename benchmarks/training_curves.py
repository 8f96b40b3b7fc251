"""How a trained model came about: a page with settings, time and curves of every stage, from the folders of its runs.

    PYTHONPATH=. python benchmarks/training_curves.py build/runs -o docs/shapes-model.md --machine "2 cores"

Contract: reads `settings.json`, `versions.json`, `metrics.csv` and `validation.csv` of each run and nothing else, so
the page says what was run, not what a recipe says. Stages stand in the order in which they are trained.
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


def page(runs: list[Run], machine: str) -> str:
    """The document."""
    versions = " ".join(f"{name} {version}" for name, version in runs[-1].versions.items() if name != "videolavit")
    lines = [
        "# The shapes model, as it was trained",
        "",
        f"By `benchmarks/training_curves.py` from the folders of the runs, {max(run.ended for run in runs)}.",
        f"Machine: {machine}. {versions}.",
        "What the model can do is measured in [quality.md](quality.md), what the stages are is in",
        "[training.md](training.md), and `make shapes-model` trains it again.",
        "",
        "| stage | steps | batch | seconds | end of the run |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        last = run.validation[-1] if run.validation else run.metrics[-1]
        shown = ", ".join(f"{name} {_short(value)}" for name, value in last.items() if name != "step")
        steps, batch = run.metrics[-1]["step"], run.settings["batch_size"]
        lines.append(f"| [{run.stage}](#{run.stage}) | {steps} | {batch} | {run.seconds:.0f} | {shown} |")
    lines.append(
        f"\nIn all {sum(run.seconds for run in runs) / 3600:.1f} hours in steps, without the tokenising of data."
    )
    for run in runs:
        lines += ["", f"## {run.stage}", *_curve(run), *_table(run)]
    return "\n".join(lines) + "\n"


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
    given = parser.parse_args()
    missing = [stage for stage in STAGES if not (given.runs / stage / "metrics.csv").is_file()]
    if missing:
        sys.exit(f"error: {given.runs}: has no run of {', '.join(missing)}; train those stages first")
    given.output.write_text(page([read(given.runs, stage) for stage in STAGES], given.machine))


if __name__ == "__main__":
    main()
