"""Draw a plot of benchmark results: TFLOP/s over sequence length, made from the JSON document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashcore.bench.reporting.report import Document, Row, libraries_of

# Okabe and Ito's colours, which colour-blind readers tell apart. flashcore has the strongest.
_OURS = "#D55E00"
_OTHERS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
_MARKERS = "osD^vPXh"
_LABEL_GAP = 0.055  # between two names at the lines' ends, as a part of the axis


def plot(document: Document, path: Path) -> None:
    """Draw TFLOP/s over seqlen, a row of panels for full and one for causal, a column a head_dim.

    Args:
        document: what `run` returned.
        path: the PNG to write.

    Raises:
        ImportError: matplotlib is missing; it comes with the extra `bench`.
        ValueError: the document has no sweep in it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in document["results"] if row["group"] == "sweep" and "seconds" in row]
    if not rows:
        raise ValueError("there is no sweep in these results, so there is nothing to plot")
    head_dims = sorted({row["head_dim"] for row in rows})
    kinds = sorted({row["causal"] for row in rows})
    figure, axes = pyplot.subplots(
        len(kinds),
        len(head_dims),
        figsize=(max(3.4 * len(head_dims), 6.0), 3.3 * len(kinds)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    top = 1.05 * max(row["flops_per_second"] / 1e12 for row in rows)
    for line, causal in zip(axes, kinds, strict=True):
        for axis, head_dim in zip(line, head_dims, strict=True):
            own = [row for row in rows if (row["head_dim"], row["causal"]) == (head_dim, causal)]
            if own:  # a run that was short of time has not come to some
                _draw_panel(axis, own, libraries_of(rows), top)
            axis.set_title(f"head_dim {head_dim}, {'causal' if causal else 'full'}", fontsize=10)
        line[0].set_ylabel("TFLOP/s")
    for axis in axes[-1]:
        axis.set_xlabel("sequence length")
    name = document["gpu"]["name"] if document["gpu"] else document["cpu"]
    dtypes = ", ".join(sorted({row["dtype"] for row in rows}))
    figure.suptitle(f"Attention {document.get('pass', 'forward')}, {dtypes}, {name}", fontsize=11)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_panel(axis: Any, rows: list[Row], libraries: list[str], top: float) -> None:
    others = iter(zip(_OTHERS, _MARKERS[1:], strict=True))
    ends: list[tuple[float, str, str]] = []
    for library in libraries:
        is_ours = library == "flashcore"
        colour, marker = (_OURS, _MARKERS[0]) if is_ours else next(others)
        points = sorted(
            (row["seqlen"], row["flops_per_second"] / 1e12)
            for row in rows
            if row["library"] == library
        )
        if not points:
            continue
        axis.plot(
            *zip(*points, strict=True),
            color=colour,
            marker=marker,
            markersize=5 if is_ours else 3.5,
            linewidth=2.4 if is_ours else 1.2,
            zorder=3 if is_ours else 2,
        )
        ends.append((points[-1][1], library, colour))
    seqlens = sorted({row["seqlen"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(seqlens, [f"{n // 1024}k" if n >= 1024 else str(n) for n in seqlens])
    axis.minorticks_off()
    axis.set_xlim(seqlens[0] * 0.85, seqlens[-1] * 1.15)
    axis.set_ylim(0, top)
    axis.grid(alpha=0.3)
    for spine in ("top", "right"):
        axis.spines[spine].set_visible(False)
    # Each line's name stands at its end, names below each other where lines end close together.
    lowest = top * 1.1
    for value, library, colour in sorted(ends, reverse=True):
        lowest = min(value, lowest - _LABEL_GAP * top)
        axis.annotate(
            library,
            (seqlens[-1] * 1.2, lowest),
            color=colour,
            fontsize=7.5,
            fontweight="bold" if library == "flashcore" else "normal",
            va="center",
            annotation_clip=False,
        )
