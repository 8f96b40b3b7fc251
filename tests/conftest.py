"""The preset `tiny` with random weights as a checkpoint and as a bundle, made once for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline

os.environ["VIDEOLAVIT_CACHE"] = "off"  # tests leave nothing in the user's folders


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a checkpoint of the preset `tiny` with random weights."""
    from videolavit.checkpoints import initialise

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    initialise("tiny", seed=0).save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the bundle exported from `tiny_checkpoint`; exporting has compared every engine with torch."""
    from export.build import export_bundle
    from videolavit.checkpoints import load

    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    export_bundle(load(tiny_checkpoint), folder)
    return folder


@pytest.fixture(scope="module")
def token_pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    """All of the pipeline of `tiny_bundle` but its diffusion: pictures are black."""
    from runtime.pipeline import Pipeline

    frame = np.zeros((128, 128, 3), np.uint8)
    with Pipeline(tiny_bundle, threads=1) as opened:
        whole: Any = opened
        whole._keyframes = SimpleNamespace(decode_each=lambda codes, *given: [(None, frame)] * len(codes))
        whole._videos = SimpleNamespace(decode=lambda *given: (None, frame[None]))
        yield opened
