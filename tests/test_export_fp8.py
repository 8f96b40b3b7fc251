"""UNets in 8-bit floating point: what is coded how, how near they stay to torch, and the GPUs that are refused."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from fake_tensorrt import FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, numpy_helper
from quantised_graphs import products

import export.tensorrt as building
from export.calibration import calibrated_with
from export.engine import Built, build_engine, write_engine
from export.quantisation import FP8_LARGEST, quantise_fp8
from export.settings import EngineChoice, EngineSettings, ExportSettings, read_profile
from export.tensorrt import build_plan
from runtime.errors import UsageError
from videolavit.checkpoints import Checkpoint, load

FP8 = EngineSettings(precision="fp8")


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return load(tiny_checkpoint)


@pytest.fixture(scope="module")
def quantised(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Built]:
    """The key-frame UNet in fp8 for ONNX Runtime: its file, and what comparing it found."""
    folder = tmp_path_factory.mktemp("fp8")
    built = build_engine(checkpoint, "keyframe_unet", folder, FP8, compare=True)
    return folder / "keyframe_unet.onnx", built


# Against torch


def test_it_agrees_with_torch_while_it_denoises(quantised: tuple[Path, Built]) -> None:
    parity = quantised[1].parity
    assert parity is not None and 1e-3 * parity.scale < parity.max_abs_error <= parity.tolerance


def test_it_codes_the_products_that_int8_does(
    quantised: tuple[Path, Built], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "keyframe_unet.onnx"
    write_engine(checkpoint, "keyframe_unet", path, EngineSettings(precision="int8", backend="tensorrt-rtx"))
    found, integer = (
        {name for name, coded in products(onnx.load(file)).items() if coded} for file in (quantised[0], path)
    )
    assert found == integer and len(found) > 40


def test_codes_are_e4m3_and_weights_have_a_scale_for_each_output(quantised: tuple[Path, Built]) -> None:
    model = onnx.load(quantised[0])
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = 0
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        codes, scales, zeros = node.input
        assert kinds[zeros] == TensorProto.FLOAT8E4M3FN and not values[zeros].astype(np.float32).any()
        if codes not in kinds:
            assert values[scales].ndim == 0 and values[scales] > 0
            continue
        weights += 1
        axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
        others = tuple(i for i in range(values[codes].ndim) if i != axis)
        largest = np.abs(values[codes].astype(np.float32)).max(axis=others)
        assert kinds[codes] == TensorProto.FLOAT8E4M3FN and values[scales].shape == largest.shape
        assert (largest >= FP8_LARGEST * 15 / 16).all(), "every output has its own scale"
    assert weights > 40


MATRICES = arrays.arrays(
    np.float32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.floats(-8, 8, width=16)
)


@settings(deadline=None)
@given(MATRICES)
def test_a_weight_is_off_by_a_sixteenth_at_most(matrix: np.ndarray) -> None:
    codes, scales = quantise_fp8(matrix)
    assert codes.shape == matrix.shape and scales.shape == (len(matrix),)
    wide = scales.astype(np.float32)[:, None]
    found = codes.astype(np.float32) * wide
    # Below 2^-6 codes are evenly spaced, 2^-9 apart.
    assert (np.abs(found - matrix) <= np.maximum(np.abs(matrix) / 16, wide * 2.0**-10) * 1.001).all()
    np.testing.assert_array_equal(found == 0, np.abs(matrix) <= wide * 2.0**-10)


# TensorRT


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
@pytest.mark.parametrize(("name", "gpus"), [("keyframe_unet", ("8.9", "12.0")), ("video_unet", ("8.9",))])
def test_tensorrt_builds_it_for_gpus_that_have_it(
    checkpoint: Checkpoint, tmp_path: Path, name: str, gpus: tuple[str, ...]
) -> None:
    wanted = EngineSettings(precision="fp8", backend="tensorrt-rtx", compute_capabilities=gpus, workspace=1 << 30)
    built = build_engine(checkpoint, name, tmp_path, wanted, compare=False)
    assert built.entry.built_for is not None and built.entry.built_for.compute_capabilities == gpus
    assert built.entry.precision == "fp8" and [path.name for path in tmp_path.iterdir()] == [f"{name}.plan"]


def test_gpus_without_it_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    old = EngineSettings(backend="tensorrt-rtx", precision="fp8", compute_capabilities=("8.6", "8.9"))
    with pytest.raises(UsageError, match=r"engine keyframe_unet: compute capability 8\.6 has no fp8; .* from 8\.9 on"):
        ExportSettings(default=old)
    every = EngineSettings(backend="tensorrt-rtx", precision="fp8")
    with pytest.raises(UsageError, match=r"engine keyframe_unet: a plan for every GPU .* compute_capabilities"):
        ExportSettings(default=every)
    one = EngineSettings(backend="tensorrt-rtx", precision="fp16", compute_capabilities=("8.6",))
    with pytest.raises(UsageError, match=r"engine video_unet: .* take int8 or fp16"):
        ExportSettings(default=one, engines={"video_unet": EngineChoice(precision="fp8")})
    assert ExportSettings(default=old, tasks=("understand",)), "which has no UNet"
    profile = tmp_path / "card.toml"
    profile.write_text('description = "a card"\nbackend = "tensorrt-rtx"\nprecision = "fp8"\n')
    with pytest.raises(UsageError, match=r"card\.toml: engine keyframe_unet: "):
        read_profile(str(profile))
    profile.write_text(profile.read_text() + 'compute_capabilities = ["12.0", "10.0"]\n')
    assert read_profile(str(profile)).for_engine("video_unet").precision == "fp8"


def test_full_tensorrt_refuses_the_gpu_it_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building.tensorrt_library, "version", lambda backend: f"{backend} 10.3.0")
    monkeypatch.setattr(building.cuda, "open_device", lambda: FakeDevice("8.7"))
    wanted = EngineSettings(backend="tensorrt", precision="fp8")
    assert ExportSettings(default=wanted), "which GPU it is, is known on the machine that builds"
    with pytest.raises(UsageError, match=r"engine video_unet: compute capability 8\.7 has no fp8"):
        build_plan("video_unet", tmp_path / "video_unet.onnx", tmp_path / "video_unet.plan", [{}], wanted)


# Settings


def test_a_bundle_of_fp8_has_such_unets_and_the_rest_in_half() -> None:
    names = ("language_model", "keyframe_unet", "video_unet", "video_vae_decoder", "video_vae_encoder")
    wanted = ExportSettings(default=FP8)
    assert [wanted.for_engine(name).precision for name in names] == ["fp16", "fp8", "fp8", "fp16", "fp32"]
    with pytest.raises(UsageError, match="engine language_model: has no precision fp8"):
        ExportSettings(engines={"language_model": EngineChoice(precision="fp8")})


def test_its_files_depend_on_what_it_was_calibrated_with() -> None:
    assert calibrated_with("video_unet", FP8) == ("motion_tokenizer", "motion_encoder", "video_vae")
