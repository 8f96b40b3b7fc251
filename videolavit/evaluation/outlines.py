"""Which of the four upright shapes a region has.

Contract: a region is the kind whose outline, at the region's area and centroid, it overlaps best (soft intersection
over union). Outlines are those the world of shapes is drawn with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from videolavit.evaluation.regions import centroid
from videolavit.shapes.scene import KINDS, Kind

_SAMPLES = 1000  # a side, to measure an outline
_EXTENT = 1.5  # radii from the centre that hold every outline


@dataclass(frozen=True)
class Outline:
    """A kind at radius 1: its area, and its centroid (x, y) seen from the centre it is drawn about."""

    area: float
    centroid: tuple[float, float]


def overlaps(alpha: np.ndarray) -> dict[Kind, float]:
    """Overlap, 0 to 1, of a cover [H, W] (float, above zero somewhere) with each kind."""
    from videolavit.shapes.drawing import signed_distance

    area = float(alpha.sum())
    x0, y0 = centroid(alpha)
    reach = 1.6 * np.sqrt(area) + 2  # no outline of this area reaches further
    left, top = max(0, int(x0 - reach)), max(0, int(y0 - reach))
    window = alpha[top : int(y0 + reach) + 2, left : int(x0 + reach) + 2]
    x = np.arange(left, left + window.shape[1])[None, :] - x0
    y = np.arange(top, top + window.shape[0])[:, None] - y0
    scores = {}
    for kind in KINDS:
        shape = outline(kind)
        radius = np.sqrt(area / shape.area)
        distance = signed_distance(kind, x / radius + shape.centroid[0], y / radius + shape.centroid[1]) * radius
        cover = np.clip(0.5 - distance, 0, 1)
        both = float(np.minimum(cover, window).sum())
        scores[kind] = both / (float(cover.sum()) + area - both)
    return scores


def diameter(kind: Kind, area: float) -> float:
    """Diameter, as the world of shapes counts it, of a shape that covers `area`; in the unit whose square that is."""
    return 2 * float(np.sqrt(area / outline(kind).area))


@cache
def outline(kind: Kind) -> Outline:
    """The measures of `kind`."""
    from videolavit.shapes.drawing import signed_distance

    at = (np.arange(_SAMPLES) + 0.5) / _SAMPLES * 2 * _EXTENT - _EXTENT
    inside = (signed_distance(kind, at[None, :], at[:, None]) < 0).astype(np.float64)
    x, y = centroid(inside)
    step = 2 * _EXTENT / _SAMPLES
    return Outline(area=float(inside.sum()) * step**2, centroid=(float(at[0] + x * step), float(at[0] + y * step)))
