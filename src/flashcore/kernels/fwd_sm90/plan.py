"""Say what a plan of the Hopper kernel is; those for a problem are in candidates.py."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashcore.kernels.fwd_sm90 import tiles as tiles_sm90
from flashcore.kernels.fwd_sm90.float8 import strips as strips_sm90
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.problem.problem import PACKS_QUERIES

if TYPE_CHECKING:
    pass

KERNEL = "attn_fwd_sm90"
ARCH = tiles_sm90.ARCH
GATES = ("qk", "softmax", "pv", "tile")  # pv_serial takes apart what only the portable kernel does
# A stage shows nothing but itself: no turns, no shared rows. Nor is a rescale put off.
OFF_UNDER_A_GATE: Any = {"ping_pong": False, "key_slices": 1, "num_splits": 1, "stream_k": False}

Q_BUFFERS = (1, 2)
# In which O may leave. More take longer, but leave shared memory for stages.
O_PARTS = (1, 2, 4)

_BARRIER_BYTES = 8
_COORD_BYTES = 4 * 16  # places of four row tiles
_SPLIT_BYTES = 4 * 16 + 16  # which part of their keys, and who was last (tile/shares.cuh)
_STREAM_BYTES = 4 * 4  # which key tiles, and where shares lie (tile/stream_k.cuh)
_FEED_BYTES = 32  # tile/schedule_varlen.cuh
_END_BYTES = 2 * 4  # of a stage of K and one of V (fwd_sm90/float8/float8_sm90.cuh)
CONVERTER_REGISTERS = 64


@dataclass(frozen=True, slots=True)
class Sm90Plan(Plan):
    """A plan is one compiled form of the Hopper kernel. See `Plan`.

    `ping_pong`: consumer warpgroups take turns at issuing to the tensor cores; `lazy_rescale`: the
    output is rescaled only when a maximum moved far; `q_buffers`: row tiles whose Q there is room
    for; `o_parts`: in how many parts, one after another, O leaves through its buffer; `key_slices`:
    consumers that share the keys of 64 rows; `num_splits`: blocks that share the keys of a row
    tile, of which the machine code knows only whether there are any; with `batch_invariant` rows
    take no votes; `mask_load_bytes`: how much of a mask tensor is copied at once, 16, 8 or 4, or 1
    for element by element; `mask_is_row`: all queries share its row; `mask_is_shifted`: its rows
    start anywhere in what is copied at once, 8 elements; `fewest_splits`: what `num_splits` must be
    at least, see problem/exactness.py; `load_stages`: tiles of K and V for which there is room as
    bytes, of 8-bit caches, beside the `num_stages` that are converted; 0 of others, and with
    `strips` of 8 rows, the warps of which share the keys of a tile of 8 bits
    (fwd_sm90/float8/few_rows_sm90.cuh; 0 where warpgroups have the tile); `whole_rows`: a box of a
    page has all columns of its rows, see obstacles.py; `loaders`: warps that load, of two one keys
    and one values.
    """

    ping_pong: bool = False
    lazy_rescale: bool = True
    q_buffers: int = 1
    o_parts: int = 1
    key_slices: int = 1
    num_splits: int = 1
    mask_load_bytes: int = 0
    mask_is_row: bool = False
    mask_is_shifted: bool = False
    fewest_splits: int = 1
    load_stages: int = 0
    strips: int = 0
    whole_rows: bool = False
    loaders: int = 1

    @property
    def params_struct(self) -> str:
        """Return the name of the parameter struct: AttnParams behind the tensor maps."""
        return "AttnSm90Params"

    @property
    def starts_early(self) -> bool:
        """Return True: before it touches global memory it waits for others (ptx/grid.cuh)."""
        return True

    @property
    def draws_tiles(self) -> bool:
        """Return whether blocks draw row tiles from a counter in global memory
        (fwd_sm90/schedule_sm90.cuh, tile/schedule_varlen.cuh)."""
        return self.deals_packed or (self.has_window_right and not self.shares_keys)

    @property
    def deals_packed(self) -> bool:
        """Return whether a warp deals out the row tiles of packed sequences, which have no ranges
        (tile/schedule_varlen.cuh)."""
        return self.varlen in PACKS_QUERIES and not self.stream_k

    @property
    def shares_keys(self) -> bool:
        """Return whether several blocks may compute one row tile (tile/shares.cuh)."""
        return self.num_splits > 1 or self.stream_k

    @property
    def arch_suffix(self) -> str:
        """Return "a", as WGMMA and setmaxnreg belong to sm_90a."""
        return "a"

    @property
    def num_consumers(self) -> int:
        """Return the number of consumer warpgroups; some may share their 64 query rows."""
        return self.row_groups * self.key_slices

    @property
    def row_groups(self) -> int:
        """Return the number of warpgroups that have rows of their own."""
        return -(-self.block_m // tiles_sm90.ROWS_OF_CONSUMER)

    @property
    def num_warps(self) -> int:
        """Return the number of warps: the consumers', the producer's warpgroup, and the one that
        converts 8-bit caches."""
        return 4 * (self.num_consumers + 1 + self.converts)

    @property
    def has_float8(self) -> bool:
        """Return whether k and v have 8 bits."""
        return self.cache_dtype != ""

    @property
    def converts(self) -> bool:
        """Return whether a warpgroup turns tiles of 8 bits into those that WGMMA reads."""
        return self.load_stages > 0

    @property
    def rows_of_group(self) -> int:
        """Return the rows of Q that a consumer has in shared memory."""
        return min(self.block_m, tiles_sm90.ROWS_OF_CONSUMER)

    @property
    def warp_strips(self) -> int:
        """Return the strips that a warp has; 0 where warpgroups have tiles."""
        return strips_sm90.strips_of_warp(self.strips, self.head_dim, self.head_dim_v)

    @property
    def warp_keys(self) -> int:
        """Return the keys of a tile that a warp has, where warps share them, else all."""
        return self.block_n * self.strips // (4 * self.warp_strips) if self.strips else self.block_n

    @property
    def chunk(self) -> int:
        """Return columns of a tile that lie together in shared memory, swizzled as one."""
        return tiles_sm90.chunk_of(self.head_dim, self.head_dim_v)

    @property
    def q_in_registers(self) -> bool:
        """Return whether consumers hold Q in registers (float8_sm90.cuh), where there are some."""
        return self.converts and self.head_dim <= 128

    @property
    def load_chunk(self) -> int:
        """Return columns of K and V that are loaded as one: `chunk`; of 8 bits up to 128, and as
        many as swizzled rows have where warps share a tile."""
        if self.strips:
            return strips_sm90.chunk_of_bytes(self.head_dim, self.head_dim_v)
        dims = tiles_sm90.padded_dims(self.head_dim, self.head_dim_v)
        return math.gcd(128, *dims) if self.has_float8 else self.chunk

    @property
    def smem_bytes(self) -> int:
        """Return dynamic shared memory of a block: Q, `num_stages` tiles of K and V, O, what
        consumers hand over, barriers."""
        qk_cols, v_cols = tiles_sm90.padded_dims(self.head_dim, self.head_dim_v)
        is_split = self.shares_keys  # then O leaves through global memory
        o_cols = -(-v_cols // self.chunk // self.o_parts) * self.chunk
        elements = self.block_m * self.q_buffers * qk_cols
        elements += 0 if is_split or self.strips else self.block_m * o_cols
        if not self.strips:
            elements += self.num_stages * self.block_n * (qk_cols + v_cols)
        # Consumers that share rows hand over O and the state of the softmax, in float32.
        shares = (self.key_slices - 1) * (self.out_cols // 2 + 4) * 128 * 4 + self.mask_bytes
        if self.strips:
            columns = sum(strips_sm90.loaded_dims(self.head_dim, self.head_dim_v))
            shares += self.num_stages * self.block_n * columns
            shares += strips_sm90.shared_bytes(self.warp_strips, self.out_cols)
        feed = _FEED_BYTES if self.deals_packed else _SPLIT_BYTES * is_split
        feed += _STREAM_BYTES * self.stream_k
        num_barriers = 2 * self.q_buffers * self.row_groups
        num_barriers += 4 * (self.num_stages + self.load_stages) + 2 * (self.key_slices > 1)
        shares += self.load_stages * (self.block_n * (qk_cols + v_cols) + _END_BYTES)
        return 2 * elements + shares + _BARRIER_BYTES * num_barriers + _COORD_BYTES + feed

    @property
    def box_rows(self) -> int:
        """Return the rows of a box of K and V: of a key tile, as far as they lie in one page."""
        return math.gcd(self.block_n, self.page_size)

    @property
    def mask_bytes(self) -> int:
        """Return shared memory for mask elements of all warps (fwd_sm90/mask_tile_sm90.cuh)."""
        if self.mask is None:
            return 0
        return self.num_consumers * tiles_sm90.mask_bytes(self.mask, self.mask_is_row, self.block_n)

    @property
    def row_warps(self) -> range:
        """Return the consumers' warps; the producer's warpgroup comes first."""
        return range(4, 4 * (self.num_consumers + 1))

    @property
    def is_persistent(self) -> bool:
        """Return True: a block takes several row tiles, one after the other."""
        return True

    @property
    def keys_backwards(self) -> bool:
        """Return True: a row tile visits its key tiles from last to first."""
        return True

    @property
    def role_registers(self) -> tuple[int, ...]:
        """Return the registers of a consumer and of a producer thread, and of one that converts;
        setmaxnreg moves them from what the launch gave everybody, `max_registers`: a block that
        asks for more than it was given waits for ever."""
        pool = self.max_registers * (self.num_warps // 4) - CONVERTER_REGISTERS * self.converts
        # At least; a warp of packed sequences deals out tiles. With lengths, many chunks of K take
        # more (head_dim 224/40 spilled with a mask and a window), and a narrow O leaves some. Pages
        # take the most, a lane each of its own tile, and so does who finds its range of work.
        many_chunks = self.varlen == "keys" and self.head_dim > 128 >= self.head_dim_v
        producer = 32 if self.varlen in PACKS_QUERIES or many_chunks else 24
        if self.page_size or self.stream_k:
            producer = 48 if self.varlen in PACKS_QUERIES or self.has_float8 else 40
            if self.varlen in PACKS_QUERIES and self.key_slices > 1:  # consumers lose none
                producer = 56
            if self.stream_k and self.num_consumers == self.min_blocks == 1:
                producer = 56
            elif self.stream_k and self.head_dim_v <= 32:  # a narrow O leaves some
                producer = 48
        consumer = min(240, (pool - producer) // self.num_consumers // 8 * 8)
        producer = min(max(40, producer), pool - consumer * self.num_consumers)
        return (consumer, producer, *[CONVERTER_REGISTERS] * self.converts)

    @property
    def overlaps(self) -> bool:
        """Return whether the softmax of a key tile runs beside P V of the tile before it, whose
        operands stay in registers as long: not where mask, soft-capping and windows take too
        many."""
        if self.mask is not None and self.has_softcap:
            return False
        if max(self.head_dim, self.head_dim_v) <= 128:
            return True
        if self.mask is not None and self.mask_load_bytes < 4:
            return False
        return not (self.has_window_left and (self.mask is not None or self.has_softcap))

    @property
    def old_max_serves(self) -> bool:
        """Return whether old maxima are tried (tile/softmax.cuh; docs/ladder-masks.md): beside a
        mask up to head_dim 128, as 256 columns of O leave no registers for both."""
        if self.mask is not None and max(self.head_dim, self.head_dim_v) > 128:
            return False
        rows_of = (None,) if self.mask_is_row else (None, "bool", "float32")
        return not self.has_softcap and self.mask in rows_of

    @property
    def finds_out_by_map(self) -> bool:
        """Return whether out is written by its tensor map alone, in the rows of q's heads."""
        return not (self.shares_keys or self.folds_heads or self.strips)

    def machine_code(self) -> Sm90Plan:
        """Return the plan that stands for all with the same machine code: see `Plan`."""
        folded = int(bool(self.constants()["FOLDED"]))
        return dataclasses.replace(self, num_splits=min(2, self.num_splits), folds_heads=folded)

    def constants(self) -> dict[str, object]:
        """Return the kernel source's compile-time constants."""
        consumer_registers, producer_registers, *converters = self.role_registers
        # Named, as a slotted dataclass is another class than the one that super() sees here.
        constants = Plan.constants(self)
        del constants["NUM_WARPS"], constants["LOAD_BYTES"], constants["KEY_TILES_OF_CHUNK"]
        return constants | {
            "CONSUMER_REGISTERS": consumer_registers,
            "PRODUCER_REGISTERS": producer_registers,
            "CONVERTER_REGISTERS": (*converters, producer_registers)[0],
            "LOAD_STAGES": self.load_stages if self.converts else self.num_stages,
            "LOAD_CHUNK": self.load_chunk,
            "WHOLE_ROWS": self.whole_rows,
            "LOADERS": self.loaders,
            "NUM_CONVERTERS": int(self.converts),
            "STRIPS": self.strips,
            "WARP_STRIPS": max(1, self.warp_strips),
            "Q_IN_REGISTERS": self.q_in_registers,
            "MathElement": "float16" if self.has_float8 else constants["Element"],
            "PING_PONG": self.ping_pong,
            "LAZY_RESCALE": self.lazy_rescale
            and not (self.returns_max_score or self.batch_invariant),
            "OLD_MAX_SERVES": self.old_max_serves,
            "Q_BUFFERS": self.q_buffers,
            "O_PARTS": self.o_parts,
            "CHUNK": self.chunk,
            "KEY_SLICES": self.key_slices,
            "SPLIT_KV": self.shares_keys,
            "OVERLAPS": self.overlaps,
            # By a vote of rows, as the lazy rescale is.
            "TANH_BY_POLYNOMIAL": self.overlaps and not self.batch_invariant,
            "MASK_LOAD_BYTES": self.mask_load_bytes,
            "MASK_IS_ROW": self.mask_is_row,
            "MASK_IS_SHIFTED": self.mask_is_shifted,
            "MASK_BY_ADDITION": True,
        }

    def describe(self) -> str:
        """Return one line for people."""
        splits = f" splits {self.num_splits}" if self.num_splits > 1 else ""
        splits += " stream-K" if self.stream_k else ""
        loads = f" loads ahead {self.load_stages}" if self.converts else ""
        loads += f" strips {self.strips}" if self.strips else ""
        return Plan.describe(self) + splits + loads
