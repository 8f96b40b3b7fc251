"""`videolavit tokenize`: what it computes, how it goes on after every kind of end, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from training_samples import GEOMETRY, contents, moving_square, plan_of, same_item

from runtime.errors import UsageError
from runtime.progress import Progress
from runtime.video import write_video
from videolavit.checkpoints import Checkpoint, load
from videolavit.cli import main
from videolavit.training.data.encoding import Encoder, Item, keep_draw
from videolavit.training.data.errors import DataError
from videolavit.training.data.fields import FIELDS, check_fields
from videolavit.training.data.index import INDEX, read_index
from videolavit.training.data.shapes_source import ShapesSource
from videolavit.training.data.tokenized import TokenizedDataset
from videolavit.training.data.tokenizing import tokenize
from videolavit.training.settings import DataSettings


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return load(tiny_checkpoint)


@given(st.integers(1, 60), st.integers(0, 2**40), st.floats(-30, 30))
def test_a_keep_draw_keeps_something_and_is_repeatable(patches: int, seed: int, bias: float) -> None:
    logits = np.stack([np.full(patches, -bias), np.full(patches, bias)], -1).astype(np.float32)
    keep = keep_draw(logits, seed, 3, 1)
    assert keep.shape == (patches,) and set(keep) <= {0.0, 1.0} and keep.any()
    assert np.array_equal(keep, keep_draw(logits, seed, 3, 1))


def test_fields_are_named_in_one_order() -> None:
    assert check_fields(["visual_ids", "motion", "motion"]) == ("motion", "visual_ids")
    for bad in ([], ["motions"]):
        with pytest.raises(UsageError, match="choose from motion, "):
            check_fields(bad)


def test_the_encoder_makes_empty_rows_of_pictures(checkpoint: Checkpoint) -> None:
    names = ("motion", "motion_latent", "motion_ids", "latents")
    rows = Encoder(checkpoint, names, (64, 32), 0).encode([Item(index=0, pictures=[np.zeros((9, 9, 3), np.uint8)])])
    for name in names:
        shape = FIELDS[name].shape
        assert shape is not None and rows[name].shape == (0, *shape(checkpoint.config, (64, 32)))


def test_a_source_of_pictures_has_no_motion(tmp_path: Path, tiny_checkpoint: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    data = DataSettings(source="folder", path=str(tmp_path))
    with pytest.raises(UsageError, match="--fields motion: need motion"):
        tokenize(plan_of(tiny_checkpoint, data=data, count=None, fields=("motion", "keyframe")), tmp_path / "out")
    result = tokenize(plan_of(tiny_checkpoint, data=data, count=None, fields=("keyframe",)), tmp_path / "out")
    assert result.index.shards[0].clips == 0 and result.index.shards[0].pictures == 1


def test_without_motion_fields_items_are_pictures(tmp_path: Path, tiny_checkpoint: Path) -> None:
    tokenize(plan_of(tiny_checkpoint, fields=("keyframe",), count=2), tmp_path / "out")
    item, picture = TokenizedDataset(tmp_path / "out")[1], ShapesSource(GEOMETRY).picture(1)
    assert item["captions"] == picture.captions and item["questions"] == picture.questions
    assert item["negatives"] == picture.negatives
    assert np.array_equal(item["keyframe"][0].numpy(), picture.image)


def test_content_does_not_depend_on_interruption_or_processes(tmp_path: Path, tiny_checkpoint: Path) -> None:
    plan = plan_of(tiny_checkpoint)
    tokenize(plan, tmp_path / "once")

    class Enough(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.done == 4:
            raise Enough

    with pytest.raises(Enough):
        tokenize(plan, tmp_path / "twice", observer=stop)
    unfinished = read_index(tmp_path / "twice")
    assert not unfinished.complete and [shard.number for shard in unfinished.shards] == [0]
    with pytest.raises(DataError, match="1 of 3 shards"):
        TokenizedDataset(tmp_path / "twice")
    with pytest.raises(UsageError, match="--resume"):
        tokenize(plan, tmp_path / "twice")
    with pytest.raises(UsageError, match=r"begun with fields motion, motion_latent, keyframe, now it is motion;"):
        tokenize(plan_of(tiny_checkpoint, fields=("motion",)), tmp_path / "twice", resume=True)
    tokenize(plan, tmp_path / "twice", workers=2, resume=True)
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")
    tokenize(plan, tmp_path / "twice", force=True)
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")


def test_a_killed_run_goes_on(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Really killed: the process cannot clean up."""
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "videolavit", "tokenize", "shapes", "-o", str(folder)]
    command += ["--checkpoint", str(tiny_checkpoint), "--fields", "keyframe", "--count", "4000", "--shard-items", "4"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        tick = threading.Event()
        while process.poll() is None and len(list(folder.glob("shard-*.safetensors"))) < 2:
            tick.wait(0.02)
        process.kill()
    (folder / ".shard-00009.1.safetensors").write_bytes(b"half")
    whole = folder / read_index(folder).shards[0].arrays
    before = whole.stat().st_mtime_ns
    index = read_index(folder)
    smaller = msgspec.structs.replace(
        index, recipe=msgspec.structs.replace(index.recipe, count=12), shards=index.shards[:2]
    )
    (folder / INDEX).write_bytes(msgspec.json.encode(smaller))
    plan = plan_of(tiny_checkpoint, fields=("keyframe",), count=12, shard_items=4)
    tokenize(plan, folder, resume=True)
    assert whole.stat().st_mtime_ns == before  # not made again
    assert not list(folder.glob(".shard-*"))
    dataset = TokenizedDataset(folder)
    dataset.verify()
    tokenize(plan, tmp_path / "other")
    other = TokenizedDataset(tmp_path / "other")
    assert len(dataset) == len(other) == 12
    assert all(same_item(dataset[index], other[index]) for index in range(12))


def test_unusable_files_stop_the_work_or_are_counted(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_video(folder / "a.mp4", moving_square(10), 6, {}, False)
    (folder / "b.mp4").write_bytes((folder / "a.mp4").read_bytes()[:200])
    (folder / "c.mp4").write_bytes((folder / "a.mp4").read_bytes())
    (folder / "c.json").write_text("{")
    command = ["tokenize", str(folder), "-o", str(tmp_path / "out"), "--checkpoint", str(tiny_checkpoint)]
    command += ["--fields", "motion", "--json"]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 6
    error = capsys.readouterr().err.strip()
    assert "b.mp4" in error and "\n" not in error
    with pytest.raises(SystemExit) as finished:
        main([*command, "--force", "--skip-bad"])
    assert finished.value.code == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (lines[-1]["items"], lines[-1]["skipped"]) == (1, 2)
    notes = " ".join(line["text"] for line in lines if line["event"] == "note")
    assert "b.mp4" in notes and "c.json" in notes
    assert [item["index"] for item in map(TokenizedDataset(tmp_path / "out").__getitem__, range(1))] == [0]


def test_a_full_disk_is_one_line(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("videolavit.training.data.shards.save_file", full)
    with pytest.raises(UsageError, match=r"shard-00000\.safetensors: cannot be written: No space left on device"):
        tokenize(plan_of(tiny_checkpoint), tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*"))
    monkeypatch.undo()
    tokenize(plan_of(tiny_checkpoint), tmp_path / "out", resume=True)
    assert len(TokenizedDataset(tmp_path / "out")) == 5


def test_a_folder_that_is_something_else_is_left_alone(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    for force in (False, True):
        with pytest.raises(UsageError, match="is not a tokenised folder"):
            tokenize(plan_of(tiny_checkpoint), tmp_path, force=force)
    assert (tmp_path / "letter.txt").read_text() == "dear"
    with pytest.raises(UsageError, match="--count is missing"):
        tokenize(plan_of(tiny_checkpoint, count=None), tmp_path / "out")
    with pytest.raises(UsageError, match="--size"):
        tokenize(plan_of(tiny_checkpoint, size=(50, 50)), tmp_path / "out")


def test_the_command_writes_a_folder(tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tokenize", "shapes", "-o", str(tmp_path / "out"), "--checkpoint", str(tiny_checkpoint)]
    command += ["--count", "2", "--clips", "2", "--split", "held-out", "--shapes", "2"]
    with pytest.raises(SystemExit) as finished:
        main(command)
    assert finished.value.code == 0
    assert "2 items (4 pictures, 4 clips) in 1 shards" in capsys.readouterr().out
    item = TokenizedDataset(tmp_path / "out")[1]
    assert item["motion_ids"].shape[0] == len(item["visual_ids"]) == 2
    index = read_index(tmp_path / "out")
    assert index.recipe.source == {"source": "shapes", "split": "held-out", "seed": 0, "clips": 2, "shapes": 2}
    assert set(index.recipe.components) == {"motion_tokenizer", "visual_tokenizer"}
