"""Make the tables of a benchmark's document that pages of the documentation show."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from flashcore.bench.reporting.report import (
    TITLES,
    errors,
    libraries_of,
    mean_cells,
    means,
    table,
    time_and_rate,
    times,
    unit,
)
from flashcore.bench.reporting.summary import OURS, best_peer, by_workload, speedup

# Columns of the tables, where the file has them; the seed's table names the best of all instead.
COLUMNS = ("flashcore", "flashcore-wmma", "sdpa-flash", "sdpa-cudnn", "flex", "fa3", "fa4")
# Other groups, in this order, where the file has them.
GROUPS = ("gqa", "small", "window", "masked", "decode", "decode-more", "varlen")
# Columns of the table of errors, those that stand for a way of rounding.
ERROR_COLUMNS = (*COLUMNS, "sdpa-math", "unfused")
ERROR_SEQLENS = (2048,)

Document = Mapping[str, Any]
Row = Mapping[str, Any]


def _microseconds(row: Row | None) -> str:
    return "-" if row is None else f"{row['seconds'] * 1e6:.1f}"


def seed_table(document: Document) -> str:
    """Return the project's first shape: microseconds, and errors against float64."""
    header = ["us", "unfused", "sdpa-flash", "best peer", "flashcore-wmma", "flashcore"]
    header.append("largest / mean error")
    lines = []
    for workload, entries in by_workload(document["results"], "seed").items():
        peer = best_peer(entries)
        ours = entries.get("flashcore")
        lines.append(
            [
                workload,
                _microseconds(entries.get("unfused")),
                _microseconds(entries.get("sdpa-flash")),
                "-" if peer is None else f"{_microseconds(peer)} ({peer['library']})",
                _microseconds(entries.get("flashcore-wmma")),
                _microseconds(ours),
                errors(ours),
            ]
        )
    return table(header, lines)


def group_table(document: Document, group: str) -> str:
    """Time and rate of a group's shapes. A peer that ran nowhere has no
    column; the best of all peers is named where it is not a column."""
    workloads = by_workload(document["results"], group)
    present = {name for entries in workloads.values() for name in entries}
    columns = [name for name in COLUMNS if name in present]
    lines = []
    for workload, entries in workloads.items():
        ratio, peer = times(speedup(entries)), best_peer(entries)
        if peer is not None and peer["library"] not in columns:
            ratio += f" ({peer['library']})"
        lines.append([workload, *(time_and_rate(entries.get(name)) for name in columns), ratio])
    return table([unit(group), *columns, "vs best peer"], lines)


def rates_table(document: Document, group: str) -> str:
    """Return TFLOP/s of every library, flashcore's share of the limit, its speed beside the
    best."""
    rows = [row for row in document["results"] if row["group"] == group]
    others = [name for name in libraries_of(rows) if name != OURS]
    lines = []
    for workload, entries in by_workload(rows, group).items():
        ours = entries.get(OURS)
        share = "-" if ours is None else f"{ours['fraction_of_limit']:.0%}"
        rates = [_rate(entries.get(name)) for name in (OURS, *others)]
        lines.append([workload, rates[0], share, *rates[1:], times(speedup(entries))])
    return table(["TFLOP/s", OURS, "of limit", *others, "vs best peer"], lines)


def _rate(row: Row | None) -> str:
    return "-" if row is None else f"{row['flops_per_second'] / 1e12:.0f}"


def group_sections(document: Document) -> list[str]:
    """Return heading and table of each group of GROUPS that the file has."""
    present = {row["group"] for row in document["results"]}
    sections = []
    for group in (group for group in GROUPS if group in present):
        title = f"{TITLES[group]} ({dtypes(document, group)}):"
        sections += [title, group_table(document, group)]
    return sections


def means_table(document: Document) -> str:
    """Return one line a group: the geometric mean of flashcore's speed over the best peer's; of a
    backward pass also together with the forward and the host."""
    rows = [mean_cells(group, found) for group, found in means(document["results"])]
    header = ["flashcore's speed over the best peer's", "shapes", "geometric mean", "ahead on"]
    return table([*header, "at least"], rows)


def peers_table(document: Document) -> str:
    """Return the geometric means of flashcore's speed over each peer's in a sweep, a line for each
    head_dim and one for all: a peer's column, and that of the best of each shape."""
    shapes = list(by_workload(document["results"], "sweep").values())
    timed = [x for x in shapes if "seconds" in x.get("flashcore", {})]
    names = [n for n in dict.fromkeys(n for x in timed for n in x) if n != "flashcore"]
    head_dims = sorted({entries["flashcore"]["head_dim"] for entries in timed})

    def cells(of: Sequence[Mapping[str, Any]]) -> list[str]:
        found = [str(len(of))]
        for name in names:
            both = [x for x in of if "seconds" in x.get(name, {})]
            ratios = [x[name]["seconds"] / x["flashcore"]["seconds"] for x in both]
            found.append(f"{statistics.geometric_mean(ratios):.2f}x" if ratios else "-")
        best = [ratio for x in of if (ratio := speedup(x)) is not None]
        return [*found, f"{statistics.geometric_mean(best):.2f}x" if best else "-"]

    lines = [
        [f"head_dim {dim}", *cells([x for x in timed if x["flashcore"]["head_dim"] == dim])]
        for dim in head_dims
    ]
    lines.append(["all", *cells(timed)])
    return table(["flashcore's speed over", "shapes", *names, "best of each shape"], lines)


def error_table(document: Document) -> str:
    """Return largest / mean error against float64, of the seed's shape and a slice of the sweep."""
    rows = {
        f"{workload}, {first['dtype']}": entries
        for group in ("seed", "sweep")
        for workload, entries in by_workload(document["results"], group).items()
        if (first := next(iter(entries.values()), None)) is not None
        and (group == "seed" or first["seqlen"] in ERROR_SEQLENS)
    }
    present = {name for entries in rows.values() for name in entries}
    columns = [name for name in ERROR_COLUMNS if name in present]
    lines = [
        [workload, *(errors(entries.get(n)) for n in columns)] for workload, entries in rows.items()
    ]
    return table(["largest / mean error", *columns], lines)


def summary(document: Document) -> str:
    """Return one sentence on all shapes of the file, the worst one named."""
    groups = dict.fromkeys(row["group"] for row in document["results"])
    ratios = {
        (group, workload): ratio
        for group in groups
        for workload, entries in by_workload(document["results"], group).items()
        if (ratio := speedup(entries)) is not None
    }
    if not ratios:
        return "flashcore was not timed beside another implementation."
    ahead = sum(ratio > 1 for ratio in ratios.values())
    best, worst = max(ratios, key=ratios.__getitem__), min(ratios, key=ratios.__getitem__)
    return (
        f"Against the fastest other implementation of each shape, flashcore takes less time on "
        f"{ahead} of {len(ratios)}: at best {ratios[best]:.2f}x its speed ({best[1]}), at worst "
        f"{ratios[worst]:.2f}x ({worst[1]})."
    )


def where(document: Document) -> str:
    """Return machine, torch and day."""
    gpu, torch = document["gpu"], document["versions"]["torch"]
    name = document["cpu"] if gpu is None else gpu["name"]
    return f"{name}, torch {torch}, {document['date'][:10]}"


def dtypes(document: Document, group: str) -> str:
    """Return the dtypes of a group's shapes."""
    rows = (row["dtype"] for row in document["results"] if row["group"] == group)
    return " and ".join(dict.fromkeys(rows))
