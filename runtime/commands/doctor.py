"""`videolavit doctor`: what works on this machine, and what to install for what does not.

Contract: every line is something that was tried, not assumed; exit code 0 when the demo can run, 3 when not.
"""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import click

from runtime.errors import VideoLavitError


@dataclass(frozen=True)
class Finding:
    """One line: `state` is `ok`, `missing` (a feature is off), `inexact`, or `broken` (the demo cannot run)."""

    state: str
    what: str
    detail: str


def _python() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("ok", "python", f"{platform.python_version()} on {platform.machine()}, {cores} cores")


def _onnxruntime() -> Finding:
    try:
        import onnxruntime
    except ImportError:
        return Finding("broken", "onnxruntime", "not installed; run: pip install 'videolavit[cpu]'")
    providers = ", ".join(p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers())
    return Finding("ok", "onnxruntime", f"{onnxruntime.__version__}, built with {providers}")


def _cuda() -> Finding:
    from runtime.backends.onnxruntime import cuda_problem

    problem = cuda_problem()
    return Finding("missing", "cuda", problem) if problem else Finding("ok", "cuda", "ONNX Runtime runs on the GPU")


def _library(name: str, package: str, use: str) -> Callable[[], Finding]:
    def look() -> Finding:
        try:
            module = importlib.import_module(name)
        except ImportError:
            return Finding("missing", name, f"not installed; for {use}: pip install '{package}'")
        return Finding("ok", name, str(getattr(module, "__version__", "installed")))

    return look


def _video() -> Finding:
    import av

    from runtime.motion.selftest import encoder_is_exact

    if encoder_is_exact():
        return Finding("ok", "motion vectors", f"PyAV {av.__version__} encodes bit for bit like the reference's ffmpeg")
    return Finding(
        "inexact",
        "motion vectors",
        f"PyAV {av.__version__}: some differ from the reference's; exact are av 15.1 to 17.0 on x86-64",
    )


def _nvdec() -> Finding:
    from runtime.motion.nvdec import problem

    found = problem()
    if found is not None:
        return Finding("missing", "nvdec", found)
    return Finding("ok", "nvdec", "PyNvVideoCodec loads; the first video shows whether the driver exports vectors")


def _bundle() -> Finding:
    from runtime.bundle import Bundle, find

    try:
        bundle = Bundle.open(find(None))
    except VideoLavitError as error:
        return Finding("broken", "demo bundle", str(error))
    weights = "trained" if bundle.manifest.trained else "random, untrained weights"
    return Finding("ok", "demo bundle", f"{bundle.path} ({weights})")


CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    _onnxruntime,
    _cuda,
    _library("tensorrt", "videolavit[tensorrt]", "TensorRT engines"),
    _library("tensorrt_rtx", "videolavit[tensorrt-rtx]", "TensorRT-RTX engines"),
    _video,
    _nvdec,
    _bundle,
    _library("torch", "videolavit[export]", "export, verify and training"),
)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object per finding.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> int:
    """Say what works on this machine and what to install."""
    findings = [check() for check in CHECKS]
    for finding in findings:
        if as_json:
            import msgspec

            click.echo(msgspec.json.encode(finding).decode())
        else:
            click.echo(f"{finding.state:>8}  {finding.what:<15} {finding.detail}")
    return 3 if any(finding.state == "broken" for finding in findings) else 0
