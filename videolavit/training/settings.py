"""What a recipe may say: the settings of a training run, read from TOML, YAML or JSON.

Contract: defaults live here and nowhere else; an unknown key, a wrong type or a value out of range is a UsageError of
one line that names file and key. The table `[options]` belongs to the stage and is read by `read_options`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from runtime.errors import EnvironmentProblem, UsageError

Count = Annotated[int, msgspec.Meta(ge=1)]
CountOrNone = Annotated[int, msgspec.Meta(ge=0)]  # 0: never, or none
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Decay = Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)]
Positive = Annotated[float, msgspec.Meta(gt=0.0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0.0)]

T = TypeVar("T")


DRAWN = ("shapes", "scenery")  # sources that are drawn by lot: without a path, without an end


class DataSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to train on; the table `[data]`.

    Attributes:
        source: "shapes" or "scenery" (drawn on the fly), "folder" or "webdataset" (videos and pictures with captions),
            or "tokenized" (what `videolavit tokenize` has written).
        path: folder of the source; not for what is drawn.
        split: part of the source.
        size: number of items of a source without an end.
        shapes: how many shapes a scene of the source "shapes" has, 1 or 2; None: some one, some two.
    """

    source: Literal["shapes", "scenery", "folder", "webdataset", "tokenized"] = "shapes"
    path: str | None = None
    split: str = "train"
    size: Count = 1_000_000
    shapes: Literal[1, 2] | None = None


class TrainSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A training run.

    Attributes:
        stage: a name of `videolavit.training.stage.STAGES`, or "module:class".
        steps: optimiser steps of the whole run.
        batch_size: items per process and forward pass.
        accumulation: forward passes per step.
        learning_rate: highest rate, after the warm-up.
        warmup_steps: steps over which the rate rises from 0.
        schedule: "cosine" falls to `final_rate` at the last step, "constant" does not fall.
        final_rate: share of `learning_rate` left at the end of the cosine.
        optimizer: "muon" orthogonalises the steps of matrices and kernels; the rest, or all, is AdamW's.
        weight_decay: on matrices and kernels only.
        betas: of AdamW.
        clip_norm: largest norm of the gradient; 0: not clipped.
        precision: mixed precision of the module's forward.
        gradient_checkpointing: compute activations again in the backward pass where the module can.
        ema: decay of the running average of the weights that is published; 0: the weights themselves.
        store: type to which published weights are rounded.
        seed: decides data order, items and every random draw.
        save_every: steps between resumable states; the last step is always saved.
        keep: states that are kept.
        log_every: steps between rows of metrics.csv; a row is the mean over them.
        validate_every: steps between rows of validation.csv; 0: never.
        workers: processes that load data; 0: the training process does.
        tensorboard: write the same figures for TensorBoard as well.
    """

    stage: str
    steps: Count
    batch_size: Count
    accumulation: Count = 1
    learning_rate: Positive
    warmup_steps: CountOrNone = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    final_rate: Share = 0.0
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: NotNegative = 0.01
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    clip_norm: NotNegative = 1.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    ema: Decay = 0.0
    store: Literal["float32", "float16"] = "float32"
    seed: CountOrNone = 0
    save_every: Count = 1000
    keep: Count = 2
    log_every: Count = 10
    validate_every: CountOrNone = 0
    workers: CountOrNone = 0
    tensorboard: bool = False
    data: DataSettings = msgspec.field(default_factory=DataSettings)
    options: dict[str, Any] = msgspec.field(default_factory=dict)


def read_settings(path: Path) -> TrainSettings:
    """The settings in `path` (.toml, .yaml, .yml or .json). Raises UsageError naming file and key."""
    decoders: dict[str, Callable[[bytes], Any]] = {
        ".toml": msgspec.toml.decode,
        ".yaml": msgspec.yaml.decode,
        ".yml": msgspec.yaml.decode,
        ".json": msgspec.json.decode,
    }
    decode = decoders.get(path.suffix.lower())
    if decode is None:
        raise UsageError(f"{path}: unknown type {path.suffix or '(none)'}; use .toml, .yaml or .json")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        raw = decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from error
    except ImportError as error:
        raise EnvironmentProblem(f"{path}: {error}; run: pip install 'videolavit[train]'") from error
    return _converted(raw, TrainSettings, str(path))


def read_options(settings: TrainSettings, kind: type[T], where: str) -> T:
    """The table `[options]` as the stage's own `kind`; `where` names the file in errors."""
    return _converted(settings.options, kind, where, table="options")


def _converted(raw: Any, kind: type[T], where: str, *, table: str = "") -> T:
    """`raw`, from the file `where`, as a `kind`; raises UsageError "WHERE: KEY: what is wrong"."""
    # YAML 1.1 takes 1e-4 for text: there, text that is a number is one.
    lax = where.lower().endswith((".yaml", ".yml"))
    try:
        return msgspec.convert(raw, kind, strict=not lax)
    except msgspec.ValidationError as error:
        raise UsageError(f"{where}: {_located(str(error), table)}") from error


def _located(message: str, table: str) -> str:
    """msgspec's message, with the key first: "Expected `int` - at `$.data.size`" -> "data.size: expected `int`"."""
    reason, _, place = message.partition(" - at `$")
    keys = [table, *place.rstrip("`").strip(".").split(".")]
    if "field `" in reason:  # unknown or missing: the message names the last key
        reason, _, name = reason.partition(" field `")
        keys.append(name.rstrip("`"))
        reason = "unknown key" if "unknown" in reason else "is missing"
    path = ".".join(key for key in keys if key)
    return f"{path}: {reason[:1].lower()}{reason[1:]}" if path else reason
