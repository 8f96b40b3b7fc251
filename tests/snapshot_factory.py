"""A snapshot in the official layout, made from any source of weights, small enough for tests.

It is written from the layout's description and not with the code that reads it: file names, prefixes and configuration
keys are spelled out here as the official files have them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from videolavit.checkpoints import TOKENIZERS, Weights
from videolavit.config import ModelConfig

UNDERSTANDING = ("language_model", "visual_tokenizer", "motion_tokenizer")
State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a snapshot is written.

    Attributes:
        fine_tuned: with language_model_sft.
        llm: `safetensors` or `bin`, cut into `shards` files, or one file when 1.
        dtype: in which the language models, UNets and autoencoders are stored; the rest is float32.
        video: `bin`: UNet and motion encoder in one archive; `both`: the UNet as safetensors and the archive too;
            `prefixed`: as `bin` with `unet.` before the UNet's names; `3d`: only video_3d_unet.bin.
        bare_tokenizer: tokenizer_encoder.bin without the projection and the vision transformer, as expected officially.
    """

    fine_tuned: bool = True
    llm: str = "safetensors"
    shards: int = 3
    dtype: torch.dtype = torch.float16
    video: str = "bin"
    bare_tokenizer: bool = True
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)


def write_snapshot(folder: Path, config: ModelConfig, weights: Weights, style: Style) -> Path:
    """Write a snapshot of `weights`; components of the fine-tuned model are asked for as `understanding/NAME`."""

    def state(component: str, dtype: torch.dtype = torch.float32) -> State:
        return {name: tensor.to(dtype) for name, tensor in weights.tensors(component)}

    half = style.dtype
    llama = llama_config(config)
    _language_model(folder / "language_model", state("language_model", half), llama, style)
    if style.fine_tuned:
        fine_tuned = state("understanding/language_model", half)
        for name in UNDERSTANDING[1:]:
            fine_tuned |= _prefixed(f"model.{name}.", state(f"understanding/{name}", half))
        extra = {"architectures": ["VideoLaVITLlamaForCausalLM"], "image_aspect_ratio": "square"}
        _language_model(folder / "language_model_sft", fine_tuned, llama | extra, style)

    visual = state("visual_tokenizer")
    eva = {name.removeprefix("encoder."): tensor for name, tensor in visual.items() if name.startswith("encoder.")}
    if style.bare_tokenizer:
        visual = {name: t for name, t in visual.items() if not name.startswith(("encoder.", "vit_proj."))}
    save_bin(eva, folder / "visual_tokenizer" / "eva_vitg_psz14.bin")
    save_bin(visual, folder / "visual_tokenizer" / "tokenizer_encoder.bin")
    save_bin(state("keyframe_decoder"), folder / "visual_tokenizer" / "highres_tokenizer_decoder.bin")
    save_bin(state("motion_tokenizer"), folder / "motion_tokenizer.bin")

    image, video = folder / "image_detokenizer", folder / "video_detokenizer"
    save_bin(state("keyframe_unet", half), image / "unet" / "diffusion_pytorch_model.bin")
    _save_safetensors(state("keyframe_vae", half), image / "vae" / "diffusion_pytorch_model.safetensors")
    _save_safetensors(state("video_vae", half), video / "vae" / "diffusion_pytorch_model.safetensors")
    _video(folder, state("video_unet", half), _prefixed("motion_encoder.", state("motion_encoder", half)), style)

    documents = diffusers_configs(config)
    for path, changes in style.configs.items():
        documents.setdefault(path, llama)
        documents[path] = {k: v for k, v in (documents[path] | changes).items() if v != "absent"}
    for path, document in documents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(document))
    return folder


def llama_config(config: ModelConfig) -> dict[str, Any]:
    """`language_model/config.json`."""
    llm = config.language_model
    return {
        "_name_or_path": "somewhere",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": llm.hidden_size,
        "intermediate_size": llm.intermediate_size,
        "max_position_embeddings": llm.max_positions,
        "model_type": "llama",
        "num_attention_heads": llm.heads,
        "num_hidden_layers": llm.layers,
        "num_key_value_heads": llm.kv_heads,
        "rms_norm_eps": llm.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": llm.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.33.2",
        "vocab_size": config.vocabulary.size,
    }


def diffusers_configs(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The configurations of both detokenizers, path -> content."""
    unet, vae = config.keyframe_unet, config.keyframe_vae
    video_unet, video_vae = config.video_unet, config.video_vae
    attends = [layers is not None for layers in unet.transformer_layers]
    stamp = {"_diffusers_version": "0.25.1"}
    schedule = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    levels = len(video_unet.block_out_channels)
    crossing = ["CrossAttn"] * (levels - 1)
    return {
        "image_detokenizer/unet/config.json": stamp
        | {
            "_class_name": "UNet2DConditionModel",
            "act_fn": "silu",
            "addition_embed_type": "text_time",
            "addition_embed_type_num_heads": 64,
            "addition_time_embed_dim": unet.time_id_dim,
            "attention_head_dim": list(unet.heads),
            "attention_type": "default",
            "block_out_channels": list(unet.block_out_channels),
            "center_input_sample": False,
            "class_embed_type": None,
            "conv_in_kernel": 3,
            "cross_attention_dim": unet.cross_attention_dim,
            "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            "dropout": 0.0,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "in_channels": 4,
            "layers_per_block": unet.layers_per_block,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "norm_eps": 1e-05,
            "norm_num_groups": unet.norm_groups,
            "out_channels": 4,
            "projection_class_embeddings_input_dim": unet.pooled_dim + 6 * unet.time_id_dim,
            "sample_size": 77,
            "transformer_layers_per_block": [layers or 1 for layers in unet.transformer_layers],
            "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
            "upcast_attention": None,
            "use_linear_projection": True,
        },
        "image_detokenizer/vae/config.json": stamp
        | {
            "_class_name": "AutoencoderKL",
            "block_out_channels": list(vae.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * len(vae.block_out_channels),
            "force_upcast": True,
            "latent_channels": 4,
            "layers_per_block": vae.layers_per_block,
            "norm_num_groups": vae.norm_groups,
            "sample_size": vae.sample_size,
            "scaling_factor": vae.scaling_factor,
            "up_block_types": ["UpDecoderBlock2D"] * len(vae.block_out_channels),
        },
        "image_detokenizer/scheduler/scheduler_config.json": stamp
        | schedule
        | {
            "_class_name": "EulerDiscreteScheduler",
            "clip_sample": False,
            "interpolation_type": "linear",
            "prediction_type": "epsilon",
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "trained_betas": None,
            "use_karras_sigmas": False,
        },
        "video_detokenizer/unet/config.json": stamp
        | {
            "_class_name": "UNetSpatioTemporalConditionModel",
            "addition_time_embed_dim": video_unet.time_id_dim,
            "block_out_channels": list(video_unet.block_out_channels),
            "cross_attention_dim": video_unet.cross_attention_dim,
            "down_block_types": [f"{c}DownBlockSpatioTemporal" for c in [*crossing, ""]],
            "in_channels": 10,
            "layers_per_block": video_unet.layers_per_block,
            "num_attention_heads": list(video_unet.heads),
            "num_frames": 25,
            "out_channels": 4,
            "projection_class_embeddings_input_dim": 3 * video_unet.time_id_dim,
            "sample_size": 96,
            "transformer_layers_per_block": 1,
            "up_block_types": [f"{c}UpBlockSpatioTemporal" for c in ["", *crossing]],
        },
        "video_detokenizer/vae/config.json": stamp
        | {
            "_class_name": "AutoencoderKLTemporalDecoder",
            "block_out_channels": list(video_vae.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * len(video_vae.block_out_channels),
            "force_upcast": True,
            "latent_channels": 4,
            "layers_per_block": video_vae.layers_per_block,
            "scaling_factor": video_vae.scaling_factor,
        },
        "video_detokenizer/scheduler/scheduler_config.json": stamp
        | schedule
        | {
            "_class_name": "EulerDiscreteScheduler",
            "clip_sample": False,
            "interpolation_type": "linear",
            "prediction_type": "v_prediction",
            "set_alpha_to_one": False,
            "sigma_max": 700.0,
            "sigma_min": 0.002,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "timestep_type": "continuous",
            "use_karras_sigmas": True,
        },
    }


def save_bin(state: State, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


def _save_safetensors(state: State, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)


def _language_model(folder: Path, state: State, config: dict[str, Any], style: Style) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(TOKENIZERS["shapes"].read_bytes())
    stem, suffix, save = {
        "safetensors": ("model", "safetensors", _save_safetensors),
        "bin": ("pytorch_model", "bin", save_bin),
    }[style.llm]
    if style.shards == 1:
        save(state, folder / f"{stem}.{suffix}")
        return
    index: dict[str, str] = {}
    for shard in range(style.shards):
        name = f"{stem}-{shard + 1:05}-of-{style.shards:05}.{suffix}"
        names = sorted(state)[shard :: style.shards]
        save({key: state[key] for key in names}, folder / name)
        index |= dict.fromkeys(names, name)
    document = {"metadata": {"total_size": 1}, "weight_map": index}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(document))


def _video(folder: Path, unet: State, encoder: State, style: Style) -> None:
    stem = folder / "video_detokenizer" / "unet" / "diffusion_pytorch_model"
    if style.video == "3d":
        save_bin(_prefixed("unet.", unet) | encoder, folder / "video_3d_unet.bin")
        return
    if style.video == "both":
        _save_safetensors(unet, stem.with_suffix(".safetensors"))
    save_bin((_prefixed("unet.", unet) if style.video == "prefixed" else unet) | encoder, stem.with_suffix(".bin"))


def _prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}
