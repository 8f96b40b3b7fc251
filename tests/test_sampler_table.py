"""The table of samplers: every line from the same tokens and noise, told by its distance from the exact one."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from runtime.bundle import Bundle

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def samplers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("samplers")


def cells(document: str, options: str) -> list[str]:
    (line,) = (line for line in document.splitlines() if line.startswith(f"| {options} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_line_like_the_exact_one_is_equal_to_it_and_others_are_not(
    samplers: Any, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = {"video_sampler": "heun", "video_spacing": "karras", "video_steps": 2, "size": (64, 64)}
    guided = {"video_steps": 2, "size": (64, 64), "video_guidance_interval": (0.5, 60.0)}
    monkeypatch.setattr(samplers, "VIDEO_EXACT", exact)
    monkeypatch.setattr(samplers, "VIDEO_ROWS", (exact, guided))
    monkeypatch.setattr(samplers, "KEYFRAME_EXACT", {"keyframe_steps": 3})
    monkeypatch.setattr(samplers, "KEYFRAME_ROWS", ({"keyframe_steps": 2}, {"keyframe_steps": 3}))
    document = samplers.measure(Bundle.open(tiny_bundle), 1, 1)
    same = cells(document, "`--video-sampler heun --video-spacing karras --video-steps 2 --size 64x64`")
    assert same[1] == "3"  # the last of Heun's steps is one call
    assert same[4] == "100.0 (100.0 to 100.0)"
    other = cells(document, "`--video-steps 2 --size 64x64 --video-guidance-interval 0.5-60`")
    assert other[1] == "2, 2 of one row"  # the two levels are the highest and the lowest
    assert float(other[4].split()[0]) < 100
    assert cells(document, "`--keyframe-steps 3`")[4] == "100.0 (100.0 to 100.0)"
    assert float(cells(document, "`--keyframe-steps 2`")[4].split()[0]) < 100


def test_what_is_asked_for_is_looked_for_in_pictures_and_clips(samplers: Any) -> None:
    from videolavit.shapes import render, sample_scene

    scene = sample_scene(3, split="held-out", shapes=2)
    frames = render(scene, 128)
    assert samplers.seen_in_picture(scene, frames[0])
    assert samplers.seen_in_clip(scene, frames)
    other = sample_scene(4, split="held-out", shapes=2)
    assert not samplers.seen_in_picture(other, frames[0])
    assert not samplers.seen_in_clip(other, frames)
