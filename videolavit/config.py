"""Model configurations: one frozen dataclass per module, and the presets.

Contract: every size a module needs is here; the same code builds `shapes` (the small demo model), `tiny` (every part at
its smallest, for tests) and `video-lavit-7b` (the official sizes, `spec: state_dict inventories`). Vocabulary, geometry
and schedulers are the runtime's own types, so the two rooms cannot disagree. This file imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import msgspec

from runtime.geometry import Geometry
from runtime.settings import KEYFRAME_SCHEDULER, VIDEO_SCHEDULER, SchedulerSettings, TaskDefaults
from runtime.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class MotionTokenizerConfig:
    """VQ autoencoder over motion fields (reference semantics §4)."""

    channels: int = 2
    frames: int = 24
    grid: tuple[int, int] = (20, 36)  # rows, columns
    dim: int = 512
    heads: int = 8
    stages: tuple[int, int, int, int] = (3, 3, 3, 3)  # blocks per stage, encoder and decoder
    mlp_ratio: float = 4.0
    codes: int = 1024
    code_dim: int = 32


@dataclass(frozen=True, kw_only=True)
class MotionConditionConfig:
    """Motion field -> cross-attention context of the video UNet (§5)."""

    channels: int = 2
    grid: tuple[int, int] = (16, 16)
    dim: int = 512
    heads: int = 8
    depth: int = 12
    mlp_ratio: float = 4.0
    out_dim: int = 1024


@dataclass(frozen=True, kw_only=True)
class EvaConfig:
    """EVA vision transformer (§6.1)."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1408
    layers: int = 40
    heads: int = 16
    mlp_ratio: float = 4.3637
    classes: int = 1024  # the unused classifier head of the checkpoint
    eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class VisualTokenizerConfig:
    """Dynamic visual tokenizer: EVA, token predictor, merger, quantiser (§6). Width is the EVA's."""

    eva: EvaConfig = field(default_factory=EvaConfig)
    layers: int = 12
    heads: int = 16
    mlp_ratio: float = 4.3637
    codes: int = 16384
    code_dim: int = 32
    llm_dim: int = 4096


@dataclass(frozen=True, kw_only=True)
class KeyframeDecoderConfig:
    """Visual ids -> conditions of the key-frame UNet (§7). Prompt width is the sum of `projections`."""

    patches: int = 256
    code_dim: int = 32
    width: int = 1408
    depth: int = 12
    heads: int = 16
    mlp_ratio: float = 4.3637
    out_dim: int = 1408
    projections: tuple[int, int] = (768, 1280)
    pooled_dim: int = 1280


@dataclass(frozen=True, kw_only=True)
class KeyframeUNetConfig:
    """SDXL-type UNet2DConditionModel of diffusers (§8.1). None in `transformer_layers`: a block without attention."""

    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    transformer_layers: tuple[int | None, ...] = (None, 2, 10)
    heads: tuple[int, ...] = (5, 10, 20)
    layers_per_block: int = 2
    cross_attention_dim: int = 2048
    pooled_dim: int = 1280
    time_id_dim: int = 256
    norm_groups: int = 32
    sample_size: int = 128


@dataclass(frozen=True, kw_only=True)
class KeyframeVaeConfig:
    """AutoencoderKL of diffusers (§8.1)."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.13025
    sample_size: int = 1024


@dataclass(frozen=True, kw_only=True)
class VideoUNetConfig:
    """Spatio-temporal UNet with per-frame motion context (§9.1).

    The last level has no attention going down, the first none going up, as in the official model.
    """

    in_channels: int = 10
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    heads: tuple[int, ...] = (5, 10, 20, 20)
    layers_per_block: int = 2
    cross_attention_dim: int = 1024
    time_id_dim: int = 256
    norm_groups: int = 32


@dataclass(frozen=True, kw_only=True)
class VideoVaeConfig:
    """AutoencoderKLTemporalDecoder of diffusers (§9.2).

    Keep two layers per block: with one, diffusers skips the decoder's mid attention.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.18215
    sample_size: int = 768


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Llama (§10)."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    max_positions: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole model. `name` is the preset's."""

    name: str
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    geometry: Geometry = field(default_factory=Geometry)
    motion_tokenizer: MotionTokenizerConfig = field(default_factory=MotionTokenizerConfig)
    motion_encoder: MotionConditionConfig = field(default_factory=MotionConditionConfig)
    visual_tokenizer: VisualTokenizerConfig = field(default_factory=VisualTokenizerConfig)
    keyframe_decoder: KeyframeDecoderConfig = field(default_factory=KeyframeDecoderConfig)
    keyframe_unet: KeyframeUNetConfig = field(default_factory=KeyframeUNetConfig)
    keyframe_vae: KeyframeVaeConfig = field(default_factory=KeyframeVaeConfig)
    video_unet: VideoUNetConfig = field(default_factory=VideoUNetConfig)
    video_vae: VideoVaeConfig = field(default_factory=VideoVaeConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    keyframe_scheduler: SchedulerSettings = KEYFRAME_SCHEDULER
    video_scheduler: SchedulerSettings = VIDEO_SCHEDULER
    defaults: TaskDefaults = field(default_factory=TaskDefaults)


def _shapes() -> ModelConfig:
    # 8 norm groups: 32 would be one or two channels each at these widths. Norms of single channels erase their means, a
    # colour for instance, and the VAE does not learn it.
    eva = EvaConfig(image_size=128, patch_size=16, width=96, layers=4, heads=4, classes=8)
    return ModelConfig(
        name="shapes",
        vocabulary=Vocabulary(text_size=512, visual_codes=512, motion_codes=256),
        geometry=Geometry(
            motion_grid=(16, 16),
            image_size=128,
            patch_size=16,
            size_multiple=32,
            max_side=512,
            keyframe_size=(128, 128),
            video_size=(128, 128),
        ),
        motion_tokenizer=MotionTokenizerConfig(
            grid=(16, 16), dim=32, heads=2, stages=(1, 1, 1, 1), codes=256, code_dim=8
        ),
        motion_encoder=MotionConditionConfig(dim=32, heads=2, depth=2, out_dim=32),
        visual_tokenizer=VisualTokenizerConfig(eva=eva, layers=2, heads=4, codes=512, code_dim=16, llm_dim=128),
        keyframe_decoder=KeyframeDecoderConfig(
            patches=64, code_dim=16, width=96, depth=3, heads=4, out_dim=96, projections=(32, 64), pooled_dim=64
        ),
        keyframe_unet=KeyframeUNetConfig(
            block_out_channels=(64, 96),
            transformer_layers=(1, 1),
            heads=(2, 4),
            layers_per_block=1,
            cross_attention_dim=96,
            pooled_dim=64,
            time_id_dim=8,
            norm_groups=8,
            sample_size=16,
        ),
        keyframe_vae=KeyframeVaeConfig(block_out_channels=(16, 32, 64, 64), norm_groups=8, sample_size=128),
        video_unet=VideoUNetConfig(
            block_out_channels=(32, 64, 64),
            heads=(1, 2, 2),
            layers_per_block=1,
            cross_attention_dim=32,
            time_id_dim=8,
            norm_groups=8,
        ),
        video_vae=VideoVaeConfig(block_out_channels=(16, 32, 64, 64), norm_groups=8, sample_size=128),
        language_model=LanguageModelConfig(
            hidden_size=128, intermediate_size=384, layers=6, heads=8, kv_heads=8, max_positions=1024
        ),
        keyframe_scheduler=SchedulerSettings(kind="ddim", prediction="v_prediction", spacing="trailing", beta_end=0.02),
        # Guidance, sampling and candidates by trial on held-out captions that `evaluate` does not ask: two shapes went
        # their ways oftener at temperature 0.8 than at 0.4, whose candidates are too much alike, and no oftener at 1.2.
        # A clip is denoised from its moved key frame. Noise of level 2 leaves what that shows; under noise of level 12
        # real videos came out worse with their motion than without.
        defaults=TaskDefaults(
            image_guidance=2.0,
            text_guidance=1.5,
            motion_guidance=1.0,
            video_guidance=(1.0, 1.5),
            top_k=50,
            temperature=0.8,
            candidates=128,
            kept_pictures=32,
            finalists=2,
            keyframe_steps=8,
            keyframe_sampler="dpmpp-2m",
            keyframe_spacing="ays",
            video_steps=4,
            video_sampler="dpmpp-2m",
            video_spacing="ays",
            video_sigmas=(0.02, 2.0),
            video_start="motion",
            max_image_tokens=66,
            min_image_tokens=4,
            max_answer_tokens=64,
            min_answer_tokens=1,
            max_clips=6,
        ),
    )


_CHOSEN_BY_TRIAL = (
    "image_guidance",
    "text_guidance",
    "motion_guidance",
    "video_guidance",
    "top_k",
    "temperature",
    "candidates",
    "kept_pictures",
    "finalists",
    "keyframe_sampler",
    "keyframe_spacing",
    "video_sampler",
    "video_spacing",
    "video_sigmas",
    "video_start",
)


def _tiny() -> ModelConfig:
    """`shapes` with smaller parts and the official schedule and guidance."""
    shapes = _shapes()
    eva = EvaConfig(image_size=128, patch_size=16, width=64, layers=3, heads=4, classes=8)
    return replace(
        shapes,
        name="tiny",
        geometry=msgspec.structs.replace(shapes.geometry, size_multiple=16),
        motion_tokenizer=replace(shapes.motion_tokenizer, dim=24),
        visual_tokenizer=replace(shapes.visual_tokenizer, eva=eva, llm_dim=96),
        keyframe_decoder=replace(
            shapes.keyframe_decoder, width=64, depth=2, out_dim=64, projections=(24, 40), pooled_dim=40
        ),
        keyframe_unet=replace(
            shapes.keyframe_unet,
            block_out_channels=(32, 48),
            transformer_layers=(None, 1),
            cross_attention_dim=64,
            pooled_dim=40,
        ),
        keyframe_vae=replace(shapes.keyframe_vae, block_out_channels=(16, 16, 16, 32), layers_per_block=1),
        video_unet=replace(shapes.video_unet, block_out_channels=(32, 32), heads=(2, 2), norm_groups=32),
        video_vae=replace(shapes.video_vae, block_out_channels=(32, 32, 32, 32), norm_groups=32),
        language_model=replace(
            shapes.language_model, hidden_size=96, intermediate_size=192, layers=3, heads=6, kv_heads=6
        ),
        keyframe_scheduler=SchedulerSettings(kind="ddim"),
        defaults=msgspec.structs.replace(
            shapes.defaults,
            **{name: getattr(TaskDefaults(), name) for name in _CHOSEN_BY_TRIAL},
            keyframe_steps=16,
            video_steps=12,
        ),
    )


PRESETS: dict[str, ModelConfig] = {
    "tiny": _tiny(),  # for tests; before `shapes`, so that a snapshot with their common vocabulary is taken for it
    "shapes": _shapes(),
    "video-lavit-7b": ModelConfig(name="video-lavit-7b"),
}


def two_layers(config: ModelConfig) -> ModelConfig:
    """`config` at its own widths with two layers of every kind, to try at real widths what does not depend on depth.

    A UNet keeps its levels, with one layer a block and one of attention in each transformer; autoencoders stay whole,
    they have two layers a block.
    """
    visual = config.visual_tokenizer
    unet = config.keyframe_unet
    return replace(
        config,
        name=f"{config.name}, two layers",
        motion_tokenizer=replace(config.motion_tokenizer, stages=(1, 1, 1, 1)),
        motion_encoder=replace(config.motion_encoder, depth=2),
        visual_tokenizer=replace(visual, eva=replace(visual.eva, layers=2), layers=2),
        keyframe_decoder=replace(config.keyframe_decoder, depth=2),
        keyframe_unet=replace(
            unet,
            transformer_layers=tuple(layers and 1 for layers in unet.transformer_layers),
            layers_per_block=1,
        ),
        video_unet=replace(config.video_unet, layers_per_block=1),
        language_model=replace(config.language_model, layers=2),
    )
