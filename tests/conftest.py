"""The demo preset with random weights as a checkpoint and as a bundle, made once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shapes_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a checkpoint of the preset `shapes` with random weights."""
    from videolavit.checkpoints import initialise

    folder = tmp_path_factory.mktemp("checkpoints") / "shapes"
    initialise("shapes", seed=0).save(folder)
    return folder


@pytest.fixture(scope="session")
def shapes_bundle(shapes_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the bundle exported from `shapes_checkpoint`; exporting has compared every engine with torch."""
    from export.build import export_bundle
    from videolavit.checkpoints import load

    folder = tmp_path_factory.mktemp("bundles") / "shapes"
    export_bundle(load(shapes_checkpoint), folder)
    return folder
