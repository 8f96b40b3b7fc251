"""Graphs rewritten on their way into an engine: the same numbers from fewer and cheaper nodes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.engine import write_engine
from export.fused_attention import fuse_attention
from export.gates import split_gates
from export.graphs.registry import GRAPHS
from export.hollow import Traced, Weight, trace_hollow
from export.settings import EngineSettings, Precision
from export.stream import write_streamed
from runtime.backends.onnxruntime import OnnxRuntimeEngine
from runtime.engines import EngineOptions
from videolavit.checkpoints import Checkpoint, load


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return load(tiny_checkpoint)


def nodes(traced: Traced) -> Counter[str]:
    return Counter(node.op_type for node in traced.model.graph.node)


def results(traced: Traced, checkpoint: Checkpoint, path: Path, name: str) -> list[np.ndarray]:
    """Outputs at every shape that exports are compared at."""
    write_streamed(traced, checkpoint.weights, path)
    engine, graph = OnnxRuntimeEngine(path, EngineOptions(threads=1)), GRAPHS[name]
    shapes = (graph.example, *graph.others)
    return [value for sizes in shapes for value in engine(**traced.signature.example(sizes, 1)).values()]


@pytest.mark.parametrize("name", ["video_unet", "keyframe_unet", "keyframe_vae_decoder"])
def test_rewritten_graphs_compute_the_same(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    plain = trace_hollow(checkpoint.config, GRAPHS[name])
    split = split_gates(plain)
    fused = fuse_attention(split)
    assert nodes(fused)["MultiHeadAttention"] == nodes(plain)["Softmax"] > 0
    assert nodes(fused)["Softmax"] == nodes(split)["Split"] == 0
    assert nodes(fused).total() < nodes(split).total()
    expected = results(plain, checkpoint, tmp_path / "plain.onnx", name)
    for model in (split, fused):
        for ours, theirs in zip(results(model, checkpoint, tmp_path / "model.onnx", name), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_attention_with_a_mask_stays_as_it_is(checkpoint: Checkpoint) -> None:
    traced = trace_hollow(checkpoint.config, GRAPHS["keyframe_conditioner"])
    assert nodes(traced)["Softmax"] > 0
    assert fuse_attention(traced) is traced


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_attention_is_fused_in_every_precision(precision: Precision, checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "keyframe_unet.onnx"
    write_engine(checkpoint, "keyframe_unet", path, EngineSettings(precision=precision))
    kinds = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    assert kinds["MultiHeadAttention"] > 0 == kinds["Softmax"] == kinds["Split"]


def test_tensorrt_gets_operators_it_knows(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "keyframe_unet.onnx"
    write_engine(checkpoint, "keyframe_unet", path, EngineSettings(backend="tensorrt-rtx", precision="fp16"))
    model = onnx.load(path, load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert {entry.domain for entry in model.opset_import} == {""}


def test_halves_of_a_weight_are_the_weight() -> None:
    array = np.arange(24.0).reshape(8, 3)
    parts = [
        Weight("unet", "proj", (8, 3), (("transpose", (1, 0)), ("part", (1, 2, which)))).turned(array)
        for which in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), array.T)
