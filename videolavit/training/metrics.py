"""Figures of a run: CSV files that continue after a resume as if nothing had happened, and TensorBoard if asked.

Contract: the first column is `step`, counted in finished steps; every row is flushed. `MetricsFile` opened at a step
cuts what lies after it, a torn last line included. Numbers are written so that they read back exactly.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from runtime.errors import EnvironmentProblem
from runtime.files import published

Row = Mapping[str, float]


class MetricsFile:
    """One CSV file. A figure that appears for the first time gets a column of its own, empty in earlier rows."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._columns: list[str] = []
        rows: list[dict[str, str]] = []
        if path.is_file():
            with path.open(newline="") as stream:
                reader = csv.DictReader(stream)
                self._columns = list(reader.fieldnames or [])
                # A row in the making lacks its last columns; whole rows have text, perhaps empty, in each.
                rows = [row for row in reader if None not in row.values() and int(row["step"]) <= step]
        self._rewrite(rows)

    def write(self, step: int, row: Row) -> None:
        """Add `row`, measured after `step` steps."""
        values = {"step": str(step), **{name: repr(float(value)) for name, value in row.items()}}
        if not values.keys() <= set(self._columns):
            with self._path.open(newline="") as stream:
                rows = list(csv.DictReader(stream))
            self._columns += [name for name in values if name not in self._columns]
            self._rewrite(rows)
        with self._path.open("a", newline="") as stream:
            csv.DictWriter(stream, self._columns).writerow(values)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with published(self._path) as staging, staging.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, self._columns)
            if self._columns:
                writer.writeheader()
            writer.writerows(rows)


class Metrics:
    """Both files of a run, and TensorBoard's; use as a context manager."""

    def __init__(self, run: Path, step: int, *, tensorboard: bool) -> None:
        self._files = {"train": MetricsFile(run / "metrics.csv", step)}
        self._validation = run / "validation.csv"
        if self._validation.is_file():
            self._files["validation"] = MetricsFile(self._validation, step)
        self._board = _board(run / "tensorboard", step) if tensorboard else None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()

    def train(self, step: int, row: Row) -> None:
        self._write("train", step, row)

    def validation(self, step: int, row: Row) -> None:
        if "validation" not in self._files:
            self._files["validation"] = MetricsFile(self._validation, step)
        self._write("validation", step, row)

    def _write(self, kind: str, step: int, row: Row) -> None:
        self._files[kind].write(step, row)
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)


class Window:
    """Means over the steps since the last row; its state is two numbers a figure."""

    def __init__(self, state: Mapping[str, tuple[float, int]] | None = None) -> None:
        self._sums = {name: (total, count) for name, (total, count) in (state or {}).items()}

    def add(self, row: Row) -> None:
        for name, value in row.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)

    def state(self) -> dict[str, tuple[float, int]]:
        return dict(self._sums)

    def take(self) -> dict[str, float]:
        """The means; the window is empty afterwards."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise EnvironmentProblem(
            "tensorboard = true needs the package tensorboard, which is not installed; "
            "run: pip install 'videolavit[tensorboard]', or take the line out: metrics.csv has the same figures"
        ) from error
    return SummaryWriter(folder, purge_step=step + 1)
