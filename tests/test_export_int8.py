"""UNets in 8-bit integers: what is quantised, how near they stay to torch, that runtimes compute in integers."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from quantised_graphs import products

from export.build import plan
from export.calibration import Calibration, _Magnitudes, calibrate, calibrated_with, denoised, scene
from export.engine import Built, build_engine
from export.graphs.registry import GRAPHS
from export.settings import UNETS, Buckets, EngineSettings, ExportSettings
from runtime.backends import graph_cache
from runtime.backends.onnxruntime import OnnxRuntimeEngine
from runtime.engines import EngineOptions
from videolavit.checkpoints import Checkpoint, RandomWeights, load
from videolavit.config import PRESETS

INT8 = EngineSettings(precision="int8")
SHORT = Calibration(seeds=(0,), steps=2)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return load(tiny_checkpoint)


@pytest.fixture(scope="module")
def quantised(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Built]:
    """The key-frame UNet in int8 for ONNX Runtime: its file, and what comparing it found."""
    folder = tmp_path_factory.mktemp("int8")
    built = build_engine(checkpoint, "keyframe_unet", folder, INT8, compare=True)
    return folder / "keyframe_unet.onnx", built


# Against torch


def test_it_agrees_with_torch_while_it_denoises(quantised: tuple[Path, Built]) -> None:
    parity = quantised[1].parity
    assert parity is not None and 1e-4 * parity.scale < parity.max_abs_error <= parity.tolerance


def test_the_video_unet_agrees_with_torch_while_it_denoises(checkpoint: Checkpoint, tmp_path: Path) -> None:
    built = build_engine(checkpoint, "video_unet", tmp_path, INT8, compare=True)
    assert built.parity is not None and built.parity.max_abs_error <= built.parity.tolerance
    found = products(onnx.load(tmp_path / "video_unet.onnx"))
    assert found["/down_blocks.0/resnets.0/temporal_res_block/Conv"], "a weight that the graph takes an axis from"


# What is quantised


def test_what_is_sensitive_stays_in_float(quantised: tuple[Path, Built]) -> None:
    found = products(onnx.load(quantised[0]))
    integer = {name for name, coded in found.items() if coded}
    assert {"/unet/mid_block/resnets.0/conv1/Conv", "/unet/mid_block/attentions.0/proj_in/MatMul"} <= integer
    kept = found.keys() - integer
    for part in ("conv_in", "conv_out", "conv_shortcut", "samplers", "time_embedding", "add_embedding", "emb_proj"):
        assert any(part in name for name in kept), part
        assert not any(part in name for name in integer), part
    assert {name for name in kept if "MatMul" in name} == {
        name for name in found if "/attn" in name and "/to_" not in name
    }


def test_codes_are_symmetric_and_weights_have_a_scale_for_each_output(quantised: tuple[Path, Built]) -> None:
    model = onnx.load(quantised[0])
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = 0
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        codes, scales, zeros = (values.get(name) for name in node.input)
        assert zeros is not None and zeros.dtype == (np.uint8 if codes is None else np.int8)
        if codes is None:
            assert zeros == 128 and scales is not None and scales.ndim == 0
        else:
            weights += 1
            axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
            others = tuple(i for i in range(codes.ndim) if i != axis)
            assert not zeros.any() and zeros.shape == (codes.shape[axis],)
            assert (np.abs(codes).max(axis=others) >= 126).all(), "every output has its own scale"
    assert weights > 40


def test_onnx_runtime_computes_in_integers(quantised: tuple[Path, Built], tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(quantised[0]), options, providers=["CPUExecutionProvider"])
    before = products(onnx.load(quantised[0]))
    optimised = onnx.load(tmp_path / "optimised.onnx")
    count = Counter(node.op_type for node in optimised.graph.node)
    assert not any(products(optimised).values())
    assert count["QLinearConv"] == sum(coded for name, coded in before.items() if "Conv" in name)
    assert count["MatMulIntegerToFloat"] == sum(coded for name, coded in before.items() if "MatMul" in name)


def test_sums_do_not_overflow_on_processors_without_vnni(
    quantised: tuple[Path, Built], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_by = []
    monkeypatch.setattr(graph_cache, "key_of", lambda files, library: kept_by.append(library))
    engine = OnnxRuntimeEngine(quantised[0], EngineOptions(threads=1), quantised[1].entry.files)
    session = engine._session
    assert session.get_session_options().get_session_config_entry("session.x64quantprecision") == "1"
    assert "x64quantprecision" in kept_by[0], "a model that was optimised without it is not taken for one with it"


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_tensorrt_builds_it_with_the_rest_in_half(checkpoint: Checkpoint, tmp_path: Path) -> None:
    settings = EngineSettings(
        precision="int8", backend="tensorrt-rtx", compute_capabilities=("8.9",), workspace=1 << 30
    )
    built = build_engine(checkpoint, "keyframe_unet", tmp_path, settings, compare=True)
    assert built.parity is not None and built.parity.max_abs_error <= built.parity.tolerance
    assert built.entry.built_for is not None and built.entry.built_for.compute_capabilities == ("8.9",)
    assert [path.name for path in tmp_path.iterdir()] == ["keyframe_unet.plan"]


# Calibration


def test_what_is_seen_is_what_the_engine_is_given(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    for name in ("keyframe_unet", "video_unet"):
        signature = GRAPHS[name].signature(config)
        calls = list(denoised(checkpoint, name, SHORT))
        assert len(calls) == SHORT.steps
        for inputs, outputs in calls:
            assert list(inputs) == list(signature.inputs) and list(outputs) == list(signature.outputs)
            for key, value in inputs.items():
                wanted = signature.inputs[key].shape
                sizes = {"B": 2, "h": 16, "w": 16}  # both halves of guidance at the model's own size
                assert value.shape == tuple(sizes[dim] if isinstance(dim, str) else dim for dim in wanted)
                assert value.dtype == np.float32
        assert calls[0][0]["timestep"] > calls[1][0]["timestep"]


def test_a_calibration_is_repeatable_and_takes_the_size_asked_for(checkpoint: Checkpoint) -> None:
    first = calibrate(checkpoint, "keyframe_unet", INT8, SHORT)
    assert first == calibrate(checkpoint, "keyframe_unet", INT8, SHORT)
    assert all(clip.inputs > 0 and (clip.results is None) == ("conv" not in name) for name, clip in first.items())
    small = EngineSettings(precision="int8", buckets=Buckets(image_sizes=((64, 96),)))
    assert first != calibrate(checkpoint, "keyframe_unet", small, SHORT)


def test_only_quantised_unets_depend_on_what_makes_their_conditions() -> None:
    assert calibrated_with("keyframe_unet", INT8) == ("visual_tokenizer", "keyframe_decoder")
    assert calibrated_with("keyframe_unet", EngineSettings(precision="fp16")) == ()
    assert calibrated_with("language_model", INT8) == ()


def test_a_rare_large_value_is_cut_and_an_even_spread_is_not() -> None:
    even = torch.linspace(-3, 3, 1_000_001)
    seen = _Magnitudes()
    seen.add(even)
    assert 2.8 < seen.clip() < 3.2
    seen.add(torch.tensor([3000.0]))
    assert 3.2 < seen.clip() < 1000
    nothing = _Magnitudes()
    nothing.add(torch.zeros(10))
    assert nothing.clip() > 0


def test_a_scene_moves_and_follows_its_seed() -> None:
    picture, motion = scene(0, 24, (96, 64))
    assert picture.shape == (64, 96, 3) and picture.dtype == np.uint8 and picture.std() > 20
    assert motion.shape == (24, 2, 4, 6) and motion.dtype == np.float32
    assert motion.std(axis=0).min() > 0 and motion[0].std() > 0
    assert not np.array_equal(picture, scene(1, 24, (96, 64))[0])


# Settings


def test_a_bundle_of_int8_has_such_unets_and_a_bundle_of_int4_has_not() -> None:
    names = ("language_model", "keyframe_unet", "video_unet", "video_vae_decoder", "video_vae_encoder")

    def found(precision: str) -> list[str]:
        settings = ExportSettings(default=EngineSettings(precision=precision))  # type: ignore[arg-type]
        return [settings.for_engine(name).precision for name in names]

    assert found("int8") == ["int8", "int8", "int8", "fp16", "fp32"]
    assert found("int4") == ["int4", "fp16", "fp16", "fp16", "fp32"]


def test_calibration_counts_in_the_plan_compared_or_not() -> None:
    official = Checkpoint(PRESETS["video-lavit-7b"], tokenizer=b"", weights=RandomWeights(PRESETS["video-lavit-7b"], 0))

    def memory(precision: str, compare: bool) -> dict[str, int]:
        settings = ExportSettings(default=EngineSettings(precision=precision))  # type: ignore[arg-type]
        parts = plan(official, ("generate",), settings, compare=compare)
        return {part.component: part.memory for part in parts if part.component in UNETS}

    half, integer = memory("fp16", compare=False), memory("int8", compare=False)
    assert all(integer[name] > 2 * half[name] for name in UNETS), "torch's copy in float32 is there too"
    assert integer == memory("int8", compare=True)
