"""Engine residency, and the ONNX Runtime backend's checks and errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from language_models import write
from onnx import TensorProto, helper, numpy_helper

from runtime.backends.onnxruntime import (
    _IDENTITY,
    OnnxRuntimeEngine,
    OnnxRuntimeLanguageModel,
    choose_provider,
    cuda_problem,
    open_session,
)
from runtime.bundle import MANIFEST, Bundle, EngineEntry, FileEntry, Manifest, TensorEntry, describe_file
from runtime.commands.options import open_pipeline
from runtime.engines import EngineOptions, EngineSet
from runtime.errors import BundleError, EnvironmentProblem, UsageError
from runtime.geometry import Geometry
from runtime.memory import peak_rss
from runtime.settings import KEYFRAME_SCHEDULER, VIDEO_SCHEDULER, LanguageModelShape, TaskDefaults
from runtime.vocabulary import Vocabulary
from videolavit.config import LanguageModelConfig

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = EngineOptions(threads=1)


def scaling_model(factor: float, weights: int = 0) -> onnx.ModelProto:
    """y [B, 3] = x [B, 3] * factor + t [1]; `weights` unused float32 values make the file larger."""
    nodes = [helper.make_node("Mul", ["x", "factor"], ["scaled"]), helper.make_node("Add", ["scaled", "t"], ["y"])]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 3]),
        helper.make_tensor_value_info("t", TensorProto.FLOAT, [1]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 3])]
    constants = [numpy_helper.from_array(np.array([factor], np.float32), "factor")]
    if weights:
        constants.append(numpy_helper.from_array(np.ones(weights, np.float32), "ballast"))
    graph = helper.make_graph(nodes, "scaling", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def bundle_of(folder: Path, models: dict[str, onnx.ModelProto], shape: LanguageModelShape | None = None) -> Bundle:
    """A bundle object over real files; what the engines do not look at is left at its default."""
    engines = {}
    for name, model in models.items():
        path = folder / f"{name}.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, path)
        tensor = TensorEntry(name="x", dtype="float32", shape=("B", 3))
        engines[name] = EngineEntry(files=(describe_file(folder, path),), inputs=(tensor,), outputs=(tensor,))
    manifest = Manifest(
        format=1,
        name="test",
        trained=False,
        source="",
        versions={},
        vocabulary=Vocabulary(),
        geometry=Geometry(),
        language_model=shape or LanguageModelShape(),
        keyframe_scheduler=KEYFRAME_SCHEDULER,
        video_scheduler=VIDEO_SCHEDULER,
        keyframe_vae_scaling=1.0,
        video_vae_scaling=1.0,
        defaults=TaskDefaults(),
        tokenizer=FileEntry(path=MANIFEST, bytes=0, sha256=""),
        engines=engines,
    )
    return Bundle(folder, manifest, "")


def factor_of(engine: object) -> float:
    result = engine(x=np.ones((1, 3), np.float32), t=np.zeros(1, np.float32))  # type: ignore[operator]
    return float(result["y"][0, 0])


@pytest.fixture
def engine(tmp_path: Path) -> OnnxRuntimeEngine:
    onnx.save(scaling_model(2.0), tmp_path / "scaling.onnx")
    return OnnxRuntimeEngine(tmp_path / "scaling.onnx", OPTIONS)


# Residency


def test_engines_load_when_asked_for_and_stay(tmp_path: Path) -> None:
    with EngineSet(bundle_of(tmp_path, {"a": scaling_model(2.0), "b": scaling_model(3.0)}), threads=1) as engines:
        assert engines.resident == () and engines.loads == []
        first = engines.get("a")
        assert factor_of(first) == 2.0
        assert factor_of(engines.get("b")) == 3.0
        assert engines.get("a") is first
        assert [load.name for load in engines.loads] == ["a", "b"]
        load = engines.loads[0]
        assert load.bytes == (tmp_path / "a.onnx").stat().st_size
        assert load.seconds > 0 and 2**20 < load.peak_rss <= peak_rss()
    assert engines.resident == ()


def unmeasured() -> None:
    """Of a system that does not say how much memory a process takes: engines count as what their files say."""


def test_least_recently_used_engine_makes_room(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, {name: scaling_model(2.0, weights=1000) for name in "abc"})
    size = (tmp_path / "a.onnx").stat().st_size
    engines = EngineSet(bundle, threads=1, memory_budget=2 * size, resident_memory=unmeasured)
    kept = engines.get("a")
    engines.get("b")
    engines.get("a")
    engines.get("c")
    assert engines.resident == ("a", "c")
    engines.get("b")
    assert engines.resident == ("c", "b")
    assert factor_of(kept) == 2.0  # released by the set, alive for its holder
    assert engines.get("a") is not kept
    assert [load.name for load in engines.loads] == ["a", "b", "c", "b", "a"]


def test_of_an_announced_task_the_engine_needed_latest_makes_room(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, {name: scaling_model(2.0, weights=1000) for name in "abcd"})
    size = (tmp_path / "a.onnx").stat().st_size
    stages = (("a",), ("b",), ("c",), ("a",), ("d",), ("b",))
    engines = EngineSet(bundle, threads=1, memory_budget=2 * size, resident_memory=unmeasured)
    plan = engines.expect(stages)
    for (name,) in stages:
        engines.get(name)
    # b before c, because a comes first; then a and c are of no use any more, and b came back only once
    assert [load.name for load in engines.loads] == ["a", "b", "c", "d", "b"]
    assert [load.engine for load in plan.loads] == [load.name for load in engines.loads]
    assert plan.fits and plan.peak == 2 * size


def test_an_engine_counts_as_what_the_process_grew_by(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, {name: scaling_model(2.0, weights=1000) for name in "abc"})
    size = (tmp_path / "a.onnx").stat().st_size
    process = [0]
    engines = EngineSet(bundle, threads=1, memory_budget=100 * size, resident_memory=lambda: process[0])
    engines.get("a")
    process[0] += 95 * size  # it ran
    engines.get("b")
    assert engines.resident == ("a", "b")
    process[0] += 10 * size
    assert engines.sizes["a"] == 95 * size and engines.sizes["b"] == 10 * size
    engines.get("c")
    assert engines.resident == ("b", "c"), "what ran is counted when room is made"


def test_engine_larger_than_the_budget_is_loaded_alone(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, {"a": scaling_model(2.0), "b": scaling_model(3.0)})
    engines = EngineSet(bundle, threads=1, memory_budget=1)
    plan = engines.expect((("a",), ("b",)))
    assert not plan.fits and "alone takes" in plan.line()
    engines.get("a")
    assert factor_of(engines.get("b")) == 3.0
    assert engines.resident == ("b",)


def test_task_has_its_own_engine_or_the_common_one(tmp_path: Path) -> None:
    models = {"a": scaling_model(2.0), "understanding/a": scaling_model(5.0), "b": scaling_model(3.0)}
    engines = EngineSet(bundle_of(tmp_path, models), threads=1)
    assert factor_of(engines.get("a", task="understanding")) == 5.0
    assert factor_of(engines.get("a", task="generation")) == 2.0
    assert factor_of(engines.get("a")) == 2.0
    assert engines.get("b", task="understanding") is engines.get("b")
    with pytest.raises(BundleError, match="no engine c for understanding, only a, b, understanding/a"):
        engines.get("c", task="understanding")


def test_language_model_of_a_bundle_keeps_the_manifests_limit(tmp_path: Path) -> None:
    config = LanguageModelConfig(hidden_size=32, intermediate_size=8, layers=1, heads=2, kv_heads=2, max_positions=16)
    layer, mlp = "model.layers.0", "model.layers.0.mlp"
    shapes = {f"{layer}.self_attn.{part}_proj": (32, 32) for part in "qkvo"}
    shapes |= {f"{mlp}.gate_proj": (8, 32), f"{mlp}.up_proj": (8, 32), f"{mlp}.down_proj": (32, 8)}
    shapes |= {f"{layer}.{part}_layernorm": (32,) for part in ("input", "post_attention")}
    shapes |= {"model.norm": (32,), "lm_head": (9, 32)}
    weights = {f"{name}.weight": np.ones(shape) for name, shape in shapes.items()}
    model = onnx.load(write(config, 9, weights, tmp_path / "written.onnx"))
    bundle = bundle_of(tmp_path, {"language_model": model}, LanguageModelShape(max_positions=16))
    with EngineSet(bundle, threads=1) as engines:
        engine = engines.language_model(task="understanding")
        assert engines.language_model() is engine
        engine.start(2, 16)
        assert engine.forward(np.ones((2, 3, 32), np.float32), np.array([3, 1])).shape == (2, 9)
        np.testing.assert_array_equal(engine.lengths, [3, 1])
        with pytest.raises(UsageError, match="17 positions are wanted, the model has 16"):
            engine.start(1, 17)


# Calls


def test_inputs_are_checked_before_the_model_runs(engine: OnnxRuntimeEngine) -> None:
    x, t = np.ones((2, 3), np.float32), np.ones(1, np.float32)
    np.testing.assert_array_equal(engine(x=x, t=t)["y"], np.full((2, 3), 3.0))
    np.testing.assert_array_equal(engine(x=x[::-1].T.copy().T, t=np.float32(1))["y"], np.full((2, 3), 3.0))
    with pytest.raises(UsageError, match="engine scaling: input t is missing"):
        engine(x=x)
    with pytest.raises(UsageError, match="has no input z, only x, t"):
        engine(x=x, t=t, z=t)
    with pytest.raises(UsageError, match="input x is float64, it must be float32"):
        engine(x=x.astype(np.float64), t=t)
    with pytest.raises(UsageError, match=r"input x is \[2, 4\], it must be \[B, 3\]"):
        engine(x=np.ones((2, 4), np.float32), t=t)
    with pytest.raises(UsageError, match=r"input t is \[2\], it must be \[1\]"):
        engine(x=x, t=np.ones(2, np.float32))


def test_free_dimension_is_the_same_in_every_input(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", "C"]) for n in "xyz"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "y"], ["z"])], "add", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "add.onnx")
    engine = OnnxRuntimeEngine(tmp_path / "add.onnx", OPTIONS)
    with pytest.raises(UsageError, match=r"input y is \[1, 3\], it must be \[B, C\] where B is 2, C is 3"):
        engine(x=np.ones((2, 3), np.float32), y=np.ones((1, 3), np.float32))
    engine.hold(y=np.ones((1, 3), np.float32))
    with pytest.raises(UsageError, match="where B is"):
        engine(x=np.ones((2, 3), np.float32))


def test_held_input_stays_until_replaced(engine: OnnxRuntimeEngine) -> None:
    x, t = np.ones((1, 3), np.float32), np.full(1, 10.0, np.float32)
    engine.hold(t=t)
    t[:] = -1  # the caller's array is the caller's
    assert engine(x=x)["y"][0, 0] == 12.0
    assert engine(x=x, t=np.zeros(1, np.float32))["y"][0, 0] == 2.0
    assert engine(x=x)["y"][0, 0] == 12.0
    engine.hold(t=np.full(1, 20.0, np.float32))
    assert engine(x=x)["y"][0, 0] == 22.0
    with pytest.raises(UsageError, match="input t is int64"):
        engine.hold(t=np.ones(1, np.int64))


def test_results_survive_the_next_call(engine: OnnxRuntimeEngine) -> None:
    first = engine(x=np.ones((1, 3), np.float32), t=np.zeros(1, np.float32))["y"]
    engine(x=np.zeros((1, 3), np.float32), t=np.zeros(1, np.float32))
    np.testing.assert_array_equal(first, np.full((1, 3), 2.0))


# Errors at load


def test_damaged_and_foreign_models_are_bundle_errors(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no model at all")
    with pytest.raises(BundleError) as damaged:
        OnnxRuntimeEngine(path, OPTIONS)
    unknown = scaling_model(2.0)
    unknown.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(unknown, path)
    with pytest.raises(BundleError) as foreign:
        OnnxRuntimeLanguageModel(path, OPTIONS, 16)
    for error in (damaged, foreign):
        message = str(error.value)
        assert "broken.onnx: ONNX Runtime" in message and "export it again" in message and "\n" not in message


def test_missing_provider_names_the_fix(tmp_path: Path) -> None:
    onnx.save(scaling_model(2.0), tmp_path / "a.onnx")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(EnvironmentProblem, match=r'provider cuda: .*pip install "videolavit\[gpu\]"'):
        OnnxRuntimeEngine(tmp_path / "a.onnx", EngineOptions(provider="cuda"))


def test_cuda_problem_says_what_is_missing() -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    assert "provider cuda: this onnxruntime has only" in (cuda_problem() or "")


def test_model_to_try_a_provider_on_loads() -> None:
    assert open_session(_IDENTITY, OPTIONS).run(None, {"x": np.ones(1, np.float32)})[0] == 1


def test_unknown_provider_is_a_usage_error(tmp_path: Path) -> None:
    onnx.save(scaling_model(2.0), tmp_path / "a.onnx")
    with pytest.raises(UsageError, match="provider 'tpu': not known; choose from cpu, cuda, auto"):
        OnnxRuntimeEngine(tmp_path / "a.onnx", EngineOptions(provider="tpu"))


def test_auto_runs_on_the_cpu_where_cuda_does_not_work_and_says_so(tmp_path: Path) -> None:
    if cuda_problem() is None:
        pytest.skip("CUDA works here")
    onnx.save(scaling_model(2.0), tmp_path / "a.onnx")
    assert choose_provider("auto") == "cpu"
    assert factor_of(OnnxRuntimeEngine(tmp_path / "a.onnx", EngineOptions(provider="auto", threads=1))) == 2.0
    noted: list[str] = []
    report: Any = SimpleNamespace(note=noted.append, progress=None)
    shipped = str(ROOT / "engines" / "shapes")
    open_pipeline(report, bundle=shipped, memory_budget=None, threads=1, provider="auto").close()
    assert "ONNX Runtime runs on cpu (provider cuda:" in noted[-1]
    noted.clear()
    open_pipeline(report, bundle=shipped, memory_budget=None, threads=1, provider="cpu").close()
    assert not any("runs on" in note for note in noted)


def test_silent_fallback_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(scaling_model(2.0), tmp_path / "a.onnx")
    # What onnxruntime-gpu does on a machine without a usable GPU: CUDA is listed, the session runs on the CPU.
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    whole = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, settings, providers, **rest: whole(path, settings, providers=["CPUExecutionProvider"], **rest),
    )
    with pytest.raises(EnvironmentProblem, match="fell back to CPUExecutionProvider"):
        OnnxRuntimeEngine(tmp_path / "a.onnx", EngineOptions(provider="cuda"))


def test_runtime_imports_without_onnxruntime_and_names_the_command(tmp_path: Path) -> None:
    onnx.save(scaling_model(2.0), tmp_path / "a.onnx")
    code = f"""
import sys
from pathlib import Path
sys.modules["onnxruntime"] = None
import runtime.engines, runtime.backends.onnxruntime as backend
from runtime.errors import EnvironmentProblem
assert not {{"torch", "transformers", "diffusers"}} & set(sys.modules)
try:
    backend.OnnxRuntimeEngine(Path({str(tmp_path / "a.onnx")!r}), runtime.engines.EngineOptions())
except EnvironmentProblem as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 'pip install "videolavit[cpu]"' in done.stdout
