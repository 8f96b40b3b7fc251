"""kill -9 at every point of an export at which it changes a file or a folder."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from export import build
from export.engine import Built
from runtime.bundle import Bundle, EngineEntry, describe_file
from videolavit.checkpoints import Checkpoint, load

ENGINES = ("motion_conditioner", "token_embedding", "understanding/language_model")
CHANGES = {"os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir"}  # audit events, each told before it happens


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """One whose engines take no time: what is built is a few bytes that say for what."""
    monkeypatch.setattr(build, "engines_for", lambda *_: list(ENGINES))
    monkeypatch.setattr(build, "sources_of", lambda checkpoint, name: ("motion_encoder",))
    monkeypatch.setattr(build, "build_engine", fake_engine)
    monkeypatch.setattr(Checkpoint, "component_digest", lambda self, component: "digest")
    monkeypatch.setattr(Checkpoint, "digest", "digest")
    return load(tiny_checkpoint)


def fake_engine(checkpoint: Checkpoint, name: str, folder: Path, settings: Any, compare: bool) -> Built:
    """Two files, an engine and its weights."""
    path = folder / f"{name}.onnx"
    path.parent.mkdir(exist_ok=True, parents=True)
    files = (path, path.with_suffix(".data"))
    for file in files:
        file.write_text(f"{name} {compare}" * 1000)
    entries = tuple(describe_file(folder, file) for file in files)
    return Built(name=name, entry=EngineEntry(files=entries, inputs=(), outputs=()), export_seconds=0.0)


def killed_before(change: int, checkpoint: Checkpoint, target: Path) -> bool:
    """Export in a process that is killed before its `change`-th change; False when it came to its end before."""
    child = os.fork()
    if not child:
        left = change

        def kill(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax")
            if event in CHANGES or writes:
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.addaudithook(kill)
            build.export_bundle(checkpoint, target, force=True, compare=True)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the export failed by itself"
    return os.WIFSIGNALED(status)


def kind_of(target: Path) -> str:
    """Whether the whole bundle that is there was compared; every hash is checked."""
    Bundle.open(target)
    texts = {path.read_text() for path in target.rglob("*.onnx")}
    [kind] = {text.rpartition(" ")[2] for text in texts}
    assert len(texts) == len(ENGINES)
    return kind


def changes(checkpoint: Checkpoint, folder: Path, old: bool) -> Iterator[tuple[int, Path]]:
    """Every number of a change before which an export can be killed, with the folder it was killed in."""
    for change in count(1):
        target = folder / str(change) / "b"
        target.parent.mkdir()
        if old:
            build.export_bundle(checkpoint, target, compare=False)
        if not killed_before(change, checkpoint, target):
            assert kind_of(target) == "True"
            assert change > 15, "too few changes were seen"
            return
        yield change, target


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
@pytest.mark.parametrize("old", [True, False], ids=["over a bundle", "anew"])
def test_an_export_killed_anywhere_leaves_the_old_bundle_or_none_and_goes_on(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    build.export_bundle(checkpoint, tmp_path / "first", compare=False)  # what is read once has been read
    seen, kept = set(), []
    for change, target in changes(checkpoint, tmp_path, old):
        stage = target.parent / ".b.export"
        left = kind_of(target) if target.exists() else "none"
        seen.add(left)
        if left == "none" and old:
            assert kind_of(stage / "old") == "False", f"change {change}: the old bundle is lost"
        finished = len(list(stage.glob("*/engine.json"))) - len(list(stage.glob("work/engine.json")))
        built = build.export_bundle(checkpoint, target, force=True, compare=True)
        reused = sum(one.reused for one in built)
        assert reused == finished or left == "True", f"change {change}: published, the stage may go"
        kept.append(reused)
        assert kind_of(target) == "True"
        assert [path.name for path in target.parent.iterdir()] == ["b"]
    assert seen == ({"False", "True", "none"} if old else {"True", "none"})
    assert set(kept) == set(range(len(ENGINES) + 1)), "killed with nothing finished, and with everything"
