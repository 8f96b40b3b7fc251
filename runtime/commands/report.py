"""How a command speaks: progress and notes on stderr, results on stdout, or JSON lines on stdout.

Contract: with `--json` every line on stdout is one JSON object with an `event` key, the last one `result`;
without, stdout holds the result alone. Progress bars appear only on a terminal.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from runtime.progress import Progress

if TYPE_CHECKING:
    from runtime.residency import MemoryPlan


class Report:
    """Use as a context manager around a command's work."""

    def __init__(self, as_json: bool) -> None:
        self._json = as_json
        self._tasks: dict[str, Any] = {}
        console = Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description:>16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=as_json or not sys.stderr.isatty(),
        )

    def __enter__(self) -> Report:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def progress(self, progress: Progress) -> None:
        """Observer for the pipeline."""
        if self._json:
            self._emit("progress", stage=progress.stage, done=progress.done, total=progress.total)
            return
        if progress.stage not in self._tasks or progress.done <= 1:
            previous = self._tasks.get(progress.stage)
            if previous is None or self._bars.tasks[previous].finished:
                self._tasks[progress.stage] = self._bars.add_task(progress.stage, total=progress.total)
        self._bars.update(self._tasks[progress.stage], completed=progress.done, total=progress.total)

    def finish_stage(self, stage: str) -> None:
        """A stage without a known total is over."""
        task = self._tasks.get(stage)
        if task is not None:
            self._bars.update(task, total=self._bars.tasks[task].completed)

    def note(self, text: str) -> None:
        """One line the user should know, on stderr (an event with --json)."""
        if self._json:
            self._emit("note", text=text)
        else:
            self._bars.console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)

    def plan(self, plan: MemoryPlan) -> None:
        """What a task will keep in memory: a note where a budget decides it, an event with --json."""
        if self._json:
            loads = [{"engine": load.engine, "released": load.released} for load in plan.loads]
            self._emit(
                "memory plan",
                text=plan.line(),
                budget_bytes=plan.budget,
                peak_bytes=plan.peak,
                fits=plan.fits,
                engine_bytes=dict(plan.sizes),
                loads=loads,
            )
        elif plan.budget is not None:
            self.note(f"memory plan: {plan.line()}")

    def event(self, event: str, **values: Any) -> None:
        """Something programs may want before the end; nothing for people."""
        if self._json:
            self._emit(event, **values)

    def result(self, text: str, **values: Any) -> None:
        """The outcome: `text` for people, `values` for programs."""
        if self._json:
            self._emit("result", **values)
        else:
            click.echo(text)

    def _emit(self, event: str, **values: Any) -> None:
        click.echo(msgspec.json.encode({"event": event, **values}).decode())
