"""The model's components by name.

Contract: `build(config, name)` gives the randomly initialised module of one component; a checkpoint holds one
weight file per name in `COMPONENTS`. Libraries are imported when a component that needs them is built, so a
single stage pays for what it uses. Build under `torch.device("meta")` to learn names and shapes only.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from videolavit.config import ModelConfig


def _visual_tokenizer(config: ModelConfig) -> nn.Module:
    from videolavit.models.visual_tokenizer import DynamicVisualTokenizer

    return DynamicVisualTokenizer(config.visual_tokenizer)


def _keyframe_decoder(config: ModelConfig) -> nn.Module:
    from videolavit.models.keyframe_decoder import KeyframeDecoder

    return KeyframeDecoder(config.keyframe_decoder)


def _keyframe_unet(config: ModelConfig) -> nn.Module:
    from videolavit.models.diffusers_models import build_keyframe_unet

    return build_keyframe_unet(config.keyframe_unet)


def _keyframe_vae(config: ModelConfig) -> nn.Module:
    from videolavit.models.diffusers_models import build_keyframe_vae

    return build_keyframe_vae(config.keyframe_vae)


def _motion_tokenizer(config: ModelConfig) -> nn.Module:
    from videolavit.models.motion_tokenizer import MotionTokenizer

    return MotionTokenizer(config.motion_tokenizer)


def _motion_encoder(config: ModelConfig) -> nn.Module:
    from videolavit.models.motion_encoder import MotionConditionEncoder

    return MotionConditionEncoder(config.motion_encoder)


def _video_unet(config: ModelConfig) -> nn.Module:
    from videolavit.models.video_unet import VideoUNet

    return VideoUNet(config.video_unet)


def _video_vae(config: ModelConfig) -> nn.Module:
    from videolavit.models.diffusers_models import build_video_vae

    return build_video_vae(config.video_vae)


def _language_model(config: ModelConfig) -> nn.Module:
    from videolavit.models.language_model import build_language_model

    return build_language_model(config.language_model, config.vocabulary.size)


COMPONENTS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "visual_tokenizer": _visual_tokenizer,
    "keyframe_decoder": _keyframe_decoder,
    "keyframe_unet": _keyframe_unet,
    "keyframe_vae": _keyframe_vae,
    "motion_tokenizer": _motion_tokenizer,
    "motion_encoder": _motion_encoder,
    "video_unet": _video_unet,
    "video_vae": _video_vae,
    "language_model": _language_model,
}


def build(config: ModelConfig, name: str) -> nn.Module:
    """The module of component `name`, one of `COMPONENTS` (KeyError otherwise), with its own random weights."""
    return COMPONENTS[name](config)
