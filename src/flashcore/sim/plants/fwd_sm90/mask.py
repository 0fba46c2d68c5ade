"""This module plants bugs in how the Hopper kernel's warps bring a mask tensor's elements to their
scores."""

from __future__ import annotations

from flashcore.compile.plant import Plant, by_name

_TILE = "fwd_sm90/mask_tile_sm90.cuh"
_SHIFTED = {"mask_is_shifted": True}

PLANTS_MASK_SM90 = by_name(
    Plant(
        name="mask-not-awaited",
        title="mask elements are read while their copies are under way",
        file=_TILE,
        find="    cp_async_wait<0>();",
        replace="",
        caught_by="async-pending",
        or_by=("race",),
    ),
    Plant(
        name="mask-of-other-lanes",
        title="lanes do not wait for what other lanes have copied",
        file=_TILE,
        find="    warp_sync();  // orders every lane's arrived copies before the reads below",
        replace="",
        caught_by="race",
        or_by=("uninitialized-read",),  # of the first tile
    ),
    Plant(
        name="mask-overwritten",
        title="the next mask tile is copied over the one that other lanes still read",
        file=_TILE,
        find="    warp_sync();  // orders the reads before the next copies",
        replace="",
        caught_by="race",
    ),
    Plant(
        name="mask-past-end",
        title="the packet in which a row ends is copied whole",
        file=_TILE,
        find="key >= 0 && (count <= 0 || count >= MASK_PACKET);",
        replace="key >= 0;",
        caught_by="out-of-bounds",
        or_by=("race", "async-pending"),  # it is copied twice
    ),
    Plant(
        name="mask-row-mixed-up",
        title="a lane's second row gets the mask of the first",
        file=_TILE,
        find="found.pair[i].word[0] = matrix.reg[i];",
        replace="found.pair[i].word[0] = matrix.reg[i / 2 * 2];",
        caught_by="wrong-result",
    ),
    Plant(
        name="mask-one-tile-late",
        title="a mask tile is that of the key tile before",
        file=_TILE,
        find="const int key = n_block * BLOCK_N + col",
        replace="const int key = (n_block + KEY_SLICES) * BLOCK_N + col",
        caught_by="wrong-result",
        or_by=("race",),  # where a row's end is found, and copied once more
    ),
    Plant(
        name="mask-rows-one-tile-late",
        title="rows are copied from the key tile before",
        file=_TILE,
        find="row_start(p, row_begin + row) + (n_block * BLOCK_N + col)",
        replace="row_start(p, row_begin + row) + ((n_block + KEY_SLICES) * BLOCK_N + col)",
        caught_by="wrong-result",
        or_by=("out-of-bounds",),  # where the tensor ends
    ),
    Plant(
        name="mask-rows-past-end",
        title="rows are copied that the tensor does not have",
        file=_TILE,
        find="src, first < rows_left);",
        replace="src, rows_left > 0);",
        caught_by="out-of-bounds",
    ),
    Plant(
        name="mask-row-again",
        title="a lane copies one row to the places of all its rows",
        file=_TILE,
        find="src = src + ROWS * p.strides.mask.row;",
        replace="src = src + 0 * p.strides.mask.row;",
        caught_by="wrong-result",
    ),
    Plant(
        name="mask-front-whole",
        title="the packet that a row starts in is copied whole",
        file=_TILE,
        find="(key + begin < 0 || count < PACKET)) continue;",
        replace="count < PACKET) continue;",
        caught_by="out-of-bounds",
        or_by=("race", "async-pending"),  # it is copied twice
        plan=_SHIFTED,
    ),
    Plant(
        name="mask-front-not-copied",
        title="the packet that a row's part of a key tile starts in is not copied",
        file=_TILE,
        find="if (PACKET > 1 && starts) {",
        replace="if (false) {",
        caught_by="uninitialized-read",
        or_by=("wrong-result",),  # of a key tile before
        plan=_SHIFTED,
    ),
    Plant(
        name="mask-end-not-copied",
        title="the packet in which a row ends is not copied",
        file=_TILE,
        find="(lane < 16 ? FRONT > 0 : ends_here)",
        replace="lane < 16 && FRONT > 0",
        caught_by="uninitialized-read",
    ),
    Plant(
        name="mask-unshifted-copies",
        title="packets are copied from where a row starts, which is inside of one",
        file=_TILE,
        find="const auto src = row_src + -shift;",
        replace="const auto src = row_src;",
        caught_by="misaligned",
        plan=_SHIFTED,
    ),
    Plant(
        name="mask-ends-overlooked",
        title="a tile in which rows end is copied as if they went on",
        file=_TILE,
        find="const bool ends = key_begin + WIDTH > num_keys;",
        replace="const bool ends = false;",
        caught_by="out-of-bounds",
        plan=_SHIFTED,
    ),
    Plant(
        name="mask-shifted-past-end",
        title="the packet in which a shifted row ends is copied whole",
        file=_TILE,
        find="(key + begin < 0 || count < PACKET)) continue;",
        replace="key + begin < 0) continue;",
        caught_by="out-of-bounds",
        or_by=("race", "async-pending"),  # it is copied twice
        plan=_SHIFTED,
    ),
    Plant(
        name="mask-shifted-end-not-copied",
        title="the packet in which a shifted row ends is not copied",
        file=_TILE,
        find="if (PACKET > 1 && ends && key_begin < num_keys + PACKET) {",
        replace="if (false) {",
        caught_by="uninitialized-read",
        or_by=("wrong-result",),  # of a row tile before
        plan=_SHIFTED,
    ),
    Plant(
        name="mask-shifted-row-again",
        title="a lane copies one shifted row to the places of all its rows",
        file=_TILE,
        find="row_src = row_src + ROW_STEP * row_stride;",
        replace="row_src = row_src + 0 * row_stride;",
        caught_by="wrong-result",
        or_by=("race", "async-pending"),
        plan=_SHIFTED,
    ),
    Plant(
        name="mask-shift-forgotten",
        title="a row is read from where it would start if it were aligned",
        file=_TILE,
        find="accum_col(lane, 0) + shift(p, row_begin + first_row);",
        replace="accum_col(lane, 0);",
        caught_by="wrong-result",
        plan=_SHIFTED,
    ),
    Plant(
        name="mask-shift-of-another-row",
        title="all rows of a warp are read as if they were shifted as its first one is",
        file=_TILE,
        find="shift(p, row_begin + first_row);",
        replace="shift(p, row_begin);",
        caught_by="wrong-result",
        plan=_SHIFTED,
    ),
)
