"""Every task through the runtime and through torch: same request, same noise, same result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from golden import assert_close

from export.end_to_end import agreement, cases
from runtime.bundle import Bundle
from runtime.detokenizers import KeyframeDetokenizer, KeyframeSettings, Reinjection
from runtime.engines import EngineSet
from runtime.errors import ParityError
from runtime.noise import Noise
from runtime.pipeline import Pipeline
from runtime.progress import Stopwatch, ignore
from runtime.requests import VideoRequest, resolve
from runtime.tokenizers import TextTokenizer
from videolavit.checkpoints import Checkpoint, initialise
from videolavit.reference import Reference

SHIPPED = Bundle.open(Path(__file__).parent.parent / "engines" / "shapes")
CASES = {case.task: case for case in cases(SHIPPED)}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return initialise("tiny", 0)


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


def test_a_later_clip_starts_from_the_same_noised_frame(reference: Reference) -> None:
    """The stage that a long video adds, on one given frame, so that no rounding before it can tell the two apart."""
    manifest = SHIPPED.manifest
    frame = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    codes = np.arange(30)
    request = resolve(
        VideoRequest(prompt="-", keyframe_steps=6, inverse_rate=0.5, clips=2), manifest.geometry, manifest.defaults
    )
    with EngineSet(SHIPPED) as engines:
        ours, picture = KeyframeDetokenizer(engines, manifest, ignore, Stopwatch()).decode(
            codes,
            KeyframeSettings(size=(128, 128), steps=6, guidance=request.image_guidance),
            Noise(5),
            Reinjection(frame=frame, rate=0.5),
        )
    noise = Noise(5)
    start = reference.noise_last_frame(frame, 3, request, noise)
    ids = manifest.vocabulary.image_span(codes)
    theirs, expected = reference.decode_keyframe(ids, (128, 128), request, noise, start, 3)
    assert_close(ours, theirs, 1e-4 * np.abs(theirs).max())
    assert np.abs(picture.astype(int) - expected.astype(int)).max() <= 1


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
