"""Tensor files as they are published: `.bin` archives, safetensors, and both cut into shards.

Contract: opening reads names, shapes and types; the numbers stay on the disk, mapped, until a tensor is asked for. A
`.bin` goes through torch's loader that knows tensors only and never through pickle proper: what would run code is
refused before anything runs. A damaged file raises Unreadable with one line; nothing else leaves this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from videolavit.snapshot.report import Problem

ARCHIVE = b"PK\x03\x04"
PICKLE = b"\x80"
LFS_POINTER = b"version https://git-lfs"
AGAIN = "download it again"


class Unreadable(Exception):
    """Why a file cannot be used, in one line without the file's name."""


@dataclass(frozen=True)
class Entry:
    """Shape and type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorFile(Protocol):
    """An opened file: its `entries`, and its tensors one by one."""

    entries: Mapping[str, Entry]

    def get(self, name: str) -> Tensor:
        """The tensor as it is stored, on the CPU."""
        ...


class BinFile:
    """A torch archive; tensors are views of the mapped file."""

    def __init__(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # damaged input makes the loader fail in any way there is
            raise Unreadable(_why(error, path)) from error
        if not isinstance(state, dict):
            raise Unreadable(f"holds one {type(state).__name__} and no named tensors; {AGAIN}")
        other = [str(name) for name, value in state.items() if not _plain(name, value)]
        if other:
            raise Unreadable(f"holds other things than tensors, the first is {other[0]!r}; it is another kind of file")
        self._state: dict[str, Tensor] = state
        self.entries: Mapping[str, Entry] = {
            name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()
        }

    def get(self, name: str) -> Tensor:
        return self._state[name].detach()


class SafetensorsFile:
    """A safetensors file."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, "pt")
            names: list[str] = self._file.keys()
            self.entries: Mapping[str, Entry] = {name: self._entry(name) for name in names}
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size
            reason = _first_line(error)
            raise Unreadable(f"is cut off or damaged, it has {size:,} bytes ({reason}); {AGAIN}") from error

    def _entry(self, name: str) -> Entry:
        part = self._file.get_slice(name)
        dtype = _SAFETENSORS_DTYPES.get(part.get_dtype(), torch.uint8)
        return Entry(tuple(part.get_shape()), dtype)

    def get(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


# Types that weights may have; every other one shows as uint8 and is reported as the wrong type.
_SAFETENSORS_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def open_file(path: Path) -> TensorFile:
    """Open one file. Raises Unreadable."""
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise Unreadable(f"cannot be opened: {error.strerror}") from error
    if not head:
        raise Unreadable(f"is empty; {AGAIN}")
    if head.startswith(LFS_POINTER):
        raise Unreadable("is a Git LFS pointer and not the file itself; run `git lfs pull` in the snapshot")
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if head.startswith(PICKLE):
        raise Unreadable("is a bare pickle and not a torch archive, so it was not opened; get the official file")
    if not head.startswith(ARCHIVE):
        raise Unreadable(f"is not a torch archive, it begins with {head[:16]!r}; {AGAIN}")
    return BinFile(path)


class TensorSet:
    """The tensors of one logical file, which may be cut into shards.

    Attributes:
        path: of the file, or of the index that names the shards, inside the snapshot.
        where: tensor -> the opened file that has it.
        lost: names that stand in shards which are missing or unreadable; reported with their shard.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.where: dict[str, TensorFile] = {}
        self.lost: set[str] = set()

    @property
    def entries(self) -> Iterator[tuple[str, Entry]]:
        return ((name, file.entries[name]) for name, file in self.where.items())

    def add(self, file: TensorFile) -> None:
        self.where.update(dict.fromkeys(file.entries, file))


def open_set(root: Path, folder: str, names: tuple[str, ...], problems: list[Problem]) -> TensorSet | None:
    """The first of `names` that is in `folder` of the snapshot `root`; a name ending in `.index.json` is an index.

    What cannot be used is added to `problems`. None when none of the names is there.
    """
    for name in names:
        path = f"{folder}/{name}" if folder else name
        if not (root / path).is_file():
            continue
        found = TensorSet(path)
        if name.endswith(".index.json"):
            _add_shards(root, folder, found, problems)
        else:
            _add(root, path, found, problems)
        return found
    return None


def _add(root: Path, path: str, found: TensorSet, problems: list[Problem]) -> bool:
    try:
        found.add(open_file(root / path))
    except Unreadable as error:
        problems.append(Problem(path, "unreadable", str(error)))
        return False
    return True


def _add_shards(root: Path, folder: str, found: TensorSet, problems: list[Problem]) -> None:
    try:
        index = msgspec.json.decode((root / found.path).read_bytes(), type=_Index)
    except msgspec.MsgspecError as error:
        problems.append(Problem(found.path, "unreadable", f"is not an index of shards: {error}; {AGAIN}"))
        return
    shards: dict[str, list[str]] = {}
    for name, shard in index.weight_map.items():
        shards.setdefault(shard, []).append(name)
    for shard, tensors in sorted(shards.items()):
        path = f"{folder}/{shard}"
        if Path(shard).name != shard:
            problems.append(Problem(found.path, "unreadable", f"names the shard {shard!r}, which leaves its folder"))
        elif not (root / path).is_file():
            problems.append(Problem(path, "missing file", f"shard with {len(tensors)} tensors; download it"))
        elif _add(root, path, found, problems):
            continue
        found.lost.update(tensors)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _plain(name: object, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided


def _why(error: Exception, path: Path) -> str:
    """What went wrong in torch's loader, in our words where we know it."""
    text = str(error)
    code = re.search(r"GLOBAL (\S+)", text)
    if code:
        return f"holds code ({code[1]}) besides tensors; it was not run, get the official file"
    size = path.stat().st_size
    if "central directory" in text or "PytorchStreamReader" in text:
        return f"is cut off or damaged, it has {size:,} bytes; {AGAIN}"
    return f"cannot be loaded as plain tensors ({_first_line(error)}); {AGAIN}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
