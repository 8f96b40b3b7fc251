"""Positions of the language model that a video takes.

Contract: arithmetic on a manifest and a resolved request; later clips are written with all earlier ones in view
(reference semantics §12.4).
"""

from __future__ import annotations

from runtime.bundle import Manifest
from runtime.errors import UsageError
from runtime.requests import Resolved


def check_room(manifest: Manifest, prompt: int, clips: int) -> None:
    """Raise UsageError when `clips` clips after `prompt` text tokens cannot fit: better now than after hours."""
    positions = manifest.language_model.max_positions
    clip = manifest.geometry.motion_tokens + 4  # with the markers of image and motion
    if prompt + clips * (clip + 1) > positions:
        most = max(0, (positions - prompt) // (clip + manifest.geometry.patches))
        raise UsageError(
            f"PROMPT of {prompt} tokens with --clips {clips}: does not fit the language model's {positions} "
            f"positions; shorten it or ask for at most {most} clips"
        )


def reserve(manifest: Manifest, prompt: int, settings: Resolved) -> int:
    """Positions that all clips after `prompt` text tokens come to: the cache is made for them at once.

    A picture has at most a token a patch, its markers and a few stray control ids. Where the model writes on and
    on, a later clip finds the cache too small and has everything read again into a larger one.
    """
    most, strays = settings.max_image_tokens, 8
    clip = min(most, manifest.geometry.patches + strays) + manifest.geometry.motion_tokens + 4
    return prompt + (settings.clips - 1) * clip + max(most + 1, clip)
