"""The detokenizers' networks against torch and diffusers, on the same random weights; see docs/benchmarks/README.md.

    PYTHONPATH=. python benchmarks/unets.py [--preset shapes] [--stages keyframe-unet,video-unet] [--compile]
        [--size 576x320] [--markdown FILE]

Contract: the stages of `videolavit bench`, with more peers: torch eagerly (for the key frame's UNet and the
autoencoders these are diffusers' own classes), torch compiled with `--compile`, and for the video UNet the class that
diffusers has for Stable Video Diffusion. All take turns run by run in one process a stage. Says what it needs, and
refuses what does not fit. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tempfile
from pathlib import Path

from export.bench import random_bundle
from export.bench.source import Source
from runtime.bench import report
from runtime.bench.peer import PeerSpec
from runtime.bench.run import measure
from runtime.bench.settings import BenchSettings
from runtime.bench.stages import parse_stages
from runtime.engines import processors
from runtime.errors import UsageError, VideoLavitError
from runtime.files import published
from videolavit.config import PRESETS

STAGES = "keyframe-unet,keyframe-vae,video-unet,video-vae"
INSTALL = "pip install -r benchmarks/requirements-peers.txt"
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="shapes", choices=PRESETS)
    parser.add_argument("--stages", default=STAGES, help="default: %(default)s")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16"))
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes minutes a network")
    parser.add_argument("--size", help="of a clip's pictures (default: the preset's)")
    parser.add_argument("--keyframe-size", help="of key frames (default: the preset's)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=processors())
    parser.add_argument("--markdown", type=Path)
    try:
        run(parser.parse_args())
    except VideoLavitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print. Raises VideoLavitError."""
    stages = parse_stages(arguments.stages)
    unknown = set(stages) - set(STAGES.split(","))
    if unknown:
        raise UsageError(f"--stages {', '.join(sorted(unknown))}: not here; choose from {STAGES}")
    settings = BenchSettings(
        repeats=arguments.repeats,
        threads=arguments.threads,
        contexts=(1,),
        size=_size("--size", arguments.size),
        keyframe_size=_size("--keyframe-size", arguments.keyframe_size),
    )
    source = Source(preset=arguments.preset)
    peers = [
        PeerSpec("torch", "export.bench.torch_peer:make", (None, arguments.preset, None, "cpu", "float32"), INSTALL)
    ]
    if arguments.compile:
        peers.append(PeerSpec("torch.compile", "peers.unets:compiled", (arguments.preset,), INSTALL))
    if "video-unet" in stages:
        peers.append(PeerSpec("diffusers", "peers.unets:stable_video", (arguments.preset,), INSTALL))
    needs = random_bundle.plan(source.config(), stages, arguments.precision, settings, copies=len(peers))
    for need in needs:
        print(f"{need.engine}: about {need.running / GIB:.1f} GiB of memory with its peers", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="videolavit-bench-") as folder:
        random_bundle.check(needs, Path(folder))
        bundle = random_bundle.write(source, Path(folder), needs)
        found = measure(
            bundle, stages, settings, peers, lambda stage: print(stage.stage, "done", file=sys.stderr, flush=True)
        )
    if arguments.markdown:
        with published(arguments.markdown) as staging:
            staging.write_text(report.markdown(found, f"python {shlex.join(sys.argv)}"), encoding="utf-8")
    print(report.table(found))
    print(json.dumps(report.figures(found)))


def _size(flag: str, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise UsageError(f"{flag} {text}: write WIDTHxHEIGHT, for example 576x320")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    main()
