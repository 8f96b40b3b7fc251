"""Modules of the official preset have exactly the parameters, names and shapes, of the official files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from videolavit.config import PRESETS
from videolavit.models.diffusers_models import build_keyframe_unet, build_keyframe_vae, build_video_vae
from videolavit.models.eva import EvaVisionTransformer
from videolavit.models.keyframe_decoder import KeyframeDecoder
from videolavit.models.language_model import build_language_model
from videolavit.models.motion_encoder import MotionConditionEncoder
from videolavit.models.motion_tokenizer import MotionTokenizer
from videolavit.models.video_unet import VideoUNet
from videolavit.models.visual_tokenizer import DynamicVisualTokenizer

FOLDER = Path(__file__).parent / "data" / "state_dict"
OFFICIAL = PRESETS["video-lavit-7b"]

# Inventory file, prefix of the module's keys in it, builder.
CASES: list[tuple[str, str, Callable[[], nn.Module]]] = [
    ("motion_tokenizer", "", lambda: MotionTokenizer(OFFICIAL.motion_tokenizer)),
    ("video_detokenizer", "motion_encoder.", lambda: MotionConditionEncoder(OFFICIAL.motion_encoder)),
    ("video_detokenizer", "vae.", lambda: build_video_vae(OFFICIAL.video_vae)),
    ("video_unet", "", lambda: VideoUNet(OFFICIAL.video_unet)),
    ("image_unet_ASSUMED_sdxl", "", lambda: build_keyframe_unet(OFFICIAL.keyframe_unet)),
    ("image_vae_ASSUMED_sdxl", "", lambda: build_keyframe_vae(OFFICIAL.keyframe_vae)),
    ("eva_vitg_psz14", "", lambda: EvaVisionTransformer(OFFICIAL.visual_tokenizer.eva)),
    ("visual_tokenizer_encoder", "", lambda: DynamicVisualTokenizer(OFFICIAL.visual_tokenizer)),
    ("highres_tokenizer_decoder", "", lambda: KeyframeDecoder(OFFICIAL.keyframe_decoder)),
    ("language_model", "", lambda: build_language_model(OFFICIAL.language_model, OFFICIAL.vocabulary.size)),
]


@pytest.mark.parametrize(("file", "prefix", "build"), CASES, ids=[f"{file}:{prefix}" for file, prefix, _ in CASES])
def test_parameters_are_the_official_ones(file: str, prefix: str, build: Callable[[], nn.Module]) -> None:
    inventory = json.loads((FOLDER / f"{file}.json").read_text(encoding="utf-8"))
    expected = {key.removeprefix(prefix): shape for key, shape in inventory.items() if key.startswith(prefix)}
    with torch.device("meta"):
        module = build()
    assert {key: list(value.shape) for key, value in module.state_dict().items()} == expected
