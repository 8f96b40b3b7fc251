"""`videolavit evaluate`: measure a bundle.

Contract: everything is measured before anything is written; a missed target is a figure, not an error. With `--json`
the result holds every figure and everything that went wrong, each with the prompt and seed that make it again.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import click

from runtime.commands.options import model_options
from runtime.commands.report import Report
from runtime.errors import UsageError
from runtime.files import check_output, published
from runtime.progress import Progress

NAMES = ("judge", "prompts", "two-shapes", "questions", "image-to-video", "reconstruction", "long", "media")
MEDIA_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")


class Parts(click.ParamType):
    """Names of parts, separated by commas."""

    name = "PARTS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in str(value).split(",") if name.strip())
        for name in names:
            if name not in NAMES:
                self.fail(f"{name!r} is not a part; choose of {', '.join(NAMES)}", param, ctx)
        if not names:
            self.fail(f"no part is named; choose of {', '.join(NAMES)}", param, ctx)
        return names


@click.group()
def evaluate() -> None:
    """Measure what a bundle makes."""


@evaluate.command()
@click.option("-n", "count", type=click.IntRange(1, 100_000), default=200, show_default=True, help="Items per part.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Another seed asks other things."
)
@click.option("--only", type=Parts(), default=NAMES, help=f"Parts, separated by commas. [default: {','.join(NAMES)}]")
@click.option("--media", type=click.Path(path_type=Path), help="Folder of real videos to rebuild as well.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Markdown document to write, or to replace.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Contact sheet to write, or to replace (.png).")
@click.option("--rows", type=click.IntRange(1, 100), default=6, show_default=True, help="Rows of the sheet per part.")
@click.option("--workers", type=click.IntRange(1, 256), default=2, show_default=True, help="Processes.")
@click.option("--keyframe-steps", type=int, help="Denoising steps of a key frame. [default: the bundle's]")
@click.option("--video-steps", type=int, help="Denoising steps of a clip. [default: the bundle's]")
@click.option("--json", "as_json", is_flag=True, help="Events and result as JSON lines on stdout.")
@model_options
def shapes(
    count: int,
    seed: int,
    only: tuple[str, ...],
    media: Path | None,
    output: Path | None,
    sheet: Path | None,
    rows: int,
    workers: int,
    keyframe_steps: int | None,
    video_steps: int | None,
    as_json: bool,
    bundle: str | None,
    memory_budget: int | None,
    threads: int | None,
    provider: str,
) -> None:
    """Measure a bundle on scenes of the world of shapes that it was not trained on.

    Clips are judged by colour, outline and path, after they were written as mp4 and decoded. Reconstructions take a
    quarter of -n items, long videos a tenth. `--only prompts -n 24` is a quick look.
    """
    from runtime.bundle import Bundle, find
    from runtime.requests import VideoRequest, resolve
    from videolavit.evaluation import report as documents
    from videolavit.evaluation.context import Settings
    from videolavit.evaluation.figures import figures as figures_of
    from videolavit.evaluation.parts import PARTS
    from videolavit.evaluation.reconstruction import motion_clips
    from videolavit.evaluation.sheet import sheet as draw
    from videolavit.evaluation.work import Workplace
    from videolavit.evaluation.work import evaluate as work

    for path, suffix in ((output, ".md"), (sheet, ".png")):
        if path is not None:
            check_output(path, (suffix,), force=True)
    settings = Settings(
        seed=seed,
        strips=rows if sheet is not None else 0,
        media=_videos(media),
        keyframe_steps=keyframe_steps,
        video_steps=video_steps,
    )
    parts = [PARTS[name] for name in NAMES if name in only and (name != "media" or media is not None)]
    if not parts:
        raise UsageError("--only media: needs --media FOLDER with videos")
    totals = {part.name: part.items(count, settings) for part in parts}
    tasks = [(name, index) for name, total in totals.items() for index in range(total)]
    with Report(as_json) as report:
        opened = Bundle.open(find(bundle))
        if not opened.manifest.trained:
            report.note(f"bundle {opened.manifest.name!r} has random, untrained weights")
        asked = VideoRequest(prompt="-", keyframe_steps=keyframe_steps, video_steps=video_steps)
        resolve(asked, opened.manifest.geometry, opened.manifest.defaults)  # a mistake shows before hours of work
        place = Workplace(
            bundle=str(opened.path),
            settings=settings,
            threads=threads,
            provider=provider,
            memory_budget=memory_budget,
        )
        if PARTS["media"] in parts:
            for path in settings.media:
                next(motion_clips(path, opened.manifest.geometry))  # so does a video that is too short
        workers = min(workers, len(tasks))
        started = time.perf_counter()
        finished = dict.fromkeys(totals, 0)

        def tell(task: tuple[str, int], _: object) -> None:
            finished[task[0]] += 1
            report.progress(Progress(task[0], finished[task[0]], totals[task[0]]))

        records = work(tasks, place, workers, tell)
        seconds = time.perf_counter() - started
        figures = [figure for part in parts for figure in figures_of(part, records)]
        picture = draw(parts, records) if sheet is not None else None
        if sheet is not None:
            if picture is None:
                report.note(f"no frames to show: {sheet} is not written")
            else:
                _save(sheet, picture)
        run = documents.Run(bundle=opened, command=_command(), seconds=seconds, workers=workers)
        if output is not None:
            address = None if sheet is None or picture is None else _address(sheet, output)
            text = documents.markdown(run, parts, figures, records, address)
            with published(output) as staging:
                staging.write_text(text, encoding="utf-8")
        wrong = documents.failures(records)
        report.result(
            "\n".join([*_lines(figures), "", f"failures: {len(wrong)}; {seconds:.0f} s on {documents.machine()}"]),
            figures=documents.records_of(figures),
            failures=wrong,
            bundle=opened.digest,
            seconds=seconds,
            machine=documents.machine(),
        )


def _videos(folder: Path | None) -> tuple[Path, ...]:
    if folder is None:
        return ()
    if not folder.is_dir():
        raise UsageError(f"--media {folder}: is not a folder; name one with videos in it")
    found = tuple(sorted(path for path in folder.iterdir() if path.suffix.lower() in MEDIA_SUFFIXES))
    if not found:
        raise UsageError(f"--media {folder}: holds no video ({', '.join(MEDIA_SUFFIXES)})")
    return found


def _lines(figures: list[Any]) -> list[str]:
    """The figures as plain text in columns."""
    from videolavit.evaluation.report import row

    rows = [(figure.part, *row(figure)) for figure in figures]
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in rows]


def _save(path: Path, picture: Any) -> None:
    from PIL import Image

    with published(path) as staging:
        Image.fromarray(picture).save(staging, optimize=True)


def _address(sheet: Path, document: Path) -> str:
    """The sheet as seen from the document."""
    return Path(os.path.relpath(sheet, document.parent)).as_posix()


def _command() -> str:
    """The command line that was given."""
    return shlex.join(["videolavit", *sys.argv[1:]])
