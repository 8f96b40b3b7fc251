"""Measurements as tables for people and as records for programs.

Contract: of all measurements of one quantity, file and backend the one nearest to its bound is shown. Numbers of
values that differ and shares of pictures are shown as such; everything else is a largest absolute difference.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from export.fidelity.backends import BACKENDS
from export.fidelity.measure import Measurement
from export.fidelity.registry import Case

LIBRARIES = ("torch", "diffusers", "transformers", "onnxruntime", "numpy", "Pillow", "av")
_EXACT = "equal"


@dataclass(frozen=True)
class Measured:
    """A case and what was measured of it."""

    case: Case
    measurements: tuple[Measurement, ...]

    @property
    def passed(self) -> bool:
        return bool(self.measurements) and all(one.passed for one in self.measurements)


def records(measured: Iterable[Measured]) -> list[dict[str, Any]]:
    """Every measurement as one flat record."""
    return [
        {
            "component": one.case.component,
            "golden": one.case.path.name,
            "backend": one.case.backend,
            "what": measurement.what,
            "error": measurement.error,
            "tolerance": measurement.tolerance,
            "scale": measurement.scale,
            "unit": measurement.unit,
            "passed": measurement.passed,
        }
        for one in measured
        for measurement in one.measurements
    ]


def failures(measured: Iterable[Measured]) -> list[str]:
    """One line for every measurement out of bounds."""
    lines = []
    for one in measured:
        lines += [
            f"{one.case.name}: {m.what}: {_error(m)}, allowed {_allowed(m)}" for m in one.measurements if not m.passed
        ]
        if not one.measurements:
            lines.append(f"{one.case.name}: nothing was measured")
    return lines


def markdown(measured: Sequence[Measured], missed: Sequence[str]) -> str:
    """The document. `missed`: files that nothing measures."""
    parts = [_head(measured, missed), _overview(measured)]
    parts += [_details(path, [one for one in measured if one.case.path == path]) for path in _paths(measured)]
    return "\n".join(parts)


def overview(measured: Sequence[Measured]) -> list[tuple[str, ...]]:
    """A row for every component, file and backend: its float quantity nearest to the bound, and what was exact."""
    rows = []
    for one in measured:
        floats = [m for m in one.measurements if not m.unit]
        exact = [m for m in one.measurements if m.unit]
        cells = ["–"] * 4
        if floats:
            worst = _nearest_to_bound(floats)
            share = f"{worst.error / worst.scale:.1e}" if worst.scale else "–"
            cells = [worst.what, _error(worst), share, _allowed(worst)]
        wrong = sum(not m.passed for m in exact)
        ids = "–" if not exact else f"{len(exact)} of {len(exact)}" if not wrong else f"{wrong} FAIL"
        rows.append((one.case.component, one.case.backend, *cells, ids, one.case.path.name))
    return rows


OVERVIEW_COLUMNS = (
    *("component", "backend", "nearest to its bound", "max error", "of scale", "allowed"),
    *("exact comparisons", "golden file"),
)


def _head(measured: Sequence[Measured], missed: Sequence[str]) -> str:
    count = sum(len(one.measurements) for one in measured)
    failed = failures(measured)
    verdict = "All are within their bounds." if not failed else f"**{len(failed)} are out of bounds.**"
    found = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    lines = [
        "# Fidelity: our numbers against the reference's",
        "",
        "Written by `python -m export.fidelity -o docs/fidelity.md`; do not edit. The golden files hold inputs,",
        "weights and outputs of the reference code, float32 on a CPU. Each is run through torch modules, the exported",
        "engines in ONNX Runtime, and, where the work is the host's, through numpy.",
        "",
        f"{count} comparisons in {len(measured)} cases of {len(_paths(measured))} files. {verdict}",
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {found}.",
        "",
        "*max error* is the largest absolute difference over all values, *of scale* the same as a share of the largest",
        "magnitude of the reference's output, *allowed* the bound. Bounds are fixed per quantity, at about ten times",
        "what other float32 kernels do to the reference itself, and at most 1e-4 of the scale.",
        "Ids, counts, masks, call orders and texts must be equal; uint8 pictures may be one level off in 0.5 % of the",
        "values.",
    ]
    loose = sorted({f"{one.case.component}, {m.what}" for one in measured for m in one.measurements if _is_loose(m)})
    if loose:
        lines += [
            "",
            f"Bounds above 1e-4 of the scale: {'; '.join(loose)}.",
            "They are of decoded frames, whose colours decoders round differently; what is computed from motion is not",
            "among them.",
        ]
    if missed:
        lines += ["", f"**Files that nothing measures: {', '.join(missed)}.**"]
    return "\n".join([*lines, ""])


def _overview(measured: Sequence[Measured]) -> str:
    rows = [(*row[:-1], f"`{row[-1]}`") for row in overview(measured)]
    return "\n".join(["## Components", "", *_table(OVERVIEW_COLUMNS, rows), ""])


def _details(path: Path, measured: Sequence[Measured]) -> str:
    """Every quantity of one file, backends side by side."""
    found: dict[str, dict[str, Measurement]] = {}
    for one in measured:
        for m in one.measurements:
            row = found.setdefault(m.what, {})
            backend = one.case.backend
            row[backend] = _nearest_to_bound([row[backend], m]) if backend in row else m
    backends = [backend for backend in BACKENDS if any(backend in row for row in found.values())]
    rows = []
    for what, row in found.items():
        cells = [
            _error(row[backend]) + ("" if row[backend].passed else " FAIL") if backend in row else "–"
            for backend in backends
        ]
        widest = max(row.values(), key=lambda m: m.scale)
        rows.append((what, *cells, _allowed(widest), f"{widest.scale:.3g}" if widest.scale else "–"))
    title = f"## {measured[0].case.component}: `{path.name}`"
    return "\n".join([title, "", *_table(("quantity", *backends, "allowed", "scale"), rows), ""])


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def _paths(measured: Iterable[Measured]) -> list[Path]:
    return list(dict.fromkeys(one.case.path for one in measured))


def _nearest_to_bound(measurements: Sequence[Measurement]) -> Measurement:
    def share(m: Measurement) -> float:
        return m.error / m.tolerance if m.tolerance else m.error * float("inf") if m.error else 0.0

    return max(measurements, key=share)


def _is_loose(measurement: Measurement) -> bool:
    return not measurement.unit and 0 < measurement.scale * 1e-4 < measurement.tolerance


def _error(m: Measurement) -> str:
    if m.unit == "share":
        return _EXACT if m.error == 0 else f"{m.error:.2%} off by one" if m.error < 1 else "off by more than one"
    if m.unit:
        return _EXACT if m.error == 0 else f"{m.error:g} {m.unit}"
    return f"{m.error:.1e}" if m.error else "0"


def _allowed(m: Measurement) -> str:
    if m.unit == "share":
        return f"{m.tolerance:.1%} off by one"
    return _EXACT if m.unit or not m.tolerance else f"{m.tolerance:.1e}"
