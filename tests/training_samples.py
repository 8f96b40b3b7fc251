"""Media, plans and comparisons for the tests of training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from runtime.geometry import Geometry
from runtime.video import write_video
from videolavit.training.data.tokenizing import Plan
from videolavit.training.settings import DataSettings

GEOMETRY = Geometry(image_size=128, patch_size=16, motion_grid=(16, 16), video_size=(128, 128))
SHAPES = DataSettings(source="shapes")
CHEAP = ("motion", "motion_latent", "keyframe")  # no network


def moving_square(frames: int, side: int = 64) -> list[np.ndarray]:
    """A textured square that moves right by 4 pixels a frame."""
    noise = np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)
    pictures = []
    for index in range(frames):
        picture = np.full((side, side, 3), 90, np.uint8)
        left = 4 * index % (side - 20)
        picture[20:40, left : left + 20] = noise
        pictures.append(picture)
    return pictures


def write_media(folder: Path) -> None:
    """Two videos, one of them short and one long enough for two clips, and a picture, with labels of every kind."""
    (folder / "more").mkdir()
    write_video(folder / "a.mp4", moving_square(10), 6, {}, False)
    (folder / "a.txt").write_text("a square\n\na square moves right\n")
    write_video(folder / "more" / "b.mp4", moving_square(76), 6, {}, False)
    said = {"captions": ["long"], "questions": [{"question": "what?", "answer": "a square", "topic": "kind"}]}
    (folder / "more" / "b.json").write_text(json.dumps(said))
    Image.fromarray(moving_square(1, side=48)[0]).save(folder / "c.png")
    (folder / "captions.jsonl").write_text(json.dumps({"file": "c.png", "captions": ["a picture"]}) + "\n")


def plan_of(checkpoint: Path, **changes: Any) -> Plan:
    return Plan(**{"data": SHAPES, "checkpoint": checkpoint, "fields": CHEAP, "count": 5, "shard_items": 2} | changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same_item(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) if isinstance(left[name], torch.Tensor) else left[name] == right[name]
        for name in left
    )
