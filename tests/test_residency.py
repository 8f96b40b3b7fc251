"""Who stays in memory, the plan of it, and the measure of what a stage takes."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import memory
from runtime.bundle import EngineEntry, FileEntry
from runtime.noise import Noise
from runtime.pipeline import Pipeline
from runtime.requests import AnswerRequest, ImageRequest, ReconstructionRequest, Request, VideoRequest, resolve
from runtime.residency import Order, Stage, estimate, make_plan
from runtime.stages import stages_of

SHIPPED = Path(__file__).parent.parent / "engines" / "shapes"
SIZES = dict.fromkeys("abcdef", 1)


def entry(precision: str, backend: Any = "onnx") -> EngineEntry:
    file = FileEntry(path="x", bytes=100, sha256="")
    return EngineEntry(files=(file, file), inputs=(), outputs=(), backend=backend, precision=precision)


def test_half_precision_takes_twice_its_file_where_it_is_widened() -> None:
    assert [estimate(entry(p), "cpu") for p in ("fp32", "fp16", "bf16", "int8", "int4")] == [200, 400, 400, 200, 200]
    assert estimate(entry("fp16"), "cuda") == estimate(entry("fp16", "tensorrt"), "cpu") == 200


def fewest_loads(sequence: str, room: int) -> int:
    """By trying everything."""

    @cache
    def loads(at: int, resident: frozenset[str]) -> int:
        if at == len(sequence):
            return 0
        name = sequence[at]
        if name in resident:
            return loads(at + 1, resident)
        if len(resident) < room:
            return 1 + loads(at + 1, resident | {name})
        return 1 + min(loads(at + 1, resident - {one} | {name}) for one in resident)

    return loads(0, frozenset())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("room", [1, 2, 3])
def test_no_other_choice_loads_less_often(seed: int, room: int) -> None:
    letters = np.random.default_rng(seed).choice(list("abcde"), 12)
    sequence = "".join(name for name, _ in itertools.groupby(letters))
    plan = make_plan([(name,) for name in sequence], SIZES, room)
    assert len(plan.loads) == fewest_loads(sequence, room)
    assert plan.peak <= room and plan.fits


def test_what_is_not_needed_again_goes_first() -> None:
    stages: list[Stage] = [("a",), ("b",), ("c",), ("d",), ("b",), ("a",)]
    plan = make_plan(stages, SIZES, 3)
    assert [(load.engine, load.released) for load in plan.loads] == [("a", ()), ("b", ()), ("c", ()), ("d", ("c",))]
    assert "c before d" in plan.line()


def test_engines_of_one_stage_stay_together() -> None:
    stages: list[Stage] = [("a",), ("b", "c"), ("d",), ("b", "c")]
    plan = make_plan(stages, SIZES, 2)
    assert [load.released for load in plan.loads][:3] == [(), (), ("a",)]


def test_a_plan_without_a_budget_keeps_everything() -> None:
    plan = make_plan([("a",), ("b",), ("a",)], SIZES, None)
    assert plan.fits and plan.peak == 2 and not any(load.released for load in plan.loads)
    assert "kept" in plan.line()
    assert make_plan([], {}, 5).peak == 0


def test_an_unplanned_engine_changes_nothing_of_the_order() -> None:
    order = Order([("a",), ("b",), ("a",)])
    for name in "axbx":
        order.reach(name)
    assert order.now("b") and [order.distance(name) for name in "abx"] == [1, 0, 5]


# --- the stages of tasks ---------------------------------------------------------------------------------------


PICTURE = np.full((128, 128, 3), 120, np.uint8)
PICTURE[40:90, 40:90] = (230, 20, 20)  # something for the visual tokenizer to keep
GRID = np.random.default_rng(0).normal(size=(24, 2, 8, 8)).astype(np.float32)
FEW: dict[str, Any] = {"keyframe_steps": 2}
REQUESTS: dict[str, Request] = {
    "text to video": VideoRequest(prompt="a star", clips=2, candidates=4, video_steps=2, **FEW),
    "picture to video": VideoRequest(image=PICTURE, prompt="a star", candidates=4, video_steps=2, **FEW),
    "text to image": ImageRequest(prompt="a star", candidates=4, **FEW),
    "image to image": ImageRequest(image=PICTURE, **FEW),
    "raw motion": ReconstructionRequest(keyframe=PICTURE, motion=GRID, video_steps=2),
    "motion tokens": ReconstructionRequest(keyframe=PICTURE, motion=GRID, video_steps=2, through_tokens=True),
    "question": AnswerRequest(question="why?", max_answer_tokens=3),
    "question about a video": AnswerRequest(
        question="why?", pictures=(PICTURE,), motions=(GRID * 10,), max_answer_tokens=3
    ),
}


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with Pipeline(SHIPPED, threads=1) as opened:
        yield opened


@pytest.mark.parametrize("case", REQUESTS)
def test_a_task_asks_for_its_engines_in_the_planned_order(
    pipeline: Pipeline, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    get = pipeline._engines._get

    def noted(name: str, *rest: Any) -> Any:
        asked.append(name)
        return get(name, *rest)

    monkeypatch.setattr(pipeline._engines, "_get", noted)
    request = REQUESTS[case]
    if isinstance(request, VideoRequest):
        list(pipeline.generate_video(request, Noise(1)))
    elif isinstance(request, ImageRequest):
        pipeline.generate_image(request, Noise(1))
    elif isinstance(request, ReconstructionRequest):
        pipeline.reconstruct(request, Noise(1))
    else:
        pipeline.answer(request, Noise(1))

    planned = stages_of(resolve(request, pipeline.manifest.geometry, pipeline.manifest.defaults))
    at, unused = 0, [set(stage) for stage in planned]
    for name in asked:
        while name not in planned[at]:
            assert not unused[at], f"{unused[at]} of stage {at} was not asked for"
            at += 1
            assert at < len(planned), f"{name} was not planned"
        unused[at].discard(name)
    assert not any(unused)


def test_a_budget_changes_loads_and_nothing_else(pipeline: Pipeline) -> None:
    request = REQUESTS["text to video"]
    assert isinstance(request, VideoRequest)
    free = list(pipeline.generate_video(request, Noise(1)))
    with Pipeline(SHIPPED, threads=1, memory_budget=1 << 20) as tight:
        plan = tight.memory_plan(request)
        held = list(tight.generate_video(request, Noise(1)))
        assert len(tight._engines.loads) > len(plan.sizes)
        assert set(tight.engine_bytes) == set(plan.sizes)
    assert all((a.frames == b.frames).all() for a, b in zip(free, held, strict=True))


# --- measuring -------------------------------------------------------------------------------------------------


PEAKS = """
from runtime import memory
import mmap

with memory.Peak() as large:
    block = mmap.mmap(-1, 64 << 20)
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    block.close()
with memory.Peak() as small:
    pass
assert large.bytes - small.bytes > 48 << 20, (large.bytes, small.bytes)
assert memory.peak_rss() >= large.bytes
"""


@pytest.mark.skipif(memory.resident() is None, reason="the system does not say")
def test_a_stretch_of_work_has_its_own_peak() -> None:
    """In a process of its own: in this one, memory that other tests gave back may be used without growth."""
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_stages_of_a_run_have_peaks(pipeline: Pipeline) -> None:
    request = REQUESTS["text to image"]
    assert isinstance(request, ImageRequest)
    pipeline.generate_image(request, Noise(1))
    assert set(pipeline.stage_peaks) >= {"image tokens", "keyframe"}
    assert all(0 < peak <= pipeline.peak_rss for peak in pipeline.stage_peaks.values())


def test_the_order_of_a_longer_video_repeats() -> None:
    short = REQUESTS["text to video"]
    assert isinstance(short, VideoRequest)
    two, three = (stages_of(replace(short, clips=clips, finalists=2)) for clips in (2, 3))
    assert three[: len(two)] == two and ("keyframe_vae_encoder",) in three[len(two) :]
    assert [stages.count(("visual_encoder",)) for stages in (two, three)] == [2, 3]  # each key frame is chosen
