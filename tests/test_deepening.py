"""A deepened language model computes the same scores, and its new layers can learn."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from runtime.errors import UsageError
from videolavit.checkpoints import Checkpoint, initialise, load
from videolavit.commands import deepen
from videolavit.deepening import deepened, layer_sources

IDS = torch.tensor([[1, 7, 40, 3, 255, 6]])


def scores(checkpoint: Checkpoint) -> torch.Tensor:
    with torch.no_grad():
        return cast(Any, checkpoint.component("language_model"))(input_ids=IDS).logits


@pytest.mark.parametrize("layers", [4, 5, 6])
def test_it_computes_the_same(layers: int) -> None:
    before = initialise("tiny", 0)
    after = deepened(before, layers)
    assert after.config.language_model.layers == layers
    assert torch.equal(scores(after), scores(before))
    assert after.component_digest("video_unet") == before.component_digest("video_unet")


def test_every_new_layer_gets_a_gradient() -> None:
    model = cast(Any, deepened(initialise("tiny", 0), 5).component("language_model")).requires_grad_(True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for layer in model.model.layers:
        assert float(layer.self_attn.o_proj.weight.grad.abs().max()) > 0
        assert float(layer.mlp.down_proj.weight.grad.abs().max()) > 0


@given(there=st.integers(1, 40), data=st.data())
def test_copies_follow_theirs_and_are_spread_evenly(there: int, data: st.DataObject) -> None:
    layers = data.draw(st.integers(there + 1, 2 * there))
    sources = layer_sources(there, layers)
    assert len(sources) == layers
    assert [old for old, silent in sources if not silent] == list(range(there))
    for (old, _), (copied, silent) in itertools.pairwise(sources):
        assert copied == (old if silent else old + 1)
    copied_layers = [-1, *(old for old, silent in sources if silent)]
    runs = [after - before for before, after in itertools.pairwise(copied_layers)]
    assert max(runs) - min(runs) <= 1 and copied_layers[-1] == there - 1


def test_the_command(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(deepen, [str(tiny_checkpoint), "--layers", "4", "-o", str(tmp_path / "deep")])
    assert done.exit_code == 0, done.output
    before, after = load(tiny_checkpoint), load(tmp_path / "deep")
    assert torch.equal(scores(after), scores(before))
    assert after.untrained == before.untrained
    stored = load_file(tmp_path / "deep" / "language_model.safetensors")
    assert stored["model.layers.3.mlp.up_proj.weight"].dtype == torch.float16


@pytest.mark.parametrize("layers", [2, 3, 7])
def test_what_cannot_be_is_one_line(tiny_checkpoint: Path, tmp_path: Path, layers: int) -> None:
    target = tmp_path / "deep"
    done = CliRunner().invoke(deepen, [str(tiny_checkpoint), "--layers", str(layers), "-o", str(target)])
    assert isinstance(done.exception, UsageError)
    assert str(done.exception) == f"--layers {layers}: the language model has 3; choose 4 to 6"
    assert not target.exists()
