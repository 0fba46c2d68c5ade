"""This module plants bugs in how keys and values are found in the pages of a cache; see plants.py
(tests/plants/test_sim_plants_pages.py)."""

from __future__ import annotations

from typing import Any

from flashcore.compile.plant import Plant, by_name

# Sequences that end inside of a box and of a page, and one that is told to have more keys than the
# table reaches. The first page belongs to none of them.
CALL: dict[str, Any] = {
    "lengths": (33, 0, 20, 80),
    "told": (33, -5, 20, 10**4),
    "page_size": 16,
    "max_pages": 5,
    "seqlen_q": 40,
    "astray": True,
    "seed": 12,
}
WIDE_CALL = CALL | {"head_dim": 128, "head_dim_v": 128}
_PAGES = "tile/pages.cuh"
_ROWS = "tile/rows.cuh"
_BOXES = "fwd_sm90/pages_sm90.cuh"
_PRODUCER = "fwd_sm90/producer_sm90.cuh"

# In both kernels.
PLANTS_PAGES = by_name(
    Plant(
        name="page-unchecked",
        title="an entry of the page table is believed, whatever it is",
        file=_PAGES,
        find="return clamp_i(entry, 0, p.pages.num_pages - 1);",
        replace="return entry;",
        caught_by="out-of-bounds",
        or_by=("wrong-result",),  # TMA reads zeros where there is no page
    ),
    Plant(
        name="page-of-the-first",
        title="every sequence takes the pages of the first one",
        file=_PAGES,
        find="p.pages.page_table + int64_t(batch_idx) * p.pages.page_table_stride;",
        replace="p.pages.page_table;",
        caught_by="wrong-result",
    ),
    Plant(
        name="page-length-unclamped",
        title="a sequence is believed to have more keys than the page table reaches",
        file="tile/sequence.cuh",
        find="own.seqlen_k = "
        "clamp_i(gmem_load(p.lengths.seqlens_k + block.batch_idx), 0, p.seqlen_k);",
        replace="own.seqlen_k = gmem_load(p.lengths.seqlens_k + block.batch_idx);",
        caught_by="out-of-bounds",
    ),
)

PLANTS_PAGES_WMMA = by_name(
    Plant(
        name="page-of-no-key",
        title="the page of a row behind the last key is looked up, too",
        file=_ROWS,
        find="    if (!valid) return head;",
        replace="",
        caught_by="out-of-bounds",
    ),
    Plant(
        name="page-row-unbounded",
        title="a key's row in its page is counted from the sequence's start",
        file=_ROWS,
        find="int64_t(key % PAGE_SIZE) * strides.row",
        replace="int64_t(key) * strides.row",
        caught_by="out-of-bounds",
        or_by=("wrong-result",),
    ),
    Plant(
        name="page-of-the-tile",
        title="all rows of a key tile lie in the page of its first",
        file=_ROWS,
        find="gmem_load(entries + key / PAGE_SIZE)",
        replace="gmem_load(entries + first / BLOCK_N * BLOCK_N / PAGE_SIZE)",
        caught_by="wrong-result",
    ),
)

PLANTS_PAGES_SM90 = by_name(
    Plant(
        name="page-box-whole",
        title="boxes of values go on behind the sequence's last key, to the end of the page",
        file=_BOXES,
        find="opaque(min_i(BOX_ROWS, num_keys - key));",
        replace="opaque(key < num_keys ? BOX_ROWS : 0);",
        caught_by="wrong-result",
    ),
    Plant(
        name="page-box-not-zeroed",
        title="where a box has no key of the sequence, some page takes the place of zeros",
        file=_BOXES,
        find="params.k_map, full, 0, PAGE_SIZE, head, 0);",
        replace="params.k_map, full, 0, 0, head, 0);",
        caught_by="wrong-result",
    ),
    Plant(
        name="page-box-without-rows",
        title="a box of values without a key of the sequence starts where the map ends",
        file=_BOXES,
        find="    } else if (count > 0) {",
        replace="    } else if (count > -BLOCK_N) {",
        caught_by="misuse",
    ),
    Plant(
        name="page-box-believed",
        title="a tile whose first box has a key is believed to have no box without one",
        file=_BOXES,
        find="num_keys > n_block * BLOCK_N + (BLOCK_N - BOX_ROWS)",
        replace="num_keys > n_block * BLOCK_N",
        caught_by="misuse",
    ),
    Plant(
        name="page-box-behind-the-table",
        title="the entry of a box without a key of the sequence is looked up, too",
        file=_BOXES,
        find="own_box() < NUM_BOXES && key < num_keys;",
        replace="own_box() < NUM_BOXES;",
        caught_by="out-of-bounds",
    ),
    Plant(
        name="page-not-advanced",
        title="the page that is looked up ahead is that of the key tile at hand",
        file=_PRODUCER,
        find="pages.advance(s, keys, n_block - s - KEY_SLICES);",
        replace="pages.advance(s, keys, n_block - s);",
        caught_by="wrong-result",
        or_by=("out-of-bounds",),
    ),
    Plant(
        name="page-of-the-next-keys",
        title="values come from the page of the keys that are loaded before them",
        file=_BOXES,
        find="checked_page(params.attn, of_v[slice]);",
        replace="checked_page(params.attn, of_k[slice]);",
        caught_by="wrong-result",
    ),
    Plant(
        name="page-lanes-ahead",
        title="lanes load keys without the first one's having waited for the stage",
        file=_PRODUCER,
        find="      if (LOADS_BY_LANES) warp_sync();  // orders wait and announcement before "
        "all lanes' loads",
        replace="",
        caught_by="mbarrier",
        or_by=("race",),
    ),
    Plant(
        name="page-place-ahead",
        title="lanes read the row tile's place before the first one has written it",
        file=_PRODUCER,
        find="      warp_sync();  // orders the place before the other lanes read it",
        replace="",
        caught_by="race",
        or_by=("uninitialized-read",),
    ),
    Plant(
        name="page-two-leaders",
        title="two lanes of the producer's warp wait and announce",
        file=_PRODUCER,
        find="const bool leads = !WHOLE_WARP || lane_idx() == 0;",
        replace="const bool leads = !WHOLE_WARP || lane_idx() < 2;",
        caught_by="mbarrier",
        or_by=("race",),
    ),
    Plant(
        name="page-values-twice",
        title="the warp that loads keys loads values, too",
        file=_PRODUCER,
        find="const bool loads_v = LOADERS == 1 || loader == 1;",
        replace="const bool loads_v = true;",
        caught_by="mbarrier",
        or_by=("race", "deadlock"),
        plan={"stream_k": True, "loaders": 2},
    ),
    Plant(
        name="page-place-by-both",
        title="the warp that loads values tells consumers where the row tile is, too",
        file=_PRODUCER,
        find="const bool places = leads && loader == 0;",
        replace="const bool places = leads;",
        caught_by="race",
        or_by=("mbarrier", "deadlock"),
        plan={"stream_k": True, "loaders": 2},
    ),
)

# Of boxes that have all columns of a page's rows.
PLANTS_PAGES_WIDE = by_name(
    Plant(
        name="page-patterns-side-by-side",
        title="eight rows of keys are believed to follow the eight before, where another chunk is",
        file="tile/smem_tile.cuh",
        find="PATTERN_BYTES = GROUP == 8 ? CHUNKS * GROUP_BYTES : 8 * ROW_BYTES;",
        replace="PATTERN_BYTES = 8 * ROW_BYTES;",
        caught_by="wrong-result",
    ),
    Plant(
        name="page-groups-side-by-side",
        title="a box of values is believed to follow the one before, where another chunk is",
        file="tile/smem_tile.cuh",
        find="row / GROUP * (CHUNKS * GROUP_BYTES)",
        replace="row / GROUP * GROUP_BYTES",
        caught_by="wrong-result",
    ),
    Plant(
        name="page-rows-as-groups",
        title="a page is looked for by its first row, where groups of rows are counted",
        file=_BOXES,
        find="rows_before / 8 : page",
        replace="rows_before : page",
        caught_by="wrong-result",
    ),
)

OF_WMMA = PLANTS_PAGES | PLANTS_PAGES_WMMA
OF_SM90 = PLANTS_PAGES | PLANTS_PAGES_SM90
