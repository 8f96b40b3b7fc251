"""The contact sheet: frames, what was asked for, and the verdict.

Contract: a picture uint8 [H, W, 3] in two columns, one row per strip of frames, in the order of the records; what is
wrong is written in red.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from videolavit.evaluation.context import STRIP_FRAMES, STRIP_SIDE
from videolavit.evaluation.record import Part, Record

FONT = 12  # pixels
LINE = 16
GAP = 10
WIDTH = STRIP_FRAMES * STRIP_SIDE
COLUMNS = 2
BLACK, GREEN, RED, GREY = (20, 20, 20), (0, 110, 40), (190, 20, 20), (110, 110, 110)


@dataclass(frozen=True)
class _Block:
    """Something with a height: a title or none, strips under each other, then lines of text with their colours."""

    title: str
    strips: tuple[np.ndarray, ...]
    lines: tuple[tuple[str, tuple[int, int, int]], ...]

    @property
    def height(self) -> int:
        lines = len(self.lines) + bool(self.title)
        return len(self.strips) * (STRIP_SIDE + 2) + lines * LINE + GAP


def sheet(parts: Sequence[Part], records: Sequence[Record]) -> np.ndarray | None:
    """The sheet of all records with strips, or None if there are none."""
    blocks = []
    for part in parts:
        shown = [record for record in records if record.part == part.name and record.strips]
        if shown:
            blocks += [_block(record, part.title if record is shown[0] else "") for record in shown]
    if not blocks:
        return None
    columns = _columns(blocks)
    height = max(sum(block.height for block in column) for column in columns) + GAP
    picture = Image.new("RGB", (COLUMNS * (WIDTH + GAP) + GAP, height), (255, 255, 255))
    for index, column in enumerate(columns):
        _draw(picture, column, GAP + index * (WIDTH + GAP))
    return np.asarray(picture)


def _block(record: Record, title: str) -> _Block:
    verdict = f"wrong: {', '.join(record.wrong)}" if record.wrong else "right" if record.checks else ""
    lines = [(record.prompt, BLACK)]
    if len(record.strips) > 1:
        lines.append((f"from top: {' / '.join(name for name, _ in record.strips)}", GREY))
    lines.append((f"expected: {record.expected}", GREY))
    lines.append((f"seen: {record.seen}   {verdict}", RED if record.wrong else GREEN))
    return _Block(title, tuple(strip for _, strip in record.strips), tuple(lines))


def _columns(blocks: Sequence[_Block]) -> list[list[_Block]]:
    """Blocks in `COLUMNS` columns of about the same height, in order."""
    share = sum(block.height for block in blocks) / COLUMNS
    columns: list[list[_Block]] = [[] for _ in range(COLUMNS)]
    reached = 0.0
    for block in blocks:
        # A block belongs where its middle lies; rounded up, so that a single one stands in the first column.
        columns[ceil((reached + block.height / 2) / share) - 1].append(block)
        reached += block.height
    return columns


def _draw(picture: Image.Image, blocks: Sequence[_Block], left: int) -> None:
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(FONT)
    top = GAP
    for block in blocks:
        y = top
        if block.title:
            draw.text((left, y), block.title, fill=GREY, font=font)
            y += LINE
        for strip in block.strips:
            picture.paste(Image.fromarray(np.concatenate(list(strip), axis=1)), (left, y))
            y += STRIP_SIDE + 2
        for text, colour in block.lines:
            draw.text((left, y), _fitting(draw, text, font), fill=colour, font=font)
            y += LINE
        top += block.height


def _fitting(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """`text`, cut so that it fits under a strip."""
    while draw.textlength(text, font=font) > WIDTH and len(text) > 1:
        text = text[:-2].rstrip() + "…"
    return text
