"""Every task through the runtime and through torch: same request, same noise, same result."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from golden import assert_close

from export.end_to_end import BOUNDS, Agreement, Follower, cases, check, precision_of
from export.engine import build_engine
from export.settings import EngineSettings
from runtime.bundle import Bundle
from runtime.detokenizers import KeyframeDetokenizer, KeyframeSettings, Reinjection
from runtime.engines import EngineSet
from runtime.errors import ParityError
from runtime.noise import Noise
from runtime.pipeline import Pipeline
from runtime.progress import Stopwatch, ignore
from runtime.requests import VideoRequest, resolve
from runtime.tokenizers import TextTokenizer
from videolavit.checkpoints import Checkpoint, initialise, load
from videolavit.reference import Reference

ROOT = Path(__file__).parent.parent
SHIPPED = Bundle.open(ROOT / "engines" / "shapes")
CASES = {case.task: case for case in cases(SHIPPED)}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load(ROOT / "checkpoints" / "shapes")


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Follower:
    return Follower(checkpoint, TextTokenizer(SHIPPED.file(SHIPPED.manifest.tokenizer)))


def test_shipped_bundle_is_made_from_this_checkpoint(checkpoint: Checkpoint) -> None:
    assert SHIPPED.manifest.trained and not checkpoint.untrained
    assert SHIPPED.manifest.source == checkpoint.digest, "engines/shapes is out of date: run `make bundle`"


@pytest.mark.parametrize("task", CASES)
def test_runtime_equals_torch(task: str, reference: Follower) -> None:
    with Pipeline(SHIPPED) as pipeline:
        ours = CASES[task].run(pipeline, Noise(3))
    found = reference.agreement(CASES[task], ours, Noise(3))
    check(found, BOUNDS["fp32"])
    assert found.tokens > 0 or "raw motion" in task
    assert found.latent_error > 0 or "question" in task, "nothing was compared"


def test_a_later_clip_starts_from_the_same_noised_frame(checkpoint: Checkpoint) -> None:
    """The stage that a long video adds, on one given frame, so that no rounding before it can tell the two apart."""
    reference = Reference(checkpoint, checkpoint.config, TextTokenizer(SHIPPED.file(SHIPPED.manifest.tokenizer)))
    manifest = SHIPPED.manifest
    frame = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    codes = np.arange(30)
    request = resolve(
        VideoRequest(prompt="-", keyframe_steps=6, inverse_rate=0.5, clips=2), manifest.geometry, manifest.defaults
    )
    with EngineSet(SHIPPED) as engines:
        ours, picture = KeyframeDetokenizer(engines, manifest, ignore, Stopwatch()).decode(
            codes,
            KeyframeSettings.of(request, (128, 128)),
            Noise(5),
            Reinjection(frame=frame, rate=0.5),
        )
    noise = Noise(5)
    start = reference.noise_last_frame(frame, 3, request, noise)
    ids = manifest.vocabulary.image_span(codes)
    theirs, expected = reference.decode_keyframe(ids, (128, 128), request, noise, start, 3)
    assert_close(ours, theirs, 1e-4 * np.abs(theirs).max())
    assert np.abs(picture.astype(int) - expected.astype(int)).max() <= 1


def test_a_wrong_result_is_noticed(reference: Follower) -> None:
    case = CASES["text to image"]
    with Pipeline(SHIPPED) as pipeline:
        [other] = case.run(pipeline, Noise(4))
    found = reference.agreement(case, [other], Noise(3))
    assert found.share == 1, "the noise is of the pictures, the ids are the same"
    for bounds in BOUNDS.values():
        with pytest.raises(ParityError, match="latents"):
            check(found, bounds)
    ids = [*other.ids]
    ids[2] = next(i for i in range(SHIPPED.manifest.vocabulary.first_visual, ids[2] + 2) if i != ids[2])
    found = reference.agreement(case, [replace(other, ids=tuple(ids))], Noise(4))
    assert 0 < found.share < 1, "torch goes on from the runtime's ids, and says which it would not have written"
    with pytest.raises(ParityError, match="ids"):
        check(found, BOUNDS["fp32"])


@pytest.mark.parametrize(
    "worse", [{"same": 0}, {"latent_error": 1.0}, {"latent_error": float("nan")}, {"psnr": 10.0}, {"ssim": 0.5}]
)
@pytest.mark.parametrize("precision", BOUNDS)
def test_every_bound_is_kept(precision: str, worse: dict[str, float]) -> None:
    good = Agreement("a task", tokens=100, same=100, psnr=60.0)
    check(good, BOUNDS[precision])
    with pytest.raises(ParityError, match="a task"):
        check(replace(good, **worse), BOUNDS[precision])


def test_a_bundle_of_lower_precision_is_held_to_its_bounds(
    checkpoint: Checkpoint, reference: Follower, tmp_path: Path
) -> None:
    """A language model in int4 writes other ids than torch, a wrong one writes none of torch's."""
    case, found = CASES["text to video"], []  # a picture's few ids alone may all be torch's
    for model in (checkpoint, initialise("shapes", 1)):
        bundle = with_language_model(model, tmp_path / str(len(found)))
        assert precision_of(bundle) == "int4"
        with Pipeline(bundle) as pipeline:
            ours = case.run(pipeline, Noise(3))
        found.append(reference.agreement(case, ours, Noise(3)))
    right, wrong = found
    check(right, BOUNDS["int4"])
    assert right.share < 1
    with pytest.raises(ParityError, match="ids"):
        check(wrong, BOUNDS["int4"])


def with_language_model(checkpoint: Checkpoint, folder: Path) -> Bundle:
    """The shipped bundle with the language model of `checkpoint` in int4."""
    shutil.copytree(SHIPPED.path, folder)
    (folder / "language_model.onnx").unlink()
    built = build_engine(checkpoint, "language_model", folder, EngineSettings(precision="int4"), compare=False)
    engines = SHIPPED.manifest.engines | {"language_model": built.entry}
    return Bundle(folder, msgspec.structs.replace(SHIPPED.manifest, engines=engines), "")


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
