"""Every task through the runtime and through torch: same request, same noise, same result."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.end_to_end import agreement, cases
from runtime.bundle import Bundle
from runtime.errors import ParityError
from runtime.noise import Noise
from runtime.pipeline import Pipeline
from runtime.requests import VideoRequest
from runtime.tokenizers import TextTokenizer
from videolavit.checkpoints import Checkpoint, initialise
from videolavit.reference import Reference

SHIPPED = Bundle.open(Path(__file__).parent.parent / "engines" / "shapes")
CASES = {case.task: case for case in cases(SHIPPED)}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return initialise("shapes", 0)


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Reference:
    return Reference(checkpoint, checkpoint.config, TextTokenizer(SHIPPED.file(SHIPPED.manifest.tokenizer)))


def test_shipped_bundle_is_made_from_this_checkpoint(checkpoint: Checkpoint) -> None:
    if SHIPPED.manifest.trained:
        pytest.skip("the shipped bundle is trained; its checkpoint is compared where it lies")
    assert SHIPPED.manifest.source == checkpoint.digest, "engines/shapes is out of date: run `make bundle`"


@pytest.mark.parametrize("task", CASES)
def test_runtime_equals_torch(task: str, reference: Reference) -> None:
    with Pipeline(SHIPPED) as pipeline:
        ours = CASES[task].run(pipeline, Noise(3))
    found = agreement(task, ours, CASES[task].run(reference, Noise(3)))
    assert found.tokens > 0 or "raw motion" in task


def test_a_wrong_result_is_noticed(reference: Reference) -> None:
    with Pipeline(SHIPPED) as pipeline:
        ours = CASES["text to image"].run(pipeline, Noise(3))
        other = CASES["text to image"].run(pipeline, Noise(4))
    with pytest.raises(ParityError):
        agreement("text to image", ours, other)


def test_same_seed_same_clip_and_memory_budget_changes_nothing() -> None:
    request = VideoRequest(prompt="a red circle moving right", keyframe_steps=2, video_steps=2)
    results = []
    for budget in (None, 1 << 20):
        with Pipeline(SHIPPED, memory_budget=budget) as pipeline:
            results.append(next(pipeline.generate_video(request, Noise(11))))
    first, second = results
    assert first.image_ids == second.image_ids
    assert first.motion_ids == second.motion_ids
    assert (first.frames == second.frames).all()
    assert len(first.motion_ids) == SHIPPED.manifest.geometry.motion_tokens
