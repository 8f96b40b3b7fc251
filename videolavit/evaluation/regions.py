"""Which pixels of a frame belong to a shape, in how many pieces, and in what colour.

Contract: plain thresholds on one frame uint8 [H, W, 3]. Shapes are saturated, in seven hues, or white; backgrounds are
muted (saturation below 0.3) and darker than white. A frame without a shape gives no region.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from videolavit.shapes.scene import COLOURS, HUES, Colour

WHITE = COLOURS.index("white")
_COLOURED = [(COLOURS.index(name), hue) for name, hue in HUES.items()]
SATURATION = 0.42  # least of a coloured shape: above any background, below any shape blurred by the codec
CHROMA = 0.22  # least difference of largest and smallest channel; keeps dark, noisy pixels out
WHITE_LEVEL = 0.74  # least of the smallest channel of a white shape
WHITE_SATURATION = 0.16  # largest of a white shape
LEAST_AREA = 0.005  # share of the frame below which a piece is a speck, such as colour that bled out of a shape
PART = 0.22  # share of a piece that another colour must have for the piece to be two shapes that touch
TEXTURE = 0.25  # cover outside a region that may be the ground's texture
MARGIN = 2  # pixels around a region in which its soft edge may lie


@dataclass(frozen=True)
class Region:
    """One piece of a frame that has one colour.

    Attributes:
        colour: its name.
        alpha: [h, w] float32, how much of each pixel of a window around it the shape covers.
        corner: (x, y) of the window in the frame, pixels.
        clipped: touches the frame's border, so its outline and place are not whole.
    """

    colour: Colour
    alpha: np.ndarray
    corner: tuple[int, int]
    clipped: bool

    @property
    def area(self) -> float:
        """Pixels covered."""
        return float(self.alpha.sum())

    @property
    def centre(self) -> tuple[float, float]:
        """Centroid (x, y), pixels; a pixel's centre has whole coordinates."""
        x, y = centroid(self.alpha)
        return x + self.corner[0], y + self.corner[1]


def centroid(alpha: np.ndarray) -> tuple[float, float]:
    """Centroid (x, y) of weights [H, W] with a sum above zero."""
    total = alpha.sum()
    x = float((alpha.sum(axis=0) * np.arange(alpha.shape[1])).sum() / total)
    y = float((alpha.sum(axis=1) * np.arange(alpha.shape[0])).sum() / total)
    return x, y


def regions(frame: np.ndarray) -> list[Region]:
    """Regions of a frame [H, W, 3] uint8, largest first."""
    names = colour_names(frame)  # [H, W] index into COLOURS, -1 for background
    least = LEAST_AREA * names.size
    pieces = [part for piece in components(names >= 0, least) for part in _colours_of(piece, names, least)]
    everything = np.zeros(names.shape, bool)
    for _, mask in pieces:
        everything |= mask
    found = [_region(frame, colour, mask, everything) for colour, mask in pieces]
    return sorted((r for r in found if r.area >= least), key=lambda r: -r.area)


def colour_names(frame: np.ndarray) -> np.ndarray:
    """Index into `COLOURS` of every pixel of a frame [H, W, 3] uint8; -1 for background: [H, W] int8."""
    most, least = frame.max(axis=-1).astype(np.float32), frame.min(axis=-1).astype(np.float32)
    chroma = most - least
    saturation = chroma / np.maximum(most, 1)
    names = np.full(frame.shape[:2], -1, np.int8)
    names[(least >= WHITE_LEVEL * 255) & (saturation <= WHITE_SATURATION)] = WHITE
    coloured = (saturation >= SATURATION) & (chroma >= CHROMA * 255)
    away = np.abs((hue_of(frame[coloured])[:, None] - [hue for _, hue in _COLOURED] + 180) % 360 - 180)  # [n, 7]
    names[coloured] = np.array([index for index, _ in _COLOURED])[away.argmin(axis=-1)]
    return names


def hue_of(pixels: np.ndarray) -> np.ndarray:
    """Hue in degrees [...] of pixels [..., 3]; 0 where there is no colour."""
    red, green, blue = np.moveaxis(pixels.astype(np.float32), -1, 0)
    return np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360


def components(mask: np.ndarray, least: float) -> list[np.ndarray]:
    """Connected parts (4-neighbours) of a mask [H, W] with at least `least` pixels, each a mask [H, W]."""
    if not mask.any():
        return []
    window = _window(mask, 0)
    labels = _labels(mask[window])
    found = []
    names, counts = np.unique(labels, return_counts=True)
    for name, count in zip(names, counts, strict=True):
        if name and count >= least:
            part = np.zeros(mask.shape, bool)
            part[window] = labels == name
            found.append(part)
    return found


def _labels(mask: np.ndarray) -> np.ndarray:
    """A number above 0 for each connected part of a mask [H, W], 0 elsewhere."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        # Every pixel looks at its neighbours' labels; a label that meets a larger one gives way to it everywhere.
        spread = labels.copy()
        spread[1:] = np.maximum(spread[1:], labels[:-1])
        spread[:-1] = np.maximum(spread[:-1], labels[1:])
        spread[:, 1:] = np.maximum(spread[:, 1:], labels[:, :-1])
        spread[:, :-1] = np.maximum(spread[:, :-1], labels[:, 1:])
        meeting = mask & (spread > labels)
        if not meeting.any():
            return labels
        winner = np.arange(mask.size + 1)
        np.maximum.at(winner, labels[meeting], spread[meeting])
        while not np.array_equal(winner, further := winner[winner]):
            winner = further
        labels = winner[labels]


def _window(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    """The smallest window of a mask [H, W], somewhere true, and `margin` pixels around it."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (
        slice(max(0, int(rows[0]) - margin), int(rows[-1]) + margin + 1),
        slice(max(0, int(columns[0]) - margin), int(columns[-1]) + margin + 1),
    )


def grow(mask: np.ndarray, times: int) -> np.ndarray:
    """`mask` [H, W] widened by `times` pixels in the four directions."""
    for _ in range(times):
        wider = mask.copy()
        wider[1:] |= mask[:-1]
        wider[:-1] |= mask[1:]
        wider[:, 1:] |= mask[:, :-1]
        wider[:, :-1] |= mask[:, 1:]
        mask = wider
    return mask


def _colours_of(piece: np.ndarray, names: np.ndarray, least: float) -> list[tuple[Colour, np.ndarray]]:
    """A piece as one shape of its commonest colour, or as the shapes that touch in it."""
    counts = np.bincount(names[piece], minlength=len(COLOURS))
    parts = []
    for index in np.flatnonzero(counts >= max(least, PART * counts.sum())):
        parts += [
            (COLOURS[index], part) for part in components(piece & (names == index), max(least, PART * piece.sum()))
        ]
    return parts if len(parts) > 1 else [(COLOURS[int(counts.argmax())], piece)]


def _region(frame: np.ndarray, colour: Colour, whole: np.ndarray, everything: np.ndarray) -> Region:
    """The region with its soft edge: how far each pixel lies from the ground around it to the shape's own colour."""
    window = _window(whole, 2 * MARGIN + 2)
    mask, others = whole[window], (everything & ~whole)[window]
    pixels = frame[window].astype(np.float32)
    near = grow(mask, MARGIN) & ~others
    ring = grow(near, MARGIN + 1) & ~near & ~grow(others, MARGIN)
    inside = mask & ~grow(~mask, 1)
    own = np.median(pixels[inside if inside.any() else mask], axis=0)
    ground = np.median(pixels[ring], axis=0) if ring.any() else np.zeros(3, np.float32)
    way = own - ground
    alpha = np.clip((pixels - ground) @ way / max(float(way @ way), 1.0), 0, 1)
    # Texture of the ground looks like a little cover; the shape's own pattern stays.
    alpha = np.where(near & (mask | (alpha > TEXTURE)), alpha, 0).astype(np.float32)
    border = whole[0].any() or whole[-1].any() or whole[:, 0].any() or whole[:, -1].any()
    return Region(colour=colour, alpha=alpha, corner=(window[1].start, window[0].start), clipped=bool(border))
