"""TensorRT-RTX really builds every engine, without a GPU, and says in one line what it does not take."""

from __future__ import annotations

import signal
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from fake_tensorrt import FakeDevice
from onnx import TensorProto, helper, numpy_helper

import export.tensorrt as building
from export.engine import write_engine
from export.graphs.registry import ENGINES, LANGUAGE_MODEL
from export.settings import Buckets, EngineSettings, Flavour, Precision, profile_names, read_profile
from export.tensorrt import build_plan, build_plans
from export.tensorrt_shapes import Range, profiles
from export.tensorrt_worker import Report, Request, prepare
from runtime.bundle import BuiltFor
from runtime.errors import EnvironmentProblem, UsageError
from videolavit.checkpoints import Checkpoint, RandomWeights
from videolavit.config import PRESETS

TINY, OFFICIAL = PRESETS["tiny"], PRESETS["video-lavit-7b"]
TARGETS = ("8.6", "8.9", "12.0")
RTX = EngineSettings(backend="tensorrt-rtx", compute_capabilities=TARGETS, workspace=1 << 30)

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")


@needs_rtx
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != LANGUAGE_MODEL])
def test_every_engine_builds_for_the_gpus_asked_for(tiny_bundle: Path, tmp_path: Path, engine: str) -> None:
    (built,) = build_plans(engine, tiny_bundle / f"{engine}.onnx", tmp_path, TINY, RTX)
    assert built.path == tmp_path / f"{engine}.plan"
    assert built.path.stat().st_size > 100_000
    assert built.built_for.library.startswith("tensorrt-rtx 1.")
    assert built.built_for.compute_capabilities == TARGETS
    assert [path.name for path in tmp_path.iterdir()] == [built.path.name]


@needs_rtx
@pytest.mark.parametrize(
    ("flavour", "precision", "layers", "files"),
    [
        ("native", "fp32", TINY.language_model.layers, ["language_model.c64.plan", "language_model.c256.plan"]),
        ("native", "int4", 1, ["language_model.c64.plan"]),
        ("plain", "fp16", 1, ["language_model.plan"]),
    ],
)
def test_the_language_model_builds_with_its_cache(
    tmp_path: Path, flavour: Flavour, precision: Precision, layers: int, files: list[str]
) -> None:
    config = replace(TINY, language_model=replace(TINY.language_model, layers=layers))
    settings = EngineSettings(
        backend="tensorrt-rtx",
        precision=precision,
        compute_capabilities=TARGETS,
        flavour=flavour,
        buckets=Buckets(cache_capacities=(256, 64) if len(files) == 2 else (64,)),
    )
    checkpoint = Checkpoint(config, tokenizer=b"", weights=RandomWeights(config, seed=0))
    model, *_ = write_engine(checkpoint, LANGUAGE_MODEL, tmp_path / "model.onnx", settings)
    built = build_plans(LANGUAGE_MODEL, model, tmp_path / "plans", config, settings)
    assert [plan.path.name for plan in built] == files
    assert all(plan.path.is_file() for plan in built)


# What is refused


def small_model(path: Path, op: str, domain: str = "", **attributes: object) -> Path:
    node = helper.make_node(op, ["x"], ["y"], name="stage.step", domain=domain, **attributes)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 4]) for name in "xy"]
    graph = helper.make_graph([node], "small", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 18)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


ROWS = [{"B": Range(1, 2, 2)}]


@needs_rtx
def test_an_operator_it_does_not_know_is_named_with_its_node(tmp_path: Path) -> None:
    model = small_model(tmp_path / "small.onnx", "Twirl", domain="our.own")
    with pytest.raises(UsageError, match=r"engine small: tensorrt-rtx .* node stage\.step \(Twirl\)") as caught:
        build_plan("small", model, tmp_path / "small.plan", ROWS, RTX)
    assert "\n" not in str(caught.value) and str(caught.value).endswith("build it with --backend onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]


@needs_rtx
def test_a_gpu_it_cannot_build_for_is_named_with_those_it_can(tmp_path: Path) -> None:
    settings = EngineSettings(backend="tensorrt-rtx", compute_capabilities=("8.7",))
    with pytest.raises(EnvironmentProblem, match=r"compute capability 8\.7: .* choose from .*8\.9"):
        build_plan("small", small_model(tmp_path / "small.onnx", "Relu"), tmp_path / "small.plan", ROWS, settings)


@needs_rtx
def test_a_plan_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """A full disk, as far as the worker sees it: a place where nothing can be written."""
    (tmp_path / "small.plan").mkdir()
    with pytest.raises(UsageError, match=r"engine small: .*small\.plan: cannot be written: Is a directory") as caught:
        build_plan("small", small_model(tmp_path / "small.onnx", "Relu"), tmp_path / "small.plan", ROWS, RTX)
    assert "--backend" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"small.onnx", "small.plan"}


def test_full_tensorrt_builds_for_the_gpu_it_sees_and_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = []

    def run(engine: str, request: Request) -> Report:
        requests.append(request)
        return Report(layers=1)

    monkeypatch.setattr(building, "_run", run)
    monkeypatch.setattr(building.tensorrt_library, "version", lambda backend: f"{backend} 10.3.0")
    monkeypatch.setattr(building.cuda, "open_device", lambda: FakeDevice("8.7"))
    monkeypatch.delenv("VIDEOLAVIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = small_model(tmp_path / "small.onnx", "Relu")
    built = build_plan("small", model, tmp_path / "small.plan", ROWS, EngineSettings(backend="tensorrt"))
    assert built.built_for == BuiltFor(library="tensorrt 10.3.0", compute_capabilities=("8.7",))
    assert requests[0].timing_cache == str(tmp_path / "cache" / "videolavit" / "tensorrt-10.3.0-8.7.timing")
    assert (tmp_path / "cache" / "videolavit").is_dir()
    elsewhere = EngineSettings(backend="tensorrt", compute_capabilities=("8.9",))
    with pytest.raises(UsageError, match=r"builds for the GPU of this machine, 8\.7, not for 8\.9"):
        build_plan("small", model, tmp_path / "small.plan", ROWS, elsewhere)


def test_a_missing_library_is_told_before_a_process_is_started(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r'pip install "videolavit\[tensorrt\]"'):
        build_plan("small", tmp_path / "none.onnx", tmp_path / "p.plan", ROWS, EngineSettings(backend="tensorrt"))


@needs_rtx
def test_a_plan_without_weights_needs_a_gpu_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise EnvironmentProblem("CUDA: there is no GPU")

    monkeypatch.setattr(building.cuda, "open_device", none)
    settings = EngineSettings(backend="tensorrt-rtx", refittable=True)
    with pytest.raises(EnvironmentProblem, match=r"engine small: a plan without weights .*there is no GPU"):
        build_plan("small", tmp_path / "none.onnx", tmp_path / "small.plan", ROWS, settings)


@needs_rtx
def test_a_dimension_without_sizes_is_named(tmp_path: Path) -> None:
    model = small_model(tmp_path / "small.onnx", "Relu")
    with pytest.raises(UsageError, match="input x has a free dimension B without sizes"):
        build_plan("small", model, tmp_path / "small.plan", [{"S": Range(1, 1, 1)}], RTX)


@needs_rtx
@pytest.mark.parametrize(
    ("status", "words"),
    [(-signal.SIGKILL, "was killed, most likely for want of memory"), (1, "ended with status 1: it broke")],
)
def test_a_builder_that_dies_is_an_error_of_its_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, words: str
) -> None:
    dead = subprocess.CompletedProcess([], status, b"", b"Traceback\nit broke\n")
    monkeypatch.setattr(building.subprocess, "run", lambda *args, **kwargs: dead)
    model = small_model(tmp_path / "small.onnx", "Relu")
    with pytest.raises(EnvironmentProblem, match=f"engine small: the TensorRT builder {words}"):
        build_plan("small", model, tmp_path / "small.plan", ROWS, RTX)


# Shapes


def test_pictures_get_a_profile_for_each_size() -> None:
    buckets = Buckets(video_sizes=((576, 320), (320, 576)), image_sizes=((1024, 576),), rows=2)
    landscape, portrait = profiles("video_unet", OFFICIAL, buckets)
    assert (landscape["h"], landscape["w"]) == (Range(40, 40, 40), Range(72, 72, 72))
    assert (portrait["h"], portrait["w"]) == (Range(72, 72, 72), Range(40, 40, 40))
    assert landscape["B"] == Range(1, 2, 2)
    (still,) = profiles("keyframe_vae_encoder", OFFICIAL, buckets)
    assert (still["H"], still["W"]) == (Range(576, 576, 576), Range(1024, 1024, 1024))


def test_sizes_left_open_are_the_models_own() -> None:
    (unet,) = profiles("keyframe_unet", OFFICIAL, Buckets())
    assert (unet["h"].best, unet["w"].best) == (72, 128)
    prompt = profiles(LANGUAGE_MODEL, OFFICIAL, Buckets())[1]
    assert (prompt["S"].high, prompt["C"].high) == (4096, 4096)


def test_the_language_model_is_fastest_at_single_positions_and_takes_prompts() -> None:
    buckets = Buckets(cache_capacities=(512, 2048), prompt_positions=1024)
    one, prompt = profiles(LANGUAGE_MODEL, OFFICIAL, buckets)
    assert (one["S"], prompt["S"].low, prompt["S"].high) == (Range(1, 1, 1), 2, 1024)
    assert one["C"] == Range(1, 512, 2048)
    assert {p["C"] for p in profiles(LANGUAGE_MODEL, OFFICIAL, buckets, 512)} == {Range(512, 512, 512)}
    assert profiles(LANGUAGE_MODEL, OFFICIAL, buckets, 512)[1]["S"].high == 512


@pytest.mark.parametrize(
    ("engine", "buckets", "words"),
    [
        (LANGUAGE_MODEL, Buckets(cache_capacities=(8192,)), "8192 is more than the model's 4096"),
        ("video_unet", Buckets(video_sizes=((576, 330),)), "multiples of 64"),
    ],
)
def test_sizes_the_model_does_not_have_are_refused(engine: str, buckets: Buckets, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        profiles(engine, OFFICIAL, buckets)


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_ask_for_what_the_official_model_has(name: str) -> None:
    settings = read_profile(name)
    for engine in ENGINES:
        own = settings.for_engine(engine)
        if own.backend != "onnx":
            assert profiles(engine, OFFICIAL, own.buckets)


# TensorRT's own copy of the graph


@pytest.mark.parametrize(("kind", "split"), [(TensorProto.FLOAT, True), (TensorProto.FLOAT16, False)])
def test_attention_in_float32_may_be_split_into_parts(kind: int, split: bool) -> None:
    cache = helper.make_tensor_value_info("past_key_0", kind, ["B", 2, "C", 8])
    query = helper.make_tensor_value_info("q", kind, ["B", 2, "S", 8])
    node = helper.make_node("Attention", ["q", "past_key_0", "past_key_0"], ["y"])
    extra = numpy_helper.from_array(np.zeros(1, np.float32), "unused")
    graph = helper.make_graph([node], "g", [query, cache], [helper.make_tensor_value_info("y", kind, None)], [extra])
    graph.value_info.append(helper.make_tensor_value_info("stale", kind, ["C"]))
    model = helper.make_model(graph)
    prepare(model, {"C": 64})
    dims = model.graph.input[1].type.tensor_type.shape.dim
    assert [dim.dim_value or dim.dim_param for dim in dims] == ["B", 2, 64, 8]
    assert not model.graph.value_info
    assert ("TRT_decomposable" in [a.name for a in model.graph.node[0].attribute]) is split
