"""The language model streamed to a file: every precision and flavour, and what is in memory on the way."""

from __future__ import annotations

import itertools
import random
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from export.language_model.source import arrays
from export.language_model.writing import write_language_model
from export.quantisation import CANDIDATES, LIMITS, block_for, pack_int4, quantise
from export.settings import Backend, EngineSettings, Flavour, Precision
from export.storage import PAGE
from runtime.errors import CheckpointError, UsageError
from videolavit.config import LanguageModelConfig
from videolavit.models.language_model import build_language_model

VOCABULARY = 101
CONFIG = LanguageModelConfig(
    hidden_size=64, intermediate_size=96, layers=3, heads=4, kv_heads=2, max_positions=32
)  # heads of 16: no flavour widens them
WAYS: list[tuple[Backend, Flavour]] = [
    *(("onnx", flavour) for flavour in ("gqa", "native", "plain")),
    ("tensorrt", "native"),
    ("tensorrt", "plain"),
]
TOLERANCE = {"fp32": 2e-5, "fp16": 5e-3}  # of the largest logit; by the type that is computed in


@cache
def state() -> dict[str, torch.Tensor]:
    """Weights in float16, as checkpoints have them."""
    torch.manual_seed(0)
    model = build_language_model(CONFIG, VOCABULARY)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return {name: tensor.half() for name, tensor in model.state_dict().items()}


def stored(seed: int | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Fresh arrays in the order of their names, or shuffled."""
    names = sorted(state())
    if seed is not None:
        random.Random(seed).shuffle(names)
    return ((name, state()[name].numpy().copy()) for name in names)


def write(folder: Path, settings: EngineSettings, config: LanguageModelConfig = CONFIG) -> Path:
    path, data = write_language_model(config, VOCABULARY, stored(), folder / "language_model.onnx", settings)
    assert data == folder / "language_model.onnx.data"
    return path


def torch_model(precision: Precision, backend: Backend) -> LlamaForCausalLM:
    """The model with the weights an engine of this precision has."""
    model = build_language_model(CONFIG, VOCABULARY)
    weights = {name: tensor.float() for name, tensor in state().items()}
    if precision in ("int8", "int4"):
        for name, tensor in weights.items():
            if tensor.ndim == 2 and "embed" not in name:
                bits = 4 if precision == "int4" and name != "lm_head.weight" else 8
                block = block_for(tensor.shape[1], name) if bits == 4 or backend == "onnx" else 0
                coded = quantise(tensor.numpy(), bits, block)
                weights[name] = torch.from_numpy(coded.dequantised().T.copy())
    model.load_state_dict(weights)
    return model.eval()


class Session:
    """A model in ONNX Runtime with its cache, whatever type that has."""

    def __init__(self, path: Path, folder: Path | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        # Activations of quantised products stay in float: the weights are what is tested.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if folder is not None:
            options.optimized_model_filepath = str(folder / "optimised.onnx")
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.lengths = np.zeros(0, np.int32)
        self.cache: dict[str, np.ndarray] = {}

    def start(self, rows: int, capacity: int) -> None:
        types: dict[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self.cache = {
            value.name: np.zeros((rows, value.shape[1], capacity, value.shape[3]), types[value.type])
            for value in self.session.get_inputs()
            if value.name.startswith(("past_key", "past_value"))
        }
        self.lengths = np.zeros(rows, np.int32)

    def forward(self, embeds: np.ndarray, counts: list[int]) -> np.ndarray:
        new = np.array(counts, np.int32)
        lengths = {"past_lengths": self.lengths, "new_lengths": new}
        names = [value.name for value in self.session.get_outputs()]
        results = self.session.run(names, {"inputs_embeds": embeds, **lengths, **self.cache})
        outputs = dict(zip(names, results, strict=True))
        self.cache = {name: outputs[name.replace("past", "present")] for name in self.cache}
        self.lengths = self.lengths + new
        logits: np.ndarray = outputs["logits"]
        return logits


def deviation(path: Path, model: LlamaForCausalLM, counts: tuple[int, ...] = (6, 2, 4), steps: int = 3) -> float:
    """Largest difference of a ragged prefill and some decode steps from torch, relative to the largest logit."""
    rng = np.random.default_rng(1)
    session = Session(path)
    session.start(len(counts), 16)
    rows = [np.zeros((0, 64), np.float32) for _ in counts]
    worst = 0.0
    for step in range(1 + steps):
        new = list(counts) if step == 0 else [1] * len(counts)
        embeds = rng.standard_normal((len(new), max(new), 64), dtype=np.float32)
        rows = [np.concatenate([row, line[:n]]) for row, line, n in zip(rows, embeds, new, strict=True)]
        with torch.no_grad():
            wanted = np.stack([model(inputs_embeds=torch.from_numpy(row)[None]).logits[0, -1].numpy() for row in rows])
        actual = session.forward(embeds, new)
        assert actual.dtype == np.float32
        worst = max(worst, float(np.abs(actual - wanted).max() / np.abs(wanted).max()))
    return worst


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize(("backend", "flavour"), WAYS)
def test_every_precision_and_flavour_equals_torch_with_the_same_weights(
    backend: Backend, flavour: Flavour, precision: Precision, tmp_path: Path
) -> None:
    path = write(tmp_path, EngineSettings(backend=backend, precision=precision, flavour=flavour))
    computed = precision if precision in TOLERANCE else "fp32" if backend == "onnx" else "fp16"
    assert deviation(path, torch_model(precision, backend)) <= TOLERANCE[computed]


def test_precisions_cost_what_they_should() -> None:
    """Otherwise the comparison with torch's own coarse weights would prove nothing."""
    exact = torch_model("fp32", "onnx")
    embeds = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = exact(inputs_embeds=embeds).logits
        costs = {
            precision: float(
                (torch_model(precision, "onnx")(inputs_embeds=embeds).logits - wanted).norm() / wanted.norm()
            )
            for precision in ("int8", "int4")
        }
    assert 0.001 < costs["int8"] < 0.03 < costs["int4"] < 0.35


@pytest.mark.parametrize(("backend", "flavour"), WAYS)
def test_models_are_what_the_runtimes_take(backend: Backend, flavour: Flavour, tmp_path: Path) -> None:
    types: dict[Precision, int] = {
        "fp32": TensorProto.FLOAT,
        "fp16": TensorProto.FLOAT16,
        "bf16": TensorProto.BFLOAT16,
        "int4": TensorProto.FLOAT if backend == "onnx" else TensorProto.FLOAT16,
    }
    for precision, dtype in types.items():
        path = write(tmp_path, EngineSettings(backend=backend, precision=precision, flavour=flavour))
        model = onnx.load(path)
        if flavour != "gqa":
            onnx.checker.check_model(model, full_check=True)
        declared = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
        assert {type for name, type in declared.items() if name[:4] in ("past", "pres") and name[-1].isdigit()} == {
            dtype
        }
        assert declared["inputs_embeds"] == declared["logits"] == TensorProto.FLOAT
        weights = Counter(tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 2)
        matrices = 4 * CONFIG.layers
        if precision == "int4":
            assert weights[TensorProto.INT4] == matrices
            assert weights[TensorProto.INT8] == 1, "the vocabulary's matrix"
            tensors = {tensor.name: tensor for tensor in model.graph.initializer}
            scales = [t for name, t in tensors.items() if "weight.scale" in name and "lm_head" not in name]
            assert len(scales) == matrices
            assert all((numpy_helper.to_array(scale).astype(np.float32) > 0).all() for scale in scales)
        elif precision == "bf16":
            assert weights[TensorProto.BFLOAT16] >= matrices + 1
        else:
            assert weights[TensorProto.FLOAT16] >= matrices + 1, "float16 is exact for this checkpoint"


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_onnx_runtime_fuses_quantised_products(precision: Precision, tmp_path: Path) -> None:
    """Otherwise the weights would be widened to float32 in memory."""
    Session(write(tmp_path, EngineSettings(precision=precision)), tmp_path)
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert operators["MatMulNBits"] == 4 * CONFIG.layers + 1
    assert operators["DequantizeLinear"] == operators["MatMul"] == 0


def test_float32_weights_that_float16_cannot_hold_stay(tmp_path: Path) -> None:
    def full() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in stored():
            yield name, array.astype(np.float32) * np.float32(1 + 2**-20) if "up_proj" in name else array

    path, _ = write_language_model(CONFIG, VOCABULARY, full(), tmp_path / "m.onnx", EngineSettings())
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert kinds["layers.1.mlp.gate_up.weight"] == TensorProto.FLOAT
    assert kinds["layers.1.mlp.down_proj.weight.float16"] == TensorProto.FLOAT16


# Streaming


def test_tensors_may_come_in_any_order(tmp_path: Path) -> None:
    settings = EngineSettings(precision="int4")
    first = onnx.load(write(tmp_path, settings))
    path, _ = write_language_model(CONFIG, VOCABULARY, stored(seed=3), tmp_path / "other.onnx", settings)
    second = onnx.load(path)
    content = [{t.name: t.raw_data for t in model.graph.initializer} for model in (first, second)]
    assert content[0] == content[1]


def test_at_most_one_layer_is_in_memory(tmp_path: Path) -> None:
    alive: set[int] = set()
    sizes: dict[int, int] = {}
    most = 0
    numbers = itertools.count()

    def watched() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal most
        for name, array in stored():
            number = next(numbers)
            alive.add(number)
            sizes[number] = array.nbytes
            weakref.finalize(array, alive.discard, number)
            most = max(most, sum(sizes[n] for n in alive))
            yield name, array

    write_language_model(CONFIG, VOCABULARY, watched(), tmp_path / "m.onnx", EngineSettings(precision="int4"))
    layer = sum(tensor.nbytes for name, tensor in state().items() if ".layers.0." in name)
    everything = sum(tensor.nbytes for tensor in state().values())
    assert most < layer < everything / 3


def test_weights_lie_in_pages_beside_a_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.storage.INLINE", 1000)
    path = write(tmp_path, EngineSettings(precision="int4"))
    tensors = [t for t in onnx.load(path, load_external_data=False).graph.initializer if t.external_data]
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in tensors]
    assert {place["location"] for place in places} == {"language_model.onnx.data"}
    assert all(int(place["offset"]) % PAGE == 0 for place in places)
    ends = sorted((int(place["offset"]), int(place["offset"]) + int(place["length"])) for place in places)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    assert len(tensors) == 4 * CONFIG.layers + 1, "the matrices; scales are smaller here"
    assert path.stat().st_size < 80_000


def test_wrong_checkpoints_are_refused(tmp_path: Path) -> None:
    path, settings = tmp_path / "m.onnx", EngineSettings()
    gap = ((name, array) for name, array in stored() if "layers.2.mlp.up_proj" not in name)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight is missing"):
        write_language_model(CONFIG, VOCABULARY, gap, path, settings)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \[101, 64\].*\[102, 64\]"):
        write_language_model(CONFIG, VOCABULARY + 1, stored(), path, settings)
    odd = replace(CONFIG, intermediate_size=88)
    with pytest.raises(UsageError, match=r"mlp\.down_proj: 88 inputs are not a multiple of 16"):
        write_language_model(odd, VOCABULARY, stored(), path, EngineSettings(precision="int4"))
    assert not path.exists()


@pytest.mark.parametrize(("precision", "value"), [("fp32", np.nan), ("fp16", 1e6), ("int8", 1e8), ("int4", np.nan)])
def test_weights_that_do_not_fit_their_type_are_refused(precision: Precision, value: float, tmp_path: Path) -> None:
    def spoilt() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in stored():
            array = array.astype(np.float32)
            if name == "model.layers.1.self_attn.o_proj.weight":
                array[3, 5] = value
            yield name, array

    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.o_proj\.weight.*not finite"):
        write_language_model(CONFIG, VOCABULARY, spoilt(), tmp_path / "m.onnx", EngineSettings(precision=precision))


def test_arrays_keep_the_stored_type_and_values() -> None:
    tensors = {dtype: torch.randn(5, 7).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)}
    for (name, array), (dtype, tensor) in zip(
        arrays((str(dtype), tensor.T) for dtype, tensor in tensors.items()), tensors.items(), strict=True
    ):
        assert name == str(dtype)
        assert array.dtype.itemsize == dtype.itemsize
        np.testing.assert_array_equal(array.astype(np.float32), tensor.T.float().numpy())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_mapped_file_does_not_stay_in_memory(tmp_path: Path) -> None:
    """And a tensor that others still use keeps its values."""
    path = tmp_path / "weights.safetensors"
    save_file({str(i): torch.full((4 << 20,), float(i)).half() for i in range(12)}, path)  # 8 MiB each
    own = torch.arange(1 << 20)

    def resident() -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split("RssFile:")[1].split()[0]) // 1024  # MiB

    with safe_open(path, "pt") as file:
        before = resident()
        for name, array in arrays((name, file.get_tensor(name)) for name in file.keys()):  # noqa: SIM118
            assert array[-1] == float(name)
            assert float(array.max()) == float(name)
        del array
        assert resident() - before < 40
    for _, values in arrays([("own", own)]):
        assert values[7] == 7
    del values
    assert int(own.sum()) == (1 << 19) * ((1 << 20) - 1)


# Quantisation


@settings(max_examples=40, deadline=None)
@given(
    outputs=st.integers(1, 40),
    groups=st.integers(1, 4),
    bits=st.sampled_from([4, 8]),
    blocked=st.booleans(),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 100.0]),
    dtype=st.sampled_from([np.float16, np.float32]),
    seed=st.integers(0, 1000),
)
def test_quantised_weights_are_near(
    outputs: int, groups: int, bits: int, blocked: bool, scale: float, dtype: Any, seed: int
) -> None:
    """Within half a step where nothing is clipped, near it at the ends of the range, exact where a block is zero."""
    rng = np.random.default_rng(seed)
    matrix = (rng.standard_normal((outputs, 16 * groups)) * scale).astype(dtype)
    matrix[0] = 0
    result = quantise(matrix, bits, 16 if blocked else 0)
    assert result.codes.shape == (16 * groups, outputs)
    assert result.scales.shape == ((groups, outputs) if blocked else (outputs,))
    assert (result.scales > 0).all()
    lowest, highest = LIMITS[bits]
    assert lowest <= result.codes.min() and result.codes.max() <= highest
    actual, wanted = result.dequantised(), matrix.T.astype(np.float32)
    assert (actual[:, 0] == 0).all()
    steps = np.repeat(result.scales, 16, 0) if blocked else np.broadcast_to(result.scales, actual.shape)
    inside = (result.codes > lowest) & (result.codes < highest)
    assert (np.abs(actual - wanted)[inside] <= 0.5001 * steps.astype(np.float32)[inside]).all()
    clipped = np.abs(actual - wanted) / np.maximum(np.abs(wanted), 1e-30)
    assert clipped[~inside].max(initial=0) <= 0.5 / highest + (0.25 if len(CANDIDATES[bits]) > 1 else 0.01)


def test_int4_takes_the_best_of_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)

    def error() -> float:
        return float(np.linalg.norm(quantise(matrix, 4, 64).dequantised().T - matrix) / np.linalg.norm(matrix))

    searched = error()
    monkeypatch.setitem(CANDIDATES, 4, (7.0,))
    assert searched < 0.97 * error()


def test_slabs_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = np.random.default_rng(0).standard_normal((37, 64)).astype(np.float16)
    whole = quantise(matrix, 4, 32)
    monkeypatch.setattr("export.quantisation.SLAB", 200)
    parts = quantise(matrix, 4, 32)
    np.testing.assert_array_equal(whole.codes, parts.codes)
    np.testing.assert_array_equal(whole.scales, parts.scales)


@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (1, 1)])
def test_packed_codes_are_onnx_int4(shape: tuple[int, int]) -> None:
    codes = np.random.default_rng(0).integers(-8, 8, shape).astype(np.int8)
    tensor = TensorProto(data_type=TensorProto.INT4, dims=shape, raw_data=pack_int4(codes).tobytes())
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), codes)


def test_blocks_divide_the_inputs() -> None:
    assert [block_for(n, "m") for n in (4096, 11008, 96, 48)] == [64, 64, 32, 16]
    with pytest.raises(UsageError, match="layer: 40 inputs"):
        block_for(40, "layer")
