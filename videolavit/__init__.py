"""Video-LaVIT: the model in PyTorch, its training and reference code, and the command.

Contract: importing this package imports no torch. `load` opens an engine bundle with the lean runtime; the
torch side lives in `videolavit.models`, `videolavit.checkpoints` and `videolavit.reference`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline

__version__ = "0.1.0"


def load(bundle: str | None = None, **options: Any) -> Pipeline:
    """Open an engine bundle: a folder, a name, or None for the shipped demo model.

    `options` are those of `runtime.pipeline.Pipeline`. Raises BundleError when it does not fit this machine.
    """
    from runtime.bundle import Bundle, find
    from runtime.pipeline import Pipeline

    return Pipeline(Bundle.open(find(bundle)), **options)
