"""Reading a tokenised folder: every field is what the modules give, and damage is noticed."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_samples import GEOMETRY, contents, plan_of, write_media

from runtime.errors import CheckpointError
from runtime.images import resize_image, to_signed, tokenizer_pixels
from runtime.motion.grid import model_motion
from runtime.noise import Noise
from runtime.requests import ImageRequest, resolve
from videolavit.checkpoints import Checkpoint, initialise, load, publish_components
from videolavit.reference import keyframes
from videolavit.reference.pipeline import Reference
from videolavit.training.data.encoding import REBUILDING, Item, keep_draw
from videolavit.training.data.errors import DataError
from videolavit.training.data.fields import FIELDS
from videolavit.training.data.folder import FolderSource
from videolavit.training.data.index import INDEX, FieldInfo, read_index
from videolavit.training.data.shards import ShardWriter
from videolavit.training.data.tokenized import TokenizedDataset
from videolavit.training.data.tokenizing import Plan, tokenize
from videolavit.training.settings import DataSettings
from videolavit.training.stages.sequences import Layout


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_media(folder)
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


@pytest.fixture(scope="module")
def finished(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "out"
    tokenize(plan_of(tiny_checkpoint, fields=("keyframe",)), folder)
    return folder


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
        assert item["negatives"] == source.labels(index).negatives
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
                key = np.random.SeedSequence([5, index, k, REBUILDING]).generate_state(1, np.uint64)
                again = redrawn(checkpoint, picture, item["visual_ids"][k].tolist(), Noise(int(key[0]) >> 1))
                close = np.abs(item["rebuilt_keyframe"][k].numpy().astype(int) - again) <= 2
                assert close.mean() > 0.99 and not np.array_equal(again, item["keyframe"][k].numpy())
    assert item["motion_ids"].dtype == item["visual_ids"][0].dtype == torch.int64
    assert len({len(ids) for index in range(3) for ids in dataset[index]["visual_ids"]}) > 1  # really ragged


def redrawn(checkpoint: Checkpoint, picture: np.ndarray, ids: list[int], noise: Noise) -> np.ndarray:
    """`picture` at 64 x 32 redrawn by the reference from the half of its steps on."""
    config, size = checkpoint.config, (64, 32)
    reference = Reference(checkpoint, config, Layout(checkpoint.tokenizer, config.vocabulary, 8).text)
    plain = resolve(ImageRequest(prompt="a"), config.geometry, config.defaults)
    steps = plain.keyframe_steps
    clean = keyframes.encode(
        checkpoint.component("keyframe_vae"), torch.from_numpy(to_signed(resize_image(picture, size)))[None]
    )
    level = steps // 2
    start = keyframes.noised(clean, config.keyframe_scheduler, steps=steps, level=level, noise=noise)
    return reference.decode_keyframe(ids, size, plain, noise, start, level)[1]


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


def test_missing_fields_name_the_command(everything: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    tokenize(plan_of(tiny_checkpoint, fields=("motion",), count=2), tmp_path / "out")
    with pytest.raises(DataError, match=r"no field latents; run `videolavit tokenize .*--fields motion,latents`"):
        TokenizedDataset(tmp_path / "out", ["motion", "latents"])
    item = TokenizedDataset(everything, ["motion"])[0]
    assert set(item) == {"motion", "captions", "questions", "negatives", "index"}
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


def test_a_projection_that_instruct_trained_leaves_tokens_valid(
    everything: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    state = dict(load(folder).component("visual_tokenizer").state_dict())
    publish_components(folder, {"visual_tokenizer": state | {"vit_proj.bias": state["vit_proj.bias"] + 1}})
    dataset = TokenizedDataset(everything, ["visual_ids"])
    dataset.require(load(folder))
    name, value = next((n, v) for n, v in state.items() if not n.startswith("vit_proj."))
    publish_components(folder, {"visual_tokenizer": state | {name: value + 1}})
    with pytest.raises(CheckpointError, match="another visual_tokenizer"):
        dataset.require(load(folder))


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


@settings(max_examples=30, deadline=None)
@given(content=st.binary(max_size=200) | st.dictionaries(st.text(max_size=5), st.integers()).map(msgspec.json.encode))
def test_random_bytes_are_no_index(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
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
