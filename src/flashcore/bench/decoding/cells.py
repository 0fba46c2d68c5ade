"""This module holds the cells that measuring.py times: those of the pages, and some by chance."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

CHUNK = 512  # tokens of a prompt beside single tokens
_MOST_BYTES = 4 * 2**30  # of a random cell's cache, with its room
_MOST_HEADS = 128


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell is a batch of sequences with one query each.

    Args:
        batch: sequences.
        num_heads_q: of queries.
        num_heads_kv: of the cache.
        head_dim: of all.
        longest: tokens of the longest sequence, and the room of each.
        page_size: of a random cell; 0 of others, which are timed with several.
        chunk: queries of the first sequence where single tokens stand beside a prompt's part, and
            that sequence's tokens; 0: CHUNK of them, in `longest` tokens. With it all others are as
            long as the longest.
    """

    batch: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    longest: int
    page_size: int = 0
    chunk: int = 0

    @property
    def name(self) -> str:
        """Return the name for tables."""
        heads = f"H{self.num_heads_q}/{self.num_heads_kv}"
        name = f"B{self.batch} {heads} D{self.head_dim} {self.longest}"
        return f"{name}, chunk of {self.chunk}" if self.chunk else name

    def lengths(self) -> list[int]:
        """Return how many tokens each sequence has: log-normal around a sixth of the longest, which
        the first one has; the same in every run."""
        if self.chunk:
            return [self.chunk] + [self.longest] * (self.batch - 1)
        draw = random.Random(0)
        others = [
            min(self.longest, max(1, round(self.longest / 6 * draw.lognormvariate(0.0, 0.8))))
            for _ in range(self.batch - 1)
        ]
        return [self.longest, *others]


CELLS = (
    Cell(8, 32, 8, 128, 8192),
    Cell(64, 32, 8, 128, 8192),
    Cell(64, 64, 8, 128, 4096),
    Cell(32, 16, 2, 256, 8192),
    Cell(128, 32, 32, 64, 2048),
    Cell(1, 32, 8, 128, 131072),
    Cell(4, 128, 8, 128, 32768),
    Cell(256, 32, 8, 128, 1024),
    Cell(16, 32, 4, 64, 16384),
)
# A chunk of a prompt beside single tokens.
MIXED = Cell(64, 32, 8, 128, 4096, chunk=2048)


def random_cells(count: int, seed: int) -> list[Cell]:
    """Draw cells, all sizes log-uniform: batches of 1 to 256, 128 to 65536 tokens, 1 to 32 heads of
    k and v, groups of 1 to 16, head_dims of 32 to 256 in steps of 8, pages of 16 to 256 in steps of
    16.

    Args:
        count: how many, all different.
        seed: the same seed gives the same cells.
    """
    draw = random.Random(seed)

    def between(least: int, most: int, step: int = 1) -> int:
        value = math.exp(draw.uniform(math.log(least), math.log(most)))
        return max(least, min(most, round(value / step) * step))

    found: dict[Cell, None] = {}
    while len(found) < count:
        batch, longest, heads_kv = between(1, 256), between(128, 65536), between(1, 32)
        group, head_dim, page_size = between(1, 16), between(32, 256, 8), between(16, 256, 16)
        if 4 * batch * longest * heads_kv * head_dim > _MOST_BYTES:
            continue
        if heads_kv * group <= _MOST_HEADS:
            found[Cell(batch, heads_kv * group, heads_kv, head_dim, longest, page_size)] = None
    return list(found)
