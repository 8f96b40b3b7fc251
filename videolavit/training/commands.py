"""`videolavit train`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
import msgspec

from runtime.commands.report import Report
from runtime.errors import UsageError


@click.command()
@click.argument("stage")
@click.option("--config", type=click.Path(path_type=Path), required=True, help="Recipe: .toml, .yaml or .json.")
@click.option("--checkpoint", type=click.Path(path_type=Path), required=True, help="Model to train; it is updated.")
@click.option("-o", "--output", "run", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps of the whole run, instead of the recipe's.")
@click.option("--resume", is_flag=True, help="Go on with the run in the folder; start it if there is none.")
@click.option("--force", is_flag=True, help="Remove the run in the folder and start again.")
@click.option("--json", "as_json", is_flag=True, help="Events and result as JSON lines on stdout.")
def train(
    stage: str, config: Path, checkpoint: Path, run: Path, steps: int | None, resume: bool, force: bool, as_json: bool
) -> None:
    """Train STAGE and put its weights into the checkpoint.

    STAGE is one of keyframe-vae, video-vae, vision, visual-tokenizer, motion-tokenizer, keyframe-detokenizer,
    video-detokenizer, language-model, instruct, or MODULE:CLASS for one of your own. Start it with `accelerate launch
    -m videolavit train ...` to use several GPUs. Ctrl-C saves the run; the same command with --resume goes on.
    """
    from accelerate import PartialState  # type: ignore[import-untyped]

    from videolavit.training.loop import train as run_training
    from videolavit.training.settings import read_settings

    if resume and force:
        raise UsageError("--resume and --force exclude each other; choose one")
    settings = read_settings(config)
    if settings.stage != stage:
        raise UsageError(f"{config}: stage: is {settings.stage!r}, the command says {stage!r}")
    if steps is not None:
        settings = msgspec.structs.replace(settings, steps=steps)
    with Report(as_json) as report:
        outcome = run_training(
            settings,
            checkpoint,
            run,
            where=str(config),
            resume=resume,
            force=force,
            observer=report.progress,
            note=report.note,
        )
        if PartialState().is_main_process:
            report.result(
                f"{checkpoint}: {', '.join(outcome.components)} trained for {outcome.steps} steps "
                f"in {outcome.seconds:.0f} s; the run is in {run}",
                checkpoint=str(checkpoint),
                run=str(run),
                **asdict(outcome),
            )
