"""Engine bundles: read, check, write.

Contract: a bundle is a folder holding `bundle.json` (the manifest, strict schema below) and the files it
names. `Bundle.open` refuses, in one line and before any engine is deserialised, a manifest with unknown or
missing keys, a path that leaves the folder, a missing file, or a file whose size or SHA-256 differs. Nothing in
a bundle is unpickled or executed. `publish` fills a staging folder beside the target and swaps it in by rename:
a crash leaves the old bundle or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from runtime.errors import BundleError, UsageError
from runtime.geometry import Geometry
from runtime.settings import LanguageModelShape, SchedulerSettings, TaskDefaults
from runtime.vocabulary import Vocabulary

FORMAT = 1
MANIFEST = "bundle.json"


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file of the bundle: path relative to the folder with `/`, size and SHA-256 of its content."""

    path: str
    bytes: int
    sha256: str


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An engine's input or output. A dimension is a number, or a name when it is free."""

    name: str
    dtype: Literal["float32", "float16", "bfloat16", "int64", "int32", "bool"]
    shape: tuple[int | str, ...]


class Parity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Largest absolute difference from torch on seeded inputs, the bound, and the outputs' largest magnitude."""

    max_abs_error: float
    tolerance: float
    scale: float


class BuiltFor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a TensorRT plan runs with.

    Attributes:
        library: name and version, like "tensorrt-rtx 1.7.1.116"; no other version reads the plan.
        compute_capabilities: of the GPUs it was built for, like "8.9"; empty for all that the library covers.
    """

    library: str
    compute_capabilities: tuple[str, ...] = ()


class EngineEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One engine. The first file is the model; others are its external data."""

    files: tuple[FileEntry, ...]
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    backend: Literal["onnx", "tensorrt", "tensorrt-rtx"] = "onnx"
    precision: str = "fp32"
    built_for: BuiltFor | None = None
    parity: Parity | None = None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`bundle.json`.

    Attributes:
        trained: False when the weights are random; every command then says so.
        source: SHA-256 over the checkpoint's weights the engines were made from.
        versions: library versions at export.
        video_vae_scaling, keyframe_vae_scaling: latent scaling factors (reference semantics §8.1, §9.2).
    """

    format: int
    name: str
    trained: bool
    source: str
    versions: dict[str, str]
    vocabulary: Vocabulary
    geometry: Geometry
    language_model: LanguageModelShape
    keyframe_scheduler: SchedulerSettings
    video_scheduler: SchedulerSettings
    keyframe_vae_scaling: float
    video_vae_scaling: float
    defaults: TaskDefaults
    tokenizer: FileEntry
    engines: dict[str, EngineEntry]


class Bundle:
    """An opened, verified bundle. Attributes: `path` (folder), `manifest`, `digest` (hash of the manifest)."""

    def __init__(self, path: Path, manifest: Manifest, digest: str) -> None:
        self.path = path
        self.manifest = manifest
        self.digest = digest

    @classmethod
    def open(cls, path: Path, *, check_hashes: bool = True) -> Bundle:
        """Open the bundle in folder `path`. Raises BundleError naming the file at fault and the fix."""
        manifest_path = path / MANIFEST
        if not manifest_path.is_file():
            raise BundleError(
                f"{path}: not an engine bundle, there is no {MANIFEST} in it; make one with `videolavit export`"
            )
        raw = manifest_path.read_bytes()
        try:
            version = msgspec.json.decode(raw, type=dict).get("format")
            if version != FORMAT:
                raise BundleError(
                    f"{manifest_path}: format is {version!r}, this version reads {FORMAT}; export the bundle again"
                )
            manifest = msgspec.json.decode(raw, type=Manifest)
        except msgspec.DecodeError as error:
            raise BundleError(f"{manifest_path}: {error}; export the bundle again") from error
        bundle = cls(path, manifest, hashlib.sha256(raw).hexdigest())
        for entry in bundle.files():
            bundle._check(entry, check_hashes)
        return bundle

    def files(self) -> Iterator[FileEntry]:
        """Every file the manifest names."""
        yield self.manifest.tokenizer
        for engine in self.manifest.engines.values():
            yield from engine.files

    def file(self, entry: FileEntry) -> Path:
        return self.path / entry.path

    def _check(self, entry: FileEntry, check_hash: bool) -> None:
        root = self.path.resolve()
        path = (self.path / entry.path).resolve()
        if not path.is_relative_to(root):
            raise BundleError(f"{self.path / MANIFEST}: path {entry.path!r} leaves the bundle; export the bundle again")
        if not path.is_file():
            raise BundleError(f"{path}: named in {MANIFEST} but missing; export the bundle again or copy it whole")
        size = path.stat().st_size
        if size != entry.bytes:
            raise BundleError(f"{path}: {size} bytes, {MANIFEST} says {entry.bytes}; copy or export the bundle again")
        if check_hash and sha256_of(path) != entry.sha256:
            raise BundleError(
                f"{path}: content does not match its SHA-256 in {MANIFEST}; copy or export the bundle again"
            )


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def describe_file(root: Path, path: Path) -> FileEntry:
    """The manifest's entry for `path`, a file under the bundle folder `root`."""
    return FileEntry(path=path.relative_to(root).as_posix(), bytes=path.stat().st_size, sha256=sha256_of(path))


def write_manifest(root: Path, manifest: Manifest) -> None:
    raw = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (root / MANIFEST).write_bytes(raw + b"\n")


@contextlib.contextmanager
def publish(target: Path, *, replace: bool, marker: str = MANIFEST, kind: str = "an engine bundle") -> Iterator[Path]:
    """Yield an empty staging folder; on success it becomes `target`, on any error it is removed.

    `marker` is the file by which a folder is known to be `kind`, and so to be safe to replace. Raises UsageError
    when `target` exists and may not be replaced, or cannot be made.
    """
    if target.exists():
        if not replace:
            raise UsageError(f"{target}: exists already; add --force to replace it")
        if not (target / marker).is_file():
            raise UsageError(f"{target}: exists and is not {kind}; choose another folder")
    if not target.parent.is_dir():
        raise UsageError(f"{target}: folder {target.parent} does not exist; create it first")
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UsageError(f"{target}: cannot write in {target.parent}: {error.strerror}") from error
    try:
        yield staging
        staging.chmod(0o755)
        if target.exists():
            retired = Path(f"{staging}.old")
            target.rename(retired)
            staging.rename(target)
            shutil.rmtree(retired)
        else:
            staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


PACKAGED = Path(__file__).resolve().parent.parent / "engines"


def find(name_or_path: str | None) -> Path:
    """Folder of the bundle a user named: a path, or a name under `./engines` or the installed engines.

    None means VIDEOLAVIT_BUNDLE, then the shipped demo bundle `shapes`. Raises BundleError listing where it looked.
    """
    wanted = name_or_path or os.environ.get("VIDEOLAVIT_BUNDLE") or "shapes"
    places = [Path(wanted), Path("engines") / wanted, PACKAGED / wanted]
    for place in places:
        if (place / MANIFEST).is_file():
            return place
    raise BundleError(
        f"--bundle {wanted}: no {MANIFEST} in {', '.join(str(p) for p in places)}; make one with `videolavit export`"
    )
