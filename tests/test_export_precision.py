"""Engines in every precision: what they keep in float32, what they store, how near they stay to torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from export.engine import build_engine
from export.settings import EngineSettings, ExportSettings, Precision, parse_precision, read_profile
from runtime.errors import CheckpointError, UsageError
from videolavit.checkpoints import Checkpoint, load


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return load(tiny_checkpoint)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("motion_conditioner", "fp16"),
        ("motion_conditioner", "bf16"),
        ("visual_merger", "fp16"),
        ("token_embedding", "fp16"),
        ("keyframe_unet", "fp16"),
        ("language_model", "fp16"),
        ("language_model", "int4"),
    ],
)
def test_precisions_agree_with_torch(name: str, precision: Precision, checkpoint: Checkpoint, tmp_path: Path) -> None:
    built = build_engine(checkpoint, name, tmp_path, EngineSettings(precision=precision), compare=True)
    assert built.entry.precision == precision
    assert built.parity is not None and built.parity.max_abs_error <= built.parity.tolerance
    assert all(
        tensor.dtype in ("float32", "int64", "int32") for tensor in built.entry.outputs if "present" not in tensor.name
    )


def test_half_precision_computes_in_half_except_where_it_would_hurt(checkpoint: Checkpoint, tmp_path: Path) -> None:
    build_engine(checkpoint, "visual_merger", tmp_path, EngineSettings(precision="fp16"), compare=False)
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "visual_merger.onnx"))
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
    of = {
        op: {kinds[n.output[0]] for n in model.graph.node if n.op_type == op} for op in ("MatMul", "LayerNormalization")
    }
    assert of["LayerNormalization"] == {TensorProto.FLOAT}
    assert of["MatMul"] == {TensorProto.FLOAT, TensorProto.FLOAT16}, "distances to codes stay in float32"
    halves = [kinds[n.output[0]] for n in model.graph.node if n.op_type == "MatMul"]
    assert halves.count(TensorProto.FLOAT16) > halves.count(TensorProto.FLOAT)


def test_a_missing_weight_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    class Lacking:
        def tensors(self, component: str):  # type: ignore[no-untyped-def]
            return list(checkpoint.weights.tensors(component))[1:]

    lacking = Checkpoint(checkpoint.config, tokenizer=b"", weights=Lacking())
    with pytest.raises(CheckpointError, match=r"motion_encoder: weight .* is missing"):
        build_engine(lacking, "motion_conditioner", tmp_path, EngineSettings(), compare=False)


def test_a_bundle_takes_the_precision_each_engine_has() -> None:
    settings = ExportSettings(default=EngineSettings(precision="int4"))
    found = {
        name: settings.for_engine(name).precision for name in ("language_model", "video_unet", "keyframe_vae_decoder")
    }
    assert found == {"language_model": "int4", "video_unet": "fp16", "keyframe_vae_decoder": "fp32"}
    default, engines = parse_precision("fp16,language_model=int4")
    settings = ExportSettings(default=EngineSettings(precision=default or "fp32"), engines=engines)
    assert settings.for_engine("understanding/language_model").precision == "int4"


def test_choices_that_an_engine_does_not_have_are_refused() -> None:
    for text, named in (("video_vae_decoder=int4", "video_vae_decoder"), ("nothing=fp16", "nothing")):
        with pytest.raises(UsageError, match=named):
            ExportSettings(engines=parse_precision(text)[1])
    with pytest.raises(UsageError, match="fp7"):
        parse_precision("fp7")
    with pytest.raises(UsageError, match="gqa"):
        ExportSettings(default=EngineSettings(backend="tensorrt", flavour="gqa"))


def test_a_profile_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    good = 'description = "x"\nbackend = "onnx"\nprecision = "fp16"\nworkspace = "4GiB"\nvideo_sizes = [[576, 320]]\n'
    path.write_text(good + '[engines.language_model]\nprecision = "int4"\n')
    settings = read_profile(str(path))
    assert settings.for_engine("language_model").precision == "int4"
    assert settings.default.workspace == 4 * 2**30 and settings.default.buckets.video_sizes == ((576, 320),)
    for wrong, named in (("presicion = 1\n", "presicion"), ('memory_budget = "many"\n', "many"), ("[[", "mine.toml")):
        path.write_text(good + wrong)
        with pytest.raises(UsageError, match=named) as caught:
            read_profile(str(path))
        assert str(path) in str(caught.value)


def test_a_value_that_half_does_not_hold_keeps_its_node_in_float32(checkpoint: Checkpoint, tmp_path: Path) -> None:
    build_engine(checkpoint, "keyframe_unet", tmp_path, EngineSettings(precision="fp16"), compare=False)
    model = onnx.load(tmp_path / "keyframe_unet.onnx")
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].t.data_type == TensorProto.FLOAT16:
            value = onnx.numpy_helper.to_array(node.attribute[0].t)
            assert np.isfinite(value).all() and (np.abs(value[value != 0]) >= 6e-5).all(), node.name
