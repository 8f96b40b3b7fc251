"""Exported engines equal torch, and a bundle is published whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from export import build, end_to_end, parity
from export.commands import export, verify
from export.engine import write_engine
from export.graphs.graph import Graph, Input, Signature, integers, run
from export.graphs.registry import ENGINES, GRAPHS, LANGUAGE_MODEL
from export.onnx import torch_module, trace
from export.settings import EngineSettings
from runtime.backends.onnxruntime import OnnxRuntimeEngine
from runtime.bundle import Bundle
from runtime.engines import EngineOptions, EngineSet
from runtime.errors import BundleError, ParityError, UsageError
from videolavit.checkpoints import Checkpoint, initialise, load

# The engine contract: inputs and outputs by name.
CONTRACT = {
    "visual_encoder": ("pixels", "features keep_logits"),
    "visual_merger": ("features keep", "codes embeds"),
    "motion_encoder": ("motion", "codes"),
    "motion_decoder": ("codes", "motion"),
    "token_embedding": ("ids", "embeds"),
    "keyframe_conditioner": ("codes counts", "prompt_embeds pooled"),
    "keyframe_unet": ("latents timestep prompt_embeds pooled time_ids", "noise"),
    "keyframe_vae_encoder": ("image", "latents"),
    "keyframe_vae_decoder": ("latents", "image"),
    "motion_conditioner": ("motion", "states"),
    "video_unet": ("sample timestep states time_ids", "v"),
    "video_vae_encoder": ("image", "latents"),
    "video_vae_decoder": ("latents", "frames"),
}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return load(tiny_checkpoint)


def test_the_bundle_holds_every_engine_of_the_contract(tiny_bundle: Path, checkpoint: Checkpoint) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert set(manifest.engines) == {*CONTRACT, LANGUAGE_MODEL}
    for name, (inputs, outputs) in CONTRACT.items():
        entry = manifest.engines[name]
        assert [tensor.name for tensor in entry.inputs] == inputs.split(), name
        assert [tensor.name for tensor in entry.outputs] == outputs.split(), name
        signature = GRAPHS[name].signature(checkpoint.config)
        assert [tensor.shape for tensor in entry.outputs] == list(signature.outputs.values()), name
        assert [tensor.shape for tensor in entry.inputs] == [part.shape for part in signature.inputs.values()], name
    assert manifest.source == checkpoint.digest
    assert not manifest.trained


def test_the_bundle_records_parity(tiny_bundle: Path) -> None:
    for name, entry in Bundle.open(tiny_bundle).manifest.engines.items():
        assert entry.parity is not None, name
        assert entry.parity.max_abs_error <= entry.parity.tolerance, name
        assert entry.parity.scale > 0.1, f"{name}: outputs are too small to be a test"


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_engines_run_at_sizes_they_were_not_traced_at(name: str, tiny_bundle: Path, checkpoint: Checkpoint) -> None:
    """Every free dimension takes another value than the traced one."""
    graph = GRAPHS[name]
    sizes = {dim: size + {"B": 1, "L": 7, "S": 2, "N": -1}.get(dim, -size // 2) for dim, size in graph.example.items()}
    signature = graph.signature(checkpoint.config)
    inputs = signature.example(sizes, seed=11)
    with EngineSet(Bundle.open(tiny_bundle, check_hashes=False)) as engines:
        actual = engines.get(name)(**inputs)
    for output, expected in run(torch_module(checkpoint, graph), inputs, signature).items():
        assert actual[output].shape == expected.shape
        assert np.abs(actual[output] - expected).max() <= 1e-4 * np.abs(expected).max(), output


def test_codes_vary_with_the_input(tiny_bundle: Path, checkpoint: Checkpoint) -> None:
    """Otherwise equal codes would prove nothing."""
    with EngineSet(Bundle.open(tiny_bundle, check_hashes=False)) as engines:
        for name in ("visual_merger", "motion_encoder"):
            inputs = GRAPHS[name].signature(checkpoint.config).example({"B": 2}, seed=3)
            assert len(np.unique(engines.get(name)(**inputs)["codes"])) > 8, name


def test_weights_are_stored_in_half_without_loss(tiny_bundle: Path) -> None:
    for name in ENGINES:
        tensors = onnx.load(tiny_bundle / f"{name}.onnx").graph.initializer
        full = sum(len(t.raw_data) for t in tensors if t.data_type == onnx.TensorProto.FLOAT)
        assert full <= 0.2 * sum(len(t.raw_data) for t in tensors), name


def test_weights_that_half_does_not_hold_stay_as_they_are(checkpoint: Checkpoint, tmp_path: Path) -> None:
    class Finer:
        def tensors(self, component: str) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in checkpoint.weights.tensors(component):
                yield name, tensor * 1.0001

    finer = Checkpoint(checkpoint.config, tokenizer=b"", weights=Finer())
    write_engine(finer, "motion_conditioner", tmp_path / "finer.onnx", EngineSettings())
    stored = [onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "finer.onnx").graph.initializer]
    assert not any(array.dtype == np.float16 for array in stored)
    values = np.concatenate([array.ravel() for array in stored if array.dtype == np.float32])
    expected = np.concatenate([t.numpy().ravel() for _, t in finer.weights.tensors("motion_encoder")])
    assert np.isin(expected, values).all()


def test_large_models_keep_their_weights_beside_them(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.onnx.SINGLE_FILE_LIMIT", 1000)
    path = tmp_path / "motion_conditioner.onnx"
    files = write_engine(checkpoint, "motion_conditioner", path, EngineSettings())
    assert [path.name for path in files] == ["motion_conditioner.onnx", "motion_conditioner.onnx.data"]
    parity.check_engine("motion_conditioner", OnnxRuntimeEngine(files[0], EngineOptions(threads=1)), checkpoint)


class Toy(nn.Module):
    """Axes split in the middle and at the end, with a batch taken from a shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        x = x.flatten(0, 1).unflatten(0, (rows, -1)).unflatten(1, (2, -1)).unflatten(-1, (3, 2))
        return x.reshape(rows, -1, 6).transpose(1, 2)


def test_unflatten_stays_dynamic(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    signature = Signature({"x": Input(("B", 4, 6))}, {"y": ("B", 6, 4)})
    graph = Graph((), lambda config: Toy(), lambda config: signature, {"B": 2}, ())
    onnx.save(trace(Toy(), graph, signature), tmp_path / "toy.onnx")
    engine = OnnxRuntimeEngine(tmp_path / "toy.onnx", EngineOptions(threads=1))
    inputs = signature.example({"B": 5}, seed=0)
    np.testing.assert_array_equal(engine(**inputs)["y"], run(Toy(), inputs, signature)["y"])
    assert capfd.readouterr() == ("", ""), "the exporter's notes must not reach the user"


class Off:
    """An engine whose outputs are changed by `change`."""

    def __init__(self, engine: Any, change: Any) -> None:
        self.engine, self.change = engine, change

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        return {name: self.change(value) for name, value in self.engine(**inputs).items()}


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("motion_conditioner", lambda v: v * np.float32(1.001), "states at B 2"),
        ("motion_conditioner", lambda v: np.where(v == v.max(), np.float32("nan"), v), "states"),
        ("motion_conditioner", lambda v: v[:1], "instead of"),
        ("motion_encoder", lambda v: np.where(np.arange(v.size).reshape(v.shape) == 5, v ^ 1, v), "1 of 96 integers"),
    ],
)
def test_a_deviation_is_a_parity_error(
    name: str, change: Any, named: str, tiny_bundle: Path, checkpoint: Checkpoint
) -> None:
    bundle = Bundle.open(tiny_bundle, check_hashes=False)
    with EngineSet(bundle) as engines, pytest.raises(ParityError, match=named) as caught:
        parity.check_engine(name, Off(engines.get(name), change), checkpoint)  # type: ignore[arg-type]
    assert caught.value.component == name


def test_other_weights_are_a_parity_error(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle, check_hashes=False)
    with EngineSet(bundle) as engines, pytest.raises(ParityError, match="language_model"):
        parity.check_language_model(engines.language_model(), initialise("tiny", 1))


def test_a_failing_export_leaves_the_old_bundle(
    tiny_bundle: Path, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Path(shutil.copytree(tiny_bundle, tmp_path / "shapes"))
    before = Bundle.open(target).digest
    graph = GRAPHS["visual_encoder"]
    monkeypatch.setattr(build, "ENGINES", ("visual_encoder",))
    with pytest.raises(UsageError, match="--force"):
        build.export_bundle(checkpoint, target)
    # What is traced has its outputs negated, what it is compared with has not.
    wrong = replace(graph, build=lambda *parts: Negated(graph.build(*parts)))
    monkeypatch.setattr("export.engine.GRAPHS", {"visual_encoder": wrong})
    with pytest.raises(ParityError):
        build.export_bundle(checkpoint, target, force=True)
    assert Bundle.open(target).digest == before
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


class Negated(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(-value for value in self.module(*inputs))


def test_export_says_what_it_would_build(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(export, [str(tiny_checkpoint), "-o", str(tmp_path / "b"), "--plan"])
    assert result.exit_code == 0, result.output
    assert "keyframe_conditioner" in result.stdout and "language_model" in result.stdout
    assert not (tmp_path / "b").exists()
    result = CliRunner().invoke(export, [str(tiny_checkpoint), "-o", str(tmp_path / "b"), "--plan", "--json"])
    parts = json.loads(result.stdout.splitlines()[-1])["plan"]
    assert {engine for part in parts for engine in part["engines"]} == set(ENGINES)


def test_verify_shows_every_engine_and_task(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = [case for case in end_to_end.cases(Bundle.open(tiny_bundle)) if case.task == "text question"]
    monkeypatch.setattr(end_to_end, "cases", lambda bundle: one)
    result = CliRunner().invoke(verify, [str(tiny_bundle), str(tiny_checkpoint)])
    assert result.exit_code == 0, result.output
    assert all(name in result.stdout for name in ENGINES)
    assert "allowed in fp32" in result.stdout and "text question" in result.stdout and "100.0%" in result.stdout


def test_verify_compares_everything_before_it_fails(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = [case for case in end_to_end.cases(Bundle.open(tiny_bundle)) if case.task == "text question"]
    monkeypatch.setattr(end_to_end, "cases", lambda bundle: one)
    monkeypatch.setitem(end_to_end.BOUNDS, "fp32", replace(end_to_end.BOUNDS["fp32"], psnr=200.0))
    real = parity.check_engine

    def spoilt(name: str, *rest: Any) -> Any:
        if name == "visual_encoder":  # the first of all
            raise ParityError(name, 1.0, 0.1, "features")
        return real(name, *rest)

    monkeypatch.setattr(build, "check_engine", spoilt)
    result = CliRunner().invoke(verify, [str(tiny_bundle), str(tiny_checkpoint), "--json"])
    assert isinstance(result.exception, ParityError) and result.exception.component == "visual_encoder"
    found = json.loads(result.stdout.splitlines()[-1])
    assert {one["name"]: one["problem"] is not None for one in found["engines"]} == {
        name: name == "visual_encoder" for name in ENGINES
    }
    assert found["allowed"]["psnr"] == 200
    assert found["tasks"][0]["share"] == 1 and "PSNR 100.0 dB, at least 200" in found["tasks"][0]["problem"]


def test_verify_wants_the_checkpoint_of_the_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    initialise("tiny", 1).save(tmp_path / "other")
    result = CliRunner().invoke(verify, [str(tiny_bundle), str(tmp_path / "other"), "--engines-only"])
    assert isinstance(result.exception, BundleError)


def test_examples_are_drawn_from_their_seed() -> None:
    signature = Signature({"codes": Input(("B", 3), integers(100))}, {})
    first, second = (signature.example({"B": 2}, seed)["codes"] for seed in (0, 0))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, signature.example({"B": 2}, 1)["codes"])
