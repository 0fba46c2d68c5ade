"""This module plants bugs in how a tree mask, of the last keys of each sequence, comes to its
scores; see plants.py (tests/plants/test_sim_plants_trees.py)."""

from __future__ import annotations

from typing import Any

from flashcore.compile.plant import Plant, by_name

_MASK = "tile/mask.cuh"
_SEQUENCE = "tile/sequence.cuh"
_TILE = "fwd_sm90/mask_tile_sm90.cuh"

# Trees that begin at the last key of a key tile, and in the middle of one; fewer keys than queries.
CALL: dict[str, Any] = {
    "lengths": (67, 2, 90),
    "page_size": 16,
    "seqlen_q": 4,
    "num_heads_q": 4,
    "num_heads_kv": 2,
    "tree": True,
    "seed": 5,
}
TILE: dict[str, Any] = {"block_m": 64, "block_n": 32, "num_stages": 2, "min_blocks": 1}
# A whole tree, one token, a part of a tree, and behind the trees' memory a chunk longer than them.
# Heads of a group are folded in one kernel, so there is a call without groups.
FOLDED_CALL: dict[str, Any] = CALL | {
    "lengths": (67, 33, 300, 60),
    "lengths_q": (5, 1, 3, 9),
    "tree_size": 5,
}
PACKED_CALL: dict[str, Any] = FOLDED_CALL | {"num_heads_kv": 4}

# In both kernels.
PLANTS_TREES = by_name(
    Plant(
        name="tree-at-the-front",
        title="a tree is of a sequence's first keys",
        file=_MASK,
        find="return MASK_IS_TREE ? p.seqlen_k - (FOLDED ? p.num_queries : p.seqlen_q) : 0;",
        replace="return 0;",
        caught_by="out-of-bounds",
    ),
    Plant(
        name="tree-as-wide-as-rows",
        title="a tree has a column for each row of folded heads",
        file=_MASK,
        find="(FOLDED ? p.num_queries : p.seqlen_q) : 0;",
        replace="p.seqlen_q : 0;",
        caught_by="out-of-bounds",
        or_by=("wrong-result",),
    ),
    Plant(
        name="tree-row-of-a-row",
        title="a tree has a row for each row of folded heads",
        file=_MASK,
        find="return MASK_IS_TREE ? query_of(p, row) : row;",
        replace="return row;",
        caught_by="out-of-bounds",
        or_by=("wrong-result",),
    ),
    Plant(
        name="tree-first-key-lost",
        title="a key tile whose last key alone is of the tree counts as one before it",
        file=_MASK,
        find="key_begin + KEYS <= first_masked_key(p);",
        replace="key_begin + KEYS <= first_masked_key(p) + 1;",
        caught_by="wrong-result",
    ),
)
PLANTS_TREES_WMMA = by_name(
    Plant(
        name="tree-read-before",
        title="columns before a tree's first are read",
        file=_MASK,
        find="(!MASK_IS_TREE || col >= 0)",
        replace="true",
        caught_by="out-of-bounds",
    ),
)
PLANTS_TREES_SM90 = by_name(
    Plant(
        name="tree-copied-before",
        title="columns before a tree's first are copied",
        file=_TILE,
        find="const int begin = max_i(tree_begin, 0);",
        replace="const int begin = 0;",
        caught_by="out-of-bounds",
    ),
    Plant(
        name="tree-copied-behind",
        title="columns behind a tree's last are copied",
        file=_TILE,
        find="min_i(p.seqlen_k - n_block * BLOCK_N, BLOCK_N) - begin;",
        replace="BLOCK_N - begin;",
        caught_by="out-of-bounds",
    ),
    Plant(
        name="tree-hides-before",
        title="keys before a tree, in its key tile, are hidden",
        file=_TILE,
        find="{{0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u}}",
        replace="{{0, 0, 0, 0}}",
        caught_by="wrong-result",
    ),
    Plant(
        name="tree-under-ones",
        title="lanes write a tree's elements while others write ones there",
        file=_TILE,
        find="    warp_sync();  // orders the ones before other lanes' elements below",
        replace="",
        caught_by="race",
    ),
    Plant(
        name="tree-taken-again",
        title="a key tile before a tree takes what was copied for the one behind it",
        file=_TILE,
        find="    if (is_before_mask<BLOCK_N>(p, n_block * BLOCK_N)) return;",
        replace="",
        caught_by="wrong-result",
        or_by=("uninitialized-read",),
    ),
    Plant(
        name="tree-not-copied",
        title="a tree's first key tile is not copied",
        file=_TILE,
        find="n_block < n_block_begin || is_before_mask<BLOCK_N>(p, n_block * BLOCK_N)",
        replace="n_block < n_block_begin || is_before_mask<BLOCK_N>(p, (n_block - 1) * BLOCK_N)",
        caught_by="wrong-result",
        or_by=("uninitialized-read",),
    ),
)
OF_WMMA = PLANTS_TREES | PLANTS_TREES_WMMA
OF_SM90 = PLANTS_TREES | PLANTS_TREES_SM90

# Of packed queries, in both kernels.
PLANTS_PACKED_TREES = by_name(
    Plant(
        name="packed-tree-of-the-longest",
        title="a sequence of more queries than trees have rows reads one",
        file=_SEQUENCE,
        find="num_queries > p.lengths.tree_size ? 0x7fffffff : num_keys - num_queries;",
        replace="num_keys - num_queries;",
        caught_by="out-of-bounds",
    ),
    Plant(
        name="packed-tree-whole",
        title="a tree begins as many keys before the end as it has columns, not queries",
        file=_SEQUENCE,
        find="0x7fffffff : num_keys - num_queries;",
        replace="0x7fffffff : num_keys - p.lengths.tree_size;",
        caught_by="wrong-result",
    ),
)
# The portable kernel folds heads only where blocks share keys.
PLANTS_PACKED_TREES_SM90 = by_name(
    Plant(
        name="packed-tree-of-rows",
        title="heads that are folded count as queries of a tree",
        file=_SEQUENCE,
        find="tree_begin(p, num_queries, own.seqlen_k);",
        replace="tree_begin(p, rows_of_queries(p, num_queries), own.seqlen_k);",
        caught_by="wrong-result",
    ),
)
