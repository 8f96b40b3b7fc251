"""What a golden file says about its module -> our configurations, and its weights as those of a checkpoint.

Contract: every size comes from the file. What a file leaves out is the official value, which is our default. Weights
are loaded under their own names; one that no component takes is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from export.fidelity.golden import Arrays, Golden
from runtime.errors import CheckpointError
from runtime.settings import SchedulerSettings
from videolavit.checkpoints import Checkpoint, RandomWeights
from videolavit.config import (
    EvaConfig,
    KeyframeDecoderConfig,
    KeyframeUNetConfig,
    KeyframeVaeConfig,
    LanguageModelConfig,
    ModelConfig,
    MotionConditionConfig,
    MotionTokenizerConfig,
    VideoUNetConfig,
    VideoVaeConfig,
    VisualTokenizerConfig,
)

Config = Mapping[str, Any]
SCHEDULERS = {
    "DDIMScheduler": "ddim",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "EulerDiscreteScheduler": "euler",
}


class GoldenWeights:
    """Weights of a golden case as a source for a Checkpoint.

    Args:
        prefixes: component -> what its names begin with in the file; the longest that fits a name takes it.
        partial: components of which the file has some tensors only; the others are random and must not matter.

    Raises CheckpointError for a weight that fits no prefix.
    """

    def __init__(
        self, weights: Arrays, prefixes: Mapping[str, str], config: ModelConfig, partial: tuple[str, ...] = ()
    ) -> None:
        self._parts: dict[str, Arrays] = {component: {} for component in prefixes}
        self._partial = partial
        self._fill = RandomWeights(config, seed=0)
        for name, array in weights.items():
            fitting = [component for component, prefix in prefixes.items() if name.startswith(prefix)]
            if not fitting:
                raise CheckpointError(f"golden weight {name}: belongs to none of {', '.join(prefixes)}")
            component = max(fitting, key=lambda component: len(prefixes[component]))
            self._parts[component][name.removeprefix(prefixes[component])] = array

    def tensors(self, component: str) -> Iterator[tuple[str, torch.Tensor]]:
        found = {name: torch.from_numpy(array) for name, array in self._parts[component].items()}
        if component in self._partial:
            found = dict(self._fill.tensors(component)) | found
        yield from sorted(found.items())


def checkpoint(
    golden: Golden,
    config: ModelConfig,
    prefixes: Mapping[str, str],
    partial: tuple[str, ...] = (),
    weights: Arrays | None = None,
) -> Checkpoint:
    """The case's weights (or `weights`) as a checkpoint of `config`; see GoldenWeights. Raises CheckpointError."""
    source = GoldenWeights(golden.weights if weights is None else weights, prefixes, config, partial)
    return Checkpoint(config, tokenizer=b"", weights=source)


def fill(module: nn.Module, weights: Arrays, prefix: str = "") -> Any:
    """`module` with the weights under `prefix`, in eval mode. Raises RuntimeError unless the names fit exactly."""
    state = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in weights.items() if k.startswith(prefix)}
    module.load_state_dict(state, strict=True)
    return module.eval().requires_grad_(False)


def motion_tokenizer(c: Config) -> MotionTokenizerConfig:
    """The three ways in which golden files describe a motion tokenizer."""
    default = MotionTokenizerConfig()
    frames, *grid = c["grid_thw"] if "grid_thw" in c else (c["num_frames"], *c["grid_hw"])
    first, second, third, fourth = c.get("stages", default.stages)
    return MotionTokenizerConfig(
        channels=c.get("decoder_out_dim", default.channels),
        frames=frames,
        grid=(grid[0], grid[1]),
        dim=c["dim"],
        heads=c["heads"] if "heads" in c else c["num_heads"],
        stages=(first, second, third, fourth),
        mlp_ratio=c.get("mlp_ratio", default.mlp_ratio),
        codes=c["n_code"] if "n_code" in c else c["n_embed"],
        code_dim=c["code_dim"] if "code_dim" in c else c["embed_dim"],
    )


def motion_encoder(c: Config) -> MotionConditionConfig:
    default = MotionConditionConfig()
    rows, columns = c.get("img_size", default.grid)
    return MotionConditionConfig(
        channels=c.get("in_channel", default.channels),
        grid=(rows, columns),
        dim=c["dim"],
        heads=c["num_heads"],
        depth=c["depth"],
        mlp_ratio=c.get("mlp_ratio", default.mlp_ratio),
        out_dim=c["out_channel"],
    )


def eva(c: Config) -> EvaConfig:
    return EvaConfig(
        image_size=c["image_size"],
        patch_size=c["patch"],
        width=c["width"],
        layers=c["layers"],
        heads=c["heads"],
        mlp_ratio=c.get("mlp_ratio", EvaConfig().mlp_ratio),
        classes=c["out"],
        eps=c["ln_eps"],
    )


def visual_tokenizer(c: Config, eva_config: Config, llm_dim: int) -> VisualTokenizerConfig:
    return VisualTokenizerConfig(
        eva=eva(eva_config),
        layers=c["layers"],
        heads=c["heads"],
        mlp_ratio=c.get("mlp_ratio", VisualTokenizerConfig().mlp_ratio),
        codes=c["n_code"],
        code_dim=c["code_dim"],
        llm_dim=llm_dim,
    )


def codebook_only(codes: int, code_dim: int) -> VisualTokenizerConfig:
    """A visual tokenizer of which only the codebook matters, the rest as small as it gets."""
    tiny = EvaConfig(image_size=1, patch_size=1, width=4, layers=1, heads=1, classes=1)
    return VisualTokenizerConfig(eva=tiny, layers=1, heads=1, codes=codes, code_dim=code_dim, llm_dim=4)


def keyframe_decoder(c: Config) -> KeyframeDecoderConfig:
    return KeyframeDecoderConfig(
        patches=(c["img_size"] // c["patch_size"]) ** 2,
        code_dim=c["in_chans"],
        width=c["embed_dim"],
        depth=c["depth"],
        heads=c["num_heads"],
        mlp_ratio=c["mlp_ratio"],
        out_dim=c["decoder_out_dim"],
        projections=(c["proj1_dim"], c["proj2_dim"]),
        pooled_dim=c["pooled_dim"],
    )


def keyframe_unet(c: Config) -> KeyframeUNetConfig:
    blocks = zip(c["down_block_types"], c["transformer_layers_per_block"], strict=True)
    layers = tuple(depth if kind.startswith("CrossAttn") else None for kind, depth in blocks)
    time_id_dim = c["addition_time_embed_dim"]
    return KeyframeUNetConfig(
        block_out_channels=tuple(c["block_out_channels"]),
        transformer_layers=layers,
        heads=tuple(c["attention_head_dim"]),
        layers_per_block=c["layers_per_block"],
        cross_attention_dim=c["cross_attention_dim"],
        pooled_dim=c["projection_class_embeddings_input_dim"] - 6 * time_id_dim,
        time_id_dim=time_id_dim,
        norm_groups=c.get("norm_num_groups", KeyframeUNetConfig().norm_groups),
        sample_size=c["sample_size"],
    )


def keyframe_vae(c: Config) -> KeyframeVaeConfig:
    return KeyframeVaeConfig(
        block_out_channels=tuple(c["block_out_channels"]),
        layers_per_block=c["layers_per_block"],
        norm_groups=c.get("norm_num_groups", KeyframeVaeConfig().norm_groups),
        scaling_factor=c["scaling_factor"],
        sample_size=c["sample_size"],
    )


def video_unet(c: Config) -> VideoUNetConfig:
    return VideoUNetConfig(
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        block_out_channels=tuple(c["block_out_channels"]),
        heads=tuple(c["num_attention_heads"]),
        layers_per_block=c["layers_per_block"],
        cross_attention_dim=c["cross_attention_dim"],
        time_id_dim=c["addition_time_embed_dim"],
    )


def video_vae(c: Config) -> VideoVaeConfig:
    return VideoVaeConfig(
        block_out_channels=tuple(c["block_out_channels"]),
        layers_per_block=c["layers_per_block"],
        scaling_factor=c["scaling_factor"],
        sample_size=c["sample_size"],
    )


def language_model(c: Config) -> LanguageModelConfig:
    default = LanguageModelConfig()
    heads = c["num_attention_heads"]
    return LanguageModelConfig(
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        layers=c["num_hidden_layers"],
        heads=heads,
        kv_heads=c.get("num_key_value_heads", heads),
        max_positions=c["max_position_embeddings"],
        rms_norm_eps=c["rms_norm_eps"],
        rope_theta=c.get("rope_theta", default.rope_theta),
    )


def scheduler(kind: str, c: Config) -> SchedulerSettings:
    """`kind` is the name of the reference's scheduler class; a field the file leaves out has that class's default."""
    settings = SchedulerSettings(
        kind=SCHEDULERS[kind],  # type: ignore[arg-type]
        prediction=c["prediction_type"],
        train_steps=c["num_train_timesteps"],
        beta_start=c["beta_start"],
        beta_end=c["beta_end"],
        spacing=c["timestep_spacing"],
        steps_offset=c["steps_offset"],
        karras=c.get("use_karras_sigmas", False),
        continuous_timesteps=c.get("timestep_type") == "continuous",
        sigma_min=c.get("sigma_min"),
        sigma_max=c.get("sigma_max"),
    )
    if settings.kind != "ddim":
        return settings
    final, clip = c.get("set_alpha_to_one", True), c.get("clip_sample", True)
    return msgspec.structs.replace(settings, set_alpha_to_one=final, clip_sample=clip)


def llama_weights(golden: Golden) -> Arrays:
    """All weights with the two large tables of the language model put together.

    They are stored as sums of short periodic tables (`NAME/modP`); some rows of the head are replaced by stored ones,
    or zero where the note on the tables says so.
    """
    config = golden.config.get("llama", golden.config)
    ids = np.arange(config["vocab_size"])
    weights = {n: w for n, w in golden.weights.items() if "/mod" not in n and "override" not in n}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tables = [(int(n.partition("/mod")[2]), w) for n, w in golden.weights.items() if n.startswith(f"{name}/mod")]
        weights[name] = np.asarray(sum(table[ids % period] for period, table in tables))
    head = weights["lm_head.weight"]
    if "lm_head.override_ids" in golden.weights:
        head[golden.weights["lm_head.override_ids"]] = golden.weights["lm_head.override_rows"]
    for first, last in re.findall(r"rows (\d+)\.\.(\d+) are set to zero", golden.meta["crt"]):
        head[int(first) : int(last) + 1] = 0
    return weights


def with_frames(config: ModelConfig, frames: int) -> ModelConfig:
    """`config` for clips of `frames` frames, as many as a case has."""
    return replace(config, geometry=msgspec.structs.replace(config.geometry, frames=frames))
