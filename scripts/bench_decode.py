"""Measure decoding over caches of true lengths: flashcore beside FlashAttention-3.

    python scripts/bench_decode.py --seed 7 --json benchmarks/results/h200-decode.json
    python scripts/bench_decode.py --groups random --seed 7   # of cells, mixed and random
    python scripts/bench_decode.py --groups cells --only "one piece" "pages of 16"
    python scripts/bench_decode.py --tiny  # a rehearsal, on any machine

flashcore.bench.decoding says what is measured; FlashAttention-3 is, where `flash_attn_interface`
can be imported. Kernels are compiled first, on all cores. `python scripts/readme_results.py` brings
the file into docs/serving-kernels.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from flashcore.bench.decoding import measuring
from flashcore.bench.decoding.cells import CELLS, MIXED, Cell, random_cells
from flashcore.bench.decoding.tables import markdown
from flashcore.bench.document import write

TINY = (Cell(2, 4, 2, 64, 300), Cell(1, 2, 2, 128, 70))
GROUPS = ("cells", "mixed", "random")
RANDOM_CELLS = 12


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run what the command line asks for, and return the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit-s", type=float, default=300, help="no new cell after that")
    parser.add_argument("--tiny", action="store_true", help="two small cells")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--seed", type=int, default=0, help="of random cells")
    parser.add_argument("--only", nargs="+", default=[], help="kinds of caches, such as step")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("torch sees no GPU here; --tiny rehearses without one")
    cells: list[Cell] = []
    cells += CELLS if "cells" in options.groups else ()
    cells += [MIXED] if "mixed" in options.groups else []
    cells += random_cells(RANDOM_CELLS, options.seed) if "random" in options.groups else []
    started = time.monotonic()
    document = measuring.run(
        device,
        TINY if options.tiny else cells,
        options.rounds,
        is_over=lambda: time.monotonic() - started > options.limit_s,
        only=options.only,
    )
    print(markdown(document))
    for row in document["results"]:
        if "skipped" in row:
            print(f"{row['cell']}, {row['what']}: {row['library']} has no time: {row['skipped']}")
    write(options.json, document)
    return document


if __name__ == "__main__":
    main()
