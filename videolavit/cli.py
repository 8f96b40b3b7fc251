"""The `videolavit` command: a table of subcommands, each imported only when it is used.

Contract: `videolavit --help` imports click and nothing else of weight. Every VideoLavitError becomes one line
on stderr and its exit code; Ctrl-C exits 130 after the commands have removed what they had half-written.
"""

from __future__ import annotations

import importlib
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from runtime.errors import EnvironmentProblem, VideoLavitError
from videolavit import __version__

# name -> (module, attribute, line for --help)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "generate": ("runtime.commands.generate", "generate", "Make a video from text, a picture, or both."),
    "imagine": ("runtime.commands.imagine", "imagine", "Make a picture from text, a picture, or both."),
    "reconstruct": ("runtime.commands.reconstruct", "reconstruct", "Rebuild a video from its key frame and motion."),
    "ask": ("runtime.commands.ask", "ask", "Ask about a video or a picture."),
    "motion": ("runtime.motion.commands", "motion", "Read a video's motion vectors."),
    "inspect": ("runtime.commands.inspect", "inspect", "Show what is in a bundle, or how a file was made."),
    "doctor": ("runtime.commands.doctor", "doctor", "Say what works on this machine and what to install."),
    "init": ("videolavit.commands", "init", "Write a checkpoint with random weights."),
    "deepen": ("videolavit.commands", "deepen", "Give a checkpoint's language model more layers."),
    "average": ("videolavit.commands", "average", "Average checkpoints trained apart from the same one."),
    "convert": ("videolavit.commands", "convert", "Check official weights, or rewrite them as a checkpoint."),
    "train": ("videolavit.training.commands", "train", "Train a part of a checkpoint."),
    "export": ("export.commands", "export", "Turn a checkpoint into an engine bundle."),
    "tokenize": ("videolavit.training.data.commands", "tokenize", "Run the tokenizers over training data once."),
    "fidelity": ("export.fidelity.command", "fidelity", "Compare the model with golden numbers of the reference."),
    "verify": ("export.commands", "verify", "Compare a bundle with its checkpoint in torch."),
    "bench": ("videolavit.bench.command", "bench", "Measure how fast a bundle is on this machine."),
    "evaluate": ("videolavit.evaluation.command", "evaluate", "Measure what a bundle makes of held-out prompts."),
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and one-line help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[name]
        try:
            command: click.Command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise missing_library(name, error) from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])


def missing_library(command: str, error: ModuleNotFoundError) -> EnvironmentProblem:
    """The one line for a library that an extra would have brought; re-raises what is our own fault."""
    missing = (error.name or "").split(".")[0]
    if missing in {"runtime", "videolavit", "export"}:
        raise error
    room = COMMANDS[command][0].partition(".")[0]
    extra = {"videolavit": "train", "export": "export"}.get(room, "cpu")
    return EnvironmentProblem(
        f"`videolavit {command}` needs {missing}, which is not installed; run: pip install 'videolavit[{extra}]'"
    )


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="videolavit")
def cli() -> None:
    """Understand and generate video with one language model, on ONNX Runtime and TensorRT.

    Every option can also be set as VIDEOLAVIT_<COMMAND>_<OPTION> in the environment.
    """


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    # SIGTERM takes the way of Ctrl-C, so that half-written files are removed.
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code; the codes are listed in `runtime.errors`."""
    signal.signal(signal.SIGTERM, _stop)
    command = next((a for a in (arguments if arguments is not None else sys.argv[1:]) if a in COMMANDS), "")
    try:
        result = cli.main(
            args=arguments, prog_name="videolavit", standalone_mode=False, auto_envvar_prefix="VIDEOLAVIT"
        )
        code = result if isinstance(result, int) else 0
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        code = 130
    except click.ClickException as error:
        error.show()
        code = 2
    except VideoLavitError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except ModuleNotFoundError as error:
        if not command:
            raise
        problem = missing_library(command, error)
        click.echo(f"error: {problem}", err=True)
        code = problem.exit_code
    except BrokenPipeError:
        # The reader of our output went away (`videolavit ... | head`); nothing is left to say.
        sys.stderr.close()
        code = 0
    except MemoryError:
        click.echo(
            "error: not enough memory; try a smaller --size, fewer --clips or a smaller --memory-budget", err=True
        )
        code = 3
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        click.echo(f"error: {place}{error.strerror or error}", err=True)
        code = 3
    sys.exit(code)
