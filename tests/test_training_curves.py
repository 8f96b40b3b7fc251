"""The page on how the shapes model was trained: what a run says, and what is taken from an earlier page."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "shapes-model.md"


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("training_curves")


def test_a_new_run_replaces_its_stage_and_leaves_the_others_as_they_stood(curves: Any, tmp_path: Path) -> None:
    run = tmp_path / "vision"
    run.mkdir()
    (run / "settings.json").write_text(json.dumps({"batch_size": 5}))
    (run / "versions.json").write_text(json.dumps({"torch": "1.2.3"}))
    (run / "metrics.csv").write_text("step,loss,seconds\n1,0.5,1800\n2,0.25,3600\n")
    before = curves.parts_of(PAGE.read_text())
    assert list(before) == list(curves.STAGES)
    after = curves.page([curves.read(tmp_path, "vision")], before, "a machine")
    found = curves.parts_of(after)
    assert found["vision"].row == "| [vision](#vision) | 2 | 5 | 3600 | loss 0.25, seconds 3600 |"
    assert "line [0.5, 0.25]" in found["vision"].section
    assert {name: each for name, each in found.items() if name != "vision"} == {
        name: each for name, each in before.items() if name != "vision"
    }
    hours = sum(each.seconds for each in found.values()) / 3600
    assert f"In all {hours:.1f} hours" in after and "Machine: a machine. torch 1.2.3." in after
