"""Write benchmark results for people: Markdown tables, made from the JSON document only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flashcore.bench.reporting.summary import by_workload, speedup, summarize, worst

Document = Mapping[str, Any]
Row = Mapping[str, Any]


TITLES = {
    "seed": "Seed's shape",
    "sweep": "Sweep: 16k tokens, hidden size 2048",
    "gqa": "Grouped queries",
    "small": "Small calls",
    "window": "Sliding window, and the same without it",
    "masked": "Mask tensors and soft-capping",
    "decode": "Decoding: one query, a long cache",
    "decode-more": "Decoding: other heads, head_dims and batches; several queries",
    "varlen": "Packed sequences of different lengths",
    "random": "Shapes drawn at random",
    "given": "Shapes that were asked for",
}


def markdown(document: Document) -> str:
    """Return the whole report: conditions, summary, one table for each group of workloads,
    errors."""
    everything = document["results"]
    parts = [conditions(document), "### Summary", summary_table(everything)]
    parts += ["\n".join(f"- {line}" for line in remarks(document))]
    for group in dict.fromkeys(row["group"] for row in everything):
        rows = [row for row in everything if row["group"] == group]
        parts.append(f"### {TITLES.get(group, group)}\n\n{times_table(rows)}")
        if document.get("pass") == "backward":
            parts.append(f"Forward and backward, host included:\n\n{eager_table(rows)}")
        what = "of dq, dk and dv " if document.get("pass") == "backward" else ""
        title = f"Largest / mean absolute error {what}against float64:"
        parts.append(f"{title}\n\n{errors_table(rows)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def summary_table(rows: Sequence[Row]) -> str:
    """Return one line a group: geometric means of time over flashcore's time."""
    lines = []
    for group, found in means(rows):
        each = ", ".join(f"{name} {times(ratio)}" for name, ratio in found["vs"].items())
        lines.append([*mean_cells(group, found), each])
    return table(["group", "shapes", "vs best peer", "ahead on", "at least", "vs each"], lines)


def means(rows: Sequence[Row]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the parts of `summarize` with a name: groups, and of a backward pass also the same
    together with the forward and the host."""
    parts = []
    for group, found in summarize(rows).items():
        parts.append((group, found))
        if found.get("with_host"):
            parts.append((f"{group}, with forward and host", found["with_host"]))
    return parts


def mean_cells(group: str, found: Mapping[str, Any]) -> list[str]:
    """Return the cells of a group's part of `summarize`, its shapes taken together."""
    return [
        group,
        str(found["shapes"]),
        times(found["vs_best_peer"]),
        str(found["ahead"]),
        f"{times(found['least'])} ({found['least_at']})",
    ]


def window_lines(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each window: its time over its share of the work."""
    return [
        f"{workload}: time over the share of 128 x 128 tiles touched, relative to the same without "
        "a window: " + ", ".join(f"{name} {cost:.2f}" for name, cost in costs.items())
        for found in summarize(rows).values()
        for workload, costs in found.get("window_cost", {}).items()
    ]


def worst_lines(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each of the shapes drawn at random on which flashcore stands worst."""
    return [
        f"among the worst of the shapes drawn at random: {name}, {ratio:.2f}x the speed of {peer}"
        for name, ratio, peer in worst(rows, "random")
    ]


def remarks(document: Document) -> list[str]:
    """Return what the tables do not say, a sentence each."""
    rows = document["results"]
    return [*worst_lines(rows), *window_lines(rows), *skipped(document)]


def conditions(document: Document) -> str:
    """Return one paragraph: hardware, versions, method, ceilings, command."""
    gpu, versions = document["gpu"], document["versions"]
    where = document["cpu"]
    if gpu is not None:
        power = "" if gpu["power_limit_w"] is None else f", {gpu['power_limit_w']:.0f} W"
        where = f"{gpu['name']} (sm_{gpu['arch']}{power}), driver {gpu['driver'] or 'unknown'}"
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    limits = document["ceilings"]
    n = int(limits["matmul_n"])
    return (
        f"{where}; {software}; {document['date']}. {document['method']}. "
        f"Ceilings of this run: {n} x {n} x {n} matmul {limits['matmul_flops'] / 1e12:.3g} "
        "TFLOP/s, "
        f"copy {limits['copy_bytes'] / 1e9:.0f} GB/s (read + write). "
        f"Command: `{document['command']}`."
    )


def libraries_of(rows: Sequence[Row]) -> list[str]:
    """Return those libraries that ran on some shape."""
    return list(dict.fromkeys(row["library"] for row in rows if "seconds" in row))


def time_and_rate(row: Row | None) -> str:
    """Return a row's time and rate, in its group's `unit`."""
    if row is None:
        return "-"
    if _reads(row["group"]):
        return f"{row['seconds'] * 1e6:.1f} / {row['bytes_per_second'] / 1e9:.0f}"
    return f"{row['seconds'] * 1e6:.1f} / {row['flops_per_second'] / 1e12:.3g}"


def unit(group: str) -> str:
    """Return the unit of `time_and_rate`, for rows of a group."""
    return "us / GB/s" if _reads(group) else "us / TFLOP/s"


def _reads(group: str) -> bool:
    """Return whether it is of decoding, which reads the cache and computes little."""
    return group.startswith("decode")


def times_table(rows: Sequence[Row]) -> str:
    """Time and rate of each library, flashcore's share of the limit, its speed beside the best."""
    libraries = libraries_of(rows)
    group = rows[0]["group"]
    lines = []
    for workload, entries in by_workload(rows, group).items():
        cells = [workload, *(time_and_rate(entries.get(library)) for library in libraries)]
        ours = entries.get("flashcore")
        cells.append(
            "-" if ours is None else f"{ours['fraction_of_limit']:.0%} ({ours['limited_by']})"
        )
        lines.append([*cells, times(speedup(entries))])
    return table([unit(group), *libraries, "flashcore: of limit", "vs best peer"], lines)


def eager_table(rows: Sequence[Row]) -> str:
    """Return microseconds of an eager call of each library, and flashcore's speed beside the
    best."""
    libraries = libraries_of(rows)
    lines = []
    for workload, entries in by_workload(rows, rows[0]["group"]).items():
        cells = [eager_time(entries.get(library)) for library in libraries]
        lines.append([workload, *cells, times(speedup(entries, "eager_seconds"))])
    return table(["us", *libraries, "vs best peer"], lines)


def eager_time(row: Row | None) -> str:
    """Return a row's microseconds of an eager call."""
    return "-" if row is None else f"{row['eager_seconds'] * 1e6:.1f}"


def errors_table(rows: Sequence[Row]) -> str:
    """Return largest / mean absolute error of each library."""
    libraries = libraries_of(rows)
    lines = [
        [workload, *(errors(entries.get(library)) for library in libraries)]
        for workload, entries in by_workload(rows, rows[0]["group"]).items()
    ]
    return table(["error", *libraries], lines)


def errors(row: Row | None) -> str:
    """Return a row's largest / mean absolute error."""
    return "-" if row is None else f"{row['max_error']:.1e} / {row['mean_error']:.1e}"


def times(ratio: float | None) -> str:
    """Return how many times as fast."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def left_out(document: Document) -> list[str]:
    """Return one line for each library that ran on no shape."""
    return [f"{row['library']}: {row['reason']}" for row in document.get("left_out", [])]


def skipped(document: Document) -> list[str]:
    """Return one line for each library and reason that kept it from running, altogether or on a
    shape."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in document["results"]:
        if "skipped" in row:
            # Without the second sentence of torch's, which holds the shape.
            reason = row["skipped"].split(". ")[0]
            reasons.setdefault((row["library"], reason), []).append(row["workload"])
    return left_out(document) + [
        f"{library} did not run on {len(names)} shape(s), {names[0]} first: {reason}"
        for (library, reason), names in reasons.items()
    ]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
