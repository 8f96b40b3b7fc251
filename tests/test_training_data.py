"""Sources, `videolavit tokenize`, and reading tokenised folders back."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import tarfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime.errors import CheckpointError, MediaError, UsageError
from runtime.geometry import Geometry
from runtime.images import resize_image, to_signed, tokenizer_pixels
from runtime.motion.grid import model_motion
from runtime.motion.mpeg4 import MotionSettings
from runtime.motion.sources import understanding_clips
from runtime.progress import Progress
from runtime.video import write_video
from videolavit.checkpoints import Checkpoint, initialise, load
from videolavit.cli import main
from videolavit.training.data import open_source
from videolavit.training.data.encoding import Encoder, Item, keep_draw
from videolavit.training.data.errors import DataError
from videolavit.training.data.examples import Question
from videolavit.training.data.fields import FIELDS, check_fields
from videolavit.training.data.folder import FolderSource
from videolavit.training.data.index import INDEX, FieldInfo, read_index
from videolavit.training.data.labels import from_json, from_jsonl, from_text
from videolavit.training.data.media import in_memory
from videolavit.training.data.shapes_source import ShapesSource
from videolavit.training.data.shards import ShardWriter
from videolavit.training.data.tokenized import TokenizedDataset
from videolavit.training.data.tokenizing import Plan, tokenize
from videolavit.training.data.webdataset import WebDatasetSource
from videolavit.training.settings import DataSettings

GEOMETRY = Geometry(image_size=128, patch_size=16, motion_grid=(16, 16), video_size=(128, 128))
SHAPES = DataSettings(source="shapes")
CHEAP = ("motion", "motion_latent", "keyframe")  # no network


def moving_square(frames: int, side: int = 64) -> list[np.ndarray]:
    """A textured square that moves right by 4 pixels a frame."""
    noise = np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)
    pictures = []
    for index in range(frames):
        picture = np.full((side, side, 3), 90, np.uint8)
        left = 4 * index % (side - 20)
        picture[20:40, left : left + 20] = noise
        pictures.append(picture)
    return pictures


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos, one of them short and one long enough for two clips, and a picture, with labels of every kind."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "more").mkdir()
    write_video(folder / "a.mp4", moving_square(10), 6, {}, False)
    (folder / "a.txt").write_text("a square\n\na square moves right\n")
    write_video(folder / "more" / "b.mp4", moving_square(76), 6, {}, False)
    said = {"captions": ["long"], "questions": [{"question": "what?", "answer": "a square", "topic": "kind"}]}
    (folder / "more" / "b.json").write_text(json.dumps(said))
    Image.fromarray(moving_square(1, side=48)[0]).save(folder / "c.png")
    (folder / "captions.jsonl").write_text(json.dumps({"file": "c.png", "captions": ["a picture"]}) + "\n")
    return folder


@pytest.fixture(scope="module")
def shards(media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The media as WebDataset shards."""
    folder = tmp_path_factory.mktemp("tar")
    for shard, names in (("0.tar", ("a.txt", "a.mp4", "c.png")), ("1.tar", ("more/b.mp4", "more/b.json"))):
        with tarfile.open(folder / shard, "w") as archive:
            for name in names:
                archive.add(media / name, name)
            other = tarfile.TarInfo("a.seg.png")
            archive.addfile(other, io.BytesIO(b""))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return load(tiny_checkpoint)


@pytest.fixture(scope="module")
def everything(tiny_checkpoint: Path, media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All fields of the media folder, two clips per item at most, two items per shard."""
    folder = tmp_path_factory.mktemp("tokens") / "all"
    plan = Plan(
        data=DataSettings(source="folder", path=str(media)),
        checkpoint=tiny_checkpoint,
        fields=tuple(FIELDS),
        clips=2,
        shard_items=2,
        seed=5,
        size=(64, 32),
    )
    tokenize(plan, folder)
    return folder


def plan_of(checkpoint: Path, **changes: Any) -> Plan:
    return Plan(**{"data": SHAPES, "checkpoint": checkpoint, "fields": CHEAP, "count": 5, "shard_items": 2} | changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same_item(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) if isinstance(left[name], torch.Tensor) else left[name] == right[name]
        for name in left
    )


# Sources


def test_shapes_are_a_pure_function_of_the_index() -> None:
    source, again = (ShapesSource(GEOMETRY, seed=3, clips=2, size=10) for _ in range(2))
    example, same = source.clip(7), again.clip(7)
    assert np.array_equal(example.frames, same.frames) and np.array_equal(example.grid, same.grid)
    assert (example.captions, example.questions) == (same.captions, same.questions)
    assert example.frames.shape == (48, 128, 128, 3) and example.frames.dtype == np.uint8
    assert example.grid.shape[:2] == (48, 2) and example.grid.shape[2] in (8, 16)
    frames, grid = example.per_clip()
    assert frames.shape[:2] == (2, 24) and grid.shape[:3] == (2, 24, 2)
    assert not grid[:, 0].any()  # a key frame has no motion
    assert example.captions and all(isinstance(q, Question) and q.topic for q in example.questions)
    picture = source.picture(7)
    assert np.array_equal(picture.image, example.frames[0])
    assert not np.array_equal(ShapesSource(GEOMETRY, seed=4).picture(7).image, picture.image)
    assert not np.array_equal(ShapesSource(GEOMETRY, seed=3, split="held-out").picture(7).image, picture.image)
    with pytest.raises(IndexError):
        source.picture(10)


def test_folder_reads_media_and_all_kinds_of_labels(media: Path) -> None:
    source = FolderSource(media, GEOMETRY, clips=2)
    assert [file.as_posix() for file in source.files] == ["a.mp4", "c.png", "more/b.mp4"]
    assert [source.moves(index) for index in range(3)] == [True, False, True]
    short = source.clip(0)
    assert short.captions == ("a square", "a square moves right") and short.clip_count == 1
    assert len(short.frames) == 24 and np.array_equal(short.frames[10], short.frames[23])  # the last frame stays
    assert not short.grid[10:].any()
    assert short.grid[1:10, 0].max() > 0  # rightwards
    picture = source.picture(1)
    assert picture.captions == ("a picture",) and picture.image.shape == (48, 48, 3)
    long = source.clip(2)
    assert long.clip_count == 2 and long.questions == (Question("what?", "a square", "kind"),)
    assert np.array_equal(source.picture(2).image, FolderSource(media, GEOMETRY).clip(2).frames[0])
    with pytest.raises(MediaError, match=r"c\.png: is a picture"):
        source.clip(1)


def test_clips_of_a_file_are_the_runtimes(media: Path) -> None:
    for path, clips in ((media / "a.mp4", 1), (media / "more" / "b.mp4", 2)):
        expected = understanding_clips(path, MotionSettings(fps=6), clips, 24)
        source = FolderSource(media, GEOMETRY, clips=clips)
        frames, grid = source.clip(source.files.index(path.relative_to(media))).per_clip()
        assert len(frames) == len(expected) == clips
        for found_frames, found_grid, clip in zip(frames, grid, expected, strict=True):
            assert np.array_equal(found_frames[0], clip.keyframe)
            assert np.array_equal(found_grid, clip.grid)


def test_tar_shards_give_what_the_folder_gives(media: Path, shards: Path) -> None:
    folder, tar = FolderSource(media, GEOMETRY, clips=2), WebDatasetSource(shards, GEOMETRY, clips=2)
    assert len(tar) == 3
    for index, other in ((0, 0), (2, 2)):
        left, right = tar.clip(index), folder.clip(other)
        assert np.array_equal(left.frames, right.frames) and np.array_equal(left.grid, right.grid)
        assert (left.captions, left.questions) == (right.captions, right.questions)
    assert np.array_equal(tar.picture(1).image, folder.picture(1).image) and not tar.moves(1)
    assert len(WebDatasetSource(shards / "1.tar", GEOMETRY)) == 1
    again = pickle.loads(pickle.dumps(tar))  # noqa: S301  (what a data loader does)
    assert np.array_equal(again.picture(1).image, tar.picture(1).image)


def test_damaged_media_name_the_file(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    source = FolderSource(tmp_path, GEOMETRY)
    with pytest.raises(MediaError, match=r"bad\.mp4: is not a video"):
        source.clip(0)
    with pytest.raises(MediaError, match=r"bad\.png: is not a picture"):
        source.picture(1)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "bad.mp4", "k.mp4")
    with pytest.raises(MediaError, match=r"x\.tar:k\.mp4: is not a video") as caught:
        WebDatasetSource(tmp_path / "x.tar", GEOMETRY).clip(0)
    assert "\n" not in str(caught.value) and "/proc" not in str(caught.value)
    cut = tmp_path / "cut.tar"
    cut.write_bytes((shards / "0.tar").read_bytes()[:3000])
    with pytest.raises(MediaError, match=r"cut\.tar"):
        WebDatasetSource(cut, GEOMETRY)
    with pytest.raises(UsageError, match="no shard"):
        WebDatasetSource(tmp_path / "none", GEOMETRY)
    with tarfile.open(tmp_path / "two.tar", "w") as archive:
        archive.add(tmp_path / "bad.mp4", "k.mp4")
        archive.add(tmp_path / "bad.png", "k.png")
    with pytest.raises(MediaError, match="same key"):
        WebDatasetSource(tmp_path / "two.tar", GEOMETRY)


def test_labels_are_strict(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.json: .*caption"):
        from_json(b'{"caption": []}', "x.json")
    with pytest.raises(DataError, match=r"c\.jsonl: line 2"):
        from_jsonl(b'{"file": "a.mp4"}\n{"file": 3}\n', "c.jsonl")
    with pytest.raises(DataError, match="has a line already"):
        from_jsonl(b'{"file": "a.mp4"}\n\n{"file": "a.mp4"}\n', "c.jsonl")
    with pytest.raises(DataError, match=r"x\.txt: is not UTF-8"):
        from_text(b"\xff\xfe\xff", "x.txt")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "captions.jsonl").write_text('{"file": "b.png"}\n')
    with pytest.raises(DataError, match=r"b\.png: there is no such"):
        FolderSource(tmp_path, GEOMETRY)


@given(st.lists(st.text(), max_size=5), st.lists(st.tuples(st.text(), st.text(), st.text()), max_size=3))
def test_labels_survive_json(captions: list[str], asked: list[tuple[str, str, str]]) -> None:
    questions = [dict(zip(("question", "answer", "topic"), each, strict=True)) for each in asked]
    labels = from_json(json.dumps({"captions": captions, "questions": questions}).encode(), "x")
    assert labels.captions == tuple(captions)
    assert labels.questions == tuple(Question(*each) for each in asked)


@given(st.binary(max_size=300))
def test_text_labels_never_fail_otherwise(content: bytes) -> None:
    try:
        labels = from_text(content, "x.txt")
    except DataError as error:
        assert str(error).startswith("x.txt: ")
    else:
        assert all(caption.strip() == caption != "" for caption in labels.captions)


def test_memory_files_are_readable_and_go_away(tmp_path: Path) -> None:
    with in_memory(b"content", "name", ".mp4") as path:
        assert path.read_bytes() == b"content"
    assert not path.exists()


def test_open_source_dispatches_and_explains(media: Path, shards: Path) -> None:
    assert isinstance(open_source(DataSettings(), GEOMETRY), ShapesSource)
    assert isinstance(open_source(DataSettings(source="folder", path=str(media)), GEOMETRY), FolderSource)
    assert isinstance(open_source(DataSettings(source="webdataset", path=str(shards)), GEOMETRY), WebDatasetSource)
    for bad, what in (
        (DataSettings(source="folder"), "data.path is missing"),
        (DataSettings(source="tokenized", path="x"), "no raw pictures"),
        (DataSettings(source="shapes", path="x"), "it has no path"),
        (DataSettings(source="shapes", split="test"), "split 'test'"),
        (DataSettings(source="folder", path=str(media), split="test"), "has no parts"),
        (DataSettings(source="folder", path=str(media / "none")), "is not a folder"),
    ):
        with pytest.raises(UsageError, match=what):
            open_source(bad, GEOMETRY)
    with pytest.raises(UsageError, match="frames"):
        open_source(DataSettings(), Geometry(frames=16))


# Fields


def test_every_field_equals_the_modules_own_output(everything: Path, media: Path, checkpoint: Checkpoint) -> None:
    source = FolderSource(media, GEOMETRY, clips=2)
    dataset = TokenizedDataset(everything)
    config, vocabulary = checkpoint.config, checkpoint.config.vocabulary
    motion_tokenizer, visual = (checkpoint.component(f"{name}_tokenizer") for name in ("motion", "visual"))
    vaes = {name: checkpoint.component(f"{name}_vae") for name in ("keyframe", "video")}
    assert len(dataset) == 3

    def latents(vae: str, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        signed = torch.stack([torch.from_numpy(to_signed(resize_image(p, (64, 32)))) for p in pictures])
        return vaes[vae].encode(signed).latent_dist.mode()

    for index in range(3):
        item = dataset[index]
        assert item["index"] == index
        if source.moves(index):
            frames, grids = source.clip(index).per_clip()
            pictures: Sequence[np.ndarray] = list(frames[:, 0])
        else:
            frames, grids = np.empty((0, 24, 48, 48, 3), np.uint8), np.empty((0, 24, 2, 3, 3), np.float32)
            pictures = [source.picture(index).image]
        assert item["captions"] == source.labels(index).captions
        assert item["questions"] == source.labels(index).questions
        assert item["motion"].shape == (len(frames), 2, 24, *config.geometry.motion_grid)
        assert item["latents"].shape == (len(frames), 24, 4, 4, 8)
        with torch.inference_mode():
            for c, (clip, grid) in enumerate(zip(frames, grids, strict=True)):
                motion = torch.from_numpy(model_motion(grid, config.geometry.motion_grid))
                torch.testing.assert_close(item["motion"][c], motion, atol=1e-3, rtol=1e-3)
                at_latent = torch.from_numpy(model_motion(grid, (4, 8))) / 10
                torch.testing.assert_close(item["motion_latent"][c], at_latent, atol=1e-4, rtol=1e-3)
                codes = motion_tokenizer.encode(motion[None])[0]
                assert torch.equal(item["motion_ids"][c], codes + vocabulary.first_motion)
                torch.testing.assert_close(item["latents"][c], latents("video", clip), atol=5e-3, rtol=1e-3)
            for k, picture in enumerate(pictures):
                assert np.array_equal(item["keyframe"][k].numpy(), resize_image(picture, (64, 32)))
                expected = latents("keyframe", [picture])[0]
                torch.testing.assert_close(item["keyframe_latents"][k], expected, atol=5e-3, rtol=1e-3)
                features = visual.features(torch.from_numpy(tokenizer_pixels(picture, 128))[None])
                torch.testing.assert_close(item["features"][k], features[0], atol=5e-3, rtol=1e-3)
                logits = visual.keep_logits(features)
                torch.testing.assert_close(item["keep_logits"][k], logits[0], atol=1e-4, rtol=1e-4)
                keep = keep_draw(logits[0].numpy(), 5, index, k)
                codes = visual.codes(visual.merge(features, torch.from_numpy(keep)[None]))[0][keep > 0]
                assert torch.equal(item["visual_ids"][k], codes + vocabulary.first_visual)
    assert item["motion_ids"].dtype == item["visual_ids"][0].dtype == torch.int64
    assert len({len(ids) for index in range(3) for ids in dataset[index]["visual_ids"]}) > 1  # really ragged


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
    assert np.array_equal(item["keyframe"][0].numpy(), picture.image)


# Shards


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.lists(st.integers(0, 50000), max_size=5), max_size=3), max_size=6),
    st.lists(st.text(), max_size=3),
)
def test_ragged_rows_come_back(
    tmp_path_factory: pytest.TempPathFactory, items: list[list[list[int]]], said: list[str]
) -> None:
    """Items with any number of pictures, each with any number of ids."""
    folder = tmp_path_factory.mktemp("ragged")
    writer = ShardWriter({"visual_ids": FieldInfo(of="picture", dtype="int32", shape=None)})
    for index, pictures in enumerate(items):
        item = Item(index=index, pictures=[np.zeros((1, 1, 3), np.uint8)] * len(pictures), captions=tuple(said))
        writer.add([item], {"visual_ids": [np.array(ids, np.int32) for ids in pictures]})
    shard = writer.write(folder, 0, 0)
    index_text = {
        "format": 1,
        "complete": True,
        "recipe": {
            "source": {},
            "count": len(items),
            "fields": {"visual_ids": {"of": "picture", "dtype": "int32", "shape": None}},
            "model": "m",
            "components": {},
            "seed": 0,
            "size": [8, 8],
            "frames": 24,
            "shard_items": max(1, len(items)),
        },
        "shards": [msgspec.to_builtins(shard)] if items else [],
    }
    (folder / INDEX).write_text(json.dumps(index_text))
    dataset = TokenizedDataset(folder)
    assert len(dataset) == len(items)
    for index, pictures in enumerate(items):
        assert [ids.tolist() for ids in dataset[index]["visual_ids"]] == pictures
        assert dataset[index]["captions"] == tuple(said)


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
    tmp_path: Path, media: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.mp4").write_bytes((media / "a.mp4").read_bytes())
    (folder / "b.mp4").write_bytes((media / "a.mp4").read_bytes()[:200])
    (folder / "c.mp4").write_bytes((media / "a.mp4").read_bytes())
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


# Reading


def test_missing_fields_name_the_command(everything: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    tokenize(plan_of(tiny_checkpoint, fields=("motion",), count=2), tmp_path / "out")
    with pytest.raises(DataError, match=r"no field latents; run `videolavit tokenize .*--fields motion,latents`"):
        TokenizedDataset(tmp_path / "out", ["motion", "latents"])
    item = TokenizedDataset(everything, ["motion"])[0]
    assert set(item) == {"motion", "captions", "questions", "index"}
    with pytest.raises(DataError, match="no tokenised folder"):
        TokenizedDataset(tmp_path)
    with pytest.raises(IndexError):
        TokenizedDataset(tmp_path / "out")[2]


def test_a_loader_with_processes_reads_the_same(everything: Path) -> None:
    dataset = TokenizedDataset(everything, ["motion_ids", "visual_ids"])
    dataset[0]  # opens a shard, which must not travel
    again = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    for index in range(len(dataset)):
        left, right = dataset[index], again[index]
        assert torch.equal(left["motion_ids"], right["motion_ids"])
        assert [ids.tolist() for ids in left["visual_ids"]] == [ids.tolist() for ids in right["visual_ids"]]


def test_tokens_of_other_weights_are_noticed(everything: Path, checkpoint: Checkpoint) -> None:
    dataset = TokenizedDataset(everything, ["motion_ids", "keyframe"])
    dataset.require(checkpoint)
    other = initialise("tiny", seed=1)
    with pytest.raises(CheckpointError, match="another motion_tokenizer"):
        dataset.require(other)
    TokenizedDataset(everything, ["keyframe"]).require(other)  # no weights made it


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda raw: raw | {"format": 9}, "format is 9"),
        (lambda raw: raw | {"extra": 1}, "extra"),
        (lambda raw: {key: value for key, value in raw.items() if key != "recipe"}, "recipe"),
        (lambda raw: raw | {"shards": raw["shards"][:1]}, "lists 1 of 3 shards"),
        (lambda raw: raw | {"shards": raw["shards"][::-1]}, "its list of shards"),
        (lambda raw: raw | {"shards": [raw["shards"][0] | {"arrays": "../x"}, *raw["shards"][1:]]}, "its list"),
        (lambda raw: raw | {"complete": "yes"}, "bool"),
    ],
)
def test_a_damaged_index_is_one_error(tmp_path: Path, finished: Path, damage: Any, what: str) -> None:
    raw = json.loads((finished / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps(damage(raw)))
    with pytest.raises(DataError, match=what) as caught:
        TokenizedDataset(tmp_path)
    assert "\n" not in str(caught.value) and INDEX in str(caught.value)


@pytest.fixture(scope="module")
def finished(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "out"
    tokenize(plan_of(tiny_checkpoint, fields=("keyframe",)), folder)
    return folder


@settings(max_examples=30, deadline=None)
@given(content=st.binary(max_size=200) | st.dictionaries(st.text(max_size=5), st.integers()).map(msgspec.json.encode))
def test_any_index_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("index")
    (folder / INDEX).write_bytes(content)
    with pytest.raises(DataError):
        read_index(folder)


def test_damaged_shards_are_noticed(tmp_path: Path, finished: Path) -> None:
    for name, content in contents(finished).items():
        (tmp_path / name).write_bytes(content)
    shard, text = tmp_path / "shard-00001.safetensors", tmp_path / "shard-00001.jsonl"
    whole, lines = shard.read_bytes(), text.read_bytes()
    TokenizedDataset(tmp_path).verify()

    shard.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"shard-00001\.safetensors: has \d+ bytes"):
        TokenizedDataset(tmp_path)
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00001\.safetensors: is missing"):
        TokenizedDataset(tmp_path)
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match="SHA-256"):
        TokenizedDataset(tmp_path).verify()
    shard.write_bytes(b"\xff" * len(whole))
    with pytest.raises(DataError, match=r"shard-00001\.safetensors: is damaged"):
        TokenizedDataset(tmp_path)[2]
    shard.write_bytes(whole)
    text.write_bytes(b"?" * len(lines))
    with pytest.raises(DataError, match=r"shard-00001\.jsonl: is damaged"):
        TokenizedDataset(tmp_path)[2]


def test_the_encoder_makes_empty_rows_of_pictures(checkpoint: Checkpoint) -> None:
    names = ("motion", "motion_latent", "motion_ids", "latents")
    rows = Encoder(checkpoint, names, (64, 32), 0).encode([Item(index=0, pictures=[np.zeros((9, 9, 3), np.uint8)])])
    for name in names:
        shape = FIELDS[name].shape
        assert shape is not None and rows[name].shape == (0, *shape(checkpoint.config, (64, 32)))


def test_the_command_writes_a_folder(tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "tokenize",
        "shapes",
        "-o",
        str(tmp_path / "out"),
        "--checkpoint",
        str(tiny_checkpoint),
        "--count",
        "2",
    ]
    with pytest.raises(SystemExit) as finished:
        main([*command, "--clips", "2", "--split", "held-out"])
    assert finished.value.code == 0
    assert "2 items (4 pictures, 4 clips) in 1 shards" in capsys.readouterr().out
    item = TokenizedDataset(tmp_path / "out")[1]
    assert item["motion_ids"].shape[0] == len(item["visual_ids"]) == 2
    index = read_index(tmp_path / "out")
    assert index.recipe.source == {"source": "shapes", "split": "held-out", "seed": 0, "clips": 2}
    assert set(index.recipe.components) == {"motion_tokenizer", "visual_tokenizer"}
