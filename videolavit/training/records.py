"""The folder of a run: what it was started with, and whether a run may start or go on in it.

Contract: RUN/settings.json holds the settings with every default filled in and can be given as --config again;
RUN/versions.json holds the libraries. A folder without settings.json is never touched.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from runtime.errors import UsageError
from runtime.files import published
from videolavit.training import states
from videolavit.training.settings import TrainSettings, read_settings

SETTINGS, VERSIONS = "settings.json", "versions.json"
LIBRARIES = ("videolavit", "torch", "accelerate", "transformers", "diffusers", "safetensors", "numpy", "av")
# What may differ when a run goes on; `steps` changes the rest of the schedule, the others nothing.
FREE = ("steps", "save_every", "keep", "log_every", "validate_every", "workers", "tensorboard", "store")

Notes = Callable[[str], None]


def open_run(
    run: Path,
    settings: TrainSettings,
    options: msgspec.Struct,
    *,
    resume: bool,
    force: bool,
    barrier: Callable[[], None],
    main: bool,
) -> None:
    """Make the folder `run` ready. All processes look before the main one writes.

    Raises UsageError when the folder is in use and neither `resume` nor `force` is given, when it is not a run's, or
    when it was started with other settings than those it is to go on with.
    """
    resolved = msgspec.structs.replace(settings, options=msgspec.to_builtins(options))
    started = (run / SETTINGS).is_file()
    if run.exists() and not started and (not run.is_dir() or any(run.iterdir())):
        raise UsageError(f"{run}: exists and is not a training run; choose another folder")
    if started and not (resume or force):
        raise UsageError(f"{run}: exists already; add --resume to go on with it, or --force to start again")
    if started and resume:
        _check_same(run / SETTINGS, resolved)
    steps = states.saved_steps(run)
    if resume and steps and steps[-1] > settings.steps:
        raise UsageError(f"steps {settings.steps}: {run} has done {steps[-1]} already; ask for more, or --force")
    if not run.parent.is_dir():
        raise UsageError(f"{run}: folder {run.parent} does not exist; create it first")
    barrier()
    if main:
        if started and not resume:
            shutil.rmtree(run)
        run.mkdir(exist_ok=True)
        for left in run.glob(".*"):  # staging folders and files of a run that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        _write(run / SETTINGS, resolved)
        _write(run / VERSIONS, {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}})
    barrier()


def _check_same(path: Path, settings: TrainSettings) -> None:
    before, now = (msgspec.json.decode(msgspec.json.encode(each)) for each in (read_settings(path), settings))
    changed = [key for key in now if key not in FREE and now[key] != before[key]]
    if changed:
        raise UsageError(
            f"{path}: the run was started with other settings: {', '.join(changed)}; "
            "--resume needs the same, --force starts again"
        )


def _write(path: Path, content: Any) -> None:
    with published(path) as staging:
        staging.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
