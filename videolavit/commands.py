"""Commands of the model room."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("preset")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, envvar="VIDEOLAVIT_SEED")
@click.option("--force", is_flag=True, help="Replace an existing checkpoint.")
def init(preset: str, output: Path, seed: int, force: bool) -> None:
    """Write a checkpoint of PRESET with random weights."""
    from videolavit.checkpoints import initialise

    initialise(preset, seed).save(output, force=force)
    click.echo(f"{output}: {preset} with random weights from seed {seed}; it is not trained", err=True)
