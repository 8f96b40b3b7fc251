"""The source that a recipe names."""

from __future__ import annotations

from pathlib import Path

from runtime.errors import UsageError
from runtime.geometry import Geometry
from videolavit.training.data.examples import Source
from videolavit.training.data.folder import FolderSource
from videolavit.training.data.scenery import ScenerySource
from videolavit.training.data.shapes_source import ShapesSource
from videolavit.training.data.webdataset import WebDatasetSource
from videolavit.training.settings import DRAWN, DataSettings


def open_source(settings: DataSettings, geometry: Geometry, *, seed: int = 0, clips: int = 1) -> Source:
    """The raw examples that `settings` name.

    Args:
        geometry: of the model: frames in a clip and their rate.
        seed: of sources that are drawn by lot.
        clips: most clips an item has.

    Raises:
        UsageError: path missing or unusable, a split the source does not have, or a tokenised folder, whose examples
            are no longer raw: open it as a `TokenizedDataset`.
    """
    if settings.source in DRAWN and settings.path is not None:
        raise UsageError(f"data.path {settings.path}: {settings.source} is drawn, it has no path; remove it")
    if settings.source == "shapes":
        return ShapesSource(
            geometry, split=settings.split, size=settings.size, seed=seed, clips=clips, shapes=settings.shapes
        )
    if settings.shapes is not None:
        raise UsageError(f"data.shapes {settings.shapes}: only the world of shapes has such scenes; remove it")
    if settings.split != DataSettings().split:
        raise UsageError(
            f"data.split {settings.split}: only the world of shapes has parts; give every part a path of its own"
        )
    if settings.source == "scenery":
        return ScenerySource(geometry, size=settings.size, seed=seed, clips=clips)
    if settings.path is None:
        raise UsageError(f'data.path is missing; source = "{settings.source}" needs one')
    if settings.source == "tokenized":
        raise UsageError(
            f"data.source tokenized: {settings.path} has no raw pictures for this; use shapes, folder or webdataset"
        )
    if settings.source == "folder":
        return FolderSource(Path(settings.path), geometry, clips=clips)
    return WebDatasetSource(Path(settings.path), geometry, clips=clips)
