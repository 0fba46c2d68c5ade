"""Plan the portable kernel: enumerate tiles, filter for legality, rank. Pure functions, no GPU
needed; selection/select.py chooses between the kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashcore.kernels.limits import blocks_that_fit, smem_limits
from flashcore.problem.exactness import LARGE_SOFTCAP, keys_of_chunk
from flashcore.problem.folding import can_fold

if TYPE_CHECKING:
    from flashcore.problem import Problem

GATES = ("qk", "softmax", "pv", "tile", "pv_serial")

_REGISTERS_PER_SM = 65536

KERNEL = "attn_fwd_wmma"
# What the compile gate compiles for.
SUPPORTED_ARCHS = (75, 80, 86, 89, 90, 100, 120)

# The simulator runs the code of an architecture that has cp.async.
SIM_ARCH = 80

# head_dim 64 keeps to this budget on every architecture; the compile gate enforces it.
HEAD_DIM_64_MAX_REGISTERS = 96
HEAD_DIM_64_MAX_SMEM_BYTES = 48 * 1024

# How sequences of one call may differ in length (tile/sequence.cuh): not, as packed rows
# (attention_varlen), in the number of keys (seqlens_k), or so with keys in pages (page_table).
VARLEN_KINDS = ("none", "packed", "keys", "pages", "packed_pages")
_MASK_KINDS = {None: 0, "bool": 1, "float16": 2, "bfloat16": 2, "float32": 2, "tree": 3}
_CUDA_TYPES = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float"}


def _padded(cols: int) -> int:
    return -(-cols // 16) * 16


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan is one compiled form of a kernel: everything that its source text depends on.

    `head_dim` and `head_dim_v` are the tensors' own; `block_m` query rows and `block_n` keys form a
    tile; `load_bytes` is the width of one global load; `mask` the dtype of the mask tensor or None;
    `varlen` one of VARLEN_KINDS; `folds_heads` how many heads of a group are rows of one,
    0 where none are (problem/folding.py); `min_blocks` the blocks an SM that the registers must
    allow; `keys_of_chunk` how many keys one sum goes over, 0 for all (tile/totals.cuh); `page_size`
    keys of a page, 0 where there are no pages (tile/pages.cuh); `has_sinks` whether a logit of each
    head joins the softmax; `cache_dtype` that of k and v where it is not `dtype`.
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
        """Return whether a block takes several row tiles, one after the other."""
        return False

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
        return self.block_m * (2 * (self.block_n + 8) + 4 * _padded(self.head_dim_v))

    @property
    def smem_bytes(self) -> int:
        """Return a block's dynamic shared memory: Q (later O), `num_stages` tiles of K and V."""
        k_stride, v_stride = _padded(self.head_dim) + 8, _padded(self.head_dim_v) + 8
        elements = self.num_stages * self.block_n * (k_stride + v_stride)
        return 2 * (self.block_m * max(k_stride, v_stride) + elements) + self.gate_serial_bytes

    @property
    def max_registers(self) -> int:
        """Return a thread's registers if an SM has `min_blocks` blocks, as ptxas rounds them."""
        return min(255, _REGISTERS_PER_SM // (self.min_blocks * self.num_threads) // 8 * 8)

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
            "KEY_TILES_OF_CHUNK": -(-self.keys_of_chunk // self.block_n),
            "MASK_KIND": _MASK_KINDS[self.mask],
            "VARLEN": VARLEN_KINDS.index(self.varlen),
            "PAGE_SIZE": max(1, self.page_size),
            # Without a bound, or a tree of queries, rows are rows, unless it is asked which head
            # each belongs to.
            "FOLDED": self.folds_heads > 0
            and (
                self.has_window_left
                or self.has_window_right
                or self.returns_max_score
                or self.mask == "tree"
            ),
            "RETURNS_MAX_SCORE": self.returns_max_score,
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


def _estimated_registers(plan: Plan) -> int:
    """Return an estimate of a thread's registers: accumulators of the scores and of O, and what the
    compile gate showed the rest to need."""
    rest = 48
    if plan.arch < 80:
        rest += 8  # the copies go through registers
    if plan.mask is not None and not _has_tight_budget(plan):
        rest += 24  # addresses and values of the mask
    if plan.page_size:
        rest += 16  # each row that a thread copies has an address of its own
    if plan.head_dim % 64 and max(plan.head_dim, plan.head_dim_v) > 64:
        rest += 16  # few threads share a row, so each copies more packets
    return plan.block_n // 2 + _padded(plan.head_dim_v) // 2 + rest


def _has_tight_budget(plan: Plan) -> bool:
    """Return whether the register budget of head_dim 64 holds; a debug gate is outside of it, and
    so are a mask tensor with seqlens_k, pages and a large softcap, which would spill."""
    exempt = plan.gate is not None or (plan.varlen == "keys" and plan.mask is not None)
    exempt |= plan.softcap_is_large or plan.page_size > 0
    return max(plan.head_dim, plan.head_dim_v) <= 64 and not exempt


def _min_blocks(plan: Plan) -> int:
    """Return the blocks an SM that shared memory and registers, or the tight budget, allow."""
    most = 5 * 128 // plan.num_threads
    if _has_tight_budget(plan):
        return most
    by_smem = blocks_that_fit(plan.smem_bytes, plan.arch)
    by_registers = _REGISTERS_PER_SM // (_estimated_registers(plan) * plan.num_threads)
    return max(1, min(by_smem, by_registers, most))


def _enumerate(base: Plan) -> Iterator[Plan]:
    num_stages = 2 if base.arch >= 80 else 1  # double-buffered where copies are asynchronous
    for block_m in (128, 64):
        for block_n in (128, 64, 32, 16):
            plan = dataclasses.replace(
                base, block_m=block_m, block_n=block_n, num_stages=num_stages
            )
            yield dataclasses.replace(plan, min_blocks=_min_blocks(plan))


def _is_legal(plan: Plan) -> bool:
    if plan.smem_bytes > smem_limits(plan.arch)[0]:
        return False
    if _has_tight_budget(plan):
        if plan.mask is not None and plan.head_dim_v > 32 and plan.block_n > 16:
            return False  # the mask's addresses and values take what wider tiles' scores would
        if plan.smem_bytes > HEAD_DIM_64_MAX_SMEM_BYTES:
            return False
        return _estimated_registers(plan) <= HEAD_DIM_64_MAX_REGISTERS
    if plan.arch < 80 and max(plan.head_dim, plan.head_dim_v) > 192 and plan.block_n > 16:
        return False  # head_dim 224 spills there: copies, scores and O meet in registers
    return _estimated_registers(plan) <= 240


def _rank(plan: Plan) -> tuple[int, ...]:
    """Return a rank, of which smaller is better: warps resident on an SM to hide latencies, as far
    as that paid; narrow key tiles, whose scores leave registers for more warps; small row tiles,
    which make more blocks. Measured on sm_90, see docs/performance.md."""
    resident_warps = min(12, plan.min_blocks * plan.num_warps)
    return (-resident_warps, abs(plan.block_n - 32), plan.block_m)


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
        # What the gate of P V is given is not normalised.
        "has_sinks": problem.has_sinks and gate != "pv",
        "cache_dtype": problem.cache_dtype,
    }


def candidates(problem: Problem, arch: int, gate: str | None = None) -> list[Plan]:
    """Return every legal tile configuration of the portable kernel, best first; see
    selection/select.py."""
    base = Plan(
        kernel=KERNEL,
        arch=arch,
        block_m=64,
        block_n=64,
        num_stages=1,
        min_blocks=1,
        load_bytes=problem.load_bytes,
        gate=gate,
        keys_of_chunk=keys_of_chunk(problem) if gate is None else 0,
        **traits(problem, gate),
    )
    legal = [plan for plan in _enumerate(base) if _is_legal(plan)]
    return sorted(legal, key=_rank)
