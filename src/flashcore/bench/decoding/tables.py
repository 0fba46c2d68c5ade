"""Make tables of what bench/decoding/measuring.py measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flashcore.bench.decoding.measuring import OF_ITS_OWN, OTHERS, PAGED, WHOLE
from flashcore.bench.reporting.report import table

Row = Mapping[str, Any]
_LIBRARIES = ("flashcore", "fa3")


def markdown(document: Mapping[str, Any]) -> str:
    """Return tables: beside FlashAttention-3, what is ours alone, a chunk of a prompt beside single
    tokens, and cells that were drawn by chance; of those that were measured."""
    rows = document["results"]
    drawn = [row for row in rows if row.get("page_size")]
    mixed = [row for row in rows if row.get("chunk")]
    usual = [row for row in rows if not row.get("page_size") and not row.get("chunk")]
    parts = []
    if usual:
        parts += [_usual(usual), _ours(usual)]
    if mixed:
        parts += ["A chunk of a prompt, its first, beside single tokens:", _beside(mixed, PAGED)]
    if drawn:
        parts += ["Cells drawn by chance, which nobody tuned for:", _drawn(drawn)]
    return "\n\n".join(parts)


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["cell"] for row in rows))


def _times(rows: Sequence[Row]) -> dict[tuple[str, str, str], float]:
    """Return us by cell, what was timed, and library."""
    return {
        (row["cell"], row["what"], row["library"]): row["seconds"] * 1e6
        for row in rows
        if "seconds" in row
    }


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _beside(rows: Sequence[Row], kinds: Sequence[str]) -> str:
    """Return a table of both libraries, with the ratio that is the least of a line, and the means
    of all."""
    times = _times(rows)
    least = {
        row["cell"]: f"{row['seconds_at_copy_speed'] * 1e6:.1f}"
        for row in rows
        if "seconds" in row and row["what"] in (WHOLE, *PAGED)
    }
    lines, ratios = [], []
    for name in _names(rows):
        pairs = [[times.get((name, kind, library)) for library in _LIBRARIES] for kind in kinds]
        found = [fa3 / ours for ours, fa3 in pairs if ours and fa3]
        ratios += found
        cells = [" / ".join(map(_us, pair)) for pair in pairs]
        lines.append([name, least.get(name, "-"), *cells, f"{min(found):.2f}" if found else "-"])
    text = table(["us, flashcore / fa3", "bytes at copy speed", *kinds, "fa3 / flashcore"], lines)
    if not ratios:
        return text
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return f"{text}\n\nfa3 / flashcore, the least of each line; of all {mean:.2f} in the mean."


def _usual(rows: Sequence[Row]) -> str:
    return _beside(rows, (WHOLE, *PAGED, "step"))


def _ours(rows: Sequence[Row]) -> str:
    times = _times(rows)
    kinds = [WHOLE, *(what for what in OTHERS if what != "step")]
    lines = [
        [name, *(_us(times.get((name, kind, "flashcore"))) for kind in kinds)]
        for name in _names(rows)
    ]
    return table(["us, flashcore", *kinds], lines)


def _drawn(rows: Sequence[Row]) -> str:
    sizes = {row["cell"]: row["page_size"] for row in rows}
    named = [{**row, "cell": f"{row['cell']}, {sizes[row['cell']]}"} for row in rows]
    return _beside(named, (WHOLE, OF_ITS_OWN)).replace(
        "us, flashcore / fa3", "us, flashcore / fa3; page size", 1
    )
