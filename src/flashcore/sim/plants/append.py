"""This module plants bugs in the kernel that appends to a cache; see plants.py
(tests/plants/test_sim_plants_append.py)."""

from __future__ import annotations

from flashcore.compile.plant import Plant, by_name

_FILE = "append/append_kvcache.cuh"

PLANTS_APPEND = by_name(
    Plant(
        name="append-no-room",
        title="a token without room is written",
        file=_FILE,
        find="if (place >= int64_t(p.columns) * p.page_size) return;",
        replace=";",
        caught_by="out-of-bounds",
    ),
    Plant(
        name="append-any-page",
        title="a page is not checked",
        file=_FILE,
        find="if (page < 0 || page >= p.num_pages) return;",
        replace=";",
        caught_by="out-of-bounds",
    ),
    Plant(
        name="append-length-unclamped",
        title="a length is not clamped",
        file=_FILE,
        find="return clamped(gmem_load(p.seqlens_k + sequence), 0, p.columns * p.page_size);",
        replace="return gmem_load(p.seqlens_k + sequence);",
        caught_by="out-of-bounds",
        or_by=("wrong-result",),
    ),
    Plant(
        name="append-position-unclamped",
        title="a position is not clamped",
        file=_FILE,
        find="return position < p.rotary_rows ? int(position) : p.rotary_rows - 1;",
        replace="return int(position);",
        caught_by="out-of-bounds",
    ),
    Plant(
        name="append-rows-of-no-sequence",
        title="rows behind the last sequence are appended",
        file=_FILE,
        find="if (!at.is_any) return;",
        replace=";",
        caught_by="wrong-result",
        or_by=(
            "double-write",
            "unwritten-output",
        ),
    ),
    Plant(
        name="append-late-end",
        title="a sequence is found by its beginning",
        file=_FILE,
        find="if (end_of(cu_seqlens, middle + 1, rows) <= row) {",
        replace="if (end_of(cu_seqlens, middle + 1, rows) < row) {",
        caught_by="wrong-result",
        or_by=("double-write",),
    ),
    Plant(
        name="append-wrong-sign",
        title="the angle has the other sign",
        file=_FILE,
        find="from_float<Element>(a * c - b * s)",
        replace="from_float<Element>(a * c + b * s)",
        caught_by="wrong-result",
    ),
    Plant(
        name="append-neighbours-turn",
        title="pairs are neighbours",
        file=_FILE,
        find="const int first = INTERLEAVED ? 2 * i : i;",
        replace="const int first = 2 * i;",
        caught_by="wrong-result",
        or_by=(
            "double-write",
            "unwritten-output",
        ),
    ),
    Plant(
        name="append-rest-left",
        title="what does not turn is not moved",
        file=_FILE,
        find="for (int i = 2 * half + lane_idx(); i < dim; i += 32) {",
        replace="for (int i = dim + lane_idx(); i < dim; i += 32) {",
        caught_by="wrong-result",
        or_by=("unwritten-output",),
    ),
    Plant(
        name="append-values-as-keys",
        title="values have the strides of keys",
        file=_FILE,
        find="const RowStrides& to = is_key ? p.k_cache_strides : p.v_cache_strides;",
        replace="const RowStrides& to = p.k_cache_strides;",
        caught_by="wrong-result",
        or_by=(
            "out-of-bounds",
            "double-write",
        ),
    ),
    Plant(
        name="append-stale-length",
        title="the new length does not count new tokens",
        file=_FILE,
        find="gmem_store(p.lengths + sequence, int(after < capacity ? after : capacity));",
        replace="gmem_store(p.lengths + sequence, tokens_before(p, sequence));",
        caught_by="wrong-result",
    ),
    Plant(
        name="append-first-query",
        title="queries stand at the first new token",
        file=_FILE,
        find="  if (p.queries == 0) {",
        replace="  if (p.queries == 3) {",
        caught_by="wrong-result",
    ),
    Plant(
        name="append-page-of-the-first",
        title="every sequence writes to the pages of the first one",
        file=_FILE,
        find="const int64_t row_of_table = int64_t(at.sequence) * p.table_stride;",
        replace="const int64_t row_of_table = 0;",
        caught_by="double-write",
        or_by=("wrong-result",),
    ),
    Plant(
        name="append-place-in-sequence",
        title="a token's row in its page is counted from the sequence's start",
        file=_FILE,
        find="(place % p.page_size) * to.row",
        replace="place * to.row",
        caught_by="out-of-bounds",
        or_by=("wrong-result", "double-write"),
    ),
    Plant(
        name="append-at-the-front",
        title="new tokens are written from the sequence's first place on",
        file=_FILE,
        find="int64_t(tokens_before(p, at.sequence)) + at.token;",
        replace="int64_t(at.token);",
        caught_by="wrong-result",
    ),
)
