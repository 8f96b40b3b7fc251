"""Running the tokenizers over a source once: the work behind `videolavit tokenize`.

Contract: the folder's content is decided by the `Plan` and the checkpoint alone, not by the number of workers, nor by
how often the work was interrupted. Whatever ends it early, finished shards stay and nothing half-written does; the
same plan goes on from there with `resume`.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from threading import Event
from typing import Any

import msgspec
import torch

from runtime.errors import EnvironmentProblem, MediaError, UsageError
from runtime.files import writing
from runtime.progress import Observer, Progress, ignore
from videolavit.checkpoints import Checkpoint, load
from videolavit.training.data.encoding import Encoder, Item
from videolavit.training.data.errors import DataError
from videolavit.training.data.examples import Source
from videolavit.training.data.fields import FIELDS, Size, components_of, maker_digest, row_bytes
from videolavit.training.data.index import (
    FORMAT,
    INDEX,
    FieldInfo,
    Index,
    Recipe,
    Shard,
    check_content,
    read_index,
    write_index,
)
from videolavit.training.data.opening import open_source
from videolavit.training.data.shards import STAGING, ShardWriter, field_infos
from videolavit.training.memory import keep_freed_memory
from videolavit.training.settings import DRAWN, DataSettings

SHARD_BYTES = 128 << 20  # about what a shard's arrays take, and what a process holds of them
SHARD_ITEMS = 512
BATCH_ITEMS = 8  # items encoded at a time

_BAD = (MediaError, DataError)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to compute.

    Attributes:
        data: the source; not a tokenised one.
        checkpoint: folder of the checkpoint.
        fields: names of `FIELDS`. Without one per clip every item is a picture: of a video its first key frame.
        count: items, from the first one on; None: all that a source with an end has.
        seed: of keep draws and of sources drawn by lot.
        clips: most clips per item.
        size: (width, height) of key frames and latents' pictures; None: the model's video size.
        skip_bad: leave unusable files out instead of stopping at the first one.
        shard_items: items per shard; None: so many that a shard takes about `SHARD_BYTES`.
        device: where torch computes.
    """

    data: DataSettings
    checkpoint: Path
    fields: tuple[str, ...]
    count: int | None = None
    seed: int = 0
    clips: int = 1
    size: Size | None = None
    skip_bad: bool = False
    shard_items: int | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Result:
    """The finished index, and one line for every file that was left out in this run."""

    index: Index
    notes: tuple[str, ...]


def tokenize(
    plan: Plan,
    folder: Path,
    *,
    workers: int = 0,
    resume: bool = False,
    force: bool = False,
    observer: Observer = ignore,
) -> Result:
    """Compute what `plan` says into `folder`.

    Args:
        workers: processes that work on a shard each; 0 or 1: this process alone.
        resume: go on with an unfinished folder of the same plan; its finished shards are checked first.
        force: replace a tokenised folder.

    Raises:
        UsageError: a plan that cannot be carried out, a folder that exists, or a disk that is full.
        MediaError, DataError: an unusable file of the source, unless `plan.skip_bad`.
        CheckpointError: the checkpoint cannot be used.
    """
    worker = _Worker.of(plan)
    index = _opened(folder, worker.recipe, resume, force)
    todo = [number for number in range(index.shard_count) if number not in {shard.number for shard in index.shards}]
    notes: list[str] = []
    try:
        parallel = min(workers, len(todo)) > 1
        shards = _in_processes(plan, folder, todo, workers) if parallel else worker.shards(folder, todo, observer)
        with closing(shards):
            for shard, skipped in shards:
                notes += skipped
                index = _with(index, shard)
                write_index(folder, index)
                if parallel:
                    observer(Progress("shards", len(index.shards), index.shard_count))
    finally:
        for path in folder.glob(STAGING):
            path.unlink(missing_ok=True)
    if not index.items:
        why = f"; the first problem: {notes[0]}" if notes else ""
        raise DataError(f"{folder}: not one of {index.recipe.count} items can be used{why}")
    index = msgspec.structs.replace(index, complete=True)
    write_index(folder, index)
    return Result(index, tuple(notes))


def _opened(folder: Path, recipe: Recipe, resume: bool, force: bool) -> Index:
    """The index to go on with; the folder is made, emptied or checked."""
    fresh = Index(format=FORMAT, complete=False, recipe=recipe, shards=())
    if not folder.parent.is_dir():
        raise UsageError(f"{folder}: folder {folder.parent} does not exist; create it first")
    if folder.exists():
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / INDEX).is_file()):
            raise UsageError(f"{folder}: exists and is not a tokenised folder; choose another one")
        if (folder / INDEX).is_file() and resume:
            return _resumed(folder, recipe)
        if (folder / INDEX).is_file() and not force:
            raise UsageError(f"{folder}: exists already; add --resume to go on with it, or --force to replace it")
        for pattern in (INDEX, "shard-*", STAGING):  # the index first: what is left is then no tokenised folder
            for path in folder.glob(pattern):
                path.unlink()
    with writing(folder):
        folder.mkdir(exist_ok=True)
    write_index(folder, fresh)
    return fresh


def _resumed(folder: Path, recipe: Recipe) -> Index:
    """The index of `folder` with the shards that are whole. UsageError when it was made by another plan."""
    index = read_index(folder)
    for name in Recipe.__struct_fields__:
        before, now = getattr(index.recipe, name), getattr(recipe, name)
        if before != now:
            raise UsageError(
                f"{folder}: was begun with {name} {_shown(before)}, now it is {_shown(now)}; take the same, or --force"
            )
    whole = []
    for shard in index.shards:
        try:
            check_content(folder, shard)
        except DataError:
            continue  # it is made again
        whole.append(shard)
    return msgspec.structs.replace(index, complete=False, shards=tuple(whole))


def _shown(value: Any) -> str:
    """A value of a recipe in a few words."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(key if isinstance(each, FieldInfo) else f"{key} {each}" for key, each in value.items())


def _with(index: Index, shard: Shard) -> Index:
    shards = tuple(sorted((*index.shards, shard), key=lambda each: each.number))
    return msgspec.structs.replace(index, shards=shards)


class _Stopped(Exception):
    """Another process has failed or the user has stopped the work."""


@dataclass
class _Worker:
    """Everything one process needs to make shards."""

    plan: Plan
    checkpoint: Checkpoint
    source: Source
    count: int
    size: Size
    stop: Any = field(default_factory=Event)  # an event of threading or multiprocessing

    @classmethod
    def of(cls, plan: Plan) -> _Worker:
        keep_freed_memory()
        checkpoint = load(plan.checkpoint)
        geometry = checkpoint.config.geometry
        if plan.count is None and plan.data.source in DRAWN:
            raise UsageError(f"--count is missing; {plan.data.source} has no end, say how many items to make")
        source = open_source(plan.data, geometry, seed=plan.seed, clips=plan.clips)
        count = len(source) if plan.count is None else plan.count
        if count > len(source):
            raise UsageError(f"--count {count}: the source has {len(source)} items")
        moving = [name for name in plan.fields if FIELDS[name].of == "clip"]
        if moving and not any(source.moves(index) for index in range(count)):
            raise UsageError(
                f"--fields {','.join(moving)}: need motion, and there are only pictures in the source; leave them out"
            )
        return cls(plan, checkpoint, source, count, geometry.check_size("--size", plan.size or geometry.video_size))

    @cached_property
    def recipe(self) -> Recipe:
        """What the index says about the plan."""
        plan, config = self.plan, self.checkpoint.config
        per_item = plan.clips * sum(row_bytes(name, config, self.size) for name in plan.fields)
        fitting = max(1, min(SHARD_ITEMS, SHARD_BYTES // per_item))
        return Recipe(
            source=dict(self.source.identity()),
            count=self.count,
            fields=field_infos(plan.fields, config, self.size),
            model=config.name,
            components={name: maker_digest(self.checkpoint, name) for name in components_of(plan.fields)},
            seed=plan.seed,
            size=self.size,
            frames=config.geometry.frames,
            shard_items=plan.shard_items or fitting,
            skip_bad=plan.skip_bad,
        )

    @cached_property
    def encoder(self) -> Encoder:
        plan = self.plan
        return Encoder(self.checkpoint, plan.fields, self.size, plan.seed, plan.device)

    def shards(
        self, folder: Path, numbers: Sequence[int], observer: Observer = ignore
    ) -> Generator[tuple[Shard, list[str]], None, None]:
        """Make shards `numbers` in `folder`; with each come the notes on what was left out."""
        recipe = self.recipe
        for number in numbers:
            writer, notes = ShardWriter(recipe.fields), list[str]()
            first = number * recipe.shard_items
            last = min(first + recipe.shard_items, self.count)
            for start in range(first, last, BATCH_ITEMS):
                if self.stop.is_set():
                    raise _Stopped
                items = list(self._items(range(start, min(start + BATCH_ITEMS, last)), notes))
                if items:
                    writer.add(items, self.encoder.encode(items))
                observer(Progress("items", min(start + BATCH_ITEMS, last), self.count))
            yield writer.write(folder, number, len(notes)), notes

    def _items(self, indices: Sequence[int], notes: list[str]) -> Iterator[Item]:
        for index in indices:
            try:
                yield self._item(index)
            except _BAD as error:
                if not self.plan.skip_bad:
                    raise
                notes.append(str(error))

    def _item(self, index: int) -> Item:
        if any(FIELDS[name].of == "clip" for name in self.plan.fields) and self.source.moves(index):
            example = self.source.clip(index)
            frames, grid = example.per_clip()
            return Item(
                index=index,
                pictures=list(frames[:, 0]),
                frames=frames,
                grid=grid,
                captions=example.captions,
                questions=example.questions,
                negatives=example.negatives,
            )
        picture = self.source.picture(index)
        return Item(
            index=index,
            pictures=[picture.image],
            captions=picture.captions,
            questions=picture.questions,
            negatives=picture.negatives,
        )


_worker: _Worker | None = None  # of a process of the pool


def _start(plan: Plan, stop: Any, threads: int) -> None:
    """First thing in a process of the pool. Ctrl-C reaches the whole group; only the parent answers it."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _worker = _Worker.of(plan)
    _worker.stop = stop


def _make(folder: Path, number: int) -> tuple[Shard, list[str]]:
    if _worker is None:
        raise EnvironmentProblem("a worker process has not started; run with --workers 1")
    (made,) = _worker.shards(folder, [number])
    return made


def _in_processes(
    plan: Plan, folder: Path, numbers: Sequence[int], workers: int
) -> Generator[tuple[Shard, list[str]], None, None]:
    """As `_Worker.shards`, in the order in which they are finished."""
    context = get_context("spawn")  # torch's threads do not survive a fork
    stop = context.Event()
    threads = max(1, torch.get_num_threads() // workers)
    pool = ProcessPoolExecutor(min(workers, len(numbers)), context, _start, (plan, stop, threads))
    try:
        for future in as_completed([pool.submit(_make, folder, number) for number in numbers]):
            yield future.result()
    except BrokenProcessPool as error:
        raise EnvironmentProblem(
            "a worker process was ended from outside, perhaps for want of memory; go on with --resume and fewer "
            "--workers"
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
