"""The language model and token embedding graphs against transformers and the golden vectors."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from golden import assert_close, load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from language_models import write
from transformers import LlamaConfig, LlamaForCausalLM

from export.language_model.attention import ATTENTION
from runtime.backends.onnxruntime import OnnxRuntimeLanguageModel
from runtime.engines import EngineOptions
from runtime.errors import CheckpointError, UsageError
from videolavit.config import LanguageModelConfig

VOCABULARY = 120
POSITIONS = 64
OPTIONS = EngineOptions(threads=1)
# (width, query heads, key heads): head widths 16, 8, 24, 20, 32; grouped and single key heads
SHAPES = [(64, 4, 2), (32, 4, 4), (96, 4, 1), (40, 2, 2), (64, 2, 1)]
FLAVOURS = sorted(ATTENTION)
OPSETS = {"gqa": 21, "native": 24, "plain": 18}  # what the runtimes that a flavour is for can read


def config_of(shape: tuple[int, int, int], layers: int = 2) -> LanguageModelConfig:
    width, heads, kv_heads = shape
    return LanguageModelConfig(
        hidden_size=width, intermediate_size=56, layers=layers, heads=heads, kv_heads=kv_heads, max_positions=POSITIONS
    )


@cache
def reference(shape: tuple[int, int, int]) -> LlamaForCausalLM:
    config = config_of(shape)
    torch.manual_seed(sum(shape))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=POSITIONS,
            rms_norm_eps=config.rms_norm_eps,
            initializer_range=0.2,
        )
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:  # all ones at first: a forgotten scale would not show
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def weights_of(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in reference(shape).state_dict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("language_models")


def engine_of(folder: Path, shape: tuple[int, int, int], flavour: str = "gqa") -> OnnxRuntimeLanguageModel:
    path = folder / f"{flavour}_{'_'.join(map(str, shape))}.onnx"
    if not path.exists():
        write(config_of(shape), VOCABULARY, weights_of(shape), path, flavour)
    return OnnxRuntimeLanguageModel(path, OPTIONS, POSITIONS)


def expected(shape: tuple[int, int, int], rows: list[np.ndarray]) -> np.ndarray:
    """Logits [B, V] at the last position of every row [S_b, D], each computed alone and without a cache."""
    with torch.no_grad():
        return np.stack([reference(shape)(inputs_embeds=torch.from_numpy(r)[None]).logits[0, -1].numpy() for r in rows])


def assert_relative(actual: np.ndarray, wanted: np.ndarray) -> None:
    assert_close(actual, wanted, 2e-5 * float(np.abs(wanted).max()))


def padded(rows: list[np.ndarray], extra: int = 0) -> np.ndarray:
    """[B, S, D], padded on the right with numbers that would show if they were read."""
    steps = max(map(len, rows)) + extra
    out = np.full((len(rows), steps, rows[0].shape[1]), 7.0, np.float32)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out


@pytest.mark.parametrize("flavour", FLAVOURS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from(SHAPES),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    extra=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_ragged_prefill_then_decode_equals_transformers(
    folder: Path, flavour: str, shape: tuple[int, int, int], lengths: list[int], extra: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = [rng.standard_normal((n, shape[0])).astype(np.float32) for n in lengths]
    model = engine_of(folder, shape, flavour)
    model.start(len(rows), capacity=20)
    assert_relative(model.forward(padded(rows, extra), np.array(lengths)), expected(shape, rows))
    for _ in range(3):
        new = rng.standard_normal((len(rows), 1, shape[0])).astype(np.float32)
        rows = [np.concatenate([row, step]) for row, step in zip(rows, new, strict=True)]
        assert_relative(model.forward(new, np.ones(len(rows), np.int64)), expected(shape, rows))
    np.testing.assert_array_equal(model.lengths, np.array(lengths) + 3)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_single_row_continues_with_several_positions(folder: Path, flavour: str) -> None:
    shape = SHAPES[0]
    row = np.random.default_rng(1).standard_normal((11, shape[0])).astype(np.float32)
    model = engine_of(folder, shape, flavour)
    model.start(1, POSITIONS)
    for begin, end in ((0, 4), (4, 9), (9, 10), (10, 11)):
        logits = model.forward(row[None, begin:end], np.array([end - begin]))
        assert_relative(logits, expected(shape, [row[:end]]))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_cache_fills_to_the_last_position_and_starts_anew(folder: Path, flavour: str) -> None:
    shape = SHAPES[2]
    row = np.random.default_rng(2).standard_normal((POSITIONS, shape[0])).astype(np.float32)
    model = engine_of(folder, shape, flavour)
    for _ in range(2):
        model.start(1, POSITIONS)
        model.forward(row[None, :-1], np.array([POSITIONS - 1]))
        assert_relative(model.forward(row[None, -1:], np.array([1])), expected(shape, [row]))


def test_logits_belong_to_the_caller(folder: Path) -> None:
    model = engine_of(folder, SHAPES[0])
    model.start(1, 8)
    step = np.ones((1, 1, 64), np.float32)
    first = model.forward(step, np.array([1]))
    kept = first.copy()
    model.forward(-step, np.array([1]))
    np.testing.assert_array_equal(first, kept)


def test_wrong_calls_are_refused_before_the_model_runs(folder: Path) -> None:
    model = engine_of(folder, SHAPES[0])
    two, one = np.zeros((2, 3, 64), np.float32), np.zeros((2, 1, 64), np.float32)
    with pytest.raises(UsageError, match="start must come before forward"):
        model.forward(two, np.array([3, 3]))
    with pytest.raises(UsageError, match="the model has 64"):
        model.start(1, POSITIONS + 1)
    with pytest.raises(UsageError, match="rows is 0"):
        model.start(0, 4)
    model.start(2, 4)
    for counts in ([3], [0, 3], [4, 3]):
        with pytest.raises(UsageError, match="counts"):
            model.forward(two, np.array(counts))
    with pytest.raises(UsageError, match=r"float32 \[2, S, 64\]"):
        model.forward(two.astype(np.float64), np.array([3, 3]))
    with pytest.raises(UsageError, match=r"float32 \[2, S, 64\]"):
        model.forward(two[:, :, :63], np.array([3, 3]))
    with pytest.raises(UsageError, match="do not fit the cache of 4"):
        model.forward(np.zeros((2, 5, 64), np.float32), np.array([5, 5]))
    model.forward(two, np.array([3, 2]))
    with pytest.raises(UsageError, match="one position each"):
        model.forward(two[:, :2], np.array([1, 1]))
    model.forward(one, np.array([1, 1]))
    with pytest.raises(UsageError, match="do not fit the cache of 4"):
        model.forward(one, np.array([1, 1]))


def test_weights_are_checked(tmp_path: Path) -> None:
    shape, path = SHAPES[0], tmp_path / "model.onnx"
    weights = weights_of(shape)
    missing = {k: v for k, v in weights.items() if k != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        write(config_of(shape), VOCABULARY, missing, path)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \[120, 64\].*\[121, 64\]"):
        write(config_of(shape), VOCABULARY + 1, weights, path)
    with pytest.raises(UsageError, match="choose from gqa, native, plain"):
        write(config_of(shape), VOCABULARY, weights, path, "other")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_runtimes_know_the_operators(tmp_path: Path, flavour: str) -> None:
    """Only `gqa` needs more than the operators of ONNX, and each flavour's opset is one its runtimes read."""
    shape = SHAPES[0]
    model = onnx.load(write(config_of(shape), VOCABULARY, weights_of(shape), tmp_path / "model.onnx", flavour))
    domains = {node.domain for node in model.graph.node}
    assert ("com.microsoft" in domains) == (flavour == "gqa")
    assert model.opset_import[0].version == OPSETS[flavour]
    if flavour != "gqa":
        onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == [
        *("inputs_embeds", "past_lengths", "new_lengths"),
        *(f"past_{part}_{layer}" for layer in range(2) for part in ("key", "value")),
    ]
    assert [value.name for value in model.graph.output] == [
        "logits",
        *(f"present_{part}_{layer}" for layer in range(2) for part in ("key", "value")),
    ]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_nodes_say_which_module_they_come_from(tmp_path: Path, flavour: str) -> None:
    shape = SHAPES[0]
    model = onnx.load(write(config_of(shape), VOCABULARY, weights_of(shape), tmp_path / "model.onnx", flavour))
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert {"layers.0.self_attn.qkv", "layers.1.mlp.gate_up", "norm", "lm_head"} <= set(names)


# Golden generation: the reference model's scores at the first two steps.

GUIDED = {"img_text": False, "img_tok_uncond": True, "mot_chain": False, "mot_uncond": True}  # explicit negative ids


def golden_weights(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The two large tables are stored as sums of small periodic ones."""
    rows = np.arange(49412)
    weights = {name: array for name, array in stored.items() if "layers" in name or "norm" in name}
    for table, a, b in (("model.embed_tokens.weight", 257, 263), ("lm_head.weight", 251, 269)):
        weights[table] = stored[f"{table}/mod{a}"][rows % a] + stored[f"{table}/mod{b}"][rows % b]
    weights["lm_head.weight"][stored["lm_head.override_ids"]] = stored["lm_head.override_rows"]
    return weights


def test_golden_generation_scores(tmp_path: Path) -> None:
    case = load("j_llm_generation")
    sizes = case.meta["config"]
    config = LanguageModelConfig(
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        kv_heads=sizes["num_attention_heads"],
        max_positions=sizes["max_position_embeddings"],
    )
    weights = golden_weights(case.weights)
    table = weights["model.embed_tokens.weight"]
    write(config, sizes["vocab_size"], weights, tmp_path / "language_model.onnx")
    model = OnnxRuntimeLanguageModel(tmp_path / "language_model.onnx", OPTIONS, config.max_positions)

    for name in ("img_text_noguid", "mot_noguid", *GUIDED):
        kind, marker = ("image", 32000) if name.startswith("img") else ("motion", 48386)
        kept = case.inputs[f"score_slice_ids_{kind}"]
        ids, mask = case.inputs[f"{name}/input_ids"], case.inputs[f"{name}/attention_mask"]
        if ids[0, -1] != marker:
            ids, mask = (np.pad(array, ((0, 0), (0, 1)), constant_values=v) for array, v in ((ids, marker), (mask, 1)))
        rows = [line[seen.astype(bool)] for line, seen in zip(ids, mask, strict=True)]
        batch = len(rows)
        if name in GUIDED:
            rows += list(case.inputs["uncond_input_ids"]) if GUIDED[name] else [np.array([marker])] * batch
        model.start(len(rows), 64)
        logits = model.forward(padded([table[row] for row in rows]), np.array([len(row) for row in rows]))
        assert_close(logits[:batch][:, kept], case.outputs[f"{name}/raw_cond_logits_step0"], 5e-4)
        check_scores(logits, batch, kept, case.outputs[f"{name}/processed_scores_step0"])

        first = case.outputs[f"{name}/sequences"][:, ids.shape[1]]
        tokens = np.concatenate([first] * (len(rows) // batch))
        logits = model.forward(table[tokens][:, None], np.ones(len(rows), np.int64))
        check_scores(logits, batch, kept, case.outputs[f"{name}/processed_scores_step1"])


def check_scores(logits: np.ndarray, batch: int, kept: np.ndarray, wanted: np.ndarray) -> None:
    """Raw scores, or guided log-probabilities with guidance 3 where a second branch is there, on the allowed ids."""
    scores = logits
    if len(logits) > batch:
        log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
        scores = 3.0 * (log_p[:batch] - log_p[batch:]) + log_p[batch:]
    allowed = wanted > -1e29
    assert allowed.any()
    assert_close(scores[:, kept][allowed], wanted[allowed], 5e-4)
