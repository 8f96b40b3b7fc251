"""What can be computed of an example once and kept: the fields of a tokenised folder.

Contract: `FIELDS` says for every field whether there is one per clip or per picture (key frame), which components it
needs, how it is stored and which shape one row has. Rows of a ragged field are one-dimensional and of any length. Ids
are those of the vocabulary, not bare codes. Latents are the mode of the posterior as the VAE gives it: nothing is
multiplied by the scaling factor. docs/data.md says what each field is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np

from runtime.errors import UsageError
from runtime.geometry import VAE_FACTOR
from videolavit.checkpoints import Checkpoint
from videolavit.config import ModelConfig

LATENT_CHANNELS = 4
Size = tuple[int, int]  # (width, height), pixels


@dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
        of: what there is one row for.
        dtype: numpy's name of the stored type.
        components: whose weights decide it.
        shape: of one row, from the configuration and the size of pictures; None if it is ragged.
    """

    of: Literal["clip", "picture"]
    dtype: Literal["float16", "float32", "int32", "uint8"]
    components: tuple[str, ...]
    shape: Callable[[ModelConfig, Size], tuple[int, ...]] | None


def latent_grid(size: Size) -> tuple[int, int]:
    """(rows, columns) of the latents of `size`."""
    return size[1] // VAE_FACTOR, size[0] // VAE_FACTOR


FIELDS: dict[str, Field] = {
    "motion": Field(
        "clip",
        "float16",
        (),
        lambda config, size: (2, config.geometry.frames, *config.geometry.motion_grid),
    ),
    "motion_latent": Field(
        "clip",
        "float16",
        (),
        lambda config, size: (2, config.geometry.frames, *latent_grid(size)),
    ),
    "motion_ids": Field(
        "clip",
        "int32",
        ("motion_tokenizer",),
        lambda config, size: (config.geometry.motion_tokens,),
    ),
    "latents": Field(
        "clip",
        "float16",
        ("video_vae",),
        lambda config, size: (config.geometry.frames, LATENT_CHANNELS, *latent_grid(size)),
    ),
    "keyframe": Field(
        "picture",
        "uint8",
        (),
        lambda config, size: (size[1], size[0], 3),
    ),
    "keyframe_latents": Field(
        "picture",
        "float16",
        ("keyframe_vae",),
        lambda config, size: (LATENT_CHANNELS, *latent_grid(size)),
    ),
    "rebuilt_keyframe": Field(
        "picture",
        "uint8",
        ("visual_tokenizer", "keyframe_decoder", "keyframe_unet", "keyframe_vae"),
        lambda config, size: (size[1], size[0], 3),
    ),
    "features": Field(
        "picture",
        "float16",
        ("visual_tokenizer",),
        lambda config, size: (config.geometry.patches, config.visual_tokenizer.eva.width),
    ),
    "keep_logits": Field(
        "picture",
        "float32",
        ("visual_tokenizer",),
        lambda config, size: (config.geometry.patches, 2),
    ),
    "visual_ids": Field(
        "picture",
        "int32",
        ("visual_tokenizer",),
        None,
    ),
}
DEFAULT_FIELDS = ("motion", "motion_ids", "visual_ids")


def check_fields(names: Sequence[str]) -> tuple[str, ...]:
    """`names` in the order of `FIELDS`, each once. Raises UsageError for one that is not there, and for none."""
    unknown = [name for name in names if name not in FIELDS]
    if unknown or not names:
        shown = f"{unknown[0]!r} is no field" if unknown else "no field is named"
        raise UsageError(f"--fields: {shown}; choose from {', '.join(FIELDS)}")
    return tuple(name for name in FIELDS if name in names)


_WITHOUT = {"visual_tokenizer": ("vit_proj.",)}  # `instruct` trains it, and no field comes through it


def maker_digest(checkpoint: Checkpoint, component: str) -> str:
    """Digest of those weights of `component` that fields are made with."""
    return checkpoint.component_digest(component, _WITHOUT.get(component, ()))


def components_of(names: Sequence[str]) -> tuple[str, ...]:
    """Components that fields `names` need, each once."""
    return tuple(dict.fromkeys(component for name in names for component in FIELDS[name].components))


def row_bytes(name: str, config: ModelConfig, size: Size) -> int:
    """Bytes of one row; of a ragged field at most."""
    field = FIELDS[name]
    shape = field.shape(config, size) if field.shape else (config.geometry.patches,)
    return prod(shape) * np.dtype(field.dtype).itemsize
