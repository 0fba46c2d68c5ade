"""Say in few numbers what the results of a benchmark are. Made from the JSON document's rows
only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Entries = Mapping[str, Row]  # library -> its timed row, for one workload

OURS = "flashcore"


def by_workload(rows: Iterable[Row], group: str) -> dict[str, dict[str, Row]]:
    """Return the timed rows of a group: workload name -> library -> row, in the file's order."""
    grouped: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["group"] == group:
            entries = grouped.setdefault(row["workload"], {})
            if "seconds" in row:
                entries[row["library"]] = row
    return grouped


def best_peer(entries: Entries, time: str = "seconds") -> Row | None:
    """Return the row with the least time that is not flashcore's, or None."""
    others = [row for name, row in entries.items() if not name.startswith(OURS)]
    return min(others, key=lambda row: float(row[time]), default=None)


def speedup(entries: Entries, time: str = "seconds") -> float | None:
    """Return the time of the best peer over flashcore's; `time` names the field of a row."""
    ours, other = entries.get(OURS), best_peer(entries, time)
    if ours is None or other is None:
        return None
    return float(other[time]) / float(ours[time])


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of at least one positive number."""
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Compare flashcore with its peers.

    Args:
        rows: the document's results.

    Returns:
        By group: `shapes` compared; the geometric mean of time of the best peer / flashcore's
        (`vs_best_peer`), its smallest with the workload's name (`least`, `least_at`), and on how
        many shapes it is above 1 (`ahead`); `vs`, the mean against each library on the shapes that
        both ran. For windows also `window_cost`, see there. Of a backward pass also `with_host`,
        the same of forward and backward together, host included.
    """
    result: dict[str, Any] = {}
    for group in dict.fromkeys(row["group"] for row in rows):
        workloads = by_workload(rows, group)
        found = _beside_the_best(workloads, "seconds")
        if found is None:
            continue
        result[group] = found
        if any(row.get("pass") == "backward" for row in rows if row["group"] == group):
            result[group]["with_host"] = _beside_the_best(workloads, "eager_seconds")
        costs = window_cost(list(workloads.values()))
        if costs:
            result[group]["window_cost"] = costs
    return result


def _beside_the_best(workloads: Mapping[str, Entries], time: str) -> dict[str, Any] | None:
    """Return the means of a group, or None where nobody else was timed."""
    speedups = {
        name: value
        for name, entries in workloads.items()
        if (value := speedup(entries, time)) is not None
    }
    if not speedups:
        return None
    least = min(speedups, key=speedups.__getitem__)
    return {
        "shapes": len(speedups),
        "vs_best_peer": geometric_mean(list(speedups.values())),
        "ahead": sum(value > 1 for value in speedups.values()),
        "least": speedups[least],
        "least_at": least,
        "vs": _by_library(workloads.values(), time),
    }


def worst(rows: Sequence[Row], group: str, count: int = 5) -> list[tuple[str, float, str]]:
    """Return the workloads of a group on which flashcore stands worst, the worst first.

    Args:
        rows: the document's results.
        group: which of them.
        count: at most so many.

    Returns:
        Workload, time of the best peer / flashcore's, and the peer's name.
    """
    found = []
    for name, entries in by_workload(rows, group).items():
        ratio, peer = speedup(entries), best_peer(entries)
        if ratio is not None and peer is not None:
            found.append((name, ratio, str(peer["library"])))
    return sorted(found, key=lambda entry: entry[1])[:count]


def _by_library(workloads: Iterable[Entries], time: str) -> dict[str, float]:
    ratios: dict[str, list[float]] = {}
    for entries in workloads:
        for name, row in entries.items():
            if OURS in entries and name != OURS:
                ratio = float(row[time]) / float(entries[OURS][time])
                ratios.setdefault(name, []).append(ratio)
    return {name: geometric_mean(values) for name, values in ratios.items()}


def window_cost(workloads: Sequence[Entries]) -> dict[str, dict[str, float]]:
    """Time of a window over its share of the work.

    Args:
        workloads: with and without a window, otherwise alike.

    Returns:
        By workload with a window, by library: (time / time without window) / (tiles of 128 x 128
        with a visible pair / those without window). 1 means that what is hidden costs nothing.
    """
    alike = ("batch", "num_heads", "seqlen", "head_dim", "causal", "dtype")

    def shape(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in ("library", *alike))

    plain = {
        shape(row): row
        for entries in workloads
        for row in entries.values()
        if row.get("window") is None
    }
    costs: dict[str, dict[str, float]] = {}
    for entries in workloads:
        for library, row in entries.items():
            base = plain.get(shape(row))
            if row.get("window") is None or base is None or "window_tiles" not in row:
                continue
            time = row["seconds"] / base["seconds"]
            share = row["window_tiles"] / base["window_tiles"]
            costs.setdefault(row["workload"], {})[library] = time / share
    return costs
