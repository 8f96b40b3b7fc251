"""`videolavit tokenize`."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from runtime.commands.options import Size, output_options
from runtime.commands.report import Report
from runtime.errors import UsageError
from videolavit.training.data.fields import DEFAULT_FIELDS, FIELDS, check_fields
from videolavit.training.settings import DRAWN, DataSettings

MIB = 2**20
_FIELDS_HELP = "Comma-separated: " + ", ".join(FIELDS) + f". [default: {','.join(DEFAULT_FIELDS)}]"


@click.command()
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), required=True, help="Checkpoint whose tokenizers are used."
)
@click.option("--fields", help=_FIELDS_HELP)
@click.option(
    "--count", type=click.IntRange(min=1), help="Items to take. [default: all; needed for shapes and scenery]"
)
@click.option("--split", default="train", show_default=True, help="Part of the world of shapes: train or held-out.")
@click.option(
    "--shapes",
    type=click.Choice(["1", "2"]),
    help="Shapes in every scene of the world of shapes. [default: 1 or 2, drawn]",
)
@click.option(
    "--clips", type=click.IntRange(1, 100), default=1, show_default=True, help="Most clips to take of a video."
)
@click.option("--size", type=Size(), help="Size of key frames and of what the VAEs see. [default: the model's]")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of every draw.")
@click.option("--workers", type=click.IntRange(1, 256), default=1, show_default=True, help="Processes.")
@click.option("--device", default="cpu", show_default=True, help="Where torch computes: cpu, cuda, cuda:1.")
@click.option("--skip-bad", is_flag=True, help="Leave out files that cannot be used, and count them.")
@click.option("--resume", is_flag=True, help="Go on with an unfinished folder.")
@click.option("--shard-items", type=click.IntRange(min=1), help="Items per shard. [default: about 128 MiB of them]")
@output_options
def tokenize(
    source: str,
    output: Path,
    checkpoint: Path,
    fields: str | None,
    count: int | None,
    split: str,
    shapes: str | None,
    clips: int,
    size: tuple[int, int] | None,
    seed: int,
    workers: int,
    device: str,
    skip_bad: bool,
    resume: bool,
    shard_items: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Run the tokenizers once over SOURCE and keep what they say, to train on.

    SOURCE is `shapes`, `scenery` (a camera moves over patches), a folder with videos and pictures, or WebDataset .tar
    shards (one, or a folder of them).
    """
    names = check_fields([name.strip() for name in fields.split(",")] if fields else DEFAULT_FIELDS)
    from videolavit.training.data.tokenizing import Plan, tokenize

    plan = Plan(
        data=data_settings(source, split, shapes),
        checkpoint=checkpoint,
        fields=names,
        count=count,
        seed=seed,
        clips=clips,
        size=size,
        skip_bad=skip_bad,
        shard_items=shard_items,
        device=device,
    )
    with Report(as_json) as report:
        result = tokenize(plan, output, workers=workers, resume=resume, force=force, observer=report.progress)
        for note in result.notes:
            report.note(f"left out: {note}")
        index = result.index
        size_bytes = sum(shard.arrays_bytes + shard.text_bytes for shard in index.shards)
        counts = {
            "items": index.items,
            "pictures": sum(shard.pictures for shard in index.shards),
            "clips": sum(shard.clips for shard in index.shards),
            "skipped": index.skipped,
            "shards": len(index.shards),
            "bytes": size_bytes,
        }
        text = (
            f"{output}: {counts['items']} items ({counts['pictures']} pictures, {counts['clips']} clips) in "
            f"{counts['shards']} shards, {size_bytes / MIB:.1f} MiB, {counts['skipped']} left out; {', '.join(names)}"
        )
        report.result(text, folder=str(output), fields=list(names), **counts)


def data_settings(source: str, split: str, shapes: str | None = None) -> DataSettings:
    """The source that a user names. Raises UsageError when there is nothing of that name."""
    settings = {"source": source, "split": split, "shapes": None if shapes is None else int(shapes)}
    if source in DRAWN:
        return msgspec.convert(settings, DataSettings)
    path = Path(source)
    if not path.exists():
        raise UsageError(f"SOURCE {source}: no such file or folder; name one, or {' or '.join(DRAWN)}")
    tar = path.suffix.lower() == ".tar" if path.is_file() else any(path.glob("*.tar"))
    return msgspec.convert({**settings, "source": "webdataset" if tar else "folder", "path": source}, DataSettings)
