"""Every error a user can cause or meet, and the exit code each one ends in.

Contract: code in this project raises one of these for anything a user can act on; the message is one
line that names the file or flag, the value found, what is allowed, and the fix. The command line
prints that line and exits with `exit_code`; a traceback reaching the user is a bug.
"""

from __future__ import annotations


class VideoLavitError(Exception):
    """Base of the family; never raised itself."""

    exit_code = 1


class UsageError(VideoLavitError):
    """A flag or argument has a value that is not allowed."""

    exit_code = 2


class EnvironmentProblem(VideoLavitError):
    """A library, execution provider or device that is needed is not there."""

    exit_code = 3


class BundleError(VideoLavitError):
    """An engine bundle is missing, damaged, or made for another machine or version."""

    exit_code = 4


class ParityError(VideoLavitError):
    """An engine's output differs from the torch module by more than the stated tolerance.

    Attributes:
        component: engine name.
        measured: largest absolute difference found.
        tolerance: largest absolute difference allowed.
    """

    exit_code = 5

    def __init__(self, component: str, measured: float, tolerance: float, detail: str = "") -> None:
        self.component = component
        self.measured = measured
        self.tolerance = tolerance
        super().__init__(
            f"{component}: differs from torch by {measured:.3g}, allowed is {tolerance:.3g}"
            + (f" ({detail})" if detail else "")
        )


class MediaError(VideoLavitError):
    """A picture or video cannot be read, or holds nothing the task can use."""

    exit_code = 6


class CheckpointError(VideoLavitError):
    """A training checkpoint is missing, damaged, or does not fit the model configuration."""

    exit_code = 4
