"""What to build: backend, precision and shapes of every engine, from flags or from a profile.

Contract: `EngineSettings` says how one engine is built, `ExportSettings` how a bundle is: defaults and exceptions for
single engines. A profile is a TOML file in `engines/profiles` (or any path) with exactly the keys of `_Profile`;
an unknown key, a wrong type or a choice that an engine does not have is a UsageError that names file and key. A
precision asked of the whole bundle is narrowed to what an engine has (`default_precision`); one asked of a single
engine is taken as it is or refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast, get_args

import msgspec

from export.graphs.registry import ENGINES, LANGUAGE_MODEL
from runtime.amounts import parse_bytes
from runtime.errors import UsageError
from videolavit.inventory import UNDERSTANDING

Backend = Literal["onnx", "tensorrt", "tensorrt-rtx"]
Precision = Literal["fp32", "fp16", "bf16", "fp8", "int8", "int4"]
Flavour = Literal["gqa", "native", "plain"]
Task = Literal["generate", "understand"]

TASKS: tuple[Task, ...] = get_args(Task)
# Their activations leave the range of float16 at official sizes, and bfloat16 costs visible levels of the picture.
WIDE = ("keyframe_vae_encoder", "keyframe_vae_decoder", "video_vae_encoder")
# Their activations are quantised too, in ranges measured while they denoise (`export.calibration`).
UNETS = ("keyframe_unet", "video_unet")
EIGHT_BITS: tuple[Precision, ...] = ("fp8", "int8")  # of the UNets
FP8_SINCE = (8, 9)  # compute capability
PROFILES = Path(__file__).resolve().parent.parent / "engines" / "profiles"
_FLOATS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Shapes an engine is optimised for; within them every size runs. Meaningful to TensorRT and to static sessions.

    Attributes:
        video_sizes: (width, height) in pixels of the pictures of a clip; empty takes the model's own.
        image_sizes: the same for key frames.
        cache_capacities: positions of the language model's KV cache; empty takes the model's limit.
        prompt_positions: most positions of one prefill; None takes the largest capacity.
        rows: largest batch: 2 is one request with guidance; candidates are written in batches of so many.
    """

    video_sizes: tuple[tuple[int, int], ...] = ()
    image_sizes: tuple[tuple[int, int], ...] = ()
    cache_capacities: tuple[int, ...] = ()
    prompt_positions: int | None = None
    rows: int = 2

    def __post_init__(self) -> None:
        numbers = [side for size in (*self.video_sizes, *self.image_sizes) for side in size]
        numbers += [*self.cache_capacities, self.rows, 1 if self.prompt_positions is None else self.prompt_positions]
        if min(numbers) < 1:
            raise UsageError("buckets: every size, capacity and number of rows must be at least 1")


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How one engine is built.

    Attributes:
        flavour: form of the language model's attention; None takes the backend's (`attention`).
        buckets: shapes to optimise for.
        workspace: most bytes of device memory the TensorRT builder may try tactics with; None leaves it to the library.
        compute_capabilities: GPUs a TensorRT engine is built for, as "8.9"; empty is the one of this machine, or for
            TensorRT-RTX every one the library covers.
        refittable: build TensorRT engines without their weights, which are put in at load.
    """

    backend: Backend = "onnx"
    precision: Precision = "fp32"
    flavour: Flavour | None = None
    buckets: Buckets = field(default_factory=Buckets)
    workspace: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    refittable: bool = False

    @property
    def attention(self) -> Flavour:
        """The flavour to write: the one asked for, else `gqa` for ONNX Runtime and `native` for TensorRT."""
        return self.flavour or ("gqa" if self.backend == "onnx" else "native")


class EngineChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a profile or a flag says of a single engine; None leaves the bundle's default."""

    backend: Backend | None = None
    precision: Precision | None = None
    flavour: Flavour | None = None


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """How a bundle is built.

    Attributes:
        default: settings of every engine without its own; its precision is narrowed per engine.
        engines: exceptions by engine name, as in `export.graphs.registry` or `understanding/NAME`; the former hold for
            the latter too.
        tasks: what the bundle is for.
        memory_budget: bytes of engines the target machine should keep in memory; None keeps all.

    Raises UsageError for an unknown engine or a choice an engine does not have.
    """

    default: EngineSettings = field(default_factory=EngineSettings)
    engines: Mapping[str, EngineChoice] = field(default_factory=dict)
    tasks: tuple[Task, ...] = TASKS
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        for name, choice in self.engines.items():
            plain = _plain(name)
            if plain not in ENGINES:
                raise UsageError(f"engine {name!r}: there is none; choose from {', '.join(ENGINES)}")
            if choice.precision is not None and choice.precision not in precisions(plain):
                raise UsageError(
                    f"engine {name}: has no precision {choice.precision}; choose from {', '.join(precisions(plain))}"
                )
            if choice.flavour is not None and plain != LANGUAGE_MODEL:
                raise UsageError(f"engine {name}: has no attention flavour, only {LANGUAGE_MODEL} has")
        for name in (LANGUAGE_MODEL, f"{UNDERSTANDING}/{LANGUAGE_MODEL}"):
            engine = self.for_engine(name)
            if engine.backend == "onnx" and engine.precision == "bf16":
                raise UsageError(f"engine {name}: ONNX Runtime multiplies no matrices in bf16 on the CPU; take fp16")
            if engine.backend != "onnx" and engine.flavour == "gqa":
                raise UsageError(f"engine {name}: flavour gqa is ONNX Runtime's own; take native or plain")
        for name in UNETS if "generate" in self.tasks else ():
            engine = self.for_engine(name)
            if engine.backend == "tensorrt-rtx" or engine.compute_capabilities:
                check_fp8(name, engine)

    def for_engine(self, name: str) -> EngineSettings:
        """Settings of engine `name`."""
        plain = _plain(name)
        common, own = self.engines.get(plain, EngineChoice()), self.engines.get(name, EngineChoice())
        backend = own.backend or common.backend or self.default.backend
        return replace(
            self.default,
            backend=backend,
            precision=own.precision or common.precision or default_precision(plain, self.default.precision, backend),
            flavour=own.flavour or common.flavour or (self.default.flavour if plain == LANGUAGE_MODEL else None),
        )


def check_fp8(engine: str, settings: EngineSettings) -> None:
    """Raise UsageError where a TensorRT engine in fp8 is to run on a GPU without it."""
    if settings.precision != "fp8" or settings.backend == "onnx":
        return
    old = [each for each in settings.compute_capabilities if _numbers(each) < FP8_SINCE]
    if old or not settings.compute_capabilities:
        what = f"compute capability {', '.join(old)} has" if old else "a plan for every GPU is for some that have"
        raise UsageError(
            f"engine {engine}: {what} no fp8; name GPUs from {FP8_SINCE[0]}.{FP8_SINCE[1]} on under "
            "compute_capabilities in a profile, or take int8 or fp16"
        )


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


def precisions(engine: str) -> tuple[Precision, ...]:
    """Precisions an engine can be built in."""
    if engine == LANGUAGE_MODEL:
        return (*_FLOATS, "int8", "int4")
    return (*_FLOATS, *EIGHT_BITS) if engine in UNETS else _FLOATS


def default_precision(engine: str, wanted: Precision, backend: Backend) -> Precision:
    """Precision of an engine in a bundle of which `wanted` is asked.

    It is fp16 where the engine has no such form, and fp32 for the networks in `WIDE`.
    """
    if wanted != "fp32" and engine in WIDE:
        return "fp32"
    if wanted == "bf16" and engine == LANGUAGE_MODEL and backend == "onnx":
        return "fp16"
    return wanted if wanted in precisions(engine) else "fp16"


class _Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A profile file. `description` says which machine it is for; sizes in bytes are numbers or texts like "4GiB"."""

    description: str
    backend: Backend
    precision: Precision
    flavour: Flavour | None = None
    tasks: tuple[Task, ...] = TASKS
    workspace: int | str | None = None
    memory_budget: int | str | None = None
    compute_capabilities: tuple[str, ...] = ()
    refittable: bool = False
    video_sizes: tuple[tuple[int, int], ...] = ()
    image_sizes: tuple[tuple[int, int], ...] = ()
    cache_capacities: tuple[int, ...] = ()
    prompt_positions: int | None = None
    rows: int = 2
    engines: dict[str, EngineChoice] = {}


def profile_names() -> list[str]:
    """Names of the profiles that come with the project."""
    return sorted(path.stem for path in PROFILES.glob("*.toml"))


def read_profile(name_or_path: str) -> ExportSettings:
    """The settings of a shipped profile, or of a TOML file. Raises UsageError naming file and key."""
    path = Path(name_or_path) if name_or_path.endswith(".toml") else PROFILES / f"{name_or_path}.toml"
    if not path.is_file():
        raise UsageError(f"--profile {name_or_path}: there is none; choose from {', '.join(profile_names())} or a file")
    try:
        profile = msgspec.toml.decode(path.read_bytes(), type=_Profile)
    except msgspec.DecodeError as error:
        raise UsageError(f"{path}: {error}") from error
    try:
        return _from_profile(profile)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def parse_precision(text: str) -> tuple[Precision | None, dict[str, EngineChoice]]:
    """`--precision`: a default, `ENGINE=PRECISION` for single engines, or both, separated by commas."""
    default: Precision | None = None
    engines = {}
    for part in text.split(","):
        name, _, value = part.strip().rpartition("=")
        if value not in get_args(Precision):
            raise UsageError(f"--precision {text}: {value!r} is none; choose from {', '.join(get_args(Precision))}")
        precision = cast(Precision, value)
        if name:
            engines[name] = EngineChoice(precision=precision)
        else:
            default = precision
    return default, engines


def _from_profile(profile: _Profile) -> ExportSettings:
    for capability in profile.compute_capabilities:
        major, _, minor = capability.partition(".")
        if not (major.isdigit() and minor.isdigit()):
            raise UsageError(f"compute_capabilities: {capability!r} is none; write it like 8.9")
    buckets = Buckets(
        video_sizes=profile.video_sizes,
        image_sizes=profile.image_sizes,
        cache_capacities=profile.cache_capacities,
        prompt_positions=profile.prompt_positions,
        rows=profile.rows,
    )
    default = EngineSettings(
        backend=profile.backend,
        precision=profile.precision,
        flavour=profile.flavour,
        buckets=buckets,
        workspace=None if profile.workspace is None else parse_bytes(profile.workspace),
        compute_capabilities=profile.compute_capabilities,
        refittable=profile.refittable,
    )
    return ExportSettings(
        default=default,
        engines=profile.engines,
        tasks=profile.tasks,
        memory_budget=None if profile.memory_budget is None else parse_bytes(profile.memory_budget),
    )


def _plain(name: str) -> str:
    """An engine's name without the task it has weights of its own for."""
    return name.removeprefix(f"{UNDERSTANDING}/")
