"""The project's own checkpoint folder: configuration, tokenizer, one safetensors file per component.

Contract: a folder holds `config.json` (strict: an unknown key is an error), `tokenizer.model` and
`COMPONENT.safetensors` for every name in `videolavit.models.components.COMPONENTS`. Weights are stored as float16
where that loses nothing and as float32 otherwise, so saving never changes a value. Reading goes through safetensors
only: nothing is unpickled. `save` fills a staging folder and publishes it by rename: a crash leaves the old
checkpoint or none.

Where weights come from is a `Weights` object; a folder and a seed are two of them, another layout is another class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from runtime.bundle import publish
from runtime.errors import CheckpointError, UsageError
from videolavit.config import PRESETS, ModelConfig
from videolavit.models.components import COMPONENTS, build

FORMAT = 1
CONFIG = "config.json"
TOKENIZER = "tokenizer.model"
ASSETS = Path(__file__).parent / "assets"
TOKENIZERS = {"shapes": ASSETS / "shapes_tokenizer.model"}  # presets whose tokenizer is shipped
LISTED = 5  # tensors named per kind of misfit in a report


class Weights(Protocol):
    """A source of weights."""

    def tensors(self, component: str) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 tensor) pairs of one component in the order of their names."""


class Checkpoint:
    """A model: `config`, `trained` (False: random weights), `tokenizer` (the sentencepiece file's bytes), weights."""

    def __init__(self, config: ModelConfig, *, trained: bool, tokenizer: bytes, weights: Weights) -> None:
        self.config = config
        self.trained = trained
        self.tokenizer = tokenizer
        self.weights = weights
        self._modules: dict[str, nn.Module] = {}

    def component(self, name: str) -> nn.Module:
        """Component `name` with its weights, in eval mode, float32, without gradients; built once.

        Raises CheckpointError with every missing, unexpected and mis-shaped tensor in one report.
        """
        if name not in self._modules:
            state = dict(self.weights.tensors(name))
            _check_fit(name, state, _inventory(self.config, name))
            module = build(self.config, name)
            module.load_state_dict(state)
            self._modules[name] = module.eval().requires_grad_(False)
        return self._modules[name]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, shapes and float32 values of all weights; the same however they are stored."""
        digest = hashlib.sha256()
        for component in COMPONENTS:
            for name, tensor in self.weights.tensors(component):
                digest.update(f"{component}/{name} {list(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def save(self, folder: Path, *, force: bool = False) -> None:
        """Write the checkpoint to `folder`.

        Raises UsageError when `folder` exists and `force` is not given, or when it is not a checkpoint.
        """
        with publish(folder, replace=force, marker=CONFIG, kind="a checkpoint") as staging:
            header = {"format": FORMAT, "trained": self.trained, "model": self.config}
            (staging / CONFIG).write_bytes(msgspec.json.format(msgspec.json.encode(header), indent=2) + b"\n")
            (staging / TOKENIZER).write_bytes(self.tokenizer)
            for component in COMPONENTS:
                stored = {name: _smallest(tensor) for name, tensor in self.weights.tensors(component)}
                path = staging / f"{component}.safetensors"
                save_file(stored, path)
                path.chmod(0o644)  # safetensors writes for the owner alone


def initialise(preset: str, seed: int) -> Checkpoint:
    """A checkpoint of `preset` (a key of `PRESETS`) with random weights from `seed`, marked as not trained.

    Every value is representable in float16. Raises UsageError for an unknown preset or one without a shipped
    tokenizer.
    """
    if preset not in PRESETS:
        raise UsageError(f"PRESET {preset!r}: there is no such preset; choose one of {', '.join(PRESETS)}")
    if preset not in TOKENIZERS:
        raise UsageError(
            f"PRESET {preset!r}: its tokenizer is not shipped; presets that can be initialised: {', '.join(TOKENIZERS)}"
        )
    config = PRESETS[preset]
    tokenizer = TOKENIZERS[preset].read_bytes()
    return Checkpoint(config, trained=False, tokenizer=tokenizer, weights=RandomWeights(config, seed))


def load(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`; weights are read when a component is asked for.

    Raises CheckpointError for a folder that is no checkpoint, lacks files, or has keys this version does not know.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder}: no checkpoint, there is no {CONFIG} in it; make one with `videolavit init`")
    try:
        raw = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        if raw.get("format") != FORMAT:
            raise CheckpointError(f"{path}: format is {raw.get('format')!r}, this version reads {FORMAT}")
        header = msgspec.convert(raw, _Header)
        unknown = _unknown_keys(raw["model"], msgspec.to_builtins(header.model), "model")
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if unknown:
        raise CheckpointError(f"{path}: unknown keys {', '.join(unknown)}; remove them")
    missing = [name for name in (TOKENIZER, *(f"{c}.safetensors" for c in COMPONENTS)) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {', '.join(missing)} missing; copy the checkpoint whole")
    tokenizer = (folder / TOKENIZER).read_bytes()
    return Checkpoint(header.model, trained=header.trained, tokenizer=tokenizer, weights=FolderWeights(folder))


class FolderWeights:
    """Weights from the safetensors files of a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def tensors(self, component: str) -> Iterator[tuple[str, Tensor]]:
        path = self._folder / f"{component}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                for name in sorted(file.keys()):
                    yield name, file.get_tensor(name).float()
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error}); copy it again") from error


class RandomWeights:
    """Seeded weights that keep activations finite and of order one, and leave no parameter without effect.

    Each tensor has its own generator, keyed by seed, component and name: values do not depend on order.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._config = config
        self._seed = seed

    def tensors(self, component: str) -> Iterator[tuple[str, Tensor]]:
        for name, shape in sorted(_inventory(self._config, component).items()):
            key = hashlib.sha256(f"{self._seed}/{component}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
            noise = torch.randn(shape, generator=generator)
            yield name, _scaled(name, noise).half().float()


def _scaled(name: str, noise: Tensor) -> Tensor:
    """Standard normal `noise` brought to a sensible range for the parameter `name`."""
    if noise.ndim == 1 and name.endswith("weight"):  # gain of a norm
        return 1 + 0.1 * noise
    if noise.ndim == 1:  # biases, mix factors
        return 0.1 * noise
    if noise.ndim == 3 and noise.shape[0] == 1:  # position and class embeddings, queries
        return 0.2 * noise
    return noise / noise[0].numel() ** 0.5  # matrices and kernels by fan-in, table rows to about unit norm


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: int
    trained: bool
    model: ModelConfig


def _unknown_keys(raw: Any, known: Any, where: str) -> list[str]:
    """Dotted names of keys in `raw` that are not in `known`; dataclasses would ignore them in silence."""
    if not (isinstance(raw, dict) and isinstance(known, dict)):
        return []
    unknown = [f"{where}.{key}" for key in raw if key not in known]
    for key in raw.keys() & known.keys():
        unknown += _unknown_keys(raw[key], known[key], f"{where}.{key}")
    return unknown


def _inventory(config: ModelConfig, component: str) -> dict[str, torch.Size]:
    """Name and shape of every tensor of a component; allocates nothing."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build(config, component).state_dict().items()}


def _check_fit(component: str, state: dict[str, Tensor], expected: dict[str, torch.Size]) -> None:
    wrong = [
        f"{name} is {list(state[name].shape)}, must be {list(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    kinds = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "wrong shape": wrong,
    }
    findings = [
        f"{len(names)} {kind}: {', '.join(names[:LISTED])}{', ...' if len(names) > LISTED else ''}"
        for kind, names in kinds.items()
        if names
    ]
    if findings:
        raise CheckpointError(f"{component}: weights do not fit the configuration; {'; '.join(findings)}")


def _smallest(tensor: Tensor) -> Tensor:
    """`tensor` as float16 when that is exact, unchanged otherwise."""
    half = tensor.half()
    return half if torch.equal(half.float(), tensor) else tensor.contiguous()
