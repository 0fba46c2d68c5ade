"""Say what a plan is, and what of one a problem decides. The rules for the portable kernel's tiles
are in kernels/fwd_wmma/tiles.py; selection/select.py chooses between the kernels.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashcore.problem.exactness import LARGE_SOFTCAP
from flashcore.problem.folding import can_fold
from flashcore.problem.problem import PACKS_QUERIES

if TYPE_CHECKING:
    from flashcore.problem import Problem

GATES = ("qk", "softmax", "pv", "tile", "pv_serial")

REGISTERS_PER_SM = 65536

KERNEL = "attn_fwd_wmma"
# The architectures that the compile gate compiles for.
SUPPORTED_ARCHS = (75, 80, 86, 89, 90, 100, 120)

# The simulator runs the code of an architecture that has cp.async.
SIM_ARCH = 80

# head_dim 64 keeps to this budget on every architecture; the compile gate enforces it.
HEAD_DIM_64_MAX_REGISTERS = 96
HEAD_DIM_64_MAX_SMEM_BYTES = 48 * 1024

# Sequences of one call may differ in length (tile/sequence.cuh): not at all, as packed rows
# (attention_varlen), in the number of keys (seqlens_k), or so with keys in pages (page_table).
VARLEN_KINDS = ("none", "packed", "keys", "pages", "packed_pages")
_MASK_KINDS = {None: 0, "bool": 1, "float16": 2, "bfloat16": 2, "float32": 2, "tree": 3}
_FLOAT8_ARCH = 89  # the first one that converts elements of 8 bits by an instruction
# Which part of the work is next, and who was last (attn_fwd_wmma.cuh); of packed queries one more.
_PIECES_BYTES = 8 * 4
_CUDA_TYPES = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float"}


def padded(cols: int) -> int:
    """Return columns as fragments have them: a multiple of 16."""
    return -(-cols // 16) * 16


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan is one compiled form of a kernel: everything that its source text depends on.

    `head_dim` and `head_dim_v` are the tensors' own; `block_m` query rows and `block_n` keys
    form a tile; `load_bytes` is the width of one global load; `mask` the dtype of the mask
    tensor or None; `varlen` one of VARLEN_KINDS; `folds_heads` how many heads of a group are
    rows of one, 0 where none are (problem/folding.py); `min_blocks` the blocks an SM that the
    registers must allow; `keys_of_chunk` how many keys one sum goes over, 0 for all
    (totals_wmma.cuh); `page_size` keys of a page, 0 where there are no pages (tile/pages.cuh);
    `has_sinks` whether a logit of each head joins the softmax; `cache_dtype` that of k and v
    where it is not `dtype`; `stream_k`: the device cuts the key tiles of all row tiles into
    equal ranges, one a block (tile/stream_k.cuh), or into pieces of `keys_of_chunk`, if there
    are some; `batch_invariant`: rows have the same bits whatever is beside them, which takes
    pieces of one length, too.
    """

    kernel: str
    arch: int
    dtype: str
    head_dim: int
    head_dim_v: int
    block_m: int
    block_n: int
    num_stages: int
    min_blocks: int
    load_bytes: int = 16
    has_window_left: bool = False
    has_window_right: bool = False
    has_softcap: bool = False
    softcap_is_large: bool = False
    mask: str | None = None
    gate: str | None = None
    varlen: str = "none"
    folds_heads: int = 0
    keys_of_chunk: int = 0
    page_size: int = 0
    returns_max_score: bool = False
    has_sinks: bool = False
    cache_dtype: str = ""
    stream_k: bool = False
    batch_invariant: bool = False

    @property
    def params_struct(self) -> str:
        """Return the kernel's parameter struct, by its name in the source."""
        return "AttnParams"

    @property
    def starts_early(self) -> bool:
        """Return whether its blocks may start before the kernels before it have ended."""
        return False

    @property
    def draws_tiles(self) -> bool:
        """Return whether its blocks share out work by a counter in global memory."""
        return False

    @property
    def arch_suffix(self) -> str:
        """Return what follows the architecture's number in the compiler's target."""
        return ""

    @property
    def num_warps(self) -> int:
        """Return the number of warps; each computes 16 query rows."""
        return self.block_m // 16

    @property
    def num_threads(self) -> int:
        return self.num_warps * 32

    @property
    def row_warps(self) -> range:
        """Return the warps that own 16 query rows each, in the order of the rows."""
        return range(self.num_warps)

    @property
    def is_persistent(self) -> bool:
        """Return whether a block takes several row tiles, or parts of their keys, one after the
        other."""
        return self.stream_k

    @property
    def packs_queries(self) -> bool:
        """Return whether queries of different sequences lie one after the other."""
        return self.varlen in PACKS_QUERIES

    @property
    def has_fixed_pieces(self) -> bool:
        """Return whether a row tile is cut every so many key tiles (tile/stream_k.cuh)."""
        may_have = self.stream_k and not self.packs_queries
        return may_have and (self.batch_invariant or self.keys_of_chunk > 0)

    @property
    def owns_keys(self) -> bool:
        """Return whether a block owns keys, and walks over rows."""
        return False

    @property
    def keys_backwards(self) -> bool:
        """Return whether a row tile visits its key tiles from last to first."""
        return False

    @property
    def gate_serial_bytes(self) -> int:
        """Return shared memory that the gate `pv_serial` adds, for P and O of the block."""
        if self.gate != "pv_serial":
            return 0
        return self.block_m * (2 * (self.block_n + 8) + 4 * padded(self.head_dim_v))

    @property
    def smem_bytes(self) -> int:
        """Return a block's dynamic shared memory: Q (later O), `num_stages` tiles of K and V."""
        k_stride, v_stride = padded(self.head_dim) + 8, padded(self.head_dim_v) + 8
        num_tiles = 1 if self.cache_dtype else self.num_stages
        elements = num_tiles * self.block_n * (k_stride + v_stride)
        others = self.gate_serial_bytes + (_PIECES_BYTES + 4 * self.packs_queries) * self.stream_k
        if self.cache_dtype:  # the stages are bytes, of which one at a time becomes a tile
            others += self.num_stages * self.block_n * (self.head_dim + self.head_dim_v)
        return 2 * (self.block_m * max(k_stride, v_stride) + elements) + others

    @property
    def out_cols(self) -> int:
        """Return columns of O that are computed: products have 16 of them."""
        return padded(self.head_dim_v)

    @property
    def max_registers(self) -> int:
        """Return a thread's registers if an SM has `min_blocks` blocks, as ptxas rounds them."""
        return min(255, REGISTERS_PER_SM // (self.min_blocks * self.num_threads) // 8 * 8)

    @property
    def role_registers(self) -> tuple[int, ...]:
        """Return the registers of a thread by role, where warps have roles."""
        return ()

    @property
    def registers_asked_for(self) -> int:
        """Return the registers that the roles of a block's warpgroups ask for together; 0 without
        roles."""
        consumer, *others = self.role_registers or (0,)
        return 128 * ((self.num_warps // 4 - len(others)) * consumer + sum(others))

    @property
    def finds_out_by_map(self) -> bool:
        """Return whether out is written by its tensor map alone, so that its rows may lie
        anywhere."""
        return False

    def machine_code(self) -> Plan:
        """Return the plan that stands for all with the same machine code, which differ in what only
        the host reads."""
        return dataclasses.replace(self, folds_heads=int(bool(self.constants()["FOLDED"])))

    def constants(self) -> dict[str, object]:
        """Return the kernel source's compile-time constants."""
        return {
            "Element": _CUDA_TYPES[self.dtype],
            "MaskElement": _CUDA_TYPES.get(self.mask or "bool", "bool"),
            "CacheElement": "float8" if self.cache_dtype else _CUDA_TYPES[self.dtype],
            "FLOAT8": self.cache_dtype != "",
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "HEAD_DIM": self.head_dim,
            "HEAD_DIM_V": self.head_dim_v,
            "NUM_WARPS": self.num_warps,
            "NUM_STAGES": self.num_stages,
            "MIN_BLOCKS": self.min_blocks,
            "LOAD_BYTES": self.load_bytes,
            "SMEM_BYTES": self.smem_bytes,
            "HAS_WINDOW_LEFT": self.has_window_left,
            "HAS_WINDOW_RIGHT": self.has_window_right,
            "HAS_SOFTCAP": self.has_softcap,
            "SOFTCAP_IS_LARGE": self.softcap_is_large,
            "HAS_SINKS": self.has_sinks,
            "TANH_BY_POLYNOMIAL": False,  # it takes more registers
            # Blocks that share keys in pieces of a chunk begin a sum anew with every piece.
            "KEY_TILES_OF_CHUNK": 0
            if self.stream_k and not self.packs_queries
            else -(-self.keys_of_chunk // self.block_n),
            "MASK_KIND": _MASK_KINDS[self.mask],
            "VARLEN": VARLEN_KINDS.index(self.varlen),
            "PAGE_SIZE": max(1, self.page_size),
            # Without a bound, or a tree of queries, rows are rows, unless it is asked which head
            # each belongs to, or packed queries lie where heads have them.
            "FOLDED": self.folds_heads > 0
            and (
                self.packs_queries
                or self.has_window_left
                or self.has_window_right
                or self.returns_max_score
                or self.mask == "tree"
            ),
            "RETURNS_MAX_SCORE": self.returns_max_score,
            "SPLIT_KV": self.stream_k,
            "STREAM_K": self.stream_k,
            "FIXED_PIECES": self.has_fixed_pieces,
            "WIDENS_BY_INTEGERS": self.cache_dtype != "" and self.arch < _FLOAT8_ARCH,
        } | ({"GATE_SERIAL_BYTES": self.gate_serial_bytes} if self.gate_serial_bytes else {})

    def describe(self) -> str:
        """Return one line for people."""
        options = [
            name
            for name, on in (
                ("window_left", self.has_window_left),
                ("window_right", self.has_window_right),
                ("softcap", self.has_softcap and not self.softcap_is_large),
                ("large softcap", self.softcap_is_large),
                (f"mask:{self.mask}", self.mask is not None),
                (f"varlen:{self.varlen}", self.varlen not in ("none", "pages")),
                (f"pages of {self.page_size}", self.page_size > 0),
                (f"folded heads:{self.folds_heads}", self.folds_heads > 0),
                (f"sums of {self.keys_of_chunk} keys", self.keys_of_chunk > 0),
                ("sinks", self.has_sinks),
                (f"gate:{self.gate}", self.gate is not None),
                ("max_score", self.returns_max_score),
                (f"cache {self.cache_dtype}", self.cache_dtype != ""),
                ("stream-K", self.stream_k),
            )
            if on
        ]
        dims = str(self.head_dim)
        if self.head_dim_v != self.head_dim:
            dims += f"/{self.head_dim_v}"
        return (
            f"{self.kernel} sm_{self.arch} {self.dtype} head_dim {dims} "
            f"tile {self.block_m}x{self.block_n} warps {self.num_warps} stages {self.num_stages} "
            f"smem {self.smem_bytes} B loads {self.load_bytes} B"
            + (f" [{' '.join(options)}]" if options else "")
        )


def traits(problem: Problem, gate: str | None = None) -> dict[str, Any]:
    """Return the fields of a Plan that the problem alone decides, whichever the kernel. What a
    debug gate writes has the shape of the problem as it was asked."""
    return {
        "dtype": problem.dtype,
        "head_dim": problem.head_dim,
        "head_dim_v": problem.head_dim_v,
        "has_window_left": problem.window_left >= 0,
        "has_window_right": problem.window_right >= 0,
        "has_softcap": problem.softcap != 0.0,
        "softcap_is_large": problem.softcap >= LARGE_SOFTCAP,
        "mask": None if problem.mask is None else problem.mask.dtype,
        "varlen": problem.varlen,
        "page_size": problem.page_size,
        "folds_heads": problem.group_size if gate is None and can_fold(problem) else 0,
        "returns_max_score": gate is None and problem.return_max_score,
        # The gate of P V is given weights that are not normalised.
        "has_sinks": problem.has_sinks and gate != "pv",
        "cache_dtype": problem.cache_dtype,
    }
