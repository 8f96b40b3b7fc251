"""`videolavit ask`: questions about a video or a picture.

Contract: the answers are the only thing on stdout, one for each question in its order. With `--chat` every line of
stdin is a question too. The file is read once; each question is answered as if it were the only one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import click

from runtime.commands.options import choose_seed, model_options, open_pipeline, sampling_options, seed_option
from runtime.commands.report import Report
from runtime.errors import UsageError
from runtime.requests import AnswerRequest


@click.command()
@click.argument("media")
@click.argument("questions", nargs=-1, metavar="[QUESTION]...")
@click.option("--chat", is_flag=True, help="Go on asking about the same file: every line typed is a question.")
@click.option("--max-answer-tokens", type=int, help="Longest answer, in tokens.")
@click.option("--max-clips", type=click.IntRange(1, 64), help="Look at this many clips of a video at most.")
@click.option(
    "--source",
    type=click.Choice(["mpeg4", "codec", "nvdec"]),
    default="mpeg4",
    show_default=True,
    help="Where a video's motion comes from; see `videolavit motion --help`.",
)
@click.option("--fallback", type=click.Choice(["mpeg4"]), help="Use this where --source cannot.")
@click.option(
    "--sparse",
    is_flag=True,
    help="Read only the clips looked at of a long video; see `videolavit motion --help`.",
)
@click.option("--sample", is_flag=True, help="Sample the answer; without, the likeliest tokens are taken.")
@seed_option
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Events and result as JSON lines on stdout.")
@model_options
def ask(
    media: str,
    questions: tuple[str, ...],
    chat: bool,
    max_answer_tokens: int | None,
    max_clips: int | None,
    source: Literal["mpeg4", "codec", "nvdec"],
    fallback: Literal["mpeg4"] | None,
    sparse: bool,
    sample: bool,
    seed: int | None,
    greedy: bool,
    as_json: bool,
    bundle: str | None,
    memory_budget: int | None,
    threads: int | None,
    provider: str,
    **settings: Any,
) -> None:
    """Ask QUESTION about MEDIA: a video, a picture, or a live stream such as rtsp://camera/1.

    Several questions are answered one by one, each without the others in view; MEDIA is read once for all of them.
    """
    if not questions and not chat:
        raise UsageError('QUESTION is missing: ask something, for example "what moves?", or add --chat')
    if sample and greedy:
        raise UsageError("--sample and --greedy exclude each other; greedy is the default")
    seed = choose_seed(seed)
    with Report(as_json) as report:
        from runtime.bundle import Bundle, find
        from runtime.media import load_media
        from runtime.motion.connection import shown
        from runtime.noise import Noise

        # Reading the file first: a mistake in its name answers before a model is loaded.
        manifest = Bundle.open(find(bundle), check_hashes=False).manifest
        clips = max_clips or manifest.defaults.max_clips
        seen = load_media(media, manifest.geometry, clips, source, fallback, sparse)
        if not seen.exact:
            report.note(f"{shown(media)}: motion is approximate ({'--sparse' if sparse else f'--source {source}'})")
        request = AnswerRequest(
            question="",
            pictures=seen.pictures,
            motions=seen.motions,
            max_answer_tokens=max_answer_tokens,
            greedy=not sample,
            **settings,
        )
        with open_pipeline(
            report, bundle=bundle, memory_budget=memory_budget, threads=threads, provider=provider
        ) as pipeline:
            before = 0.0
            for question, result in pipeline.answers(request, _asked(questions, chat), Noise(seed)):
                report.finish_stage("answer")
                spent = sum(pipeline.seconds.values())
                report.result(
                    result.text,
                    question=question,
                    answer=result.text,
                    tokens=len(result.ids),
                    seed=seed,
                    seconds=spent - before,
                    first_token_seconds=pipeline.reached["first token"],
                    peak_rss_bytes=pipeline.peak_rss,
                )
                before = spent


def _asked(questions: tuple[str, ...], chat: bool) -> Iterator[str]:
    """The questions of the command line, and with `chat` those of stdin, each read when the one before is answered."""
    yield from questions
    while chat:
        try:
            yield click.prompt("", prompt_suffix="> ", err=True)
        except click.Abort:  # end of input, or Ctrl-C at the prompt: the conversation is over
            return
