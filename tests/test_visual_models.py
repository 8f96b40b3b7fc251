"""The visual modules against vectors computed with the reference model (reference semantics §6, §7)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import Golden, assert_close, load

from runtime.errors import UsageError
from runtime.noise import Noise
from runtime.vocabulary import Vocabulary
from videolavit.config import EvaConfig, KeyframeDecoderConfig, VisualTokenizerConfig
from videolavit.models.eva import EvaVisionTransformer
from videolavit.models.keyframe_decoder import KeyframeDecoder, pad_codes
from videolavit.models.visual_tokenizer import DynamicVisualTokenizer, keep_decision, policies, policy_softmax

EVA = EvaConfig(image_size=56, patch_size=14, width=32, layers=3, heads=4, classes=12)
VISUAL = VisualTokenizerConfig(eva=EVA, layers=2, heads=4, codes=64, code_dim=8, llm_dim=40)
DECODER = KeyframeDecoderConfig(
    patches=16, code_dim=8, width=32, depth=2, heads=4, out_dim=40, projections=(12, 20), pooled_dim=20
)


def _fill(module: torch.nn.Module, golden: Golden, prefix: str = "") -> torch.nn.Module:
    weights = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in golden.weights.items() if k.startswith(prefix)}
    module.load_state_dict(weights, strict=True)
    return module.eval().requires_grad_(False)


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def tokenizer_case() -> tuple[DynamicVisualTokenizer, Golden]:
    golden = load("d_dynamic_visual_tokenizer")
    module = DynamicVisualTokenizer(VISUAL)
    _fill(module, golden)
    return module, golden


@pytest.fixture(scope="module")
def decoder_case() -> tuple[KeyframeDecoder, Golden, torch.Tensor]:
    golden = load("f_highres_decoder")
    codebook = torch.from_numpy(golden.weights.pop("visual_tokenizer.quantize.embedding.weight"))
    module = KeyframeDecoder(DECODER)
    _fill(module, golden)
    return module, golden, codebook


def test_eva_features_are_before_the_final_norm() -> None:
    golden = load("e_eva_vit")
    module = EvaVisionTransformer(EVA)
    _fill(module, golden)
    pixels = torch.from_numpy(golden.inputs["image"])
    assert_close(module.forward_features(pixels), golden.outputs["all_features"], 4e-5)
    assert_close(module(pixels), golden.outputs["forward_default"], 4e-5)


@pytest.mark.parametrize("policy", ["ones", "random"])
def test_token_predictor(policy: str) -> None:
    golden = load("d_token_predictor_merger")
    predictor = _fill(DynamicVisualTokenizer(VISUAL).token_predictor, golden, "token_predictor.")
    inputs = _tensors(golden.inputs)
    scores = predictor(inputs["features"], inputs[f"policy_{policy}"])
    assert_close(scores, golden.outputs[f"pred_score_policy_{policy}"], 2e-5)


def test_merger_and_its_first_block() -> None:
    golden = load("d_token_predictor_merger")
    module = DynamicVisualTokenizer(VISUAL)
    merger = module.causal_encoder
    _fill(merger, golden, "causal_encoder.")
    features, keep = (torch.from_numpy(golden.inputs[name]) for name in ("features", "hard_keep_decision"))
    origin = merger.ln_vision(features)
    assert_close(origin, golden.outputs["ln_vision"], 2e-5)
    block = merger.blocks[0](features, origin, *policies(keep))
    assert_close(block, golden.outputs["block0"], 2e-5)
    assert_close(merger(features, keep), golden.outputs["merged"], 2e-5)


def test_keep_decision_is_sampled_from_log_probabilities(tokenizer_case: tuple[DynamicVisualTokenizer, Golden]) -> None:
    module, golden = tokenizer_case
    log_probs = module.keep_logits(module.features(torch.from_numpy(golden.inputs["image"])))
    assert_close(log_probs, golden.outputs["pred_score"], 2e-5)
    keep = keep_decision(log_probs, torch.from_numpy(golden.inputs["gumbel_noise"]))
    assert_close(keep, golden.outputs["keep_decision_from_gumbel_noise"], 0)


def test_keep_decision_follows_the_probabilities() -> None:
    probabilities = torch.tensor([0.9, 0.1])
    draws = keep_decision(probabilities.log().expand(1, 20000, 2), torch.from_numpy(Noise(0).gumbel(1, 20000, 2)))
    assert draws.mean().item() == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("add_special", [False, True])
def test_tokenize(tokenizer_case: tuple[DynamicVisualTokenizer, Golden], add_special: bool) -> None:
    module, golden = tokenizer_case
    vocabulary = Vocabulary(visual_codes=64)
    pixels, keep = (torch.from_numpy(golden.inputs[name]) for name in ("image", "hard_keep_decision"))
    ids = module.tokenize(pixels, keep, vocabulary, add_special=add_special)
    expected = golden.outputs["token_ids_with_special_concat" if add_special else "token_ids_concat"]
    assert [len(row) - 2 * add_special for row in ids] == golden.outputs["kept_per_image"].tolist()
    assert [i for row in ids for i in row] == expected.tolist()


def test_code_rows_of_kept_tokens(tokenizer_case: tuple[DynamicVisualTokenizer, Golden]) -> None:
    module, golden = tokenizer_case
    pixels, keep = (torch.from_numpy(golden.inputs[name]) for name in ("image", "hard_keep_decision"))
    merged = module.merge(module.features(pixels), keep)
    kept = keep > 0.5
    assert_close(module.encode_task_layer(merged)[kept], golden.outputs["to_quantizer_features"], 2e-5)
    assert_close(module.quantize.lookup(module.codes(merged))[kept], golden.outputs["quantize"], 0)


def test_encode_features(tokenizer_case: tuple[DynamicVisualTokenizer, Golden]) -> None:
    module, golden = tokenizer_case
    rows = module.encode_features(*(torch.from_numpy(golden.inputs[n]) for n in ("image", "hard_keep_decision")))
    assert [len(row) for row in rows] == golden.outputs["kept_per_image"].tolist()
    assert_close(torch.cat(rows), golden.outputs["encode_features_concat"], 2e-5)


def test_nothing_kept_gives_empty_rows(tokenizer_case: tuple[DynamicVisualTokenizer, Golden]) -> None:
    module, golden = tokenizer_case
    pixels = torch.from_numpy(golden.inputs["image"][:1])
    nothing = torch.zeros(1, 16)
    vocabulary = Vocabulary(visual_codes=64)
    assert module.tokenize(pixels, nothing, vocabulary) == [[vocabulary.image_start, vocabulary.image_end]]
    assert module.encode_features(pixels, nothing)[0].shape == (0, 40)


def test_policy_softmax_is_uniform_where_nothing_is_allowed() -> None:
    logits = torch.randn(1, 1, 2, 5, generator=torch.Generator().manual_seed(0)) * 10
    policy = torch.tensor([[0.0] * 5, [1.0] * 5])
    weights = policy_softmax(logits, policy)[0, 0]
    assert_close(weights[0], np.full(5, 0.2), 1e-7)
    assert_close(weights[1], logits[0, 0, 1].softmax(-1), 1e-5)


def test_gradient_reaches_the_keep_decision(tokenizer_case: tuple[DynamicVisualTokenizer, Golden]) -> None:
    module, golden = tokenizer_case
    features = module.features(torch.from_numpy(golden.inputs["image"]))
    keep = torch.from_numpy(golden.inputs["hard_keep_decision"]).requires_grad_(True)
    (gradient,) = torch.autograd.grad(module.merge(features, keep).square().sum(), keep)
    assert gradient.abs().max() > 0


def test_keyframe_decoder(decoder_case: tuple[KeyframeDecoder, Golden, torch.Tensor]) -> None:
    module, golden, codebook = decoder_case
    vocabulary = Vocabulary(visual_codes=64)
    rows = [vocabulary.visual_codes_of(golden.inputs[f"token_ids_{i}"]).tolist() for i in range(2)]
    codes, counts = pad_codes(rows, DECODER.patches)
    assert counts.tolist() == golden.inputs["token_num"].tolist()
    vectors = codebook[codes]
    assert_close(torch.cat([v[:n] for v, n in zip(vectors, counts, strict=True)]), golden.inputs["quantized_concat"], 0)
    prompt, pooled = module(vectors, counts)
    assert_close(prompt, golden.outputs["prompt_embeds"], 1e-5)
    assert_close(pooled, golden.outputs["pooled_prompt_embeds"], 1e-5)


def test_padding_of_keyframe_decoder_has_no_effect(decoder_case: tuple[KeyframeDecoder, Golden, torch.Tensor]) -> None:
    module, _, codebook = decoder_case
    codes, counts = pad_codes([[3, 1, 4]], DECODER.patches)
    alone = module(codebook[codes], counts)
    padded = module(torch.cat([codebook[codes], torch.full((1, 9, 8), 7.0)], dim=1), counts)
    assert_close(padded[0], alone[0], 1e-6)
    assert_close(padded[1], alone[1], 1e-6)


def test_pad_codes_truncates_and_refuses_empty_pictures() -> None:
    codes, counts = pad_codes([list(range(20)), [5]], 16)
    assert codes.shape == (2, 16) and counts.tolist() == [16, 1]
    assert codes[0].tolist() == list(range(16)) and codes[1].tolist() == [5] + [0] * 15
    with pytest.raises(UsageError, match="no visual tokens"):
        pad_codes([[1], []], 16)
    with pytest.raises(UsageError, match="no visual tokens"):
        pad_codes([], 16)
