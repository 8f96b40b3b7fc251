"""The configuration files of a snapshot -> ModelConfig.

Contract: what the files say replaces the preset's values: sizes and constants of the language model, both UNets, both
autoencoders and both schedulers. Parts without a file (EVA, tokenizers, key-frame decoder, motion encoder) keep the
preset's. A value that this project's modules do not compute is a problem (reference semantics §8, §9, §10, §16).
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from runtime.settings import SchedulerSettings
from videolavit.config import (
    PRESETS,
    KeyframeUNetConfig,
    KeyframeVaeConfig,
    LanguageModelConfig,
    ModelConfig,
    VideoUNetConfig,
    VideoVaeConfig,
)
from videolavit.snapshot.json_file import JsonFile
from videolavit.snapshot.report import Problem

GENERATION = "language_model/config.json"
FINE_TUNED = "language_model_sft/config.json"
OFFICIAL = "video-lavit-7b"

Count = Annotated[int, msgspec.Meta(ge=1, le=10**7)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Levels = Annotated[tuple[Count, ...], msgspec.Meta(min_length=1, max_length=8)]
PerLevel = Count | Levels
Prediction = Literal["epsilon", "v_prediction"]
Spacing = Literal["leading", "trailing", "linspace"]


def choose_preset(root: Path) -> ModelConfig:
    """The preset that gives the sizes no file has: the one with the language model's vocabulary, else the official."""
    for path in (GENERATION, FINE_TUNED):
        size = JsonFile(root, path, []).values.get("vocab_size")
        for preset in PRESETS.values():
            if preset.vocabulary.size == size:
                return preset
    return PRESETS[OFFICIAL]


def read_configs(root: Path, base: ModelConfig, *, fine_tuned: bool, problems: list[Problem]) -> ModelConfig:
    """`base` with what the files say in its place; `fine_tuned`: the understanding model is there too."""
    config = replace(
        base,
        language_model=_language_model(JsonFile(root, GENERATION, problems), base),
        keyframe_unet=_keyframe_unet(JsonFile(root, "image_detokenizer/unet/config.json", problems), base),
        keyframe_vae=_keyframe_vae(JsonFile(root, "image_detokenizer/vae/config.json", problems), base.keyframe_vae),
        keyframe_scheduler=_keyframe_scheduler(
            JsonFile(root, "image_detokenizer/scheduler/scheduler_config.json", problems), base.keyframe_scheduler
        ),
        video_unet=_video_unet(JsonFile(root, "video_detokenizer/unet/config.json", problems), base),
        video_vae=_video_vae(JsonFile(root, "video_detokenizer/vae/config.json", problems), base.video_vae),
        video_scheduler=_video_scheduler(
            JsonFile(root, "video_detokenizer/scheduler/scheduler_config.json", problems), base.video_scheduler
        ),
    )
    if not fine_tuned:
        return config
    file = JsonFile(root, FINE_TUNED, problems)
    ours, theirs = config.language_model, _language_model(file, base)
    positions = min(ours.max_positions, theirs.max_positions)
    if replace(theirs, max_positions=ours.max_positions) != ours:
        file.problem(f"is a model of other sizes or constants than {GENERATION}; one bundle cannot hold both")
    if theirs.max_positions != ours.max_positions:
        file.problem(f"max_position_embeddings differs from {GENERATION}; both get {positions}", fatal=False)
    return replace(config, language_model=replace(ours, max_positions=positions))


def _language_model(file: JsonFile, base: ModelConfig) -> LanguageModelConfig:
    """Llama. Keys that do not change what is computed are not looked at: training writes many of its own here."""
    preset = base.language_model
    heads = file.take("num_attention_heads", Count, preset.heads)
    hidden = file.take("hidden_size", Count, preset.hidden_size)
    rope: dict[str, Any] = file.take("rope_parameters", dict[str, Any] | None, {}, absent=None) or {}
    config = LanguageModelConfig(
        hidden_size=hidden,
        intermediate_size=file.take("intermediate_size", Count, preset.intermediate_size),
        layers=file.take("num_hidden_layers", Count, preset.layers),
        heads=heads,
        kv_heads=file.take("num_key_value_heads", Count, preset.kv_heads, absent=heads),
        max_positions=file.take("max_position_embeddings", Count, preset.max_positions),
        rms_norm_eps=file.take("rms_norm_eps", Positive, preset.rms_norm_eps),
        rope_theta=file.take("rope_theta", Positive, preset.rope_theta, absent=rope.get("rope_theta", 10000.0)),
    )
    file.expect("vocab_size", base.vocabulary.size)
    if hidden != base.visual_tokenizer.llm_dim:
        file.problem(f"hidden_size is {hidden}, must be {base.visual_tokenizer.llm_dim} for the visual tokenizer")
    if file.values.get("head_dim") is not None:
        file.expect("head_dim", hidden // heads)
    if rope.get("rope_type", "default") != "default":
        file.problem(f"rope_parameters.rope_type is {rope['rope_type']!r}, must be 'default'")
    for key, allowed in _LLAMA.items():
        file.expect(key, allowed, absent=allowed)
    return config


_LLAMA = {
    "hidden_act": "silu",
    "attention_bias": None,
    "mlp_bias": None,
    "tie_word_embeddings": None,
    "rope_scaling": None,
    "sliding_window": None,
    "quantization_config": None,
}


def _keyframe_unet(file: JsonFile, base: ModelConfig) -> KeyframeUNetConfig:
    from diffusers import UNet2DConditionModel

    from videolavit.models.diffusers_models import LATENT_CHANNELS, TIME_IDS

    preset = base.keyframe_unet
    channels = file.take("block_out_channels", Levels, preset.block_out_channels)
    plain, attending = "DownBlock2D", "CrossAttnDownBlock2D"
    blocks = tuple(attending if layers else plain for layers in preset.transformer_layers)
    blocks = file.take("down_block_types", tuple[Literal["DownBlock2D", "CrossAttnDownBlock2D"], ...], blocks)
    file.expect("up_block_types", [name.replace("Down", "Up") for name in reversed(blocks)])
    one_each = tuple(layers or 1 for layers in preset.transformer_layers)
    layers = _per_level(file, "transformer_layers_per_block", len(channels), one_each, absent=1)
    time_dim = file.take("addition_time_embed_dim", Count, preset.time_id_dim)
    projected = file.take(
        "projection_class_embeddings_input_dim", Count, preset.pooled_dim + TIME_IDS * preset.time_id_dim
    )
    if len(blocks) != len(channels):
        file.problem(f"down_block_types has {len(blocks)} levels, block_out_channels {len(channels)}")
    config = KeyframeUNetConfig(
        block_out_channels=channels,
        transformer_layers=tuple(n if block == attending else None for n, block in zip(layers, blocks, strict=False)),
        heads=_per_level(file, "attention_head_dim", len(channels), preset.heads, absent=8),
        layers_per_block=_single(file, "layers_per_block", preset.layers_per_block, absent=2),
        cross_attention_dim=_single(file, "cross_attention_dim", preset.cross_attention_dim, absent=1280),
        pooled_dim=projected - TIME_IDS * time_dim,
        time_id_dim=time_dim,
        norm_groups=file.take("norm_num_groups", Count, preset.norm_groups, absent=32),
        sample_size=preset.sample_size,
    )
    _agree(file, "cross_attention_dim", config.cross_attention_dim, sum(base.keyframe_decoder.projections))
    _agree(file, "projection_class_embeddings_input_dim", config.pooled_dim, base.keyframe_decoder.pooled_dim)
    for key in ("in_channels", "out_channels"):
        file.expect(key, LATENT_CHANNELS, absent=4)
    file.expect("use_linear_projection", True, absent=False)
    file.expect("addition_embed_type", "text_time", absent=None)
    file.expect_rest(_defaults(UNet2DConditionModel), ignored=("sample_size", "dropout"))
    return config


def _keyframe_vae(file: JsonFile, preset: KeyframeVaeConfig) -> KeyframeVaeConfig:
    from diffusers import AutoencoderKL

    channels = file.take("block_out_channels", Levels, preset.block_out_channels, absent=[64])
    config = KeyframeVaeConfig(
        block_out_channels=channels,
        layers_per_block=file.take("layers_per_block", Count, preset.layers_per_block, absent=1),
        norm_groups=file.take("norm_num_groups", Count, preset.norm_groups, absent=32),
        scaling_factor=file.take("scaling_factor", Positive, preset.scaling_factor, absent=0.18215),
        sample_size=preset.sample_size,
    )
    file.expect("up_block_types", ["UpDecoderBlock2D"] * len(channels), absent=["UpDecoderBlock2D"])
    _expect_vae(file, AutoencoderKL)
    return config


def _video_vae(file: JsonFile, preset: VideoVaeConfig) -> VideoVaeConfig:
    from diffusers import AutoencoderKLTemporalDecoder

    config = VideoVaeConfig(
        block_out_channels=file.take("block_out_channels", Levels, preset.block_out_channels, absent=[64]),
        layers_per_block=file.take("layers_per_block", Count, preset.layers_per_block, absent=1),
        scaling_factor=file.take("scaling_factor", Positive, preset.scaling_factor, absent=0.18215),
        sample_size=preset.sample_size,
    )
    _expect_vae(file, AutoencoderKLTemporalDecoder)
    return config


def _expect_vae(file: JsonFile, library: type) -> None:
    file.expect("down_block_types", ["DownEncoderBlock2D"], absent=["DownEncoderBlock2D"])
    # Everything runs in float32 here, so whether half precision would need upcasting does not matter.
    file.expect_rest(_defaults(library), ignored=("sample_size", "force_upcast"))


def _video_unet(file: JsonFile, base: ModelConfig) -> VideoUNetConfig:
    """The project's own class in the reference: block names may be its own, what they start with is fixed (§9.1)."""
    preset = base.video_unet
    channels = file.take("block_out_channels", Levels, preset.block_out_channels)
    time_dim = file.take("addition_time_embed_dim", Count, preset.time_id_dim, absent=256)
    config = VideoUNetConfig(
        in_channels=preset.in_channels,
        out_channels=preset.out_channels,
        block_out_channels=channels,
        heads=_per_level(file, "num_attention_heads", len(channels), preset.heads),
        layers_per_block=_single(file, "layers_per_block", preset.layers_per_block, absent=2),
        cross_attention_dim=_single(file, "cross_attention_dim", preset.cross_attention_dim, absent=1024),
        time_id_dim=time_dim,
    )
    file.expect("in_channels", preset.in_channels)
    file.expect("out_channels", preset.out_channels, absent=4)
    file.expect("transformer_layers_per_block", 1, absent=1)
    file.expect("projection_class_embeddings_input_dim", 3 * time_dim, absent=768)
    _agree(file, "cross_attention_dim", config.cross_attention_dim, base.motion_encoder.out_dim)
    last = len(channels) - 1
    for key, without in (("down_block_types", last), ("up_block_types", 0)):
        names: tuple[str, ...] = file.take(key, tuple[str, ...] | None, (), absent=None) or ()
        attends = [name.startswith("CrossAttn") for name in names]
        if names and attends != [level != without for level in range(len(channels))]:
            file.problem(f"{key} is {list(names)}: every level but number {without + 1} must have cross attention")
    file.expect_rest({}, ignored=("num_frames", "sample_size"))
    return config


def _keyframe_scheduler(file: JsonFile, preset: SchedulerSettings) -> SchedulerSettings:
    """Euler-ancestral if the file says so, DDIM otherwise, whatever else it names (§8)."""
    if not file.found:
        return preset
    if file.values.get("_class_name") == "EulerAncestralDiscreteScheduler":
        return SchedulerSettings(kind="euler-ancestral", **_schedule(file, preset, spacing="linspace"))
    for key in ("thresholding", "rescale_betas_zero_snr"):
        file.expect(key, None, absent=None)
    clip = file.take("clip_sample", bool, False, absent=True)
    if clip:
        file.expect("clip_sample_range", 1.0, absent=1.0)
    return SchedulerSettings(
        kind="ddim",
        set_alpha_to_one=file.take("set_alpha_to_one", bool, False, absent=True),
        clip_sample=clip,
        **_schedule(file, preset, spacing="leading"),
    )


def _video_scheduler(file: JsonFile, preset: SchedulerSettings) -> SchedulerSettings:
    if not file.found:
        return preset
    for key in ("use_exponential_sigmas", "use_beta_sigmas", "rescale_betas_zero_snr"):
        file.expect(key, None, absent=None)
    file.expect("interpolation_type", "linear", absent="linear")
    file.expect("final_sigmas_type", "zero", absent="zero")
    timestep_type = file.take("timestep_type", Literal["discrete", "continuous"], "continuous", absent="discrete")
    return SchedulerSettings(
        kind="euler",
        karras=file.take("use_karras_sigmas", bool, preset.karras, absent=False),
        continuous_timesteps=timestep_type == "continuous",
        sigma_min=file.take("sigma_min", Positive | None, preset.sigma_min, absent=None),
        sigma_max=file.take("sigma_max", Positive | None, preset.sigma_max, absent=None),
        **_schedule(file, preset, spacing="linspace"),
    )


def _schedule(file: JsonFile, preset: SchedulerSettings, spacing: Spacing) -> dict[str, Any]:
    """What all schedulers have; `spacing` is the library's for a file that does not say. Other keys are not theirs."""
    file.expect("beta_schedule", "scaled_linear", absent="linear")
    file.expect("trained_betas", None, absent=None)
    return {
        "train_steps": file.take("num_train_timesteps", Count, preset.train_steps, absent=1000),
        "beta_start": file.take("beta_start", Positive, preset.beta_start, absent=0.0001),
        "beta_end": file.take("beta_end", Positive, preset.beta_end, absent=0.02),
        "prediction": file.take("prediction_type", Prediction, preset.prediction, absent="epsilon"),
        "spacing": file.take("timestep_spacing", Spacing, preset.spacing, absent=spacing),
        "steps_offset": file.take("steps_offset", int, preset.steps_offset, absent=0),
    }


def _per_level(file: JsonFile, key: str, levels: int, preset: tuple[int, ...], **absent: Any) -> tuple[int, ...]:
    """One number for every level, or one for all."""
    value: int | tuple[int, ...] = file.take(key, PerLevel, preset, **absent)
    if isinstance(value, int):
        return (value,) * levels
    if len(value) != levels:
        file.problem(f"{key} has {len(value)} levels, block_out_channels {levels}")
    return value


def _single(file: JsonFile, key: str, preset: int, absent: int) -> int:
    """One number, or a list that repeats it."""
    value: int | tuple[int, ...] = file.take(key, PerLevel, preset, absent=absent)
    if isinstance(value, int):
        return value
    if len(set(value)) > 1:
        file.problem(f"{key} is {list(value)}, must be the same for all levels")
    return value[0]


def _agree(file: JsonFile, key: str, value: int, wanted: int) -> None:
    """The part that has no file of its own feeds this one and must fit."""
    if file.found and value != wanted:
        file.problem(f"{key} asks for conditions of width {value}, the modules that make them give {wanted}")


def _defaults(library: type) -> dict[str, Any]:
    """What a library class takes for keys that its file leaves out."""
    parameters = inspect.signature(library.__init__).parameters  # type: ignore[misc]
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}
