"""The table of precisions: what it says of what the commands said, and that no command is run twice for it."""

from __future__ import annotations

import json
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import EnvironmentProblem

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
ALLOWED = {"share": 0.8, "latent_error": 0.15, "psnr": 25.0, "ssim": 0.9}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("precisions"), import_module("precisions_page")


def record(**result: Any) -> dict[str, Any]:
    return {"key": "", "seconds": 60.0, "error": None, "result": result}


def task(**changes: Any) -> dict[str, Any]:
    good = {"task": "a", "tokens": 10, "same": 9, "share": 0.9, "latent_error": 0.1, "psnr": 30.0, "ssim": 0.95}
    return {**good, "problem": None, **changes}


def engine(name: str, error: float | None, allowed: float, problem: str | None = None) -> dict[str, Any]:
    return {"name": name, "max_abs_error": error, "tolerance": allowed, "problem": problem}


def figure(value: float | None, count: int, **changes: Any) -> dict[str, Any]:
    known = {"part": "prompts", "key": "colour", "what": "colour", "unit": "share", "low": 0.1, "high": 0.9}
    return {**known, "value": value, "count": count, **changes}


def document(module: Any, tasks: list[Any], engines: list[Any], figures: list[Any], plans: dict[str, Any]) -> str:
    row = module.Row(
        precision="int8",
        exported=record(engines=[{"bytes": 3 * 2**19}, {"bytes": 2**20}]),
        verified=record(tasks=tasks, engines=engines, allowed=ALLOWED),
        evaluated=record(figures=figures, seconds=90.0),
    )
    plain = module.Row(precision="fp32", exported=record(engines=[]))
    half = module.Row(precision="fp16", exported=row.exported, evaluated=record(figures=[figure(0.5, 8)], seconds=6.0))
    whole = module.Page(
        model="tiny",
        trained=False,
        digest="d" * 64,
        machine="a machine",
        items=8,
        steps=None,
        rows={"fp32": plain, "half": half, "int8": row},
        plans=plans,
        capabilities=("8.6", "12.0"),
    )
    text: str = module.page(whole)
    return text


def test_figures_beyond_a_bound_are_bold_and_what_was_not_run_is_left_out(modules: tuple[Any, Any]) -> None:
    text = document(
        modules[1],
        [task(), task(share=0.7, same=7, latent_error=None, psnr=26.0, ssim=0.8)],
        [
            engine("visual_merger", 0.01, 0.2),
            engine("understanding/visual_merger", 0.3, 0.2, "too far"),
            engine("motion_encoder", 0, 0),
        ],
        [figure(0.25, 4), figure(-0.001, 2, key="gain", what="gain", unit="dB", low=-1.0, high=1.0)],
        {"fp16": {"8.6": record(engines=[{"bytes": 2**20}]), "12.0": {**record(), "error": "no | such GPU"}}},
    )
    assert "The weights are random" in text
    assert "| `fp32` | 0.0 |  |  |  |  |  |" in text
    assert (
        "| `int8` | 2.5 | **80.0% of 20 (70.0%)** | **inf** | 26.0 | **0.8000** | **understanding/visual_merger** |"
        in text
    )
    assert "| visual_merger | **0.3 / 0.2** |" in text and "| motion_encoder | 0 / 0 |" in text
    assert "| prompts: colour | 8 | 50.0 % (10.0 to 90.0) | 25.0 % (10.0 to 90.0, n 4) |" in text
    assert "| `fp16` | 1.0 (60) | refused: no / such GPU | not executed: no GPU |" in text


def test_a_step_is_run_once_for_the_same_facts(
    modules: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command[3:])
        lines = [json.dumps({"event": "progress"}), json.dumps({"event": "result", "number": len(asked)})]
        return subprocess.CompletedProcess(command, 0, "\n".join(lines), "")

    monkeypatch.setattr(modules[0].subprocess, "run", run)
    bench = modules[0].Bench(tmp_path / "checkpoint", "digest", tmp_path / "work")
    for facts, flag, number in (
        (["a"], "-x", 1),
        (["a"], "-x", 1),
        (["b"], "-x", 2),
        (["b"], "-y", 3),
        (["b"], "-y", 3),
    ):
        assert bench.step("fp32, int4", "verify", facts, ["verify", flag])["result"]["number"] == number
    assert len(asked) == 3 and asked[0] == ["verify", "-x", "--json"]
    other = modules[0].Bench(tmp_path / "checkpoint", "other digest", tmp_path / "work")
    assert other.step("fp32, int4", "verify", ["b"], ["verify", "-y"])["result"]["number"] == 4


@pytest.mark.parametrize(
    ("status", "words", "kept"),
    [
        (5, "error: far off", True),
        (2, "error: not taken; build it with --backend onnx", True),
        (2, "error: a file cannot be written", False),
        (1, "Traceback", False),
    ],
)
def test_a_miss_is_kept_and_a_failure_is_not(
    modules: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, words: str, kept: bool
) -> None:
    done = subprocess.CompletedProcess([], status, '{"event":"result"}', f"note: x\n{words}\n")
    monkeypatch.setattr(modules[0].subprocess, "run", lambda *_, **__: done)
    bench = modules[0].Bench(tmp_path, "digest", tmp_path)
    if kept:
        assert bench.step("row", "verify", [], [])["error"] == words.removeprefix("error: ")
    else:
        with pytest.raises(EnvironmentProblem, match=rf"row: verify ended with status {status}: .*\n{words}"):
            bench.step("row", "verify", [], [])
    assert (tmp_path / "row" / "verify.json").exists() is kept


def test_what_is_said_of_files_at_work_does_not_say_where_they_lie(
    modules: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = f"error: {tmp_path}/row/profile.toml: compute capability 8.6 has no fp8"
    done = subprocess.CompletedProcess([], 2, "", words)
    monkeypatch.setattr(modules[0].subprocess, "run", lambda *_, **__: done)
    said = modules[0].Bench(tmp_path, "digest", tmp_path).step("row", "export", [], [])["error"]
    assert said == "profile.toml: compute capability 8.6 has no fp8"
