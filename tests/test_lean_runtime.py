"""What the device needs stays lean: no torch below the runtime's floor, and a quick start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "diffusers", "accelerate")
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "runtime").rglob("*.py")
)


def loaded_by(code: str) -> set[str]:
    script = f"{code}\nimport sys; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split())


def test_importing_the_runtime_brings_no_torch() -> None:
    loaded = loaded_by("import runtime, videolavit")
    assert not loaded & {*HEAVY, "onnxruntime", "av"}


def test_no_module_of_the_runtime_brings_torch_or_the_rooms_above() -> None:
    loaded = loaded_by("import " + ", ".join(MODULES))
    assert not loaded & {*HEAVY, "export", "onnx"}


def test_a_whole_generation_brings_no_torch(tmp_path: Path) -> None:
    out = tmp_path / "clip.mp4"
    loaded = loaded_by(
        "from videolavit.cli import main\n"
        f"few = ['-o', {str(out)!r}, '--keyframe-steps', '2', '--video-steps', '2', '--candidates', '2']\n"
        "try: main(['generate', 'a red circle', *few])\n"
        "except SystemExit as stop: assert stop.code == 0"
    )
    assert out.is_file()
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_loads_nothing_of_weight(arguments: list[str]) -> None:
    loaded = loaded_by(f"from videolavit.cli import main\ntry: main({arguments!r})\nexcept SystemExit: pass")
    assert not loaded & {*HEAVY, "onnxruntime", "av", "numpy"}
