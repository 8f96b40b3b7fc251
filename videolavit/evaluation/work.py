"""Running parts: in this process, or in several at once.

Contract: each process opens the bundle once and works in a temporary folder of its own; all are removed at the end.
Records come back in the order of the tasks, whatever the number of processes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from runtime.engines import processors
from runtime.pipeline import Pipeline
from videolavit.evaluation.context import Context, Settings
from videolavit.evaluation.parts import PARTS
from videolavit.evaluation.record import Record

Task = tuple[str, int]  # part, item


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """What a process opens: the options of `runtime.pipeline.Pipeline`, and the settings of the parts."""

    bundle: str
    settings: Settings
    threads: int | None = None
    provider: str = "cpu"
    memory_budget: int | None = None


def evaluate(
    tasks: Sequence[Task], place: Workplace, workers: int, done: Callable[[Task, list[Record]], None]
) -> list[Record]:
    """Records of all `tasks`; `done` is told of each task, in the order in which they finish."""
    found: dict[Task, list[Record]] = {}

    def keep(task: Task, records: list[Record]) -> None:
        found[task] = records
        done(task, records)

    with tempfile.TemporaryDirectory(prefix="videolavit-evaluate-") as folder:
        if workers == 1:
            with _pipeline(place) as pipeline:
                context = Context(pipeline, Path(folder), place.settings)
                for name, index in tasks:
                    keep((name, index), PARTS[name].run(context, index))
        else:
            share = replace(place, threads=place.threads or max(1, processors() // workers))
            _in_processes(tasks, share, Path(folder), workers, keep)
    return [record for task in tasks for record in found[task]]


def _in_processes(
    tasks: Sequence[Task], place: Workplace, folder: Path, workers: int, keep: Callable[[Task, list[Record]], None]
) -> None:
    with ProcessPoolExecutor(workers, get_context("spawn"), _open, (place, folder)) as pool:
        futures = {pool.submit(_work, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                keep(futures.pop(future), future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _pipeline(place: Workplace) -> Pipeline:
    return Pipeline(place.bundle, threads=place.threads, provider=place.provider, memory_budget=place.memory_budget)


_contexts: list[Context] = []  # of a worker process: one


def _open(place: Workplace, folder: Path) -> None:
    own = Path(tempfile.mkdtemp(dir=folder))
    _contexts.append(Context(_pipeline(place), own, place.settings))


def _work(task: Task) -> list[Record]:
    name, index = task
    return PARTS[name].run(_contexts[0], index)
