"""The part that looks at the borders between the clips of long videos."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from runtime.requests import VideoRequest
from videolavit.evaluation.context import Context, described_scene
from videolavit.evaluation.judge import Seen, look
from videolavit.evaluation.record import Measure, Part, Record
from videolavit.evaluation.verdicts import described, words_of

FLOOR = 0.25  # grey levels; frames that differ by less count as equal


class Long(Part):
    """Text to a video of two or three clips."""

    name = "long"
    title = "Long videos"
    about = (
        "Captions of held-out scenes of one shape, by turns two and three clips. The step between two frames is their "
        "mean difference in grey levels; at a border it should be no larger than within a clip, and the shape should "
        "stay what and where it is."
    )
    every = 10
    measures = (
        Measure(key="colour", label="colour the same in all clips"),
        Measure(key="kind", label="kind the same in all clips"),
        Measure(key="found", label="a shape in all clips"),
        Measure(key="border", label="step at borders", unit="levels"),
        Measure(key="within", label="step within clips", unit="levels"),
        Measure(key="ratio", label="border by within", unit="×"),
        Measure(key="jump", label="path of the shape across a border", unit="% of the width"),
        Measure(key="stride", label="its path from frame to frame", unit="% of the width"),
    )

    def run(self, context: Context, index: int) -> list[Record]:
        number = context.number(self.name, index)
        scene, prompt = described_scene(number, shapes=1)
        clips = 2 + index % 2
        frames, problem = context.film(VideoRequest(prompt=prompt, clips=clips), number)
        starts = [0, *(context.geometry.frames + k * (context.geometry.frames - 1) for k in range(clips - 1))]
        per_clip = [look(part) for part in np.split(frames, starts[1:])] if len(frames) else [[] for _ in starts]
        values = {}
        if len(frames):
            values = border_steps(frames, starts[1:]) | jumps(look(frames), starts[1:])
        first = [seen[0] if seen else None for seen in per_clip]
        return [
            Record(
                part=self.name,
                index=index,
                seed=number,
                prompt=f"{prompt} (--clips {clips})",
                expected=described(scene),
                seen=problem or " | ".join(map(words_of, per_clip)),
                checks={
                    "found": all(first),
                    "colour": all(first) and len({one.colour for one in first if one}) == 1,
                    "kind": all(first) and len({one.kind for one in first if one}) == 1,
                },
                values=values,
                strips=context.strips(index, film=frames),
            )
        ]


def border_steps(frames: np.ndarray, borders: list[int]) -> dict[str, float]:
    """Mean difference, in levels, of neighbouring frames [T, H, W, 3]: at `borders` (a clip's first frame), within."""
    steps = np.array([np.abs(a.astype(np.int16) - b).mean() for a, b in pairwise(frames)])
    at = np.zeros(len(steps), bool)
    at[np.array(borders) - 1] = True
    border, within = float(steps[at].mean()), float(steps[~at].mean())
    return {"border": border, "within": within, "ratio": max(border, FLOOR) / max(within, FLOOR)}


def jumps(seen: list[Seen], borders: list[int]) -> dict[str, float]:
    """The way of the largest shape, in % of the width, across borders and from frame to frame; {} if it is not seen."""
    if not seen:
        return {}
    ways = np.hypot(*np.diff(seen[0].track, axis=0).T) * 100  # NaN where it was not found
    at = np.zeros(len(ways), bool)
    at[np.array(borders) - 1] = True
    if np.isnan(ways[at]).any() or np.isnan(ways[~at]).all():
        return {}
    return {"jump": float(ways[at].mean()), "stride": float(np.nanmean(ways[~at]))}
