"""The document of `benchmarks/precisions.py`.

Contract: a function of what the commands said, and of nothing else. What was not run is not in it; a figure that missed
its bound is bold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

MIB = 2**20
Record = dict[str, Any]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One bundle: what `--precision` was given; what export, verify and evaluate said, None for what was not run."""

    precision: str
    exported: Record
    verified: Record | None = None
    evaluated: Record | None = None


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """Everything in the document.

    Attributes:
        items: of a part of the evaluation, as asked for.
        steps: of its denoising loops; None is the bundle's.
        plans: by precision and compute capability, what export said.
    """

    model: str
    trained: bool
    digest: str
    machine: str
    items: int
    steps: int | None
    rows: dict[str, Row]
    plans: dict[str, dict[str, Record]]
    capabilities: tuple[str, ...]


def page(whole: Page) -> str:
    """The document as Markdown."""
    lines = [
        "# Precisions and backends: size, agreement with torch, task scores",
        "",
        "Written by `benchmarks/precisions.py`; do not edit. Every figure is what `videolavit export`, `verify` and",
        f"`evaluate shapes` said of bundles made from the model `{whole.model}` (weights {whole.digest[:12]}),",
        f"on {whole.machine}.",
        "",
    ]
    if not whole.trained:
        lines += ["**The weights are random; scores only show that everything runs.**", ""]
    if whole.rows:
        lines += [*_sizes(whole.rows), *_parities(whole.rows), *_scores(whole)]
    if whole.plans:
        lines += _plans(whole)
    return "\n".join(lines).rstrip() + "\n"


def _sizes(rows: dict[str, Row]) -> list[str]:
    lines = [
        "## ONNX Runtime on the processor: size and whole tasks",
        "",
        "Whole tasks as in `verify`: the runtime runs freely, torch follows on what it wrote. Ids that torch would",
        "have written too are of all tasks, in brackets of the worst; latents, PSNR and SSIM are the worst task's.",
        "What is bold is beyond what `verify` allows at the bundle's lowest precision.",
        "",
    ]
    cells: list[tuple[str, ...]] = [
        ("`--precision`", "MiB", "ids the same", "latents, relative", "PSNR dB", "SSIM", "engines beyond a bound")
    ]
    for row in rows.values():
        cells.append((f"`{row.precision}`", _mib(row.exported), *_tasks(row.verified)))
    return [*lines, *_table(cells), ""]


def _tasks(verified: Record | None) -> tuple[str, ...]:
    if verified is None or verified["result"] is None:
        return ("",) * 5
    tasks, engines = verified["result"]["tasks"], verified["result"]["engines"]
    allowed = verified["result"]["allowed"]
    total = sum(task["tokens"] for task in tasks)
    share = sum(task["same"] for task in tasks) / total if total else 1.0
    missed = [engine["name"] for engine in engines if engine["problem"]]
    least = min(task["share"] for task in tasks)
    # What is not a number comes as None, and misses.
    latents = max(float("inf") if task["latent_error"] is None else task["latent_error"] for task in tasks)
    psnr, ssim = (min(task[key] or 0.0 for task in tasks) for key in ("psnr", "ssim"))
    return (
        _bold(f"{share:.1%} of {total} ({least:.1%})", least < allowed["share"]),
        _bold(f"{latents:.2g}", latents > allowed["latent_error"]),
        _bold(f"{psnr:.1f}", psnr < allowed["psnr"]),
        _bold(f"{ssim:.4f}", ssim < allowed["ssim"]),
        _bold(", ".join(missed), True) if missed else "none",
    )


def _parities(rows: dict[str, Row]) -> list[str]:
    found = {name: _engines(row) for name, row in rows.items() if row.verified and row.verified["result"]}
    if not found:
        return []
    lines = [
        "## ONNX Runtime on the processor: every engine against torch",
        "",
        "Largest error / largest that is allowed, in units of the output; of codes, how many differ / may differ.",
        "Of an engine that answering has for itself too, the worse of both.",
        "",
    ]
    names = list(dict.fromkeys(name for engines in found.values() for name in engines))
    cells = [("engine", *found)]
    cells += [(name, *(engines.get(name, "") for engines in found.values())) for name in names]
    return [*lines, *_table(cells), ""]


def _engines(row: Row) -> dict[str, str]:
    """Engine -> its cell; of one that a task has for itself too, the one nearer to or farther beyond its bound."""
    worst: dict[str, Record] = {}
    for engine in (row.verified or {})["result"]["engines"]:
        name = engine["name"].rpartition("/")[2]
        if name not in worst or _strain(engine) > _strain(worst[name]):
            worst[name] = engine
    return {name: _engine_cell(engine) for name, engine in worst.items()}


def _engine_cell(engine: Record) -> str:
    error, allowed = engine["max_abs_error"], engine["tolerance"]
    text = "not a number" if error is None else f"{error:.2g}"
    return _bold(f"{text} / {allowed:.2g}", bool(engine["problem"]))


def _strain(engine: Record) -> float:
    """Error over what is allowed; what is not a number is the most."""
    error, allowed = engine["max_abs_error"], engine["tolerance"]
    if error is None:
        return float("inf")
    return error / allowed if allowed else error * float("inf") if error else 0.0


def _scores(whole: Page) -> list[str]:
    rows = whole.rows.items()
    found = {name: row.evaluated["result"] for name, row in rows if row.evaluated and row.evaluated["result"]}
    if not found:
        return []
    figures = {name: {(one["part"], one["key"]): one for one in result["figures"]} for name, result in found.items()}
    first = next(iter(figures.values()))
    lines = [
        "## ONNX Runtime on the processor: task scores",
        "",
        f"`videolavit evaluate shapes -n {whole.items}` with {whole.steps or 'the default'} denoising steps: the same",
        "held-out scenes, prompts and noise for every bundle. In brackets 95 % intervals of each figure by itself,",
        "Wilson's for shares, bootstrap for means; n is the first column's, and stands in the cell where it differs.",
        "",
    ]
    cells = [("what", "n", *figures)]
    for key, one in first.items():
        if one["count"]:
            scores = (_score(own.get(key), one["count"]) for own in figures.values())
            cells.append((f"{key[0]}: {one['what']}", str(one["count"]), *scores))
    lines += [*_table(cells), ""]
    times = [f"{name} {result['seconds'] / 60:.1f}" for name, result in found.items()]
    return [*lines, f"Minutes that the evaluation took: {', '.join(times)}.", ""]


def _score(figure: Record | None, count: int) -> str:
    if figure is None or figure["value"] is None:
        return ""
    unit = figure["unit"]
    value, low, high = (_amount(figure[key], unit) for key in ("value", "low", "high"))
    other = f", n {figure['count']}" if figure["count"] != count else ""
    return f"{value} {'%' if unit == 'share' else unit}".strip() + f" ({low} to {high}{other})"


def _amount(number: float | None, unit: str) -> str:
    """A value as the report of an evaluation writes it."""
    if number is None:
        return "?"
    if unit == "share":
        return f"{100 * number:.1f}"
    return f"{number:.3f}" if unit == "" else f"{round(number, 2) + 0.0:.2f}"  # adding 0 takes the sign off -0


def _plans(whole: Page) -> list[str]:
    lines = [
        "## TensorRT-RTX: size of the plans",
        "",
        "MiB of all plans of a bundle, built for one GPU; in brackets seconds of the export, most of them before the",
        "plan. Not executed: there was no GPU.",
        "",
    ]
    cells = [("`--precision`", *(f"SM{name.replace('.', '')}" for name in whole.capabilities), "run")]
    for precision, plans in whole.plans.items():
        sizes = (_plan_cell(plans.get(name)) for name in whole.capabilities)
        cells.append((f"`{precision}`", *sizes, "not executed: no GPU"))
    return [*lines, *_table(cells), ""]


def _plan_cell(record: Record | None) -> str:
    if record is None:
        return ""
    if record["error"]:
        return f"refused: {record['error']}"
    return f"{_mib(record)} ({record['seconds']:.0f})"


def _mib(exported: Record) -> str:
    return f"{sum(engine['bytes'] for engine in exported['result']['engines']) / MIB:.1f}"


def _bold(text: str, wanted: bool) -> str:
    return f"**{text}**" if wanted else text


def _table(rows: Sequence[Iterable[str]]) -> list[str]:
    """Lines of a table, the first row its head."""
    cells = [[cell.replace("|", "/") for cell in row] for row in rows]
    cells.insert(1, ["---"] * len(cells[0]))
    return [f"| {' | '.join(row)} |" for row in cells]
