"""Fill the results of README.md and of pages in docs/ from benchmarks/results/h200.json,
docs/host-overhead.md from h200-host.json, README.md and docs/backward-speed.md from
h200-gradients.json, docs/backward.md from h200-masks.json, docs/serving-kernels.md from
h200-decode.json, h200-packed-decode.json and h200-steps.json.

    python scripts/readme_results.py            # after `flashcore bench --output ...`
    python scripts/readme_results.py --check    # change nothing, fail where a page is stale

The text between the lines `<!-- results:begin -->` and `<!-- results:end -->` of a page is made
here and nowhere else, so a page cannot say what was not measured. A page of several files has a
pair for each; a name says which, as in `<!-- results:begin masks -->`.

Exit status: 0 up to date (or no results yet), 1 a page is stale, 2 a page has lost its markers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flashcore.bench.decoding.tables import markdown as decode_markdown
from flashcore.bench.host import markdown as host_markdown
from flashcore.bench.reporting.report import (
    TITLES,
    conditions,
    eager_table,
    left_out,
    window_lines,
    worst_lines,
)
from flashcore.bench.reporting.studies import masks_table, packed_decode_table, steps_table
from flashcore.bench.reporting.tables import (
    Document,
    dtypes,
    error_table,
    group_sections,
    group_table,
    means_table,
    peers_table,
    rates_table,
    seed_table,
    summary,
    where,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmarks/results/h200.json")
HOST_RESULTS = Path("benchmarks/results/h200-host.json")
BACKWARD_RESULTS = Path("benchmarks/results/h200-gradients.json")
DECODE_RESULTS = Path("benchmarks/results/h200-decode.json")
MASK_RESULTS = Path("benchmarks/results/h200-masks.json")
PACKED_RESULTS = Path("benchmarks/results/h200-packed-decode.json")
STEP_RESULTS = Path("benchmarks/results/h200-steps.json")

# The models of scripts/bench_training.py, in words.
TRAINING = {
    "llama": "Llama of 1.1 billion parameters in Transformers, eager, H32/8 D64",
    "gpt": "GPT of 124 million parameters, torch.compile, H12 D64",
}
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


class MarkerError(ValueError):
    """A page does not have exactly one begin marker followed by one end marker."""


def readme_section(document: Document, folder: Path) -> str:
    """Return what README.md says."""
    plot = _plot(folder, RESULTS.with_suffix(".png").as_posix())
    return "\n\n".join(
        [
            f"{where(document)}; medians of one run, kernel time without the host's. Beside the "
            "fastest of all peers on each shape; `random` are shapes drawn by chance, which nobody "
            "tuned for:",
            means_table(document),
            f"{summary(document)} All shapes, errors, limits and what was tried: "
            "[docs/performance.md](docs/performance.md).",
            *plot,
        ]
    )


def performance_section(document: Document, folder: Path) -> str:
    """Return what docs/performance.md says."""
    name = f"../{RESULTS.as_posix()}"
    report = Path(name).with_suffix(".md").as_posix()
    rows = document["results"]
    lines = [*worst_lines(rows), *window_lines(rows), *left_out(document)]
    has_report = (folder / RESULTS.with_suffix(".md")).is_file()
    others = f", the other columns and errors in [{Path(report).name}]({report})" * has_report
    return "\n\n".join(
        [
            f"From [{RESULTS.name}]({name}){others}. {conditions(document)}",
            "In short:",
            means_table(document),
            summary(document),
            f"The seed's shape, {dtypes(document, 'seed')}:",
            seed_table(document),
            f"16k tokens, hidden size 2048, {dtypes(document, 'sweep')}:",
            group_table(document, "sweep"),
            *group_sections(document),
            "\n".join(f"- {line}" for line in lines),
            *_plot(folder, Path(name).with_suffix(".png").as_posix()),
        ]
    )


def numerics_section(document: Document, folder: Path) -> str:
    """Return what docs/numerics.md says."""
    del folder
    return (
        f"{where(document)}; inputs from N(0, 1), rows at the start and the end of the first and "
        f"the last head ([{RESULTS.name}](../{RESULTS.as_posix()})):\n\n{error_table(document)}"
    )


def _plot(root: Path, link: str) -> list[str]:
    """Return the plot as an image, where there is one."""
    exists = (root / RESULTS.with_suffix(".png")).is_file()
    return [f"![TFLOP/s over sequence length]({link})"] if exists else []


PAGES: dict[str, Callable[[Document, Path], str]] = {
    "README.md": readme_section,
    "docs/performance.md": performance_section,
    "docs/numerics.md": numerics_section,
}


def backward_section(document: Document, folder: Path) -> str:
    """Return what docs/backward-speed.md says."""
    source = f"[{BACKWARD_RESULTS.name}](../{BACKWARD_RESULTS.as_posix()})"
    parts = [f"From {source}. {conditions(document)}", means_table(document)]
    groups = dict.fromkeys(row["group"] for row in document["results"])
    for group in groups:
        parts += [f"{TITLES[group]} ({dtypes(document, group)}):", rates_table(document, group)]
    if "small" in groups:
        rows = [row for row in document["results"] if row["group"] == "small"]
        parts += ["Small calls, forward and backward by the clock:", eager_table(rows)]
    return "\n\n".join([*parts, *training_parts(folder)])


def gradients_section(document: Document, folder: Path) -> str:
    """Return what README.md says of gradients."""
    del folder
    return (
        f"{where(document)}; gradients of q, k and v, {dtypes(document, 'sweep')}, 16k tokens, "
        "hidden size 2048, full and causal, 1k to 16k tokens a sequence, deterministic; kernel "
        f"time, geometric means:\n\n{peers_table(document)}\n\nAll shapes: "
        "[docs/backward-speed.md](docs/backward-speed.md)."
    )


def training_parts(folder: Path) -> list[str]:
    """Return a sentence and a table of whole training steps; nothing where none was measured."""
    rows, sources = [], []
    for name, model in TRAINING.items():
        path = folder / RESULTS.with_name(f"{RESULTS.stem}-training-{name}.json")
        if not path.is_file():
            continue
        sources.append(f"[{path.name}](../{path.relative_to(folder).as_posix()})")
        document = json.loads(path.read_text(encoding="utf-8"))
        for row in document["results"]:
            if "tokens_per_second" in row:
                rows.append(
                    f"| {model}, B{document['batch']} S{document['seqlen']} "
                    f"| {row['implementation']} | {row['tokens_per_second']:,.0f} "
                    f"| {row['flashcore_over_this']:.3f} | {row['peak_gib']:.1f} |"
                )
    if not rows:
        return []
    head = "| step | attention | tokens a second | flashcore over this | peak GiB |"
    table = "\n".join([head, "| --- | --- | --- | --- | --- |", *rows])
    return [f"Whole training steps ({' and '.join(sources)}):", table]


def study_section(source: Path, draw: Callable[[Document], str]) -> Callable[[Document, Path], str]:
    """Return what makes a section of one table, which `draw` draws, of the file `source`."""

    def section(document: Document, folder: Path) -> str:
        del folder
        link = f"[{source.name}](../{source.as_posix()})"
        return f"{where(document)} ({link}); {document['method']}.\n\n{draw(document)}"

    return section


SOURCES: dict[Path, dict[str, Callable[[Document, Path], str]]] = {
    RESULTS: PAGES,
    HOST_RESULTS: {"docs/host-overhead.md": study_section(HOST_RESULTS, host_markdown)},
    BACKWARD_RESULTS: {
        "README.md": gradients_section,
        "docs/backward-speed.md": backward_section,
    },
    DECODE_RESULTS: {"docs/serving-kernels.md": study_section(DECODE_RESULTS, decode_markdown)},
    MASK_RESULTS: {"docs/backward.md": study_section(MASK_RESULTS, masks_table)},
    PACKED_RESULTS: {"docs/serving-kernels.md": study_section(PACKED_RESULTS, packed_decode_table)},
    STEP_RESULTS: {"docs/serving-kernels.md": study_section(STEP_RESULTS, steps_table)},
}
# Whose markers have names.
NAMES = {
    BACKWARD_RESULTS: "gradients",
    MASK_RESULTS: "masks",
    PACKED_RESULTS: "packed-decode",
    STEP_RESULTS: "steps",
}


def filled(text: str, section: str, page: str, name: str = "") -> str:
    """Return `text` with `section` between its markers, those of `name`. Raises MarkerError."""
    begin = BEGIN.replace(" -->", f" {name} -->") if name else BEGIN
    head, _, rest = text.partition(begin)
    old, end, tail = rest.partition(END)
    opens, closes = text.count("<!-- results:begin"), text.count(END)
    if text.count(begin) != 1 or not end or "<!-- results:" in old or opens != closes:
        raise MarkerError(f"{page} needs one line {begin} and below it one line {END}")
    return f"{head}{begin}\n{section}\n{END}{tail}"


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
        document = json.loads((root / source).read_text(encoding="utf-8"))
        for page, section in pages.items():
            path = root / page
            text = path.read_text(encoding="utf-8")
            wanted = filled(text, section(document, root), page, NAMES.get(source, ""))
            if wanted != text:
                stale.append(page)
                if not check:
                    path.write_text(wanted, encoding="utf-8")
    return stale


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
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
