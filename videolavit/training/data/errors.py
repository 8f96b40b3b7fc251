"""What can be wrong with training data."""

from __future__ import annotations

from runtime.errors import VideoLavitError


class DataError(VideoLavitError):
    """Labels or a tokenised folder are missing, damaged or unfinished, or have not what is asked of them."""

    exit_code = 6
