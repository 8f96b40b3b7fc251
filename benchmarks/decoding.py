"""Decoding and prefill against other runtimes, on the same random weights; see docs/benchmarks/README.md.

    PYTHONPATH=. python benchmarks/decoding.py FOLDER [--sizes shapes,16x2048] [--precisions fp32,int8,int4]
        [--contexts 64,1024] [--peers ours,torch_eager,...] [--markdown FILE]

Contract: every peer is a process of its own (`benchmarks/peers`) and they take turns call by call, so that a busy
machine is busy for all of them; medians, and each one's ratio to this project's runtime in the same turns. Where not
all fit into memory together, they take turns in groups, with the project's runtime in each. What all write in fp32 has
to be the same: the share of equal tokens stands in the table. Models are written to FOLDER and stay there for the next
run. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from peers import model
from peers.protocol import PRECISIONS, Setting
from peers.worker import PeerProblem, Worker, convert, load

from export.graphs.registry import LANGUAGE_MODEL
from export.plan import available_memory
from runtime.apart import apart
from runtime.bench.run import Machine, machine
from runtime.bench.settings import BenchSettings
from runtime.bench.timing import Times
from runtime.engines import processors
from runtime.errors import UsageError, VideoLavitError
from runtime.files import published
from videolavit.inventory import inventory

OURS = "ours"
PEERS = (OURS, "torch_eager", "torch_compile", "hf_generate", "genai", "llama_cpp")
RUNNING = {"fp32": 4.0, "int8": 2.3, "int4": 1.3}  # bytes a parameter that a loaded model takes, about
PROCESS = 600 << 20  # and a process with its library
MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """One peer at one context. Seconds are of a whole prompt and of a token; `same` is None without ours."""

    model: str
    precision: str
    context: int
    peer: str
    prefill: Times
    decode: Times
    prefill_ratio: float
    decode_ratio: float
    same: float
    peak: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", default="shapes,16x2048")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--contexts", default="64,1024")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--tokens", type=int, default=32, help="of one run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="runs of everything (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=processors())
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    try:
        rows = measure(arguments)
    except VideoLavitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    text = document(rows, arguments)
    if arguments.markdown:
        with published(arguments.markdown) as staging:
            staging.write_text(text, encoding="utf-8")
    print(text)
    print(json.dumps({"rows": [_plain(row) for row in rows], "machine": asdict(_machine(arguments))}))


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Rows of every model, precision and context. Raises UsageError."""
    names = _chosen("--peers", arguments.peers, PEERS)
    names = [OURS, *(name for name in names if name != OURS)]
    contexts = [int(part) for part in arguments.contexts.split(",")]
    rows: list[Row] = []
    for size in arguments.sizes.split(","):
        config = model.model_of(size)
        limit = config.language_model.max_positions
        fitting = [min(context, limit - arguments.tokens - 1) for context in contexts]
        folder = arguments.folder / size
        apart(f"model {size}", model.write, config, folder)
        parameters = sum(math.prod(shape) for shape in inventory(config, LANGUAGE_MODEL).values())
        for precision in _chosen("--precisions", arguments.precisions, PRECISIONS):
            setting = Setting(folder, precision, arguments.threads, max(fitting) + arguments.tokens + 1)
            ready = [name for name in names if precision in load(name).PRECISIONS and _converted(name, setting)]
            if OURS not in ready:
                raise UsageError(f"{size} in {precision}: the project's own engine was not written; nothing to compare")
            for group in groups(ready, PROCESS + int(RUNNING[precision] * parameters)):
                rows += together(group, size, setting, dict.fromkeys(fitting), arguments.repeats, arguments.tokens)
    return rows


def groups(names: Sequence[str], each: int) -> list[list[str]]:
    """`names`, ours first, in groups that fit into memory together; ours is in every one of them."""
    at_once = max(2, available_memory() * 4 // 5 // each)
    others = list(names[1:])
    if not others:
        return [[OURS]]
    step = at_once - 1
    return [[OURS, *others[first : first + step]] for first in range(0, len(others), step)]


def together(
    names: Sequence[str], size: str, setting: Setting, contexts: dict[int, None], repeats: int, tokens: int
) -> list[Row]:
    """Measure peers in turn. One that ends is left out from then on, with a line that says so."""
    workers: dict[str, Worker] = {}
    rows: list[Row] = []
    try:
        for name in names:
            try:
                workers[name] = Worker(name, setting)
            except PeerProblem as problem:
                print(f"{size} in {setting.precision}: {problem}", file=sys.stderr)
        for context in contexts:
            rows += _at(context, workers, size, setting, repeats, tokens)
            print(f"{size} in {setting.precision}, {context}: {', '.join(workers)}", file=sys.stderr, flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    return rows


def _at(context: int, workers: dict[str, Worker], size: str, setting: Setting, repeats: int, tokens: int) -> list[Row]:
    prompt = [3 + (7919 * place) % 1000 for place in range(context)]
    prefill: dict[str, list[float]] = {name: [] for name in workers}
    decode: dict[str, list[float]] = {name: [] for name in workers}
    written: dict[str, list[int]] = {}
    for attempt in range(1 + repeats):  # the first is to warm up
        for name in tuple(workers):
            with _leaving_out(workers, name, size, setting):
                first, seconds = workers[name].call("prefill", prompt)
                written[name] = [first]
                if attempt:
                    prefill[name].append(seconds)
    start = written.get(OURS, [0])[0]  # all go on from one token, whatever each would have chosen
    for attempt in range(1 + repeats):
        for name in tuple(workers):
            with _leaving_out(workers, name, size, setting):
                workers[name].call("rewind", context)
                after, seconds = workers[name].call("decode", start, tokens)
                if attempt:
                    decode[name].append(seconds / tokens)
                else:
                    written[name] += after
    if OURS not in workers:
        raise UsageError(f"{size} in {setting.precision}: the project's own runtime has ended; nothing to compare with")
    return [
        Row(
            model=size,
            precision=setting.precision,
            context=context,
            peer=name,
            prefill=Times(tuple(prefill[name])),
            decode=Times(tuple(decode[name])),
            prefill_ratio=median(prefill[name]) / median(prefill[OURS]),
            decode_ratio=median(decode[name]) / median(decode[OURS]),
            same=sum(a == b for a, b in zip(written[name], written[OURS], strict=True)) / len(written[OURS]),
            peak=worker.peak(),
        )
        for name, worker in workers.items()
    ]


class _leaving_out:
    """A peer that has a problem is taken out of `workers`, with a line on stderr."""

    def __init__(self, workers: dict[str, Worker], name: str, size: str, setting: Setting) -> None:
        self._workers, self._name, self._where = workers, name, f"{size} in {setting.precision}"

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, PeerProblem):
            return False
        print(f"{self._where}: {error}; left out", file=sys.stderr)
        self._workers.pop(self._name).close()
        return True


def _converted(name: str, setting: Setting) -> bool:
    problem = apart(f"conversion for {name}", convert, name, setting)
    if problem is not None:
        print(f"{setting.folder.name} in {setting.precision}: {name}: {problem}; left out", file=sys.stderr)
    return problem is None


def _chosen(flag: str, text: str, known: Sequence[str]) -> list[str]:
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    for part in chosen:
        if part not in known:
            raise UsageError(f"{flag} {part}: there is none; choose from {', '.join(known)}")
    return chosen


def document(rows: Sequence[Row], arguments: argparse.Namespace) -> str:
    """The tables, one for each model and precision, as Markdown."""
    found = _machine(arguments)
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    lines = [
        "# Decoding beside other runtimes",
        "",
        f"Made by `python {shlex.join(_relative(sys.argv))}` on {found.date}.",
        "",
        f"- {found.processor}, {found.cores} processors, {found.threads} threads for each; Python {found.python}",
        f"- {versions}",
        f"- medians of {arguments.repeats} turns, {arguments.tokens} tokens each; the ratio is to `{OURS}` in the same "
        "turns: above 1 is slower than this project",
    ]
    for key in dict.fromkeys((row.model, row.precision) for row in rows):
        lines += [
            "",
            f"## {key[0]}, {key[1]}",
            "",
            "| in cache | peer | ms a token | mean ± spread | ratio | prefill ms | ratio | same tokens | peak MiB |",
            "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        own = sorted((row for row in rows if (row.model, row.precision) == key), key=lambda row: row.context)
        for row in own:
            token, prompt = row.decode, row.prefill
            lines.append(
                f"| {row.context} | {row.peer} | {token.median * 1e3:.3g} | {token.mean * 1e3:.3g} ± "
                f"{token.spread * 1e3:.2g} | {row.decode_ratio:.2f} | {_ms(prompt.median)} | "
                f"{row.prefill_ratio:.2f} | {row.same:.0%} | {row.peak / MIB:.0f} |"
            )
    return "\n".join(lines) + "\n"


def _ms(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _machine(arguments: argparse.Namespace) -> Machine:
    extra = ("onnxruntime-genai", "llama-cpp-python")
    found = machine(BenchSettings(threads=arguments.threads))
    for name in extra:
        try:
            found.versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _relative(arguments: Sequence[str]) -> list[str]:
    """Paths as they are from here: nobody else has this machine's folders."""
    return [os.path.relpath(part) if Path(part).is_absolute() else part for part in arguments]


def _plain(row: Row) -> dict[str, object]:
    values = asdict(row)
    for key in ("prefill", "decode"):
        values[key] = {"median": getattr(row, key).median, "seconds": list(getattr(row, key).seconds)}
    return values


if __name__ == "__main__":
    main()
