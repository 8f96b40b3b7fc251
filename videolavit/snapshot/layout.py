"""The files of the official snapshot, what may stand in each, and which component every tensor belongs to.

Contract: `PARTS` is the table of logical files; `official_files` gives, for any model configuration, every tensor of
every file by its name there. Names are those of the whole video detokenizer where a file may leave a prefix out: a
bare UNet name counts as `unet.NAME` (file layout, "double use").
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from videolavit.config import ModelConfig
from videolavit.inventory import FINE_TUNED, for_task, inventory
from videolavit.models.components import COMPONENTS

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Owner:
    """Tensors `prefix + X` of a file are tensors `inside + X` of `component`."""

    prefix: str
    component: str
    inside: str = ""


@dataclass(frozen=True)
class Part:
    """One logical file.

    Attributes:
        path: in the snapshot; of a folder, the folder.
        names: file names that are looked for in the folder, first come; empty when `path` is the file.
        owners: whose tensors it has; of two that fit, the first.
        strict: tensors it should not have are an error, as in the reference; otherwise they are noted.
        optional: the snapshot can do without it.
        may_lack: prefixes of tensors that it need not have.
        only: when not empty, prefixes of the tensors that are used at all.
        spare: used for components that no file before it has a tensor of.
    """

    path: str
    owners: tuple[Owner, ...]
    names: tuple[str, ...] = ()
    strict: bool = False
    optional: bool = False
    may_lack: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    spare: bool = False


def _names(stem: str, torch_stem: str) -> tuple[str, ...]:
    """Files a library looks for, in its order."""
    return (
        f"{stem}.safetensors",
        f"{stem}.safetensors.index.json",
        f"{torch_stem}.bin",
        f"{torch_stem}.bin.index.json",
    )


_TRANSFORMERS = _names("model", "pytorch_model")
_DIFFUSERS = _names("diffusion_pytorch_model", "diffusion_pytorch_model")
_DIFFUSERS_BIN_FIRST = (*_DIFFUSERS[2:], *_DIFFUSERS[:2])
_VIDEO = (
    Owner("unet.", "video_unet"),
    Owner("motion_encoder.", "motion_encoder"),
    Owner("vae.", "video_vae"),
    Owner("motion_tokenizer.", "motion_tokenizer"),
)
_ADD_ONS = ("motion_encoder.", "vae.", "motion_tokenizer.")

LANGUAGE_MODEL, FINE_TUNED_MODEL = "language_model", "language_model_sft"
VISUAL_TOKENIZER = "visual_tokenizer/tokenizer_encoder.bin"
VIDEO_UNET = "video_detokenizer/unet"
VIDEO_UNET_BIN = f"{VIDEO_UNET}/diffusion_pytorch_model.bin"
VIDEO_3D_UNET = "video_3d_unet.bin"

# Where two files have the same tensor, the one further up is used: the reference loads it last.
PARTS = (
    Part(LANGUAGE_MODEL, (Owner("", "language_model"),), _TRANSFORMERS),
    Part(
        FINE_TUNED_MODEL,
        (
            Owner("model.visual_tokenizer.", for_task("visual_tokenizer")),
            Owner("model.motion_tokenizer.", for_task("motion_tokenizer")),
            Owner("", for_task("language_model")),
        ),
        _TRANSFORMERS,
        optional=True,
    ),
    Part(VISUAL_TOKENIZER, (Owner("", "visual_tokenizer"),), may_lack=("encoder.", "vit_proj.")),
    Part("visual_tokenizer/eva_vitg_psz14.bin", (Owner("", "visual_tokenizer", "encoder."),), strict=True),
    Part("visual_tokenizer/highres_tokenizer_decoder.bin", (Owner("", "keyframe_decoder"),), strict=True),
    Part("image_detokenizer/unet", (Owner("", "keyframe_unet"),), _DIFFUSERS_BIN_FIRST),
    Part("image_detokenizer/vae", (Owner("", "keyframe_vae"),), _DIFFUSERS),
    Part(VIDEO_UNET, _VIDEO, _DIFFUSERS, may_lack=_ADD_ONS),
    Part("motion_tokenizer.bin", (Owner("", "motion_tokenizer"),), strict=True),
    Part("video_detokenizer/vae", (Owner("", "video_vae"),), _DIFFUSERS),
    Part(VIDEO_3D_UNET, _VIDEO, optional=True, may_lack=_ADD_ONS, spare=True),
    # The generation model needs no projection to embeddings, so its own file may lack it.
    *(
        Part(
            f"{folder}/visual_weight.bin",
            (Owner("", "visual_tokenizer"),),
            optional=True,
            may_lack=("",),
            only=("vit_proj.",),
        )
        for folder in (FINE_TUNED_MODEL, LANGUAGE_MODEL)
    ),
)


def official_files(config: ModelConfig) -> dict[str, Shapes]:
    """Path of a part -> name and shape of every tensor that may stand in it."""
    shapes = component_shapes(config)
    return {part.path: tensors_of(part, shapes) for part in PARTS}


def component_shapes(config: ModelConfig) -> dict[str, Shapes]:
    """Component, the fine-tuned ones too -> its inventory."""
    shapes = {name: inventory(config, name) for name in COMPONENTS}
    return shapes | {for_task(name): shapes[name] for name in FINE_TUNED}


def tensors_of(part: Part, shapes: dict[str, Shapes]) -> Shapes:
    """Name and shape of every tensor that may stand in `part`."""
    tensors: Shapes = {}
    for owner in part.owners:
        for name, shape in shapes[owner.component].items():
            if name.startswith(owner.inside):
                tensors[owner.prefix + name.removeprefix(owner.inside)] = shape
    return tensors


def belongs_to(part: Part, name: str) -> tuple[str, str]:
    """Component and name there of the tensor `name` of `part`."""
    owner = next(owner for owner in part.owners if name.startswith(owner.prefix))
    return owner.component, owner.inside + name.removeprefix(owner.prefix)


_OLD_ATTENTION = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def official_name(part: Part, name: str, known: Shapes) -> str | None:
    """The name in `known` of the tensor stored as `name`; None for a buffer that is computed, not loaded."""
    if name.endswith("rotary_emb.inv_freq"):  # older versions of the library stored it
        return None
    if name not in known and part.owners is _VIDEO:
        return f"unet.{name}" if f"unet.{name}" in known else name
    if part.names is not _TRANSFORMERS:  # the other library renames these while loading
        return _OLD_ATTENTION.sub(lambda match: f"{match[1]}.{_NEW_ATTENTION[match[2]]}.", name)
    return name
