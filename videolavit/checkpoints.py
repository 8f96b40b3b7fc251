"""Checkpoints: a model's configuration, tokenizer and weights, wherever they come from.

Contract: `load` takes the project's own folder or an official snapshot (`videolavit.snapshot`). The own folder holds
`config.json` (strict: an unknown key is an error), `tokenizer.model` and `COMPONENT.safetensors` for every name in
`videolavit.models.components.COMPONENTS`, and `understanding/COMPONENT.safetensors` when the model was fine-tuned for
that task. Weights in 16 bits are stored as they are, others as float16 where that loses nothing, so saving never
changes a value. Nothing is unpickled. `save` fills a staging folder tensor by tensor and publishes it by rename: a
crash leaves the old checkpoint or none. `publish_components` replaces single files of a checkpoint, each by one rename
and the header last: a crash in between leaves a checkpoint that loads.

Where weights come from is a `Weights` object; a folder, a snapshot and a seed are three of them.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from runtime.bundle import publish
from runtime.errors import CheckpointError, UsageError
from runtime.files import published
from runtime.progress import Observer, Progress, ignore
from videolavit.config import PRESETS, ModelConfig
from videolavit.inventory import FINE_TUNED, UNDERSTANDING, for_task, inventory, module_of
from videolavit.models.components import COMPONENTS, build
from videolavit.safetensors_writer import write_safetensors
from videolavit.snapshot import Snapshot, SnapshotError, is_snapshot, read_snapshot

FORMAT = 2
CONFIG = "config.json"
TOKENIZER = "tokenizer.model"
ASSETS = Path(__file__).parent / "assets"
TOKENIZERS = dict.fromkeys(("shapes", "tiny"), ASSETS / "shapes_tokenizer.model")  # presets whose tokenizer is shipped
LISTED = 5  # tensors named per kind of misfit in a report


class Weights(Protocol):
    """A source of weights."""

    def tensors(self, component: str) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 tensor) pairs of one component in the order of their names."""


@runtime_checkable
class StoredWeights(Weights, Protocol):
    """A source that knows in which type weights were stored."""

    def stored(self, component: str) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor as it is stored) pairs of one component in the order of their names."""


def stored_tensors(weights: Weights, component: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) pairs in the types in which they are stored, float32 where `weights` does not say."""
    return weights.stored(component) if isinstance(weights, StoredWeights) else weights.tensors(component)


class Checkpoint:
    """A model.

    Attributes:
        config: sizes and settings.
        untrained: names of the components that still have random weights.
        tokenizer: the sentencepiece file's bytes.
        weights: where tensors come from.
        components: names of all components, those of the fine-tuned understanding model included.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        tokenizer: bytes,
        weights: Weights,
        components: Sequence[str] = tuple(COMPONENTS),
        untrained: Collection[str] = (),
    ) -> None:
        self.config = config
        self.untrained = tuple(name for name in components if name in untrained)
        self.tokenizer = tokenizer
        self.weights = weights
        self.components = tuple(components)
        self._modules: dict[str, nn.Module] = {}  # by the names of `components`
        self._names: dict[str, str] = {}  # where this object has other names for them

    @property
    def trained(self) -> bool:
        """Whether no component has random weights."""
        return not self.untrained

    def resolve(self, name: str, task: str | None = None) -> str:
        """Component that `task` uses as `name`: its own copy where the model has one."""
        own = for_task(name, task) if task else name
        return own if own in self.components else name

    def for_task(self, task: str) -> Checkpoint:
        """This model as `task` sees it: the task's own components under the common names. Modules are shared."""
        seen = copy.copy(self)
        names = {name: self.resolve(name, task) for name in COMPONENTS}
        seen.weights = _RenamedWeights(self.weights, names)
        seen.components = tuple(COMPONENTS)
        seen._names = names
        return seen

    def component(self, name: str) -> nn.Module:
        """Component `name` with its weights, in eval mode, float32, without gradients; built once.

        The weights are in memory once; what is stored in float32 stays in its mapped file until it is used. Raises
        CheckpointError with every missing, unexpected and mis-shaped tensor in one report.
        """
        held = self._names.get(name, name)
        if held not in self._modules:
            from accelerate import init_empty_weights  # type: ignore[import-untyped]

            state = dict(self.weights.tensors(name))
            _check_fit(held, state, inventory(self.config, name))
            with init_empty_weights(include_buffers=False):
                module = build(self.config, module_of(name))
            module.load_state_dict(state, assign=True)
            self._modules[held] = module.eval().requires_grad_(False)
        return self._modules[held]

    def release(self, *keep: str) -> None:
        """Forget built components except those named, so that their memory can be used for others."""
        for name in self._modules.keys() - set(keep):
            del self._modules[name]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, shapes and float32 values of all weights; the same however they are stored."""
        every = ((f"{c}/{name}", tensor) for c in self.components for name, tensor in self.weights.tensors(c))
        return _digest(every)

    def component_digest(self, name: str, without: tuple[str, ...] = ()) -> str:
        """As `digest`, of the weights of component `name` alone, but for those whose names start with `without`."""
        return _digest(item for item in self.weights.tensors(name) if not item[0].startswith(without))

    def save(self, folder: Path, *, force: bool = False, observer: Observer = ignore) -> None:
        """Write the checkpoint to `folder`; one tensor at a time is in memory, `observer` is told of each component.

        Raises UsageError when `folder` exists and `force` is not given, or when it is not a checkpoint, and
        CheckpointError when weights do not fit the configuration.
        """
        with publish(folder, replace=force, marker=CONFIG, kind="a checkpoint") as staging:
            (staging / CONFIG).write_bytes(_Header(untrained=self.untrained, model=self.config).text())
            (staging / TOKENIZER).write_bytes(self.tokenizer)
            for count, component in enumerate(self.components, 1):
                path = staging / f"{component}.safetensors"
                path.parent.mkdir(exist_ok=True)
                shapes = dict(sorted(inventory(self.config, component).items()))
                write_safetensors(path, shapes, self._to_store(component))
                observer(Progress("save", count, len(self.components)))

    def _to_store(self, component: str) -> Iterator[tuple[str, Tensor]]:
        """A component's tensors in the smallest type that keeps their values."""
        for name, tensor in stored_tensors(self.weights, component):
            yield name, _smallest(tensor)


class _RenamedWeights:
    """Weights under other component names."""

    def __init__(self, weights: Weights, names: dict[str, str]) -> None:
        self._weights = weights
        self._names = names

    def tensors(self, component: str) -> Iterator[tuple[str, Tensor]]:
        return self._weights.tensors(self._names[component])


def initialise(preset: str, seed: int, layers: int | None = None) -> Checkpoint:
    """A checkpoint of `preset` (a key of `PRESETS`) with random weights from `seed`, marked as untrained.

    `layers` are of the language model (None: as many as the preset has). Every value is representable in float16.
    Raises UsageError for an unknown preset or one without a shipped tokenizer.
    """
    if preset not in PRESETS:
        raise UsageError(f"PRESET {preset!r}: there is no such preset; choose one of {', '.join(PRESETS)}")
    if preset not in TOKENIZERS:
        raise UsageError(
            f"PRESET {preset!r}: its tokenizer is not shipped; presets that can be initialised: {', '.join(TOKENIZERS)}"
        )
    config = PRESETS[preset]
    if layers is not None:
        config = replace(config, language_model=replace(config.language_model, layers=layers))
    tokenizer = TOKENIZERS[preset].read_bytes()
    weights = RandomWeights(config, seed)
    return Checkpoint(config, tokenizer=tokenizer, weights=weights, untrained=tuple(COMPONENTS))


def load(folder: Path) -> Checkpoint:
    """The checkpoint or official snapshot in `folder`; weights are read when a component is asked for.

    Raises CheckpointError for a folder that is neither, lacks files, or has keys this version does not know; for a
    snapshot it is a SnapshotError whose report has every problem of every file.
    """
    if is_snapshot(folder):
        return from_snapshot(read_snapshot(folder))
    header = _read_header(folder)
    own = tuple(for_task(name) for name in FINE_TUNED) if (folder / UNDERSTANDING).is_dir() else ()
    components = (*COMPONENTS, *own)
    missing = [name for name in (TOKENIZER, *(f"{c}.safetensors" for c in components)) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {', '.join(missing)} missing; copy the checkpoint whole")
    return Checkpoint(
        header.model,
        tokenizer=(folder / TOKENIZER).read_bytes(),
        weights=FolderWeights(folder),
        components=components,
        untrained=header.untrained,
    )


def from_snapshot(snapshot: Snapshot) -> Checkpoint:
    """The model of an official snapshot. Raises SnapshotError when a file of it is missing, damaged or does not fit."""
    if not snapshot.report.usable:
        raise SnapshotError(snapshot.report)
    return Checkpoint(
        snapshot.config,
        tokenizer=snapshot.tokenizer,
        weights=snapshot.weights,
        components=snapshot.components,
    )


def publish_components(
    folder: Path, states: Mapping[str, Mapping[str, Tensor]], trained: Collection[str] | None = None
) -> None:
    """Replace components of the checkpoint in `folder`: component name -> its full state dict, on any device.

    Those in `trained` (None: all of `states`) are no longer listed as untrained. All are checked before the first
    file is touched. Raises CheckpointError for an unknown component or one that does not fit the configuration.
    """
    header = _read_header(folder)
    for name, state in states.items():
        if not (folder / f"{name}.safetensors").is_file():
            raise CheckpointError(f"{folder}: has no component {name!r}; it has {', '.join(COMPONENTS)}")
        _check_fit(name, state, inventory(header.model, name))
    for name, state in states.items():
        with published(folder / f"{name}.safetensors") as staging:
            shapes = dict(sorted(inventory(header.model, name).items()))
            write_safetensors(staging, shapes, ((key, _smallest(state[key].detach().cpu())) for key in shapes))
    done = states if trained is None else trained
    # Read again: another run may have published in the meantime.
    header = _read_header(folder)
    left = tuple(name for name in header.untrained if name not in done)
    with published(folder / CONFIG) as staging:
        staging.write_bytes(_Header(untrained=left, model=header.model).text())


class FolderWeights:
    """Weights from the safetensors files of a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def tensors(self, component: str) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor.float()) for name, tensor in self.stored(component))

    def stored(self, component: str) -> Iterator[tuple[str, Tensor]]:
        path = self._folder / f"{component}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                for name in sorted(file.keys()):
                    yield name, file.get_tensor(name)
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
        for name, shape in sorted(inventory(self._config, component).items()):
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
    format: int = FORMAT
    untrained: tuple[str, ...]
    model: ModelConfig

    def text(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"


def _read_header(folder: Path) -> _Header:
    """`config.json` of a checkpoint folder. Raises CheckpointError when it is not there or not of this version."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no checkpoint, there is no {CONFIG} in it and no file of an official snapshot; "
            "make one with `videolavit init`"
        )
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
    strange = [name for name in header.untrained if module_of(name) not in COMPONENTS]
    if strange:
        raise CheckpointError(f"{path}: untrained: there is no component {', '.join(strange)}")
    return header


def _unknown_keys(raw: Any, known: Any, where: str) -> list[str]:
    """Dotted names of keys in `raw` that are not in `known`; dataclasses would ignore them in silence."""
    if not (isinstance(raw, dict) and isinstance(known, dict)):
        return []
    unknown = [f"{where}.{key}" for key in raw if key not in known]
    for key in raw.keys() & known.keys():
        unknown += _unknown_keys(raw[key], known[key], f"{where}.{key}")
    return unknown


def _check_fit(component: str, state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
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


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _smallest(tensor: Tensor) -> Tensor:
    """`tensor` as float16 when that is exact, unchanged otherwise; one that is stored in 16 bits stays as it is."""
    if tensor.dtype.itemsize == 2:
        return tensor
    half = tensor.half()
    return half if torch.equal(half.float(), tensor) else tensor.contiguous()
