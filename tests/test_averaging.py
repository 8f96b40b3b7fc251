"""The mean of checkpoints: every tensor's, stored as before, and only of models of the same shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from runtime.errors import CheckpointError, UsageError
from videolavit.averaging import averaged
from videolavit.checkpoints import Checkpoint, initialise, load
from videolavit.commands import average


def weights(checkpoint: Checkpoint, component: str) -> dict[str, torch.Tensor]:
    return dict(checkpoint.weights.tensors(component))


def test_every_tensor_is_the_mean() -> None:
    several = [initialise("tiny", seed) for seed in range(3)]
    found = weights(averaged(several), "language_model")
    for name, tensor in found.items():
        expected = sum(weights(each, "language_model")[name] for each in several) / 3
        torch.testing.assert_close(tensor, torch.as_tensor(expected), rtol=1e-6, atol=1e-7)


def test_what_is_the_same_in_all_stays_as_it_is() -> None:
    same = initialise("tiny", 5)
    assert averaged([same, same, same]).digest == same.digest


def test_the_command_stores_types_as_before(tmp_path: Path) -> None:
    for seed in (0, 1):
        initialise("tiny", seed).save(tmp_path / str(seed))
    given = [str(tmp_path / "0"), str(tmp_path / "1"), "-o", str(tmp_path / "mean")]
    done = CliRunner().invoke(average, given)
    assert done.exit_code == 0, done.output
    first, second, mean = (load_file(tmp_path / name / "language_model.safetensors") for name in ("0", "1", "mean"))
    for name, tensor in mean.items():
        assert tensor.dtype == first[name].dtype == torch.float16
        torch.testing.assert_close(tensor.float(), (first[name].float() + second[name].float()) / 2, rtol=1e-3, atol=0)
    assert load(tmp_path / "mean").untrained == load(tmp_path / "0").untrained
    again = CliRunner().invoke(average, given)
    assert isinstance(again.exception, UsageError) and "--force" in str(again.exception)


def test_untrained_is_what_any_of_them_has_not_trained() -> None:
    one, other = initialise("tiny", 0), initialise("tiny", 1)
    one.untrained, other.untrained = ("video_unet",), ("language_model",)
    assert set(averaged([one, other]).untrained) == {"video_unet", "language_model"}


def test_other_sizes_are_refused(tmp_path: Path) -> None:
    initialise("tiny", 0).save(tmp_path / "one")
    initialise("tiny", 0, layers=4).save(tmp_path / "deep")
    folders = [str(tmp_path / name) for name in ("one", "one", "deep")]
    done = CliRunner().invoke(average, [*folders, "-o", str(tmp_path / "mean")])
    assert isinstance(done.exception, UsageError) and "sizes of number 3" in str(done.exception)
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_a_tensor_that_one_of_them_lacks_is_named(tmp_path: Path, name: str) -> None:
    for folder in ("one", "other"):
        initialise("tiny", 0).save(tmp_path / folder)
    file = tmp_path / "other" / "language_model.safetensors"
    state = load_file(file)
    del state[name]
    save_file(state, file)
    done = CliRunner().invoke(average, [str(tmp_path / "one"), str(tmp_path / "other"), "-o", str(tmp_path / "mean")])
    assert isinstance(done.exception, CheckpointError)
    assert f"language_model: {name} is not the same tensor in all" in str(done.exception)
    assert not (tmp_path / "mean").exists()


def test_one_alone_is_refused() -> None:
    with pytest.raises(UsageError, match=r"CHECKPOINT: 1 given; a mean needs two or more"):
        averaged([initialise("tiny", 0)])


def test_another_tokenizer_is_refused() -> None:
    one, other = initialise("tiny", 0), initialise("tiny", 0)
    other.tokenizer = b"other"
    with pytest.raises(UsageError, match="tokenizer of number 2"):
        averaged([one, other])


def test_defaults_are_those_of_the_first() -> None:
    one, other = initialise("tiny", 0), initialise("tiny", 0)
    other.config = replace(other.config, defaults=msgspec.structs.replace(other.config.defaults, top_k=3))
    assert averaged([other, one]).config.defaults.top_k == 3
    assert averaged([one, other]).config == one.config
