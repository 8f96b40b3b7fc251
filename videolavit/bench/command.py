"""`videolavit bench`: how fast a bundle is on this machine.

Contract: a table on stdout, or with `--json` events of every stage and as last line one object with every figure. A
stage that the bundle has no engines for is left out with a note, unless it was asked for. Without `--against` and
`--preset` neither torch nor onnx is needed.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runtime.commands.options import Size
from runtime.commands.report import Report
from runtime.errors import BundleError, EnvironmentProblem, UsageError
from runtime.files import check_output, published, writing
from runtime.progress import Progress

if TYPE_CHECKING:
    from export.settings import Precision
    from runtime.bench.peer import PeerSpec
    from runtime.bench.settings import BenchSettings, StageResult
    from runtime.bundle import Bundle

GIB = 2**30
PRECISIONS = ("fp32", "fp16", "int8", "int4")
INSTALL = "pip install 'videolavit[cpu,export]'"
PEERS = {"torch": INSTALL, "genai": f"{INSTALL} onnxruntime-genai"}  # and what brings them


class Contexts(click.ParamType):
    """Numbers of positions, separated by commas."""

    name = "N,N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(dict.fromkeys(int(part) for part in str(value).split(",")))
        except ValueError:
            numbers = ()
        if not numbers or min(numbers) < 1:
            self.fail(f"{value!r} is not a list of positions; write for example 64,1024", param, ctx)
        return numbers


@click.command()
@click.argument("bundle", required=False)
@click.option("--stages", help="Stages to measure, separated by commas.  [default: all the bundle has engines for]")
@click.option("--repeats", type=click.IntRange(1, 10_000), default=10, show_default=True, help="Counted runs.")
@click.option("--warm-up", type=click.IntRange(1, 1000), default=2, show_default=True, help="Runs before them.")
@click.option(
    "--contexts",
    type=Contexts(),
    help="Positions in the cache before a token is written, and lengths of a prompt.  [default: 64 and 1024, or what "
    "the model has room for]",
)
@click.option(
    "--tokens", type=click.IntRange(1, 4096), default=16, show_default=True, help="Tokens of one run of decode."
)
@click.option("--size", type=Size(), help="Size of a clip's pictures.  [default: the model's]")
@click.option("--keyframe-size", type=Size(), help="Size of key frames.  [default: the model's]")
@click.option("--keyframe-steps", type=click.IntRange(1), help="Denoising steps of the clip's key frame.")
@click.option("--video-steps", type=click.IntRange(1), help="Denoising steps of the clip.")
@click.option("--candidates", type=click.IntRange(1), default=1, show_default=True, help="Tries at the clip's tokens.")
@click.option("--video", type=click.Path(path_type=Path), help="Video for motion-vectors.  [default: one is made]")
@click.option("--no-roofs", is_flag=True, help="Neither measure the machine's limits nor count operations.")
@click.option("--against", multiple=True, type=click.Choice(PEERS), help="Measure this too, in turn with the bundle.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights the bundle was made from, for --against.")
@click.option("--preset", help="Measure these sizes instead of a bundle; needs --random-weights.")
@click.option("--random-weights", is_flag=True, help="With --preset: make engines of random weights, and delete them.")
@click.option("--layers", type=click.IntRange(1), help="With --preset: only so many layers of the language model.")
@click.option("--precision", type=click.Choice(PRECISIONS), help="With --preset: of the engines.  [default: fp32]")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads. [default: all cores]")
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "auto"]),
    default="cpu",
    show_default=True,
    help="Where ONNX Runtime computes.",
)
@click.option(
    "--markdown", type=click.Path(path_type=Path), help="Document to write the table to, or to replace (.md)."
)
@click.option("--json", "as_json", is_flag=True, help="Events and result as JSON lines on stdout.")
def bench(
    bundle: str | None,
    stages: str | None,
    against: tuple[str, ...],
    checkpoint: Path | None,
    preset: str | None,
    random_weights: bool,
    layers: int | None,
    precision: Precision | None,
    contexts: tuple[int, ...] | None,
    no_roofs: bool,
    markdown: Path | None,
    as_json: bool,
    **choices: Any,
) -> None:
    """Measure every stage of BUNDLE (a folder or a name; the shipped one where none is named) on this machine.

    Each is run in a process of its own. Shares are of the machine's memory bandwidth or of its rate of matrix products,
    both measured in the same run.
    """
    from runtime.bench import report as documents
    from runtime.bench.run import measure
    from runtime.bench.settings import BenchSettings

    _check_choices(bundle, against, checkpoint, preset, random_weights, layers, precision)
    if markdown is not None:
        check_output(markdown, (".md",), force=True)
    with Report(as_json) as report:
        settings = BenchSettings(count_work=not no_roofs, contexts=contexts or (), **choices)
        with _opened(report, bundle, preset, layers, precision or "fp32", stages, settings, len(against)) as found:
            opened, names, settings = found
            peers = _peers(report, opened, against, checkpoint, preset, layers, settings)
            done: list[str] = []

            def on_stage(result: StageResult) -> None:
                done.append(result.stage)
                report.progress(Progress("bench", len(done), len(names)))
                report.event("stage", **documents.stage_figures(result))

            measured = measure(opened, names, settings, peers, on_stage)
        if markdown is not None:
            command = shlex.join(["videolavit", *sys.argv[1:]])
            with published(markdown) as staging, writing(markdown):
                staging.write_text(documents.markdown(measured, command), encoding="utf-8")
        report.result(documents.table(measured), **documents.figures(measured))


def _check_choices(
    bundle: str | None,
    against: tuple[str, ...],
    checkpoint: Path | None,
    preset: str | None,
    random_weights: bool,
    layers: int | None,
    precision: str | None,
) -> None:
    """Raise UsageError for options that do not go together."""
    if (preset is None) == random_weights:
        raise UsageError("--preset and --random-weights go together: sizes of a preset, weights that mean nothing")
    if preset is None and (layers is not None or precision is not None):
        raise UsageError("--layers and --precision: are for --preset; a bundle is measured as it was exported")
    if preset is not None and (bundle is not None or checkpoint is not None):
        raise UsageError("--preset: makes its own engines and weights; leave BUNDLE and --checkpoint out")
    if against and preset is None and checkpoint is None:
        raise UsageError(f"--against {against[0]}: needs --checkpoint DIR with the weights the bundle was made from")
    if checkpoint is not None and not checkpoint.is_dir():
        raise UsageError(f"--checkpoint {checkpoint}: there is no such folder")


@contextmanager
def _opened(
    report: Report,
    name: str | None,
    preset: str | None,
    layers: int | None,
    precision: Precision,
    stages: str | None,
    settings: BenchSettings,
    peers: int,
) -> Iterator[tuple[Bundle, tuple[str, ...], BenchSettings]]:
    """The bundle, the stages to measure, and the settings with contexts that the model has room for."""
    from runtime.bench.run import missing_engines
    from runtime.bench.stages import STAGES, parse_stages
    from runtime.bundle import Bundle, find

    asked = parse_stages(stages) if stages is not None else None
    if preset is not None:
        with _random_bundle(report, preset, layers, precision, asked, settings, peers) as opened:
            yield opened
        return
    bundle = Bundle.open(find(name))
    if not bundle.manifest.trained:
        report.note(f"bundle {bundle.manifest.name!r} has random, untrained weights")
    settings = _with_contexts(settings, bundle.manifest.language_model.max_positions)
    settings.check(bundle.manifest)
    names = []
    for stage in asked or tuple(STAGES):
        missing = missing_engines(bundle, stage)
        if not missing:
            names.append(stage)
        elif asked is not None:
            raise BundleError(
                f"{bundle.path}: stage {stage} needs {', '.join(missing)}, which this bundle does not have"
            )
        else:
            report.note(f"stage {stage} is left out: the bundle has no {', '.join(missing)}")
    yield bundle, tuple(names), settings


@contextmanager
def _random_bundle(
    report: Report,
    preset: str,
    layers: int | None,
    precision: Precision,
    asked: tuple[str, ...] | None,
    settings: BenchSettings,
    peers: int,
) -> Iterator[tuple[Bundle, tuple[str, ...], BenchSettings]]:
    """As `_opened`, of random weights in a temporary folder. Says what it takes, and refuses before it is taken."""
    try:
        from export.bench import random_bundle
        from export.bench.source import Source
    except ModuleNotFoundError as error:
        raise EnvironmentProblem(f"--preset: {error.name} is not installed; run: {INSTALL}") from error

    source = Source(preset=preset, layers=layers)
    config = source.config()
    names = asked or ("prefill", "decode")
    settings = _with_contexts(settings, config.language_model.max_positions)
    needs = random_bundle.plan(config, names, precision, settings, copies=peers)
    for need in needs:
        report.note(
            f"{need.engine} in {need.precision}: {need.parameters / 1e6:,.1f} million parameters, about "
            f"{need.disk / GIB:.2f} GiB of disk, {need.writing / GIB:.1f} GiB of memory to write and "
            f"{need.running / GIB:.1f} GiB to run"
        )
    with tempfile.TemporaryDirectory(prefix="videolavit-bench-") as folder:
        random_bundle.check(needs, Path(folder))
        bundle = random_bundle.write(
            source, Path(folder), needs, lambda count: report.progress(Progress("random engines", count, len(needs)))
        )
        settings.check(bundle.manifest)
        yield bundle, names, settings


def _with_contexts(settings: BenchSettings, positions: int) -> BenchSettings:
    """The default contexts where none were asked for: those that a small model has no room for become its longest."""
    from dataclasses import replace

    from runtime.bench.settings import BenchSettings as Defaults

    if settings.contexts:
        return settings
    most = max(1, positions - settings.tokens)
    return replace(settings, contexts=tuple(dict.fromkeys(min(context, most) for context in Defaults().contexts)))


def _peers(
    report: Report,
    bundle: Bundle,
    against: tuple[str, ...],
    checkpoint: Path | None,
    preset: str | None,
    layers: int | None,
    settings: BenchSettings,
) -> list[PeerSpec]:
    """Raises EnvironmentProblem for a library that is missing, BundleError for a checkpoint of other weights."""
    if not against:
        return []
    from runtime.backends.onnxruntime import choose_provider
    from runtime.bench.peer import PeerSpec

    try:
        from videolavit.checkpoints import load
    except ModuleNotFoundError as error:
        raise EnvironmentProblem(
            f"--against {against[0]}: {error.name} is not installed; run: {PEERS[against[0]]}"
        ) from error
    if checkpoint is not None and load(checkpoint).digest != bundle.manifest.source:
        raise BundleError(f"{bundle.path}: was not made from the weights in {checkpoint}; name its own checkpoint")
    device = choose_provider(settings.provider)
    source = (None if checkpoint is None else str(checkpoint), preset or "", layers, device)
    kinds = {}
    if "torch" in against:
        kinds["torch"] = "float16" if device == "cuda" else "float32"
        report.note(f"torch computes in {kinds['torch']} on {device}, eagerly")
    if "genai" in against:
        engine = bundle.manifest.engines.get("language_model")
        kinds["genai"] = "fp32" if engine is None else engine.precision
        report.note("genai reads and writes tokens alone, without guidance")
    return [
        PeerSpec(name, f"export.bench.{name}_peer:make", (*source, kind), PEERS[name]) for name, kind in kinds.items()
    ]
