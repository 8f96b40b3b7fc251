"""Checkpoint folder: exact round trip, strict reading, readable reports, atomic writing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from runtime.errors import CheckpointError, UsageError
from videolavit import checkpoints
from videolavit.checkpoints import initialise, load, publish_components
from videolavit.commands import init
from videolavit.config import PRESETS
from videolavit.models.components import COMPONENTS


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, component: str, edit: object) -> None:
    path = folder / f"{component}.safetensors"
    tensors = load_file(path)
    edit(tensors)  # type: ignore[operator]
    save_file(tensors, path)


def test_a_saved_checkpoint_comes_back_exactly(tiny_checkpoint: Path) -> None:
    made, read = initialise("tiny", 0), load(tiny_checkpoint)
    assert (read.config, read.trained, read.tokenizer) == (PRESETS["tiny"], False, made.tokenizer)
    assert read.untrained == tuple(COMPONENTS)
    assert read.digest == made.digest
    for name, tensor in made.weights.tensors("motion_tokenizer"):
        assert torch.equal(read.component("motion_tokenizer").state_dict()[name], tensor), name


def test_a_seed_decides_the_weights() -> None:
    assert initialise("tiny", 3).digest == initialise("tiny", 3).digest
    assert initialise("tiny", 3).digest != initialise("tiny", 4).digest


def test_a_language_model_can_begin_with_other_layers_than_the_preset(tmp_path: Path) -> None:
    done = CliRunner().invoke(init, ["tiny", "-o", str(tmp_path / "two"), "--layers", "2"])
    assert done.exit_code == 0, done.output
    read = load(tmp_path / "two")
    assert read.config.language_model.layers == 2 != PRESETS["tiny"].language_model.layers
    read.component("language_model")


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
    module = initialise("tiny", 0).component(component)
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
        ({"format": 1}, "format is 1"),
        ({"untrained": "yes"}, "untrained"),
        ({"untrained": ["motion_encodre"]}, "motion_encodre"),
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
    other = initialise("tiny", 1)
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
        initialise("tiny", 1).save(folder, force=True)
    assert load(folder).digest == before
    assert sorted(path.name for path in folder.parent.iterdir()) == files


def test_published_components_replace_their_files_and_are_no_longer_untrained(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    state = dict(initialise("tiny", 1).weights.tensors("motion_encoder"))
    state["norm.bias"] = torch.full_like(state["norm.bias"], 1 / 3)  # not a float16 number
    publish_components(folder, {"motion_encoder": state, "motion_tokenizer": _state("motion_tokenizer")})
    after = load(folder)
    assert after.untrained == tuple(n for n in COMPONENTS if n not in {"motion_encoder", "motion_tokenizer"})
    for name, tensor in after.weights.tensors("motion_encoder"):
        assert torch.equal(tensor, state[name]), name
    assert load_file(folder / "motion_encoder.safetensors")["norm.weight"].dtype == torch.float16
    changed = {path.name for path in folder.iterdir() if path.read_bytes() != before.get(path.name)}
    assert changed == {"config.json", "motion_encoder.safetensors", "motion_tokenizer.safetensors"}


def test_components_can_be_published_before_they_are_complete(folder: Path) -> None:
    publish_components(folder, {"motion_encoder": _state("motion_encoder")}, trained=())
    assert load(folder).untrained == tuple(COMPONENTS)
    publish_components(folder, {name: _state(name) for name in COMPONENTS})
    assert load(folder).trained


@pytest.mark.parametrize(
    ("states", "named"),
    [
        ({"motion_encodre": {}}, "motion_encodre"),
        ({"motion_tokenizer": {}}, "missing"),
        ({"motion_encoder": {"norm.bias": torch.zeros(1)}}, r"norm\.bias is \[1\]"),
    ],
)
def test_nothing_is_published_that_does_not_fit(
    folder: Path, states: dict[str, dict[str, torch.Tensor]], named: str
) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match=named):
        publish_components(folder, {"video_vae": _state("video_vae"), **states})
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_crash_while_publishing_leaves_a_checkpoint_that_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoints.write_safetensors

    def crash_at_the_second(path: Path, *rest: Any) -> Any:
        if "motion_tokenizer" in path.name:
            path.write_bytes(b"half a file")
            raise OSError("disk full")
        return real(path, *rest)

    monkeypatch.setattr(checkpoints, "write_safetensors", crash_at_the_second)
    new = {name: _state(name) for name in ("motion_encoder", "motion_tokenizer")}
    names = sorted(path.name for path in folder.iterdir())
    with pytest.raises(OSError, match="disk full"):
        publish_components(folder, new)
    after = load(folder)
    assert after.untrained == tuple(COMPONENTS)
    for name in COMPONENTS:
        assert after.component(name)
    assert sorted(path.name for path in folder.iterdir()) == names


def _state(component: str) -> dict[str, torch.Tensor]:
    return dict(initialise("tiny", 1).weights.tensors(component))


def test_init_writes_a_checkpoint(tmp_path: Path) -> None:
    result = CliRunner().invoke(init, ["tiny", "-o", str(tmp_path / "made"), "--seed", "5"])
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "made").digest == initialise("tiny", 5).digest
