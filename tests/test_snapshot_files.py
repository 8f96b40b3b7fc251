"""Files that are not what they should be end in one line, and code in them never runs."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from snapshot_factory import save_bin

from runtime.errors import CheckpointError
from videolavit.safetensors_writer import write_safetensors
from videolavit.snapshot.files import Unreadable, open_file, open_set
from videolavit.snapshot.report import Problem


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    save_bin(STATE, tmp_path / "good.bin")
    return tmp_path / "good.bin"


def test_a_malicious_archive_is_refused_and_not_run(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    torch.save({"a": torch.zeros(1), "trap": Trap(sprung)}, tmp_path / "bad.bin")
    with pytest.raises(Unreadable, match=r"holds code \(\S*mkdir\).*not run"):
        open_file(tmp_path / "bad.bin")
    assert not sprung.exists()
    torch.load(tmp_path / "bad.bin", weights_only=False)
    assert sprung.exists(), "the trap must be able to spring"


def test_a_bare_pickle_is_not_even_opened(tmp_path: Path) -> None:
    for protocol in (2, 4):
        (tmp_path / "bad.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung"), protocol=protocol))
        with pytest.raises(Unreadable, match="bare pickle"):
            open_file(tmp_path / "bad.bin")
    (tmp_path / "bad.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung"), protocol=0))
    with pytest.raises(Unreadable, match="not a torch archive"):
        open_file(tmp_path / "bad.bin")
    torch.save(STATE, tmp_path / "bad.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(Unreadable, match="bare pickle"):
        open_file(tmp_path / "bad.bin")
    assert not (tmp_path / "sprung").exists()


def test_an_archive_gives_its_tensors_one_by_one(archive: Path) -> None:
    file = open_file(archive)
    assert {name: (entry.shape, entry.dtype) for name, entry in file.entries.items()} == {
        "a.weight": ((2, 3), torch.float32),
        "b": ((4,), torch.bfloat16),
    }
    assert torch.equal(file.get("a.weight"), STATE["a.weight"])
    file.get("a.weight")[0, 0] = 7  # a copy in memory: the file is only read
    assert torch.equal(torch.load(archive, weights_only=True)["a.weight"], STATE["a.weight"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "not a torch archive"),
        (b"PK\x03\x04 nothing follows", "cut off or damaged, it has 20 bytes"),
        (b"\x00" * 100, "not a torch archive"),
    ],
)
def test_wrong_content_says_what_it_is(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "bad.bin").write_bytes(content)
    with pytest.raises(Unreadable, match=words) as caught:
        open_file(tmp_path / "bad.bin")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["good.bin", "good.safetensors"])
def test_truncated_anywhere_is_one_line(archive: Path, name: str) -> None:
    save_file(STATE, archive.with_suffix(".safetensors"))
    whole = archive.with_name(name).read_bytes()
    for length in sorted({1, 3, 4, 8, 9, 40, *range(100, len(whole), 97), len(whole) - 1}):
        archive.with_name(name).write_bytes(whole[:length])
        with pytest.raises(Unreadable) as caught:
            open_file(archive.with_name(name))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (torch.zeros(3), "holds one Tensor and no named tensors"),
        ({"model": {"a": torch.zeros(1)}}, "other things than tensors, the first is 'model'"),
        ({1: torch.zeros(1)}, "other things than tensors"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "other things than tensors"),
    ],
)
def test_archives_of_something_else(state: object, words: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "bad.bin")
    with pytest.raises(Unreadable, match=words):
        open_file(tmp_path / "bad.bin")


def test_a_zip_that_is_no_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad.bin", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(Unreadable):
        open_file(tmp_path / "bad.bin")


def test_an_index_cannot_name_files_outside(archive: Path) -> None:
    folder = archive.parent / "inner"
    folder.mkdir()
    problems: list[Problem] = []
    (folder / "x.bin.index.json").write_text(json.dumps({"weight_map": {"a.weight": "../good.bin", "b": "gone.bin"}}))
    found = open_set(archive.parent, "inner", ("x.bin", "x.bin.index.json"), problems)
    assert found is not None and not found.where and found.lost == {"a.weight", "b"}
    assert [(p.file, p.kind) for p in problems] == [
        ("inner/x.bin.index.json", "unreadable"),
        ("inner/gone.bin", "missing file"),
    ]
    for text in ("{", "[]", '{"weight_map": {"a": 3}}', "{}"):
        (folder / "x.bin.index.json").write_text(text)
        problems.clear()
        open_set(archive.parent, "inner", ("x.bin.index.json",), problems)
        assert [p.kind for p in problems] == ["unreadable"], text


def test_streamed_safetensors_are_ordinary_ones(tmp_path: Path) -> None:
    state = STATE | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "t": torch.arange(6.0).reshape(2, 3).T}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    path = tmp_path / "made.safetensors"
    dtypes = write_safetensors(path, shapes, reversed(state.items()))
    assert dtypes["b"] == torch.bfloat16
    read = load_file(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in state.items())


@pytest.mark.parametrize(
    "tensors",
    [[("a", torch.zeros(3))], [("b", torch.zeros(2))], [("a", torch.zeros(2))] * 2, [], [("a", torch.zeros(2).long())]],
)
def test_only_announced_tensors_are_written(tensors: list[tuple[str, torch.Tensor]], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        write_safetensors(tmp_path / "made.safetensors", {"a": (2,)}, tensors)
