"""docs/training.md names every setting and every stage with all of its options, and no others."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from videolavit.training.settings import DataSettings, TrainSettings
from videolavit.training.stage import STAGES, find_stage

DOCS = (Path(__file__).resolve().parent.parent / "docs" / "training.md").read_text()
INHERITED = {"instruct": "language-model"}  # stages whose list ends in "and those of" another


def section(heading: str) -> str:
    return re.split(r"^##", DOCS.split(f"{heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def names(kind: type[msgspec.Struct]) -> set[str]:
    return {field.name for field in msgspec.structs.fields(kind)}


def test_every_setting_has_a_row() -> None:
    first_cells = [
        re.findall(r"`([^`]+)`", row.split("|")[1]) for row in section("## Settings").splitlines() if "|" in row
    ]
    assert {cell for cells in first_cells for cell in cells if cells[0] not in {"[data]", "[options]"}} == (
        names(TrainSettings) - {"data", "options"}
    )
    assert {cells[1] for cells in first_cells if cells and cells[0] == "[data]"} == names(DataSettings)


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_of_a_stage_is_named(stage: str) -> None:
    listed = set(re.findall(r"`([^`]+)`", re.split(r"\.\n\n", section(f"### `{stage}`").split("Options: ")[1])[0]))
    expected = names(find_stage(stage).Options)
    if stage in INHERITED:
        expected = expected - names(find_stage(INHERITED[stage]).Options) | {INHERITED[stage]}
    assert listed == expected
