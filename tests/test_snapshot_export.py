"""From official files to a bundle: both language models are exported, and questions go to the fine-tuned one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from snapshot_factory import Style, write_snapshot

from export.build import ANSWERING, engines_for, export_bundle, plan, verify_engines
from export.commands import export
from export.end_to_end import cases
from export.graphs.registry import ENGINES
from runtime import pipeline
from runtime.bundle import Bundle
from runtime.engines import EngineSet
from runtime.errors import BundleError, UsageError
from runtime.noise import Noise
from runtime.pipeline import Pipeline
from runtime.requests import AnswerRequest, ImageRequest
from runtime.tokenizers import TextTokenizer
from videolavit.checkpoints import Checkpoint, RandomWeights, load
from videolavit.config import PRESETS
from videolavit.inventory import FINE_TUNED, UNDERSTANDING, for_task
from videolavit.models.components import COMPONENTS
from videolavit.reference import Reference

SHAPES = PRESETS["tiny"]
WEIGHTS = RandomWeights(SHAPES, 0)
OWN = [for_task(name) for name in ANSWERING]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official") / "v1"
    return write_snapshot(folder, SHAPES, WEIGHTS, Style(llm="bin", shards=2))


@pytest.fixture(scope="module")
def checkpoint(snapshot: Path) -> Checkpoint:
    return load(snapshot)


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """What answering needs, made from the snapshot."""
    folder = tmp_path_factory.mktemp("bundles") / "asking"
    export_bundle(checkpoint, folder, tasks=["understand"])
    return Bundle.open(folder)


def test_the_bundle_has_the_fine_tuned_engines(bundle: Bundle, checkpoint: Checkpoint) -> None:
    assert sorted(bundle.manifest.engines) == sorted(OWN)
    assert bundle.manifest.trained
    assert bundle.manifest.source == checkpoint.digest
    seen = []
    with EngineSet(bundle) as engines:
        verify_engines(engines, checkpoint, lambda name, parity: seen.append(name))
        with pytest.raises(BundleError, match="has no engine video_unet"):
            engines.get("video_unet")
    assert sorted(seen) == sorted(OWN)


def test_answers_are_those_of_the_fine_tuned_model(bundle: Bundle, checkpoint: Checkpoint) -> None:
    assert pipeline.UNDERSTAND == UNDERSTANDING
    tokenizer = TextTokenizer(bundle.file(bundle.manifest.tokenizer))
    reference = Reference(checkpoint, checkpoint.config, tokenizer)
    modules = {name: checkpoint.component(name) for name in (*FINE_TUNED, *map(for_task, FINE_TUNED))}
    from_modules = Reference(modules, checkpoint.config, tokenizer)
    general = Reference({name: modules[name] for name in FINE_TUNED}, checkpoint.config, tokenizer)
    asked = [case for case in cases(bundle) if "question" in case.task]
    assert len(asked) == 3
    answers = {}
    with Pipeline(bundle) as model:
        for case in asked:
            ours, theirs, others = (
                case.run(side, Noise(0))[0].ids  # type: ignore[union-attr]
                for side in (model, reference, general)
            )
            assert ours == theirs, case.task
            assert case.run(from_modules, Noise(0))[0].ids == ours  # type: ignore[union-attr]
            answers[case.task] = (ours, others)
    assert any(ours != others for ours, others in answers.values()), "both models answer alike: this proves nothing"


def test_generation_does_not_see_the_fine_tuned_model(checkpoint: Checkpoint, bundle: Bundle) -> None:
    tokenizer = TextTokenizer(bundle.file(bundle.manifest.tokenizer))
    common = {name: checkpoint.component(name) for name in ("language_model",)}
    both = Reference(checkpoint, checkpoint.config, tokenizer)
    alone = Reference(common, checkpoint.config, tokenizer)
    request = ImageRequest(prompt="a red circle", greedy=True, keyframe_steps=2)
    settings = both.settings(request)
    ids = tokenizer.encode("a red circle")
    # Also after a question, which uses the other modules.
    both.answer(AnswerRequest(question="what?", max_answer_tokens=2), Noise(0))
    np.testing.assert_array_equal(
        both.write_image_ids(ids, settings, Noise(0)), alone.write_image_ids(ids, settings, Noise(0))
    )


def test_tasks_pick_the_engines(checkpoint: Checkpoint, tiny_checkpoint: Path) -> None:
    assert engines_for(checkpoint) == [*ENGINES, *(for_task(n) for n in ENGINES if n in ANSWERING)]
    assert engines_for(checkpoint, ["generate"]) == list(ENGINES)
    single = load(tiny_checkpoint)  # one model for both tasks
    assert engines_for(single) == list(ENGINES)
    assert sorted(engines_for(single, ["understand"])) == sorted(ANSWERING)


def test_the_plan_counts_both_models(checkpoint: Checkpoint, snapshot: Path, tmp_path: Path) -> None:
    parts = {part.component: part for part in plan(checkpoint)}
    assert set(parts) == {*COMPONENTS, *map(for_task, FINE_TUNED)}
    assert parts["language_model"].parameters == parts[for_task("language_model")].parameters
    assert parts[for_task("motion_tokenizer")].engines == (for_task("motion_encoder"),)
    arguments = [str(snapshot), "-o", str(tmp_path / "b"), "--plan", "--json", "--tasks", "understand"]
    result = CliRunner().invoke(export, arguments)
    assert result.exit_code == 0, result.output
    planned = json.loads(result.stdout.splitlines()[-1])["plan"]
    assert {engine for part in planned for engine in part["engines"]} == set(OWN)
    wrong = CliRunner().invoke(export, [str(snapshot), "-o", str(tmp_path / "b"), "--tasks", "genrate"])
    assert isinstance(wrong.exception, UsageError) and "generate, understand" in str(wrong.exception)
