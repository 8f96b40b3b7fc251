"""What a snapshot's configurations say is what is built, and what cannot be built is refused by file and key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from snapshot_factory import diffusers_configs, llama_config

from runtime.schedulers import make_schedule
from runtime.settings import KEYFRAME_SCHEDULER, VIDEO_SCHEDULER, SchedulerSettings
from videolavit.config import PRESETS, ModelConfig
from videolavit.models.components import build
from videolavit.snapshot.configs import choose_preset, read_configs
from videolavit.snapshot.report import Problem

SHAPES, OFFICIAL = PRESETS["tiny"], PRESETS["video-lavit-7b"]
LLM, SFT = "language_model/config.json", "language_model_sft/config.json"
UNET, VAE = "image_detokenizer/unet/config.json", "image_detokenizer/vae/config.json"
VIDEO_UNET, VIDEO_VAE = "video_detokenizer/unet/config.json", "video_detokenizer/vae/config.json"
IMAGE_SCHEDULER = "image_detokenizer/scheduler/scheduler_config.json"
SCHEDULER = "video_detokenizer/scheduler/scheduler_config.json"
ABSENT = object()


def read(root: Path, model: ModelConfig, changes: dict[str, dict[str, Any]]) -> tuple[ModelConfig, list[Problem]]:
    """The configuration of a snapshot of `model` with some keys changed, and the problems found."""
    import json

    documents = diffusers_configs(model) | {LLM: llama_config(model), SFT: llama_config(model)}
    for path, document in documents.items():
        content = {k: v for k, v in (document | changes.get(path, {})).items() if v is not ABSENT}
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps(content))
    problems: list[Problem] = []
    base = choose_preset(root)
    return read_configs(root, base, fine_tuned=True, problems=problems), problems


@pytest.mark.parametrize("model", [SHAPES, OFFICIAL], ids=lambda model: model.name)
def test_files_give_the_configuration_back(model: ModelConfig, tmp_path: Path) -> None:
    config, problems = read(tmp_path, model, {})
    assert problems == []
    assert config == replace(model, keyframe_scheduler=SchedulerSettings(kind="ddim"))
    assert config.video_scheduler == VIDEO_SCHEDULER


def test_values_come_from_the_files(tmp_path: Path) -> None:
    config, problems = read(
        tmp_path,
        SHAPES,
        {
            LLM: {"rms_norm_eps": 1e-6, "rope_theta": 5e5, "max_position_embeddings": 4096, "num_key_value_heads": 2},
            SFT: {"rms_norm_eps": 1e-6, "rope_theta": 5e5, "max_position_embeddings": 2048, "num_key_value_heads": 2},
            UNET: {"attention_head_dim": 4, "transformer_layers_per_block": 2, "layers_per_block": [2, 2]},
            VAE: {"scaling_factor": 0.5, "layers_per_block": 3},
            VIDEO_UNET: {"num_attention_heads": 4},
            VIDEO_VAE: {"scaling_factor": 0.25},
            IMAGE_SCHEDULER: {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
            SCHEDULER: {"sigma_max": 80.0, "use_karras_sigmas": False, "timestep_type": "discrete"},
        },
    )
    assert [(p.fatal, p.detail) for p in problems] == [
        (False, f"max_position_embeddings differs from {LLM}; both get 2048")
    ]
    llm, unet = config.language_model, config.keyframe_unet
    assert (llm.rms_norm_eps, llm.rope_theta, llm.max_positions, llm.kv_heads) == (1e-6, 5e5, 2048, 2)
    assert (unet.heads, unet.transformer_layers, unet.layers_per_block) == ((4, 4), (None, 2), 2)
    assert (config.keyframe_vae.scaling_factor, config.keyframe_vae.layers_per_block) == (0.5, 3)
    assert (config.video_unet.heads, config.video_vae.scaling_factor) == ((4, 4), 0.25)
    assert config.keyframe_scheduler == replace_struct(KEYFRAME_SCHEDULER, spacing="trailing")
    assert (config.video_scheduler.sigma_max, config.video_scheduler.karras) == (80.0, False)
    assert not config.video_scheduler.continuous_timesteps


def replace_struct(settings: SchedulerSettings, **changes: Any) -> SchedulerSettings:
    import msgspec

    return msgspec.structs.replace(settings, **changes)


def test_keys_left_out_mean_what_the_libraries_mean(tmp_path: Path) -> None:
    config, problems = read(
        tmp_path,
        SHAPES,
        {
            LLM: {"num_key_value_heads": ABSENT, "rope_theta": ABSENT, "rope_parameters": {"rope_theta": 10000.0}},
            UNET: {"act_fn": ABSENT, "norm_eps": ABSENT},
            IMAGE_SCHEDULER: {"set_alpha_to_one": ABSENT, "clip_sample": ABSENT, "steps_offset": ABSENT},
            SCHEDULER: {"timestep_spacing": ABSENT, "use_karras_sigmas": ABSENT},
        },
    )
    assert problems == []
    assert config.language_model == SHAPES.language_model
    scheduler = config.keyframe_scheduler
    assert (scheduler.set_alpha_to_one, scheduler.clip_sample, scheduler.steps_offset) == (True, True, 0)
    assert (config.video_scheduler.spacing, config.video_scheduler.karras) == ("linspace", False)


UNSUPPORTED: list[tuple[str, str, Any, str]] = [
    (LLM, "hidden_act", "gelu", 'hidden_act is "gelu", must be "silu"'),
    (LLM, "rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling"),
    (LLM, "rope_parameters", {"rope_type": "llama3"}, "rope_parameters.rope_type"),
    (LLM, "attention_bias", True, "attention_bias is true, must be null"),
    (LLM, "tie_word_embeddings", True, "tie_word_embeddings"),
    (LLM, "head_dim", 99, "head_dim is 99, must be 16"),
    (LLM, "rms_norm_eps", "small", 'rms_norm_eps is "small"'),
    (LLM, "rms_norm_eps", ABSENT, "rms_norm_eps is missing"),
    (LLM, "num_hidden_layers", -3, "num_hidden_layers is -3"),
    (SFT, "rms_norm_eps", 0.5, "other sizes or constants"),
    (UNET, "act_fn", "gelu", 'act_fn is "gelu", must be "silu"'),
    (UNET, "down_block_types", ["DownBlock2D", "AttnDownBlock2D"], "down_block_types"),
    (UNET, "up_block_types", ["UpBlock2D", "UpBlock2D"], "up_block_types"),
    (UNET, "use_linear_projection", ABSENT, "use_linear_projection is false, must be true"),
    (UNET, "addition_embed_type", "text", "addition_embed_type"),
    (UNET, "attention_head_dim", [1, 2, 3], "attention_head_dim has 3 levels"),
    (UNET, "layers_per_block", [1, 2], "the same for all levels"),
    (UNET, "cross_attention_dim", 48, "cross_attention_dim asks for conditions of width 48"),
    (UNET, "projection_class_embeddings_input_dim", 60, "projection_class_embeddings_input_dim asks"),
    (UNET, "class_embed_type", "timestep", "class_embed_type"),
    (UNET, "block_out_channels", [], "block_out_channels is []"),
    (VAE, "latent_channels", 16, "latent_channels is 16, must be 4"),
    (VAE, "use_quant_conv", False, "use_quant_conv"),
    (VAE, "shift_factor", 0.1, "shift_factor"),
    (VAE, "scaling_factor", "big", "scaling_factor"),
    (VIDEO_UNET, "in_channels", 8, "in_channels is 8, must be 10"),
    (VIDEO_UNET, "transformer_layers_per_block", [1, 2], "transformer_layers_per_block"),
    (VIDEO_UNET, "num_attention_heads", ABSENT, "num_attention_heads is missing"),
    (VIDEO_UNET, "up_block_types", ["CrossAttnUpBlock", "UpBlock"], "every level but number 1"),
    (VIDEO_UNET, "cross_attention_dim", 48, "cross_attention_dim asks"),
    (VIDEO_VAE, "down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], "down_block_types"),
    (IMAGE_SCHEDULER, "beta_schedule", "linear", "beta_schedule"),
    (IMAGE_SCHEDULER, "prediction_type", "sample", "prediction_type"),
    (IMAGE_SCHEDULER, "rescale_betas_zero_snr", True, "rescale_betas_zero_snr"),
    (SCHEDULER, "interpolation_type", "log_linear", "interpolation_type"),
    (SCHEDULER, "timestep_spacing", "uniform", "timestep_spacing"),
    (SCHEDULER, "trained_betas", [0.1], "trained_betas"),
]


@pytest.mark.parametrize(
    ("path", "key", "value", "words"), UNSUPPORTED, ids=[f"{path}:{key}" for path, key, _, _ in UNSUPPORTED]
)
def test_what_is_not_supported_is_named(path: str, key: str, value: Any, words: str, tmp_path: Path) -> None:
    _, problems = read(tmp_path, SHAPES, {path: {key: value}})
    fatal = [problem for problem in problems if problem.fatal]
    assert any(problem.file == path and words in problem.detail for problem in fatal), fatal


def test_keys_nobody_knows_are_noted(tmp_path: Path) -> None:
    _, problems = read(tmp_path, SHAPES, {UNET: {"wibble": 1}, VIDEO_UNET: {"wobble": 2}, LLM: {"mm_projector": "x"}})
    assert [(p.file, p.kind, p.fatal) for p in problems] == [(UNET, "note", False), (VIDEO_UNET, "note", False)]


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff\xfe"])
def test_a_configuration_that_is_no_json(text: str, tmp_path: Path) -> None:
    read(tmp_path, SHAPES, {})
    (tmp_path / UNET).write_bytes(text.encode("latin-1"))
    problems: list[Problem] = []
    config = read_configs(tmp_path, SHAPES, fine_tuned=False, problems=problems)
    assert [(p.file, p.kind) for p in problems] == [(UNET, "unreadable")]
    assert config.keyframe_unet == SHAPES.keyframe_unet


def test_the_vocabulary_tells_the_preset(tmp_path: Path) -> None:
    assert choose_preset(tmp_path) is OFFICIAL
    read(tmp_path, SHAPES, {})
    assert choose_preset(tmp_path) is SHAPES
    config, problems = read(tmp_path, SHAPES, {LLM: {"vocab_size": 5}, SFT: {"vocab_size": 5}})
    assert config.name == OFFICIAL.name
    assert any("vocab_size is 5, must be 49412" in problem.detail for problem in problems)


# --- against the libraries: what we build from a file is what they build from it -----------------------------------


@pytest.mark.parametrize(
    ("path", "component", "library"),
    [
        (UNET, "keyframe_unet", diffusers.UNet2DConditionModel),
        (VAE, "keyframe_vae", diffusers.AutoencoderKL),
        (VIDEO_VAE, "video_vae", diffusers.AutoencoderKLTemporalDecoder),
    ],
)
def test_modules_are_those_the_library_builds_from_the_file(
    path: str, component: str, library: Any, tmp_path: Path
) -> None:
    changes = {UNET: {"attention_head_dim": 4, "layers_per_block": 2}, VAE: {"norm_num_groups": 4}}
    config, problems = read(tmp_path, SHAPES, changes)
    assert problems == []
    with torch.device("meta"):
        ours = build(config, component)
        theirs = library.from_config(library.load_config((tmp_path / path).parent))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    free = ("sample_size", "force_upcast")
    for key, value in theirs.config.items():
        if key not in free and not key.startswith("_"):
            assert per_level(ours.config[key]) == per_level(value), key


def per_level(value: Any) -> set[Any]:
    """The values of a setting that may be one for all levels; nothing and False are the same."""
    return {part or None for part in (value if isinstance(value, list | tuple) else (value,))}


@pytest.mark.parametrize(
    ("path", "library", "changes"),
    [
        (SCHEDULER, diffusers.EulerDiscreteScheduler, {}),
        (SCHEDULER, diffusers.EulerDiscreteScheduler, {"use_karras_sigmas": False, "timestep_type": "discrete"}),
        (IMAGE_SCHEDULER, diffusers.DDIMScheduler, {}),
        (IMAGE_SCHEDULER, diffusers.DDIMScheduler, {"timestep_spacing": "trailing", "steps_offset": ABSENT}),
        (
            IMAGE_SCHEDULER,
            diffusers.EulerAncestralDiscreteScheduler,
            {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": ABSENT},
        ),
    ],
)
def test_schedules_are_those_the_library_makes_from_the_file(
    path: str, library: Any, changes: dict[str, Any], tmp_path: Path
) -> None:
    config, problems = read(tmp_path, SHAPES, {path: changes})
    assert problems == []
    schedule = make_schedule(config.video_scheduler if path == SCHEDULER else config.keyframe_scheduler, 7)
    theirs = library.from_config(library.load_config((tmp_path / path).parent))
    theirs.set_timesteps(7)
    assert torch.allclose(theirs.timesteps.float(), torch.from_numpy(schedule.timesteps.copy()), atol=1e-3)
    assert abs(float(theirs.init_noise_sigma) - float(schedule.init_noise_sigma)) <= 1e-4 * float(
        schedule.init_noise_sigma
    )
