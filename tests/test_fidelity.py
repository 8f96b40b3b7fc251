"""Every golden file on every backend; that none is left out; that a wrong number is found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from golden import FOLDER
from safetensors import safe_open
from safetensors.numpy import save_file

from export.fidelity.backends import NUMPY, ONNX, TORCH
from export.fidelity.command import FidelityError, fidelity
from export.fidelity.measure import close, equal, pictures
from export.fidelity.registry import FAMILIES, Case, cases, uncovered
from runtime.errors import CheckpointError

CASES = cases(FOLDER)
DOCUMENT = FOLDER.parents[2] / "docs" / "fidelity.md"
INPUT = "inputs/token_ids_0"


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_golden(case: Case) -> None:
    measurements = case.measure()
    assert measurements
    assert [m for m in measurements if not m.passed] == []


def test_every_file_is_measured() -> None:
    assert uncovered(FOLDER, CASES) == []


def test_every_family_has_a_file_and_every_backend_it_can_have() -> None:
    assert {case.family.component for case in CASES} == {family.component for family in FAMILIES}
    networks = {case.path for case in CASES if case.backend == ONNX}
    assert networks == {case.path for case in CASES if case.backend == TORCH and case.path.suffix != ".json"}
    assert {case.path for case in CASES if case.backend == NUMPY} | networks == {case.path for case in CASES}


def test_the_document_has_a_row_for_every_case() -> None:
    rows = [line.split(" | ") for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    listed = {(row[0].removeprefix("| "), row[1], row[-1].rstrip(" |")) for row in rows}
    assert {(case.component, case.backend, f"`{case.path.name}`") for case in CASES} <= listed
    assert "FAIL" not in DOCUMENT.read_text()


def _copy(folder: Path, source: str, name: str, **changes: np.ndarray | None) -> Path:
    """A golden file under another name, tensors replaced, added, or with None left out."""
    with safe_open(FOLDER / f"{source}.safetensors", "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()} | changes  # noqa: SIM118
        metadata = file.metadata()
    save_file({key: np.asarray(t) for key, t in tensors.items() if t is not None}, folder / name, metadata)
    return folder / name


def test_a_file_is_known_by_what_it_says_not_by_its_name(tmp_path: Path) -> None:
    _copy(tmp_path, "f_highres_decoder", "x_other.safetensors")
    found = cases(tmp_path)
    assert [(case.component, case.backend) for case in found] == [
        ("key-frame decoder", backend) for backend in (TORCH, ONNX, NUMPY)
    ]
    assert all(m.passed for case in found for m in case.measure())


@pytest.mark.parametrize("backend", [TORCH, ONNX, NUMPY])
def test_a_wrong_number_is_found(tmp_path: Path, backend: str) -> None:
    with safe_open(FOLDER / "f_highres_decoder.safetensors", "np") as file:
        ids = file.get_tensor(INPUT).copy()
    ids[-3] = ids[-3] + 1 if ids[-3] % 2 else ids[-3] - 1  # another code
    _copy(tmp_path, "f_highres_decoder", "f.safetensors", **{INPUT: ids})
    [case] = [case for case in cases(tmp_path) if case.backend == backend]
    assert [m for m in case.measure() if not m.passed]


def test_a_weight_nothing_takes_is_found(tmp_path: Path) -> None:
    _copy(tmp_path, "f_highres_decoder", "f.safetensors", **{"weights/blocks.9.extra": np.ones(1, np.float32)})
    [measurement] = cases(tmp_path)[0].measure()
    assert not measurement.passed
    assert "blocks.9.extra" in measurement.what


def test_files_nothing_measures_are_named(tmp_path: Path) -> None:
    metadata = {"golden": json.dumps({"component": "SomethingNew"})}
    save_file({"inputs/x": np.zeros(1, np.float32)}, tmp_path / "n_new.safetensors", metadata)
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.m4v").touch()
    (tmp_path / "README.md").touch()
    assert uncovered(tmp_path, cases(tmp_path)) == ["media/a.m4v", "n_new.safetensors"]
    (tmp_path / "broken.safetensors").write_text("no")
    with pytest.raises(CheckpointError, match=r"broken\.safetensors: not a golden file"):
        cases(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        cases(tmp_path / "nowhere")


def test_command_writes_the_document_and_then_judges(tmp_path: Path) -> None:
    document = tmp_path / "fidelity.md"
    _copy(tmp_path, "a_vector_quantizer", "a.safetensors")
    arguments = ["--golden", str(tmp_path), "--only", TORCH, "--json", "-o", str(document)]
    result = CliRunner().invoke(fidelity, arguments, catch_exceptions=False)
    last = json.loads(result.stdout.splitlines()[-1])
    assert last["problems"] == []
    assert next((m["what"], m["golden"]) for m in last["measurements"]) == ("ids", "a.safetensors")
    assert "| vector quantiser | torch |" in document.read_text()

    with safe_open(tmp_path / "a.safetensors", "np") as file:
        indices = file.get_tensor("outputs/indices").copy()
    indices[7] += 1
    _copy(tmp_path, "a_vector_quantizer", "a.safetensors", **{"outputs/indices": indices})
    with pytest.raises(FidelityError, match=r"a \(torch\): ids: 1 values, allowed equal") as caught:
        CliRunner().invoke(fidelity, arguments, catch_exceptions=False)
    assert caught.value.exit_code == 5
    assert "1 values FAIL" in document.read_text()


def test_measurements_fail_for_what_no_bound_allows() -> None:
    ones = np.ones(3)
    assert close("x", ones + 9e-5, ones, 1).passed
    assert not close("x", ones + 2e-4, ones, 1).passed  # the share of the scale, whatever the bound
    assert not close("x", ones + 2e-6, ones, 1e-6).passed
    assert not close("x", [1, 1, np.nan], ones, 1).passed
    assert not close("x", np.ones((1, 3)), ones, 1).passed
    assert close("x", [-np.inf, 1], [-1e30, 1], 1e-6).passed
    assert not close("x", [-5, 1], [-1e30, 1], 1e-6).passed
    assert not equal("x", ["a", "b"], ["a", "c"]).passed
    assert not equal("x", [1], [1, 2]).passed
    dark = np.zeros((20, 20, 3), np.uint8)
    off = dark.copy()
    off[0, 0] = 1
    assert pictures("x", off, dark).passed
    assert not pictures("x", off * 2, dark).passed
    assert not pictures("x", dark + 1, dark).passed
