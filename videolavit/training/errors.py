"""What can go wrong in training itself."""

from __future__ import annotations

from runtime.errors import VideoLavitError


class TrainingError(VideoLavitError):
    """Training went wrong: the loss, or a weight that was to be published, is not a number that can be used."""

    exit_code = 7
