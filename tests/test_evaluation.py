"""The parts of an evaluation on models whose quality is known, and what is written of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from click.testing import CliRunner

from runtime.bundle import Bundle, find
from runtime.errors import MediaError, UsageError
from runtime.images import resize_image
from runtime.pipeline import Pipeline
from runtime.requests import AnswerResult, ClipResult
from runtime.video import write_video
from videolavit.cli import cli
from videolavit.evaluation.command import NAMES
from videolavit.evaluation.context import Context, Settings
from videolavit.evaluation.figures import Figure, figures
from videolavit.evaluation.long import border_steps
from videolavit.evaluation.parts import PARTS
from videolavit.evaluation.questions import same_answer
from videolavit.evaluation.reconstruction import moving_scene
from videolavit.evaluation.record import Measure, Record
from videolavit.evaluation.report import Run, failures, markdown, records_of, row, verdict
from videolavit.evaluation.sheet import sheet
from videolavit.evaluation.statistics import bootstrap, wilson
from videolavit.evaluation.verdicts import said_size, said_speed
from videolavit.shapes import Scene, questions, render, sample_scene

SHIPPED = Bundle.open(find("shapes"), check_hashes=False)


class Oracle:
    """A pipeline that knows the scene: what it makes is right, or wrong in a known way."""

    def __init__(self, scene: Scene, backwards: bool = False, fails: bool = False) -> None:
        self.manifest = SHIPPED.manifest
        self.scene, self.backwards, self.fails = scene, backwards, fails

    def generate_video(self, request: Any, noise: Any) -> Iterator[ClipResult]:
        if self.fails:
            raise UsageError("no picture")
        frames = render(self.scene)[:: -1 if self.backwards else 1]
        for index in range(request.clips):
            shown = frames if index == 0 else np.repeat(frames[-1:], len(frames), axis=0)
            yield cast(ClipResult, SimpleNamespace(index=index, frames=shown))

    def reconstruct(self, request: Any, noise: Any) -> ClipResult:
        frames = render(self.scene)
        if not request.motion.any():
            frames = np.repeat(resize_image(request.keyframe, (128, 128))[None], len(frames), axis=0)
        return cast(ClipResult, SimpleNamespace(frames=frames))

    def answer(self, request: Any, noise: Any) -> AnswerResult:
        known = {question: answer for question, answer, _ in self.asked}
        return AnswerResult(ids=(), text="no idea" if self.fails else known[request.question])


def measured(part: str, folder: Path, shapes: int | None = 1, index: int = 0, **options: bool) -> list[Record]:
    oracle = Oracle(sample_scene(0), **options)
    context = Context(cast(Pipeline, oracle), folder, Settings(strips=1))
    number = context.number(part, index)
    oracle.scene = (
        moving_scene(number) if part == "reconstruction" else sample_scene(number, split="held-out", shapes=shapes)
    )
    oracle.asked = questions(oracle.scene, np.random.default_rng(number))
    return PARTS[part].run(context, index)


@pytest.mark.parametrize(("part", "shapes"), [("prompts", 1), ("two-shapes", 2), ("image-to-video", 1), ("long", 1)])
def test_a_perfect_model_is_right(part: str, shapes: int, tmp_path: Path) -> None:
    (record,) = measured(part, tmp_path, shapes)
    assert record.checks and all(record.checks.values()), record
    assert record.strips[0][1].shape == (8, 80, 80, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_runs_backwards_is_wrong_in_direction_only(tmp_path: Path) -> None:
    (record,) = measured("prompts", tmp_path, index=1, backwards=True)
    assert {key for key, right in record.checks.items() if not right} == {"direction", "all"}
    (found,) = failures([record])
    assert found["wrong"] == ["direction"] and found["prompt"] == record.prompt and found["seed"] == record.seed


@pytest.mark.parametrize(("part", "shapes"), [("prompts", 1), ("two-shapes", 2), ("image-to-video", 1), ("long", 1)])
def test_a_model_that_makes_nothing_is_wrong_and_says_why(part: str, shapes: int, tmp_path: Path) -> None:
    (record,) = measured(part, tmp_path, shapes, fails=True)
    assert not any(record.checks.values()) and record.seen == "no picture" and record.strips == ()


def test_settings_that_are_not_allowed_are_no_failure_of_the_model(tmp_path: Path) -> None:
    context = Context(cast(Pipeline, Oracle(sample_scene(0))), tmp_path, Settings(video_steps=1))
    with pytest.raises(UsageError, match="video-steps"):
        PARTS["prompts"].run(context, 0)


def test_answers(tmp_path: Path) -> None:
    right = measured("questions", tmp_path, None)
    assert {"colour", "kind", "direction", "count", "answer"} <= {key for record in right for key in record.checks}
    assert all(all(record.checks.values()) for record in right)
    assert not any(any(record.checks.values()) for record in measured("questions", tmp_path, None, fails=True))


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("Red.", "red", True),
        ("the red circle", "red circle", True),
        ("the blue star and the red circle", "the red circle and the blue star", True),
        ("a red star moving up and to the right and a blue circle staying still",) * 2 + (True,),
        ("up and to the right", "up and to the left", False),
        ("red", "green", False),
        ("yes it does", "yes", False),
        ("", "no", False),
    ],
)
def test_what_counts_as_the_same_answer(answer: str, expected: str, same: bool) -> None:
    assert same_answer(answer, expected) is same


def test_reconstruction_is_measured_against_both_baselines(tmp_path: Path) -> None:
    (record,) = measured("reconstruction", tmp_path)
    assert record.checks == {"better": True}
    values = record.values
    assert values["raw over repeat"] > 6 and values["raw over zero"] > 6
    assert values["psnr zero"] == pytest.approx(values["psnr repeat"], abs=0.5)
    assert values["ssim raw"] > values["ssim repeat"]
    assert [name for name, _ in record.strips] == ["original", "raw", "tokens", "zero", "repeat"]


def test_real_videos_are_rebuilt(tmp_path: Path) -> None:
    scene = moving_scene(0)
    video = tmp_path / "street.mp4"
    write_video(video, render(scene, 256), SHIPPED.manifest.geometry.reconstruction_fps, {}, force=False)
    context = Context(cast(Pipeline, Oracle(scene)), tmp_path, Settings(strips=1, media=(video,)))
    assert PARTS["media"].items(200, context.settings) == 1
    (record,) = PARTS["media"].run(context, 0)
    assert record.prompt == "street.mp4 (clips: 1)" and record.checks == {"better": True}
    assert record.values["raw over zero"] > 6
    assert record.strips[0][0] == "original"


def test_steps_at_borders_are_told_from_those_within() -> None:
    frames = np.zeros((10, 4, 4, 3), np.uint8)
    frames[6:] = 40
    steps = border_steps(frames, [6])
    assert steps == {"border": 40, "within": 0, "ratio": 160}
    assert border_steps(frames, [3])["within"] == pytest.approx(5)


def test_size_and_speed_are_read_from_the_caption() -> None:
    assert said_size("There is a little red star sliding down.") == "small"
    assert said_size("a Big circle") == "large"
    assert said_size("a red star") is None
    assert said_speed("a circle moving right at a slow pace") == "slowly"
    assert said_speed("a star rapidly moving up") == "quickly"
    assert said_speed("a star moving up") is None


def test_intervals() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0) == (0, 1)
    assert wilson(200, 200)[1] == 1
    low, high = bootstrap([1.0, 2.0, 3.0, 4.0])
    assert 1 < low < 2.5 < high < 4
    assert bootstrap([5.0]) == (5.0, 5.0)
    assert all(np.isnan(bootstrap([])))


def record(index: int, right: bool, **values: float) -> Record:
    checks = {"colour": right, "kind": True}
    return Record(
        part="prompts", index=index, seed=9, prompt="a | b", expected="x", seen="y", checks=checks, values=values
    )


def figure(value: float, low: float, high: float, target: float | None, unit: str = "share", count: int = 9) -> Figure:
    measure = Measure(key="k", label="l", unit=unit, target=target)
    return Figure(part="prompts", measure=measure, value=value, low=low, high=high, count=count)


def test_verdicts() -> None:
    assert verdict(figure(0.97, 0.95, 0.99, 0.9)) == "reached"
    assert verdict(figure(0.97, 0.88, 0.99, 0.9)) == "reached, uncertain"
    assert verdict(figure(0.8, 0.7, 0.85, 0.9)) == "**missed**"
    assert verdict(figure(0.8, 0.7, 0.95, 0.9)) == "**missed**, uncertain"
    assert verdict(figure(0.8, 0.7, 0.95, None)) == ""
    assert verdict(figure(0.0, -1.0, 1.0, 0.0, "dB")).startswith("**missed**")
    assert verdict(figure(float("nan"), 0.0, 1.0, 0.9, count=0)) == ""


def test_an_amount_that_rounds_to_nothing_has_no_sign() -> None:
    assert row(figure(-0.001, -0.002, 0.001, 0.0, "dB"))[1:3] == ("0.00 dB", "0.00 to 0.00")


def test_figures_and_document() -> None:
    part = PARTS["prompts"]
    records = [record(index, index > 0) for index in range(4)]
    found = {one.measure.key: one for one in figures(part, records)}
    assert found["colour"].value == 0.75 and found["colour"].reached is False
    assert found["kind"].value == 1 and found["kind"].reached is True
    assert found["speed"].count == 0 and found["speed"].reached is None
    run = Run(bundle=SHIPPED, command="videolavit evaluate shapes", seconds=60, workers=2)
    text = markdown(run, [part], list(found.values()), records, "quality.png")
    assert "| colour | 75.0 % | 30.1 % to 95.4 % | 4 | ≥ 97.0 % | **missed** |" in text
    assert "| speed, where said | – | – | 0 | – |  |" in text
    assert "(quality.png)" in text and "`videolavit evaluate shapes`" in text
    assert "wrong: colour" in text
    assert json.dumps(records_of(found.values()), allow_nan=False)


def test_sheet_holds_strips_and_text() -> None:
    strip = np.full((8, 80, 80, 3), 7, np.uint8)
    shown = Record(part="prompts", index=0, seed=0, prompt="p" * 300, expected="", seen="", strips=(("film", strip),))
    picture = sheet([PARTS["prompts"]], [shown])
    assert picture is not None and (picture == 7).all(axis=-1).sum() == 8 * 80 * 80
    assert (picture[:, picture.shape[1] // 2 :] == 255).all()  # a single row stands in the first column
    assert sheet([PARTS["prompts"]], [record(0, True)]) is None


def invoke(*arguments: str) -> list[dict[str, Any]]:
    result = CliRunner().invoke(cli, ["evaluate", "shapes", "--json", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_command_measures_the_shipped_bundle_in_two_processes(tmp_path: Path) -> None:
    document, picture = tmp_path / "quality.md", tmp_path / "quality.png"
    few = ("-n", "1", "--keyframe-steps", "2", "--video-steps", "2")
    events = invoke("--only", "judge,prompts", *few, "-o", str(document), "--sheet", str(picture))
    result = events[-1]
    assert result["event"] == "result" and result["seconds"] > 0
    found = {(one["part"], one["key"]): one for one in result["figures"]}
    assert found["judge", "kind"]["value"] == 1
    assert found["prompts", "kind"]["count"] == 1
    assert "![Frames, prompts and verdicts](quality.png)" in document.read_text(encoding="utf-8")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_number_of_processes_changes_nothing() -> None:
    one, two = (invoke("--only", "judge", "-n", "2", "--workers", workers)[-1] for workers in ("1", "2"))
    assert one["figures"] == two["figures"] and one["failures"] == two["failures"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--media", "nowhere"], "is not a folder"),
        (["--only", "media"], "--media"),
        (["--only", "judge", "--video-steps", "1"], "--video-steps 1"),
        (["-o", "quality.txt"], "unknown output type"),
    ],
)
def test_mistakes_are_said_before_work_starts(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CliRunner().invoke(cli, ["evaluate", "shapes", *arguments], catch_exceptions=False)
    for parts in ("colour", ","):
        assert CliRunner().invoke(cli, ["evaluate", "shapes", "--only", parts]).exit_code == 2


def test_a_video_that_is_too_short_is_refused_before_work_starts(tmp_path: Path) -> None:
    write_video(tmp_path / "short.mp4", np.zeros((5, 64, 64, 3), np.uint8), 6, {}, force=False)
    with pytest.raises(MediaError, match="short"):
        invoke("--only", "judge,media", "--media", str(tmp_path))


def test_a_sheet_without_frames_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    events = invoke("--only", "judge", "-n", "1", "--sheet", str(tmp_path / "sheet.png"))
    assert any("sheet.png is not written" in event.get("text", "") for event in events)
    assert list(tmp_path.iterdir()) == []


def test_the_command_names_every_part() -> None:
    assert tuple(PARTS) == NAMES
