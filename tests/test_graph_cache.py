"""Models kept as ONNX Runtime optimised them: same results, found again, made again when damaged."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from runtime.backends import graph_cache
from runtime.backends.onnxruntime import OnnxRuntimeEngine, load_engine
from runtime.bundle import Bundle, FileEntry
from runtime.engines import EngineOptions
from runtime.files import cache_folder

SHIPPED = Bundle.open(Path(__file__).parent.parent / "engines" / "shapes", check_hashes=False)
ENTRY = SHIPPED.manifest.engines["visual_merger"]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VIDEOLAVIT_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def codes_of(engine: OnnxRuntimeEngine) -> np.ndarray:
    shape = [2 if isinstance(size, str) else size for size in ENTRY.inputs[0].shape]
    features = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return engine(features=features, keep=np.ones(shape[:2], np.float32))["embeds"]


def load() -> OnnxRuntimeEngine:
    return load_engine(SHIPPED, ENTRY, EngineOptions(threads=1))


def test_a_kept_model_is_used_and_computes_the_same(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = codes_of(load())
    [path] = kept.iterdir()
    used = []
    find = graph_cache.find
    monkeypatch.setattr(graph_cache, "find", lambda key: used.append(find(key)) or used[-1])
    np.testing.assert_array_equal(codes_of(load()), first)
    assert used == [path]
    assert list(kept.iterdir()) == [path]


def test_what_is_damaged_is_made_again(kept: Path) -> None:
    first = codes_of(load())
    [path] = kept.iterdir()
    whole = path.read_bytes()
    for damage in (whole[:-100], b"", whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]):
        path.write_bytes(damage)
        np.testing.assert_array_equal(codes_of(load()), first)
        [path] = kept.iterdir()
        assert len(path.read_bytes()) == len(whole)


def test_nothing_is_kept_where_that_is_not_wanted_or_not_possible(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for place in ("off", str(tmp_path / "file")):
        monkeypatch.setenv("VIDEOLAVIT_CACHE", place)
        assert codes_of(load()).any()
    assert not kept.exists()
    monkeypatch.delenv("VIDEOLAVIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / "videolavit"


def test_a_full_disk_only_means_that_nothing_is_kept(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_cache, "staging", lambda key: kept / "no" / "such" / "folder.part")
    assert codes_of(load()).any()


def test_the_key_is_all_that_a_model_depends_on() -> None:
    small, other = (FileEntry(path="a.onnx", bytes=9, sha256=letter * 64) for letter in "ab")
    keys = {
        graph_cache.key_of([small], "1.31"),
        graph_cache.key_of([small], "1.32"),
        graph_cache.key_of([other], "1.31"),
    }
    assert len(keys) == 3 and None not in keys
    large = FileEntry(path="a.onnx", bytes=graph_cache.LARGEST + 1, sha256="a" * 64)
    assert graph_cache.key_of([large], "1.31") is None
    assert graph_cache.key_of([small, other], "1.31") is None


def test_models_nobody_used_for_long_go(kept: Path) -> None:
    kept.mkdir()
    old, fresh, other = kept / "old.1.onnx", kept / "fresh.1.onnx", kept / "notes.txt"
    for path in (old, fresh, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (time.time() - 40 * 86400,) * 2)
    load()
    assert not old.exists() and fresh.exists() and other.exists()
