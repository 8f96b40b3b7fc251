"""What every precision and backend costs a model: bytes, agreement with torch, and scores at its tasks.

    PYTHONPATH=. python benchmarks/precisions.py checkpoints/shapes --work build/precisions \
        -o docs/benchmarks/precisions.md

Contract: every figure comes from the command itself, `export`, `verify` and `evaluate shapes`, run in a process of its
own; what it said is kept in WORK as JSON, one file a row and step. A step that is there for the same weights, bundle
and flags is not run again, so an ended run goes on where it stopped and further rows can be added. The document is
written again after every step. Bundles for ONNX Runtime stay in WORK, plans of TensorRT-RTX are deleted when they are
weighed: without a GPU they are built and not run. A miss of a bound is a figure; anything else that goes wrong ends it.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from precisions_page import Page, Row, page

from export.stage import content_key
from runtime.bundle import Bundle
from runtime.errors import EnvironmentProblem, ParityError, UsageError, VideoLavitError
from runtime.files import check_output, published
from videolavit.checkpoints import load
from videolavit.evaluation.report import machine

ROOT = Path(__file__).resolve().parent.parent
# Name of a row -> what `--precision` is given.
ONNX = {
    "fp32": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
    "int8": "int8",
    "int4": "int4",
    "fp32, UNets fp8": "fp32,keyframe_unet=fp8,video_unet=fp8",
    "fp32, UNets int8": "fp32,keyframe_unet=int8,video_unet=int8",
    "fp32, language model int8": "fp32,language_model=int8",
    "fp32, language model int4": "fp32,language_model=int4",
}
RTX = ("fp32", "fp16", "bf16", "fp8", "int8", "int4")
CAPABILITIES = ("8.6", "8.9", "12.0")
PARTS = "prompts,two-shapes,questions,reconstruction"


@dataclass(frozen=True)
class Bench:
    """Where and on what: `digest` is of the checkpoint's weights."""

    checkpoint: Path
    digest: str
    work: Path

    def step(self, row: str, step: str, facts: Sequence[str], arguments: Sequence[str]) -> dict[str, Any]:
        """What a command said, now or when it was run before on the same `facts` with the same arguments.

        Raises EnvironmentProblem when it ended in anything but a result or a refusal.
        """
        folder = self.work / slug(row)
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / f"{step}.json"
        key = content_key([self.digest, facts, arguments])
        if kept.is_file():
            record: dict[str, Any] = msgspec.json.decode(kept.read_bytes())
            if record["key"] == key:
                return record
        command = [sys.executable, "-m", "videolavit", *arguments, "--json"]
        print(f"{row}: videolavit {shlex.join(arguments)}", flush=True)
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
        complaint = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        events = [msgspec.json.decode(line) for line in done.stdout.splitlines()]
        results = [event for event in events if event["event"] == "result"]
        if done.returncode and not is_finding(done.returncode, complaint):
            raise EnvironmentProblem(
                f"{row}: {step} ended with status {done.returncode}: {done.stderr[-2000:].strip()}"
            )
        record = {
            "key": key,
            "seconds": time.perf_counter() - started,
            # Where the figures lie is of this machine and not for the document.
            "error": complaint[0].removeprefix("error: ").replace(f"{folder}/", "") if complaint else None,
            "result": results[-1] if results else None,
        }
        with published(kept) as staging:
            staging.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
        return record


def is_finding(status: int, complaint: Sequence[str]) -> bool:
    """Whether a command's end is one of what is measured: a missed bound, or what TensorRT or the GPU does not take."""
    reasons = ("--backend onnx", "has no fp8")
    refused = status == UsageError.exit_code and any(reason in line for line in complaint for reason in reasons)
    return refused or (status == ParityError.exit_code and bool(complaint))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for bundles and figures; made if need be")
    parser.add_argument("-o", "--output", type=Path, required=True, help="Markdown document to write, or to replace")
    parser.add_argument("-n", type=int, default=40, help="items a part of the evaluation (default: %(default)s)")
    parser.add_argument("--only", default=PARTS, help="parts of the evaluation (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of the evaluation (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="denoising steps of the evaluation (default: the bundle's)")
    parser.add_argument("--rows", nargs="*", default=list(ONNX), help=f"of ONNX Runtime: {', '.join(map(repr, ONNX))}")
    parser.add_argument("--rtx", nargs="*", default=list(RTX), choices=RTX, help="precisions of TensorRT-RTX")
    parser.add_argument("--capabilities", nargs="+", default=list(CAPABILITIES), help="GPUs of TensorRT-RTX")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except VideoLavitError as error:
        sys.exit(f"error: {error}")


def run(arguments: argparse.Namespace) -> None:
    """Measure what is missing; the document is whole at any time."""
    for name in arguments.rows:
        if name not in ONNX:
            raise UsageError(f"--rows {name}: there is none; choose from {', '.join(map(repr, ONNX))}")
    check_output(arguments.output, (".md",), force=True)
    checkpoint = load(arguments.checkpoint)
    bench = Bench(arguments.checkpoint.resolve(), checkpoint.digest, arguments.work.resolve())
    rows: dict[str, Row] = {}
    plans: dict[str, dict[str, dict[str, Any]]] = {}

    def write() -> None:
        whole = Page(
            model=checkpoint.config.name,
            trained=checkpoint.trained,
            digest=checkpoint.digest,
            machine=machine(),
            items=arguments.n,
            steps=arguments.steps,
            rows=rows,
            plans=plans,
            capabilities=tuple(arguments.capabilities),
        )
        with published(arguments.output) as staging:
            staging.write_text(page(whole), encoding="utf-8")

    for name in arguments.rows:
        for row in onnx_row(bench, name, arguments):
            rows[name] = row
            write()
    for precision in arguments.rtx:
        for capability in arguments.capabilities:
            plans.setdefault(precision, {})[capability] = plan_of(bench, precision, capability)
            write()


def onnx_row(bench: Bench, name: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """The row after each of its steps."""
    bundle = bench.work / slug(name) / "bundle"
    flags = ["--precision", ONNX[name], "--no-compare"]
    if not (bundle / "bundle.json").is_file():
        (bench.work / slug(name) / "export.json").unlink(missing_ok=True)
    exported = bench.step(name, "export", [], ["export", str(bench.checkpoint), "-o", str(bundle), *flags, "--force"])
    row = Row(precision=ONNX[name], exported=exported)
    yield row
    made = [Bundle.open(bundle, check_hashes=False).digest]
    row = msgspec.structs.replace(
        row, verified=bench.step(name, "verify", made, ["verify", str(bundle), str(bench.checkpoint)])
    )
    yield row
    flags = ["-n", str(arguments.n), "--only", arguments.only, "--workers", str(arguments.workers)]
    if arguments.steps:
        flags += ["--keyframe-steps", str(arguments.steps), "--video-steps", str(arguments.steps)]
    evaluated = bench.step(name, "evaluate", made, ["evaluate", "shapes", "--bundle", str(bundle), *flags])
    yield msgspec.structs.replace(row, evaluated=evaluated)


def plan_of(bench: Bench, precision: str, capability: str) -> dict[str, Any]:
    """The record of building a bundle for one GPU, which is not kept."""
    name = f"rtx {precision} {capability}"
    folder = bench.work / slug(name)
    folder.mkdir(parents=True, exist_ok=True)
    profile = folder / "profile.toml"
    lines = (
        f'description = "compute capability {capability}"',
        'backend = "tensorrt-rtx"',
        f'precision = "{precision}"',
        f'compute_capabilities = ["{capability}"]',
    )
    profile.write_text("\n".join(lines) + "\n", encoding="utf-8")
    bundle = folder / "bundle"
    flags = ["--profile", str(profile), "--no-compare", "--force"]
    record = bench.step(name, "export", lines, ["export", str(bench.checkpoint), "-o", str(bundle), *flags])
    shutil.rmtree(bundle, ignore_errors=True)
    return record


def slug(name: str) -> str:
    """A row's name as that of a folder."""
    return name.replace(", ", "-").replace(" ", "-")


if __name__ == "__main__":
    main()
