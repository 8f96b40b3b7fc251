"""Which engines stay in memory: what they take, when they are needed next, and the plan that follows.

Contract: a task is a list of stages in the order they run, each the names of the engines it uses. Whoever must go to
make room is the one whose next stage is farthest away (Belady's rule, which loads least often of all); what the task
does not need again goes before that, on the assumption that another task like it may follow. Functions of names and
numbers; `runtime.engines` does what is decided here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from runtime.bundle import EngineEntry

Stage = tuple[str, ...]


def estimate(entry: EngineEntry, provider: str) -> int:
    """Bytes that an engine's weights take, before it was ever loaded.

    ONNX Runtime computes on the CPU in float32: half-precision weights become twice as large when they are loaded.
    Quantised ones stay as they are, and so does everything on a GPU.
    """
    files = sum(file.bytes for file in entry.files)
    widened = entry.backend == "onnx" and provider == "cpu" and entry.precision in ("fp16", "bf16")
    return 2 * files if widened else files


class Order:
    """Where a task stands in its stages."""

    def __init__(self, stages: Sequence[Stage] = ()) -> None:
        self._stages = tuple(stages)
        self._now = 0

    def reach(self, name: str) -> None:
        """Engine `name` is used now: go on to the first stage, from the present one, that has it, if any does."""
        for index in range(self._now, len(self._stages)):
            if name in self._stages[index]:
                self._now = index
                return

    def now(self, name: str) -> bool:
        """Whether the present stage uses the engine."""
        return bool(self._stages) and name in self._stages[self._now]

    def distance(self, name: str) -> int:
        """Stages until an engine is used again; beyond all of them as if the task were to run once more."""
        stages = self._stages[self._now :] + self._stages
        return next((i for i, stage in enumerate(stages) if name in stage), len(stages))

    def first_to_go(self, names: Iterable[str]) -> str:
        """Of `names`, least recently used first, the one to release: the first of those needed latest."""
        return max(names, key=self.distance)


@dataclass(frozen=True)
class Load:
    """One load of a plan: the engine, and what is released for it."""

    engine: str
    released: tuple[str, ...]


@dataclass(frozen=True)
class MemoryPlan:
    """What a task loads and releases.

    Attributes:
        budget: bytes of engines to keep at once; None for all.
        sizes: bytes each engine of the task takes, estimated or measured.
        loads: in order.
        peak: bytes of engines in memory at most.
        largest: the engine that takes most.
    """

    budget: int | None
    sizes: Mapping[str, int]
    loads: tuple[Load, ...]
    peak: int
    largest: str

    @property
    def fits(self) -> bool:
        return self.budget is None or self.peak <= self.budget

    def line(self) -> str:
        """The plan in one line."""
        text = f"{len(self.sizes)} engines of {_size(sum(self.sizes.values()))} in all"
        if self.budget is None:
            return f"{text} are kept once loaded"
        again = len(self.loads) - len(self.sizes)
        text += f", at most {_size(self.peak)} of the {_size(self.budget)} allowed at once"
        if not self.fits:
            text += f" (more, because {self.largest} alone takes {_size(self.sizes[self.largest])})"
        released = [f"{', '.join(load.released)} before {load.engine}" for load in self.loads if load.released]
        text += f"; released: {'; '.join(_shortened(released))}" if released else "; nothing is released"
        return f"{text}; {again} loaded again" if again else text


def make_plan(stages: Sequence[Stage], sizes: Mapping[str, int], budget: int | None) -> MemoryPlan:
    """What running `stages` loads and releases, with engines of `sizes` bytes under `budget`."""
    order, resident, loads, peak = Order(stages), [], [], 0  # type: Order, list[str], list[Load], int
    for stage in stages:
        for name in stage:
            order.reach(name)
            released = []
            if name not in resident:
                released = room_for(sizes[name], resident, sizes, budget, order)
                loads.append(Load(name, tuple(released)))
            resident = [one for one in resident if one not in released and one != name] + [name]
            peak = max(peak, sum(sizes[one] for one in resident))
    used = {name: sizes[name] for stage in stages for name in stage}
    return MemoryPlan(budget, used, tuple(loads), peak, max(used, key=lambda name: used[name]) if used else "")


def room_for(
    size: int, resident: Collection[str], sizes: Mapping[str, int], budget: int | None, order: Order
) -> list[str]:
    """Whom to release of `resident`, least recently used first, so that `size` more bytes fit; all if it never does."""
    left, released = list(resident), []  # type: list[str], list[str]
    while budget is not None and left and size + sum(sizes[name] for name in left) > budget:
        released.append(order.first_to_go(left))
        left.remove(released[-1])
    return released


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _shortened(items: list[str], most: int = 6) -> list[str]:
    return items if len(items) <= most else [*items[:most], f"and {len(items) - most} more"]
