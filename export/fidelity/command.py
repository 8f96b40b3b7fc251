"""`videolavit fidelity`: measure a folder of golden files.

Contract: everything is measured before anything is judged; the document is written whatever came out, and then
FidelityError (exit code 5) names what is out of bounds and which files nothing measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from runtime.commands.report import Report
from runtime.errors import ParityError, VideoLavitError
from runtime.files import check_output, published
from runtime.progress import Progress

GOLDEN = Path("tests/data/golden")
NAMED = 5  # failures named in the error


class FidelityError(ParityError):
    """Numbers differ from the reference's by more than is allowed, or some were not compared at all."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        VideoLavitError.__init__(self, f"fidelity: {'; '.join(problems[:NAMED])}{more}")


@click.command()
@click.option("--golden", type=click.Path(path_type=Path), default=GOLDEN, show_default=True, help="Golden files.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Markdown document to write, or to replace.")
@click.option(
    "--only", metavar="TEXT", default="", help="Only cases with TEXT in their name, such as a file's or torch."
)
@click.option("--json", "as_json", is_flag=True, help="Events and result as JSON lines on stdout.")
def fidelity(golden: Path, output: Path | None, only: str, as_json: bool) -> None:
    """Compare the model with golden files of the reference, from torch, ONNX Runtime and numpy."""
    from export.fidelity import report as tables
    from export.fidelity.registry import cases, uncovered

    if output is not None:
        check_output(output, (".md",), force=True)
    found = cases(golden)
    missed = uncovered(golden, found)
    chosen = [case for case in found if only in case.name]
    measured = []
    with Report(as_json) as report:
        for index, case in enumerate(chosen, 1):
            measured.append(tables.Measured(case, tuple(case.measure())))
            report.progress(Progress("fidelity", index, len(chosen)))
        if output is not None:
            with published(output) as staging:
                staging.write_text(tables.markdown(measured, missed), encoding="utf-8")
        problems = tables.failures(measured) + [f"{name}: no case measures this file" for name in missed]
        if not measured:
            problems.append(f"{golden}: there is nothing to measure")
        report.result(_text(measured), measurements=tables.records(measured), problems=problems)
    if problems:
        raise FidelityError(problems)


def _text(measured: Sequence[object]) -> str:
    """The overview as plain text."""
    from export.fidelity.report import OVERVIEW_COLUMNS, overview

    table = Table(box=None, pad_edge=False)
    for column in OVERVIEW_COLUMNS:
        table.add_column(column)
    for row in overview(measured):  # type: ignore[arg-type]
        table.add_row(*row)
    console = Console(width=180, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
