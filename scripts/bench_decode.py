"""Measure decoding over caches of true lengths: flashcore beside FlashAttention-3.

    python scripts/bench_decode.py --json benchmarks/results/h200-decode.json
    python scripts/bench_decode.py --tiny  # a rehearsal, on any machine

flashcore.bench.decoding says what is measured; FlashAttention-3 is, where `flash_attn_interface`
can be imported. `python scripts/readme_results.py` brings the file into docs/serving-kernels.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from flashcore.bench import decoding
from flashcore.bench.document import write

TINY = (decoding.Cell(2, 4, 2, 64, 300), decoding.Cell(1, 2, 2, 128, 70))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run what the command line asks for, and return the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit-s", type=float, default=300, help="no new cell after that")
    parser.add_argument("--tiny", action="store_true", help="two small cells")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("torch sees no GPU here; --tiny rehearses without one")
    started = time.monotonic()
    document = decoding.run(
        device,
        TINY if options.tiny else decoding.CELLS,
        options.rounds,
        is_over=lambda: time.monotonic() - started > options.limit_s,
    )
    print(decoding.markdown(document))
    for row in document["results"]:
        if "skipped" in row:
            print(f"{row['cell']}, {row['what']}: {row['library']} has no time: {row['skipped']}")
    write(options.json, document)
    return document


if __name__ == "__main__":
    main()
