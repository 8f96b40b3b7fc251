"""The official preset has exactly the tensors of the official files, and a snapshot of that size is read in seconds."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from snapshot_factory import diffusers_configs, llama_config
from torch._subclasses import FakeTensorMode

from videolavit.config import PRESETS
from videolavit.inventory import for_task, inventory
from videolavit.models.components import COMPONENTS
from videolavit.snapshot import read_snapshot
from videolavit.snapshot.layout import PARTS, official_files

FOLDER = Path(__file__).parent / "data" / "state_dict"
OFFICIAL = PRESETS["video-lavit-7b"]
Shapes = dict[str, tuple[int, ...]]

# Part of the snapshot -> inventory file, prefix of its tensors there.
FILES = {
    "language_model": ("language_model", ""),
    "language_model_sft": ("understanding_model", ""),
    "visual_tokenizer/tokenizer_encoder.bin": ("visual_tokenizer_encoder", ""),
    "visual_tokenizer/eva_vitg_psz14.bin": ("eva_vitg_psz14", ""),
    "visual_tokenizer/highres_tokenizer_decoder.bin": ("highres_tokenizer_decoder", ""),
    "image_detokenizer/unet": ("image_unet_ASSUMED_sdxl", ""),
    "image_detokenizer/vae": ("image_vae_ASSUMED_sdxl", ""),
    "motion_tokenizer.bin": ("motion_tokenizer", ""),
    "video_detokenizer/unet": ("video_detokenizer", ""),
    "video_detokenizer/vae": ("video_detokenizer", "vae."),
    "video_3d_unet.bin": ("video_detokenizer", ""),
    "language_model/visual_weight.bin": ("visual_tokenizer_encoder", ""),
    "language_model_sft/visual_weight.bin": ("visual_tokenizer_encoder", ""),
}
PARAMETERS = {  # totals of the file layout
    "motion_tokenizer": 158_476_322,
    "visual_tokenizer": 1_422_408_322,
    "keyframe_decoder": 414_002_304,
    "video_unet": 1_524_628_842,
    "motion_encoder": 51_095_040,
    "video_vae": 97_742_847,
    "language_model": 6_881_054_720,
    "keyframe_unet": 2_567_463_684,
    "keyframe_vae": 83_653_863,
}


@cache
def recorded(file: str, prefix: str = "") -> Shapes:
    tensors = json.loads((FOLDER / f"{file}.json").read_text(encoding="utf-8"))
    return {k.removeprefix(prefix): tuple(shape) for k, shape in tensors.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def ours() -> dict[str, Shapes]:
    return official_files(OFFICIAL)


@pytest.mark.parametrize("path", FILES)
def test_every_file_has_the_official_tensors(path: str, ours: dict[str, Shapes]) -> None:
    assert ours[path] == recorded(*FILES[path])


def test_the_unet_alone_is_the_prefixed_one(ours: dict[str, Shapes]) -> None:
    bare = {f"unet.{name}": shape for name, shape in recorded("video_unet").items()}
    assert bare.items() <= ours["video_detokenizer/unet"].items()
    assert len(bare) == 1428


def test_no_file_and_no_inventory_is_left_out() -> None:
    assert set(FILES) == {part.path for part in PARTS}
    assert {file for file, _ in FILES.values()} | {"video_unet"} == {path.stem for path in FOLDER.glob("*.json")}


@pytest.mark.parametrize("component", COMPONENTS)
def test_components_have_the_official_size(component: str) -> None:
    assert sum(torch.Size(shape).numel() for shape in inventory(OFFICIAL, component).values()) == PARAMETERS[component]


# --- a snapshot of the official size, as sparse files: everything but the numbers ---------------------------------


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """53 GiB of files that take a few MB on the disk."""
    folder = tmp_path_factory.mktemp("full") / "Video-LaVIT-v1"
    bare_tokenizer = {
        name: shape
        for name, shape in recorded("visual_tokenizer_encoder").items()
        if not name.startswith(("encoder.", "vit_proj."))
    }
    unet_bin = {**recorded("video_unet"), **_keep("video_detokenizer", "motion_encoder.")}
    for path, shapes, dtype in [
        ("visual_tokenizer/eva_vitg_psz14.bin", recorded("eva_vitg_psz14"), torch.float32),
        ("visual_tokenizer/tokenizer_encoder.bin", bare_tokenizer, torch.float32),
        ("visual_tokenizer/highres_tokenizer_decoder.bin", recorded("highres_tokenizer_decoder"), torch.float32),
        ("motion_tokenizer.bin", recorded("motion_tokenizer"), torch.float32),
        ("image_detokenizer/unet/diffusion_pytorch_model.bin", recorded("image_unet_ASSUMED_sdxl"), torch.float16),
        ("video_detokenizer/unet/diffusion_pytorch_model.bin", unet_bin, torch.float32),
        ("video_3d_unet.bin", _keep("video_detokenizer", ("unet.", "motion_encoder.")), torch.float32),
    ]:
        _sparse_bin(folder / path, shapes, dtype)
    _sparse_safetensors(folder / "image_detokenizer/vae", recorded("image_vae_ASSUMED_sdxl"))
    _sparse_safetensors(folder / "video_detokenizer/vae", recorded("video_detokenizer", "vae."))
    for name in ("language_model", "language_model_sft"):
        _sparse_shards(folder / name, recorded(FILES[name][0]))
        (folder / name / "config.json").write_text(json.dumps(llama_config(OFFICIAL)))
    for path, content in diffusers_configs(OFFICIAL).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    yield folder


def _keep(file: str, prefixes: str | tuple[str, ...]) -> Shapes:
    return {name: shape for name, shape in recorded(file).items() if name.startswith(prefixes)}


def _sparse_bin(path: Path, shapes: Shapes, dtype: torch.dtype) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FakeTensorMode():
        state = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state, path)


def _sparse_safetensors(folder: Path, shapes: Shapes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    entries, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries).encode()
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + offset)


def _sparse_shards(folder: Path, shapes: Shapes) -> None:
    names = list(shapes)
    index = {}
    for shard, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"pytorch_model-{shard:05}-of-00002.bin"
        _sparse_bin(folder / file, {name: shapes[name] for name in part}, torch.bfloat16)
        index |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_a_snapshot_of_the_official_size_is_checked_without_reading_it(full_size: Path) -> None:
    inventory(OFFICIAL, "keyframe_unet")  # the libraries, once, before memory is measured
    before = _peak()
    found = read_snapshot(full_size)
    assert _peak() - before < 2**30
    # The text tokenizer is the one file of the release that cannot be made up.
    assert [(p.file, p.kind) for p in found.report.fatal] == [("language_model/tokenizer.model", "missing file")]
    assert found.config.name == "video-lavit-7b"
    assert found.config.language_model == OFFICIAL.language_model
    assert found.config.keyframe_unet == OFFICIAL.keyframe_unet
    assert found.config.video_unet == OFFICIAL.video_unet
    for component in found.components:
        parameters = PARAMETERS[component.rpartition("/")[2]]
        width = 2 if component.startswith(("understanding", "language", "keyframe_u", "keyframe_v")) else 4
        width = 2 if component == "video_vae" else width
        shared = 2 * 5_771_264 if component == "visual_tokenizer" else 0  # its projection comes from the 16-bit model
        assert found.weights.stored_bytes(component) == width * parameters - shared, component
    assert for_task("motion_tokenizer") in found.components
