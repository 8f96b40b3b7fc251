"""What can go wrong with engines, as a user of the command meets it: one line, an exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from fake_tensorrt import FakeDevice
from onnx import TensorProto, helper
from PIL import Image

from export import build
from export.plan import Planned
from runtime.backends import cuda, tensorrt_library
from runtime.bundle import MANIFEST, BuiltFor, Bundle, describe_file, write_manifest
from videolavit.cli import main

ROOT = Path(__file__).resolve().parent.parent
FIRST = "visual_encoder"  # the first engine that a question about a picture needs
BUILT = BuiltFor(library="tensorrt-rtx 1.7.1", compute_capabilities=("8.9",))


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that must fail; its exit code and the one line of its error."""

    def call(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        return int(stop.value.code or 0), one_line(error)

    return call


def one_line(error: str) -> str:
    """The error of a command's stderr, which has no other and no traceback."""
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in error, error
    return lines[0].removeprefix("error: ")


@pytest.fixture
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose first engine is a plan, on a machine with a GPU of compute capability 8.9 and the library."""
    folder = Path(shutil.copytree(ROOT / "engines" / "shapes", tmp_path / "plans"))
    (folder / f"{FIRST}.plan").write_bytes(b"a plan")
    with_plan(folder, BUILT)
    monkeypatch.setattr(tensorrt_library, "version", lambda backend: f"{backend} 1.7.1")
    monkeypatch.setattr(cuda, "open_device", lambda: FakeDevice("8.9"))
    return folder


def with_plan(folder: Path, built_for: BuiltFor) -> None:
    """Let the manifest say that the plan in `folder` is the first engine, built for this."""
    manifest = Bundle.open(folder, check_hashes=False).manifest
    entry = msgspec.structs.replace(
        manifest.engines[FIRST],
        files=(describe_file(folder, folder / f"{FIRST}.plan"),),
        backend="tensorrt-rtx",
        built_for=built_for,
    )
    write_manifest(folder, msgspec.structs.replace(manifest, engines=manifest.engines | {FIRST: entry}))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


# A bundle that does not fit the machine


@pytest.mark.parametrize(
    ("built_for", "line"),
    [
        (
            BuiltFor(library="tensorrt-rtx 1.7.1", compute_capabilities=("8.6", "12.0")),
            "engine visual_encoder: built for compute capability 8.6, 12.0, this GPU has 8.9; "
            "export the bundle again for 8.9",
        ),
        (
            BuiltFor(library="tensorrt-rtx 1.6.0", compute_capabilities=("8.9",)),
            "engine visual_encoder: built with tensorrt-rtx 1.6.0, this machine has tensorrt-rtx 1.7.1; "
            "install that version or export the bundle again here",
        ),
    ],
    ids=["another GPU", "another version"],
)
def test_a_plan_for_another_machine(plans: Path, picture: Path, complaint: Any, built_for: BuiltFor, line: str) -> None:
    with_plan(plans, built_for)
    assert complaint("ask", picture, "what?", "--bundle", plans) == (4, line)


def test_a_library_that_is_missing(plans: Path, picture: Path, complaint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # neither library nor GPU
    tensorrt_library.library.cache_clear()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    code, line = complaint("ask", picture, "what?", "--bundle", plans)
    tensorrt_library.library.cache_clear()
    assert code == 3 and line.endswith('run `pip install "videolavit[tensorrt-rtx]"`')
    assert line.startswith("backend tensorrt-rtx: tensorrt_rtx cannot be imported")


def test_bindings_of_cuda_that_are_missing(
    plans: Path, picture: Path, complaint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(tensorrt_library, "version", lambda backend: f"{backend} 1.7.1")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    cuda.open_device.cache_clear()
    code, line = complaint("ask", picture, "what?", "--bundle", plans)
    assert code == 3 and line.startswith("cuda-bindings cannot be imported") and "pip install cuda-bindings" in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.write_bytes(b"a Plan"), "content does not match its SHA-256"),
        (lambda path: path.write_bytes(b"a pla"), "5 bytes, bundle.json says 6"),
        (lambda path: path.unlink(), "named in bundle.json but missing"),
    ],
    ids=["changed", "cut off", "missing"],
)
def test_a_plan_that_was_tampered_with(plans: Path, picture: Path, complaint: Any, change: Any, words: str) -> None:
    change(plans / f"{FIRST}.plan")
    code, line = complaint("ask", picture, "what?", "--bundle", plans)
    assert code == 4 and line.startswith(f"{plans / FIRST}.plan: ") and words in line


def test_a_manifest_that_points_elsewhere(plans: Path, picture: Path, complaint: Any) -> None:
    manifest = json.loads((plans / MANIFEST).read_text())
    manifest["engines"][FIRST]["files"][0]["path"] = "../picture.png"
    (plans / MANIFEST).write_text(json.dumps(manifest))
    code, line = complaint("ask", picture, "what?", "--bundle", plans)
    assert code == 4 and "path '../picture.png' leaves the bundle" in line


# An export that cannot be


def test_a_backend_that_is_not_installed(tiny_checkpoint: Path, tmp_path: Path, complaint: Any) -> None:
    if find_spec("tensorrt") is not None:
        pytest.skip("full TensorRT is installed")
    code, line = complaint("export", tiny_checkpoint, "-o", tmp_path / "b", "--backend", "tensorrt")
    assert code == 3 and 'pip install "videolavit[tensorrt]"' in line
    assert not list(tmp_path.iterdir())


def twirl(checkpoint: Any, name: str, path: Path, settings: Any) -> list[Path]:
    """Instead of an engine: one operator that no library knows."""
    node = helper.make_node("Twirl", ["x"], ["y"], name="stage.step", domain="our.own")
    values = [helper.make_tensor_value_info(tensor, TensorProto.FLOAT, [1, 4]) for tensor in "xy"]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("our.own", 1)]
    graph = helper.make_graph([node], "small", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return [path]


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_an_operator_that_tensorrt_does_not_take(
    tiny_checkpoint: Path, tmp_path: Path, complaint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "ENGINES", ("motion_conditioner",))
    monkeypatch.setattr("export.engine.write_engine", twirl)
    flags = ("--backend", "tensorrt-rtx", "--no-compare")
    code, line = complaint("export", tiny_checkpoint, "-o", tmp_path / "b", *flags)
    assert code == 2
    assert line.startswith("engine motion_conditioner: tensorrt-rtx 1.") and line.endswith(
        "build it with --backend onnx"
    )
    assert "node stage.step (Twirl) is not taken" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("disk", "memory"), [(1 << 60, 1), (1, 1 << 60)], ids=["disk", "memory"])
def test_a_machine_that_is_too_small(
    tiny_checkpoint: Path, tmp_path: Path, complaint: Any, monkeypatch: pytest.MonkeyPatch, disk: int, memory: int
) -> None:
    part = Planned("video_unet", 1, ("video_unet",), ("fp32",), disk, memory, 1.0)
    monkeypatch.setattr(build, "plan", lambda *_, **__: [part])
    code, line = complaint("export", tiny_checkpoint, "-o", tmp_path / "b")
    assert code == 3 and "GiB" in line and "free" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits on the size of files are of this system")
def test_a_disk_that_runs_full(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """No file may grow beyond half a megabyte: to whoever writes that is a disk on which nothing more fits."""
    command = [sys.executable, "-m", "videolavit", "export", str(tiny_checkpoint), "-o", str(tmp_path / "b")]
    done = subprocess.run(
        [*command, "--tasks", "understand", "--no-compare"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    line = one_line(done.stderr)
    assert done.returncode == 2, done.stderr
    assert ".onnx: cannot be written: File too large; free some space or choose another place" in line
    assert not (tmp_path / "b").exists()
