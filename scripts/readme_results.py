"""Fill the results of README.md and of pages in docs/ from benchmarks/results/h100.json and, for
more groups of shapes, h100-short.json, and docs/host-overhead.md from h100-host.json.

    python scripts/readme_results.py            # after `flashcore bench --output ...`
    python scripts/readme_results.py --check    # change nothing, fail where a page is stale

What stands between the lines `<!-- results:begin -->` and `<!-- results:end -->` of a page is made
here and nowhere else, so a page cannot say what was not measured.

Exit status: 0 up to date (or no results yet), 1 a page is stale, 2 a page has lost its markers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flashcore.bench.host import markdown as host_markdown
from flashcore.bench.report import conditions, skipped, time_and_rate, window_lines
from flashcore.bench.summary import best_peer, by_workload, speedup, summarize

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmarks/results/h100.json")
MORE_RESULTS = Path("benchmarks/results/h100-short.json")  # of other groups, on a GPU of its kind
HOST_RESULTS = Path("benchmarks/results/h100-host.json")

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
# Columns of the tables, where the file has them; the seed's table names the best of all instead.
COLUMNS = ("flashcore", "flashcore-wmma", "sdpa-flash", "sdpa-cudnn", "flex", "fa3", "fa4")
# Other groups, in this order, where the file has them: what stands above the table.
GROUPS = {
    "gqa": "Grouped queries",
    "small": "Small calls",
    "window": "A window over long sequences",
    "masked": "Mask tensors and soft-capping",
    "decode": "Decoding, one query for a long cache",
    "decode-more": "Decoding with other heads, head_dims and batches, and several queries",
}
README_SEQLENS = (512, 2048, 16384)
# Columns of the table of errors, those that stand for a way of rounding.
ERROR_COLUMNS = (*COLUMNS, "sdpa-math", "unfused")
ERROR_SEQLENS = (2048,)

Document = Mapping[str, Any]
Row = Mapping[str, Any]


class MarkerError(ValueError):
    """A page does not have exactly one begin marker followed by one end marker."""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _microseconds(row: Row | None) -> str:
    return "-" if row is None else f"{row['seconds'] * 1e6:.1f}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def seed_table(document: Document) -> str:
    """The project's first shape: microseconds, and errors against float64."""
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
                _errors(ours),
            ]
        )
    return _table(header, lines)


def group_table(document: Document, group: str, seqlens: Sequence[int] | None = None) -> str:
    """Time and rate of a group's shapes, of all lengths or of some. A peer that ran nowhere has no
    column; the best of all peers is named where it is not a column."""
    workloads = by_workload(document["results"], group)
    present = {name for entries in workloads.values() for name in entries}
    columns = [name for name in COLUMNS if name in present]
    lines = []
    for workload, entries in workloads.items():
        if seqlens is not None and all(row["seqlen"] not in seqlens for row in entries.values()):
            continue
        ratio, peer = _times(speedup(entries)), best_peer(entries)
        if peer is not None and peer["library"] not in columns:
            ratio += f" ({peer['library']})"
        lines.append([workload, *(time_and_rate(entries.get(name)) for name in columns), ratio])
    unit = "us / GB/s" if group.startswith("decode") else "us / TFLOP/s"
    return _table([unit, *columns, "vs best peer"], lines)


def group_sections(document: Document) -> list[str]:
    """Heading and table of each group of GROUPS that the file has."""
    present = {row["group"] for row in document["results"]}
    sections = []
    for group, title in GROUPS.items():
        if group in present:
            sections += [f"{title}, {_dtypes(document, group)}:", group_table(document, group)]
    return sections


def means_table(document: Document) -> str:
    """One line a group: the geometric mean of flashcore's speed over the best peer's."""
    rows = [
        [
            group,
            str(found["shapes"]),
            _times(found["vs_best_peer"]),
            str(found["ahead"]),
            f"{_times(found['least'])} ({found['least_at']})",
        ]
        for group, found in summarize(document["results"]).items()
    ]
    header = ["flashcore's speed over the best peer's", "shapes", "geometric mean", "ahead on"]
    return _table([*header, "at least"], rows)


def error_table(document: Document) -> str:
    """Largest / mean error against float64, of the seed's shape and a slice of the sweep."""
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
        [workload, *(_errors(entries.get(n)) for n in columns)]
        for workload, entries in rows.items()
    ]
    return _table(["largest / mean error", *columns], lines)


def _errors(row: Row | None) -> str:
    return "-" if row is None else f"{row['max_error']:.1e} / {row['mean_error']:.1e}"


def summary(document: Document) -> str:
    """One sentence on all shapes of the file, the worst one named."""
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


def _where(document: Document) -> str:
    gpu, torch = document["gpu"], document["versions"]["torch"]
    where = document["cpu"] if gpu is None else gpu["name"]
    return f"{where}, torch {torch}, {document['date'][:10]}"


def _dtypes(document: Document, group: str) -> str:
    rows = (row["dtype"] for row in document["results"] if row["group"] == group)
    return " and ".join(dict.fromkeys(rows))


def readme_section(document: Document, folder: Path) -> str:
    """What README.md says."""
    plot = _plot(folder, RESULTS.with_suffix(".png").as_posix())
    return "\n\n".join(
        [
            f"{_where(document)}; medians of one run, kernel time without the host's. The first "
            "benchmark of this project, 8 heads, 512 tokens, head_dim 64, "
            f"{_dtypes(document, 'seed')}:",
            seed_table(document),
            "A sweep at 16k tokens and hidden size 2048, "
            f"{_dtypes(document, 'sweep')}, microseconds / TFLOP/s:",
            group_table(document, "sweep", README_SEQLENS),
            "Every group of shapes, beside the fastest of all peers on each shape:",
            means_table(document),
            f"{summary(document)} All shapes, errors, limits and what was tried: "
            "[docs/performance.md](docs/performance.md).",
            *plot,
        ]
    )


def performance_section(document: Document, folder: Path) -> str:
    """What docs/performance.md says."""
    name = f"../{RESULTS.as_posix()}"
    report = Path(name).with_suffix(".md").as_posix()
    has_report = (folder / RESULTS.with_suffix(".md")).is_file()
    notes = [*window_lines(document["results"]), *skipped(document)]
    others = f", the other columns and errors in [{Path(report).name}]({report})" * has_report
    if (folder / MORE_RESULTS).is_file():
        others += f" and [{MORE_RESULTS.name}](../{MORE_RESULTS.as_posix()})"
    return "\n\n".join(
        [
            f"From [{RESULTS.name}]({name}){others}. {conditions(document)}",
            f"The seed's shape, {_dtypes(document, 'seed')}:",
            seed_table(document),
            f"16k tokens, hidden size 2048, {_dtypes(document, 'sweep')}:",
            group_table(document, "sweep"),
            *group_sections(document),
            "In short:",
            means_table(document),
            summary(document),
            "\n".join(f"- {line}" for line in notes),
            *_plot(folder, Path(name).with_suffix(".png").as_posix()),
        ]
    )


def numerics_section(document: Document, folder: Path) -> str:
    """What docs/numerics.md says."""
    del folder
    return (
        f"{_where(document)}; inputs from N(0, 1), rows at the start and the end of the first and "
        f"the last head ([{RESULTS.name}](../{RESULTS.as_posix()})):\n\n{error_table(document)}"
    )


def _plot(root: Path, link: str) -> list[str]:
    """The plot as an image, where there is one."""
    exists = (root / RESULTS.with_suffix(".png")).is_file()
    return [f"![TFLOP/s over sequence length]({link})"] if exists else []


PAGES: dict[str, Callable[[Document, Path], str]] = {
    "README.md": readme_section,
    "docs/performance.md": performance_section,
    "docs/numerics.md": numerics_section,
}


def host_section(document: Document, folder: Path) -> str:
    """What docs/host-overhead.md says."""
    del folder
    source = f"[{HOST_RESULTS.name}](../{HOST_RESULTS.as_posix()})"
    return f"{_where(document)} ({source}); {document['method']}.\n\n{host_markdown(document)}"


SOURCES: dict[Path, dict[str, Callable[[Document, Path], str]]] = {
    RESULTS: PAGES,
    HOST_RESULTS: {"docs/host-overhead.md": host_section},
}


def filled(text: str, section: str, page: str) -> str:
    """`text` with `section` between its markers. Raises MarkerError."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise MarkerError(f"{page} needs one line {BEGIN} and below it one line {END}")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{section}\n{END}{tail}"


def load(root: Path, source: Path) -> Document:
    """A file's document; that of RESULTS with the rows of MORE_RESULTS, where these are."""
    document = json.loads((root / source).read_text(encoding="utf-8"))
    if source == RESULTS and (root / MORE_RESULTS).is_file():
        more = json.loads((root / MORE_RESULTS).read_text(encoding="utf-8"))
        document["results"] += more["results"]
        document["command"] += f"` and, at the same time on another such GPU, `{more['command']}"
    return document


def update(root: Path, check: bool) -> list[str]:
    """Fill all pages.

    Args:
        root: the repository.
        check: change nothing.

    Returns:
        The pages that were (or with `check`: are) stale; none where there are no results.

    Raises:
        MarkerError: a page has lost its markers.
    """
    stale = []
    for source, pages in SOURCES.items():
        if not (root / source).is_file():
            continue
        document = load(root, source)
        for page, section in pages.items():
            path = root / page
            text = path.read_text(encoding="utf-8")
            wanted = filled(text, section(document, root), page)
            if wanted != text:
                stale.append(page)
                if not check:
                    path.write_text(wanted, encoding="utf-8")
    return stale


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing, fail where stale")
    check = parser.parse_args(arguments).check
    if not (ROOT / RESULTS).is_file():
        print(f"{RESULTS} does not exist yet: run flashcore bench --output {RESULTS} on the GPU")
        return 0
    try:
        stale = update(ROOT, check)
    except MarkerError as error:
        print(error, file=sys.stderr)
        return 2
    for page in stale:
        print(f"{page}: {'stale, run python scripts/readme_results.py' if check else 'updated'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
