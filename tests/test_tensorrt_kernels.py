"""Kernels that TensorRT-RTX compiled are kept between runs: on a library and a GPU made of numpy."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_tensorrt import FakeDevice, FakeRuntimeCache, fake_library
from tensorrt_programs import FakeBundle, entry, multiplier, x

from runtime.backends import cuda, tensorrt, tensorrt_library
from runtime.backends.tensorrt_plan import Plan


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """The GPU, with the fake library in the place of TensorRT-RTX; nothing may be left on it at the end."""
    device = FakeDevice()
    module = fake_library(device, {"multiplier": multiplier()}, [])
    monkeypatch.setattr(tensorrt_library, "library", lambda backend: module)
    tensorrt_library.log.cache_clear()
    monkeypatch.setattr(cuda, "open_device", lambda: device)
    yield device
    tensorrt_library.log.cache_clear()
    assert not device.memory and not device.graphs


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VIDEOLAVIT_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def use(folder: Path, device: FakeDevice, digest: str = "d" * 64) -> bool:
    """Load the multiplier, run and close it; whether anything was compiled."""
    (folder / "multiplier.plan").write_text("multiplier")
    loading = entry("multiplier.plan", sha256=digest)
    device.events.clear()
    engine = tensorrt.load_engine(FakeBundle(folder), loading, None)  # type: ignore[arg-type]
    np.testing.assert_array_equal(engine(x=x(2), by=np.float32([2]))["y"], x(2) * 2)
    engine.close()
    return "compile" in device.events


def test_kernels_are_compiled_once(tmp_path: Path, device: FakeDevice, kept: Path) -> None:
    assert [use(tmp_path, device) for _ in range(3)] == [True, False, False]
    [path] = kept.iterdir()
    before = path.stat().st_ino
    use(tmp_path, device)
    assert path.stat().st_ino == before, "what is the same is not written again"


def test_kernels_are_of_one_plan_one_gpu_and_one_library(
    tmp_path: Path, device: FakeDevice, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(tmp_path, device)
    assert use(tmp_path, device, digest="e" * 64)
    device.compute_capability = "8.6"
    assert use(tmp_path, device)
    monkeypatch.setattr(tensorrt_library, "version", lambda backend: "tensorrt-rtx 1.8.0")
    monkeypatch.setattr(tensorrt, "check_built_for", lambda *_: None)
    assert use(tmp_path, device)
    assert len(list(kept.iterdir())) == 4


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: b"", lambda whole: whole[:-1] + b"\0"])
def test_damaged_kernels_are_not_given_to_the_library(
    tmp_path: Path, device: FakeDevice, kept: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    use(tmp_path, device)
    [path] = kept.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with monkeypatch.context() as strict:
        strict.setattr(FakeRuntimeCache, "deserialize", lambda self, blob: pytest.fail("was given what is damaged"))
        assert use(tmp_path, device)
    assert path.read_bytes() == whole


def test_kernels_of_another_driver_are_refused_and_replaced(
    tmp_path: Path, device: FakeDevice, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(tmp_path, device)
    monkeypatch.setattr(FakeRuntimeCache, "driver", b"590 ")
    assert [use(tmp_path, device) for _ in range(2)] == [True, False]
    assert len(list(kept.iterdir())) == 1


def test_without_a_place_for_kernels_they_are_compiled_every_time(
    tmp_path: Path, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for place in ("off", str(tmp_path / "file")):
        monkeypatch.setenv("VIDEOLAVIT_CACHE", place)
        assert all(use(tmp_path, device) for _ in range(2))


def test_a_library_without_such_a_cache_works_as_before(tmp_path: Path, device: FakeDevice, kept: Path) -> None:
    device.compiles = False
    assert use(tmp_path, device)
    assert not kept.exists()


def test_kernels_nobody_used_for_long_go(tmp_path: Path, device: FakeDevice, kept: Path) -> None:
    use(tmp_path, device)
    [old] = kept.iterdir()
    os.utime(old, (time.time() - 40 * 86400,) * 2)
    use(tmp_path, device, digest="e" * 64)
    assert not old.exists() and len(list(kept.iterdir())) == 1


def test_kernels_of_a_plan_that_was_let_go_of_are_kept_too(tmp_path: Path, device: FakeDevice, kept: Path) -> None:
    (tmp_path / "multiplier.plan").write_text("multiplier")
    plan = Plan("tensorrt-rtx", "multiplier", [tmp_path / "multiplier.plan"], device, "d" * 64)
    plan.context()
    assert not kept.exists()
    del plan
    assert len(list(kept.iterdir())) == 1
    assert not use(tmp_path, device)
