"""An export that ends early: what is left, and what the next one takes up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from export import build
from export.stage import Stage
from runtime.bundle import Bundle
from runtime.errors import EnvironmentProblem, ParityError, UsageError
from videolavit.checkpoints import Checkpoint, load

SMALL = ("motion_conditioner", "token_embedding", "language_model")


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setattr(build, "ENGINES", SMALL)
    return load(tiny_checkpoint)


def test_finished_engines_are_kept_and_damaged_ones_made_again(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ParityError("language_model", 1.0, 0.1)

    with monkeypatch.context() as broken:
        broken.setattr("export.parity.check_language_model", fail)
        with pytest.raises(ParityError):
            build.export_bundle(checkpoint, tmp_path / "b")
    stage = tmp_path / ".b.export"
    assert not (tmp_path / "b").exists() and stage.is_dir()
    damaged = next(stage.glob("*/token_embedding.onnx"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    built = build.export_bundle(checkpoint, tmp_path / "b")
    assert [one.reused for one in built] == [True, False, False]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert set(Bundle.open(tmp_path / "b").manifest.engines) == set(SMALL)


def test_a_killed_export_leaves_the_old_bundle_and_goes_on(
    checkpoint: Checkpoint, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    build.export_bundle(checkpoint, tmp_path / "b")
    before = Bundle.open(tmp_path / "b").digest
    code = (
        "import sys; from pathlib import Path; from export import build; from videolavit.checkpoints import load; "
        f"build.ENGINES = {SMALL!r}; "
        "build.export_bundle(load(Path(sys.argv[1])), Path(sys.argv[2]), force=True)"
    )
    command = [sys.executable, "-c", code, str(tiny_checkpoint), str(tmp_path / "b")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    stage = tmp_path / ".b.export"
    while process.poll() is None and not list(stage.glob("*/engine.json")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert Bundle.open(tmp_path / "b").digest == before
    assert stage.is_dir()
    built = build.export_bundle(checkpoint, tmp_path / "b", force=True)
    assert built[0].reused
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_bundle_lost_between_two_renames_is_put_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    build.export_bundle(checkpoint, tmp_path / "b")
    stage = tmp_path / ".b.export"
    stage.mkdir()
    (tmp_path / "b").rename(stage / "old")
    with Stage(tmp_path / "b", replace=True):
        assert (tmp_path / "b" / "bundle.json").is_file()
    assert not stage.exists()


def test_two_exports_do_not_share_a_target(tmp_path: Path) -> None:
    with Stage(tmp_path / "b", replace=False), pytest.raises(UsageError, match="another export"):
        Stage(tmp_path / "b", replace=False).__enter__()


def test_a_full_disk_is_one_line(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("export.engine.write_engine", full)
    with pytest.raises(UsageError, match="No space left on device; free some space"):
        build.export_bundle(checkpoint, tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_errors_of_an_export_apart_come_back_as_they_were(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "ENGINES", ("motion_conditioner",))
    monkeypatch.setattr(build, "APART", 0)
    built = build.export_bundle(checkpoint, tmp_path / "b")
    assert built[0].parity is not None
    monkeypatch.setattr("export.plan.available_memory", lambda: 1)
    from export.plan import check_fits

    with pytest.raises(EnvironmentProblem, match=r"component motion_encoder: .* of memory"):
        check_fits(build.plan(checkpoint), tmp_path / "c")
