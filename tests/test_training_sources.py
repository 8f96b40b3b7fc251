"""Raw examples: the world of shapes, folders and tar shards, and the labels beside the media."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from training_samples import GEOMETRY, write_media

from runtime.errors import MediaError, UsageError
from runtime.geometry import Geometry
from runtime.motion.mpeg4 import MotionSettings
from runtime.motion.sources import understanding_clips
from videolavit.training.data import open_source
from videolavit.training.data.errors import DataError
from videolavit.training.data.examples import Negative, Question
from videolavit.training.data.folder import FolderSource
from videolavit.training.data.labels import from_json, from_jsonl, from_text
from videolavit.training.data.media import in_memory
from videolavit.training.data.shapes_source import ShapesSource
from videolavit.training.data.webdataset import WebDatasetSource
from videolavit.training.settings import DataSettings


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_media(folder)
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


@pytest.mark.parametrize("shapes", [1, 2])
def test_the_number_of_shapes_may_be_given(shapes: int) -> None:
    source = open_source(DataSettings(source="shapes", shapes=shapes), GEOMETRY)
    assert isinstance(source, ShapesSource)
    assert {len(source.scene(index)[0].shapes) for index in range(20)} == {shapes}
    assert {len(ShapesSource(GEOMETRY).scene(index)[0].shapes) for index in range(20)} == {1, 2}


def test_two_shapes_are_named_from_left_to_right() -> None:
    """Captions and answers; wrong captions in any order, but for those about places."""
    source = ShapesSource(GEOMETRY, shapes=2, size=24)
    orders = set()
    for index in range(24):
        example = source.clip(index)
        shapes = sorted(source.scene(index)[0].shapes, key=lambda shape: shape.start[0])
        colours = [shape.colour for shape in shapes]
        described = [asked.answer for asked in example.questions if asked.topic == "description"]
        ways = [told for told in example.negatives if told.topic == "ways"]
        turned = [told for told in example.negatives if told.topic == "order"]
        ordered = [*example.captions, *described, *(told.caption for told in turned)]
        ordered += [text for told in ways for text in (told.caption, told.wrong)]
        assert [_named(text, colours) for text in ordered] == [colours] * len(ordered)
        assert turned and all(_named(told.wrong, colours) == colours[::-1] for told in turned)
        others = [told.caption for told in example.negatives if told.topic not in ("ways", "order")]
        orders |= {_named(text, colours) == colours for text in others}
        assert not ways or shapes[0].motion != shapes[1].motion
    assert orders == {True, False}
    assert not any(told.topic == "ways" for told in source.picture(0).negatives)


def _named(text: str, colours: list[str]) -> list[str]:
    """`colours` in the order in which `text` names them."""
    return sorted(colours, key=text.lower().index)


def test_the_number_of_shapes_is_only_for_the_world_of_shapes(media: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.shapes 2: only the world of shapes"):
        open_source(DataSettings(source="folder", path=str(media), shapes=2), GEOMETRY)


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
    negatives = [{"caption": caption, "wrong": caption[::-1], "topic": "order"} for caption in captions]
    said = {"captions": captions, "questions": questions, "negatives": negatives}
    labels = from_json(json.dumps(said).encode(), "x")
    assert labels.negatives == tuple(Negative(caption, caption[::-1], "order") for caption in captions)
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


def test_scenery_moves_as_its_vectors_say() -> None:
    source = open_source(DataSettings(source="scenery", size=24), GEOMETRY, seed=4)
    moved: list[float] = []
    still: list[float] = []
    for index in range(24):
        clip, again = source.clip(index), source.clip(index)
        assert clip.frames.shape == (24, 128, 128, 3) and clip.frames.dtype == np.uint8 and not clip.grid[0].any()
        assert (clip.frames == again.frames).all() and (clip.grid == again.grid).all()
        assert (source.picture(index).image == clip.frames[0]).all()
        found = float(np.linalg.norm(clip.grid, axis=1).mean())
        (moved if (clip.frames[0] != clip.frames[-1]).any() else still).append(found)
    # The encoder finds a little motion in noise too.
    assert still and max(still) < 0.05 < 0.1 < np.quantile(moved, 0.2)
    with pytest.raises(UsageError, match="one clip an item"):
        open_source(DataSettings(source="scenery"), GEOMETRY, clips=2)
    with pytest.raises(IndexError):
        source.picture(24)


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
        (DataSettings(source="scenery", path="x"), "it has no path"),
        (DataSettings(source="scenery", split="held-out"), "only the world of shapes has parts"),
        (DataSettings(source="folder", path=str(media), split="test"), "only the world of shapes has parts"),
        (DataSettings(source="folder", path=str(media / "none")), "is not a folder"),
    ):
        with pytest.raises(UsageError, match=what):
            open_source(bad, GEOMETRY)
    with pytest.raises(UsageError, match="frames"):
        open_source(DataSettings(), Geometry(frames=16))
