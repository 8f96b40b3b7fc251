"""Checkpoint folder: exact round trip, strict reading, readable reports, atomic writing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from runtime.errors import CheckpointError, UsageError
from videolavit import checkpoints
from videolavit.checkpoints import initialise, load
from videolavit.commands import init
from videolavit.config import PRESETS
from videolavit.models.components import COMPONENTS


@pytest.fixture
def folder(shapes_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(shapes_checkpoint, tmp_path / "copy"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, component: str, edit: object) -> None:
    path = folder / f"{component}.safetensors"
    tensors = load_file(path)
    edit(tensors)  # type: ignore[operator]
    save_file(tensors, path)


def test_a_saved_checkpoint_comes_back_exactly(shapes_checkpoint: Path) -> None:
    made, read = initialise("shapes", 0), load(shapes_checkpoint)
    assert (read.config, read.trained, read.tokenizer) == (PRESETS["shapes"], False, made.tokenizer)
    assert read.digest == made.digest
    for name, tensor in made.weights.tensors("motion_tokenizer"):
        assert torch.equal(read.component("motion_tokenizer").state_dict()[name], tensor), name


def test_a_seed_decides_the_weights() -> None:
    assert initialise("shapes", 3).digest == initialise("shapes", 3).digest
    assert initialise("shapes", 3).digest != initialise("shapes", 4).digest


def test_weights_that_do_not_fit_float16_keep_their_values(folder: Path, tmp_path: Path) -> None:
    edit_weights(folder, "motion_encoder", lambda t: t.update({"norm.bias": torch.full((32,), 1 / 3)}))
    load(folder).save(tmp_path / "again")
    stored = load_file(tmp_path / "again" / "motion_encoder.safetensors")
    assert stored["norm.bias"].dtype == torch.float32
    assert torch.equal(stored["norm.bias"], torch.full((32,), 1 / 3))
    assert stored["norm.weight"].dtype == torch.float16
    assert load(tmp_path / "again").digest == load(folder).digest


@pytest.mark.parametrize("component", COMPONENTS)
def test_components_are_ready_to_run(component: str) -> None:
    module = initialise("shapes", 0).component(component)
    assert not module.training
    for name, parameter in module.named_parameters():
        assert parameter.dtype == torch.float32 and not parameter.requires_grad, name
        assert parameter.isfinite().all() and parameter.abs().max() > 0, name


def test_an_unknown_key_is_an_error(folder: Path) -> None:
    model = json.loads((folder / "config.json").read_text())["model"]
    model["video_unet"]["hedas"] = 3
    edit_config(folder, model=model)
    with pytest.raises(CheckpointError, match=r"model\.video_unet\.hedas"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"extra": 1}, "extra"),
        ({"format": 2}, "format is 2"),
        ({"trained": "yes"}, "trained"),
        ({"model": {}}, "name"),
        ({"model": 3}, "model"),
    ],
)
def test_a_wrong_header_is_an_error(folder: Path, changes: dict[str, object], named: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=named):
        load(folder)


def test_every_misfit_is_in_one_report(folder: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["norm.bias"]
        tensors["norm.weight"] = tensors["norm.weight"][:-1].clone()
        tensors["stray"] = torch.zeros(1)

    edit_weights(folder, "motion_encoder", damage)
    checkpoint = load(folder)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.component("motion_encoder")
    for part in ("motion_encoder", "1 missing: norm.bias", "1 unexpected: stray", "norm.weight is [31], must be [32]"):
        assert part in str(caught.value)
    checkpoint.component("motion_tokenizer")  # the others are not touched by it


def test_missing_and_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "video_vae.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match=r"video_vae\.safetensors"):
        load(folder).component("video_vae")
    (folder / "video_vae.safetensors").unlink()
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.model, video_vae\.safetensors missing"):
        load(folder)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path / "nowhere")


def test_presets_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(UsageError, match="shapes, video-lavit-7b"):
        initialise("sahpes", 0)
    with pytest.raises(UsageError, match="tokenizer"):
        initialise("video-lavit-7b", 0)


def test_a_checkpoint_is_replaced_only_with_force(folder: Path, tmp_path: Path) -> None:
    other = initialise("shapes", 1)
    with pytest.raises(UsageError, match="--force"):
        other.save(folder)
    other.save(folder, force=True)
    assert load(folder).digest == other.digest
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="not a checkpoint"):
        other.save(tmp_path / "mine", force=True)


def test_a_crash_while_saving_leaves_the_old_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load(folder).digest
    files = sorted(path.name for path in folder.parent.iterdir())

    def crash(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "write_safetensors", crash)
    with pytest.raises(OSError, match="disk full"):
        initialise("shapes", 1).save(folder, force=True)
    assert load(folder).digest == before
    assert sorted(path.name for path in folder.parent.iterdir()) == files


def test_init_writes_a_checkpoint(tmp_path: Path) -> None:
    result = CliRunner().invoke(init, ["shapes", "-o", str(tmp_path / "made"), "--seed", "5"])
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "made").digest == initialise("shapes", 5).digest
