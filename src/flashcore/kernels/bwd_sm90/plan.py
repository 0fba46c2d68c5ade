"""Make plans of the two backward kernels for Hopper: for which problems, and with which tiles.

`attn_bwd_dq_sm90` computes dq and delta, then `attn_bwd_dkdv_sm90` dk and dv; see
kernels/bwd_sm90/bwd_sm90.cuh.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from flashcore.kernels.bwd_sm90.tiles import DQ_ROLE_REGISTERS, UNCUT, BwdTile, padded_to_16, tiles
from flashcore.kernels.fwd_sm90 import plan as plan_sm90
from flashcore.kernels.fwd_sm90 import tiles as tiles_sm90
from flashcore.kernels.fwd_sm90.tiles import ROWS_OF_CONSUMER
from flashcore.kernels.fwd_wmma.plan import Plan, traits
from flashcore.kernels.limits import smem_limits
from flashcore.problem.validation import HEAD_DIM_MAX

if TYPE_CHECKING:
    from flashcore.problem import Problem

DQ_KERNEL = "attn_bwd_dq_sm90"
DKDV_KERNEL = "attn_bwd_dkdv_sm90"
ARCH = plan_sm90.ARCH

_BARRIER_BYTES = 8
_COORD_BYTES = 4 * 16  # places of four tiles
_FEED_BYTES = 32  # tile/schedule_varlen.cuh
_MAX_PACKED_ROWS = 2**30  # of all heads, a tile of each at most


@dataclass(frozen=True, slots=True)
class BwdSm90Plan(Plan):
    """A plan is one compiled form of a backward kernel for Hopper. See `Plan`.

    In the kernel of dq a block owns `block_m` rows and walks over tiles of `block_n` keys, of which
    K has `num_stages` buffers and V `other_stages`. In that of dk and dv it owns `block_n` keys and
    walks over tiles of `block_m` rows, of which Q has `num_stages` buffers and dO `other_stages`.
    `overlaps`: a tile's last product is issued behind the first ones of the next.
    `also_dq`: the kernel of dk and dv computes dq too, see plan_one.py; dS has `ds_stages` buffers.
    `ordered`: blocks add to dq in the order of the keys, else in any order, to sums of 0.
    `heads`: of k and v, counted over the batch, those that the launch takes: first one and number.
    `mask_load_bytes`, `mask_is_row` and `mask_is_shifted`: how a mask is read, as in Sm90Plan.
    """

    other_stages: int = 2
    overlaps: bool = True
    early_dp: bool = True
    keeps_p: bool = True
    also_dq: bool = False
    ds_stages: int = 1
    ordered: bool = True
    mask_load_bytes: int = 1
    mask_is_row: bool = False
    mask_is_shifted: bool = False
    heads: tuple[int, int] | None = None

    @property
    def is_dq(self) -> bool:
        """Return whether it is the kernel of dq."""
        return self.kernel == DQ_KERNEL

    @property
    def params_struct(self) -> str:
        """Return the name of the parameter struct, which both kernels share."""
        return "AttnBwdSm90Params"

    @property
    def starts_early(self) -> bool:
        """Return True: it waits for the kernels before it by itself (ptx/grid.cuh)."""
        return True

    @property
    def is_persistent(self) -> bool:
        """Return True: a block takes several tiles."""
        return True

    @property
    def draws_tiles(self) -> bool:
        """Return whether blocks draw tiles from a counter (fwd_sm90/schedule_sm90.cuh)."""
        return self.has_window_right or self.varlen == "packed" or self.also_dq

    @property
    def arch_suffix(self) -> str:
        """Return "a", as WGMMA and setmaxnreg belong to sm_90a."""
        return "a"

    @property
    def num_consumers(self) -> int:
        """Return how many consumer warpgroups there are, of 64 rows or of 64 keys, or two of 64."""
        groups = (self.block_m if self.is_dq else self.block_n) // ROWS_OF_CONSUMER
        return 2 * groups if self.has_roles else groups

    @property
    def has_roles(self) -> bool:
        """Return whether two warpgroups share the products of 64 keys, for one could not hold what
        there is (bwd_sm90/bwd_dkdv_roles_sm90.cuh)."""
        is_crowded = self.has_softcap or (self.mask is not None and self.varlen != "none")
        one_holds = 64 if is_crowded and not self.also_dq else 128
        return not self.is_dq and max(self.head_dim, self.head_dim_v) > one_holds

    @property
    def has_dq_role(self) -> bool:
        """Return whether a warpgroup of its own computes dq. Above head_dim 96 consumers share it,
        as there are no registers for one."""
        return self.also_dq and max(self.head_dim, self.head_dim_v) <= 96

    @property
    def num_warps(self) -> int:
        """Return the number of warps: the consumers', the producer's warpgroup, and that of dq, if
        there is one."""
        return 4 * (self.num_consumers + 1 + self.has_dq_role)

    @property
    def row_warps(self) -> range:
        """Return the consumers' warps; the producer's warpgroup comes first."""
        return range(4, 4 * (self.num_consumers + 1))

    def warps_of(self, name: str) -> range:
        """Return the warps that own 16 rows or keys each of delta, ds, dq, dk or dv. Of two that
        share 64 keys the second warpgroup has ds and dk."""
        if not self.has_roles:
            return self.row_warps
        return range(8, 12) if name in ("ds", "dk") else range(4, 8)

    @property
    def owns_keys(self) -> bool:
        """Return whether a block owns keys, and walks over rows."""
        return not self.is_dq

    @property
    def chunk(self) -> int:
        """Return the columns of a tile that lie together in shared memory, swizzled as one."""
        return tiles_sm90.chunk_of(self.head_dim, self.head_dim_v)

    @property
    def dq_buffers(self) -> tuple[int, bool]:
        """Return how many row tiles' Q and dO there is room for in the kernel of dq, and whether dq
        leaves through a buffer of its own: first of all, the next row tile is loaded during this
        one."""
        limit = smem_limits(ARCH)[0]
        for found in ((2, True), (2, False), (1, True)):
            if self._dq_smem_bytes(*found) <= limit:
                return found
        return 1, False

    def _dq_smem_bytes(self, q_buffers: int, has_out_buffer: bool) -> int:
        qk_cols, v_cols = tiles_sm90.padded_dims(self.head_dim, self.head_dim_v)
        elements = self.block_m * (q_buffers * (qk_cols + v_cols) + qk_cols * has_out_buffer)
        elements += self.block_n * (self.num_stages * qk_cols + self.other_stages * v_cols)
        num_barriers = 2 * (q_buffers * self.num_consumers + self.num_stages + self.other_stages)
        others = _BARRIER_BYTES * num_barriers + _COORD_BYTES + self._feed_bytes
        return 2 * elements + self.mask_bytes + others

    @property
    def num_sums_full(self) -> int:
        """Return the barriers of parts of dq to be added, one for each part and adder of it."""
        return self.also_dq * (2 if self.has_dq_role else 2 * self.num_consumers)

    @property
    def mask_bytes(self) -> int:
        """Return shared memory for the mask tensor's elements of every warp
        (fwd_sm90/mask_tile_sm90.cuh; bwd_sm90/key_mask_sm90.cuh, of 16 keys each)."""
        if self.mask is None:
            return 0
        if self.is_dq:
            of_consumer = tiles_sm90.mask_bytes(self.mask, self.mask_is_row, self.block_n)
            return self.num_consumers * of_consumer
        element = tiles_sm90.MASK_ELEMENT_BYTES[self.mask]
        row_bytes = 16 * element + (16 if element > 1 else 0)
        if self.mask_is_shifted:
            row_bytes = 24 * element
        return self.block_n // 16 * (1 if self.mask_is_row else self.block_m) * row_bytes

    @property
    def _feed_bytes(self) -> int:
        """Return shared memory for the places of tiles that a warp deals out."""
        return _FEED_BYTES if self.varlen == "packed" else 0

    @property
    def smem_bytes(self) -> int:
        """Return dynamic shared memory of a block."""
        if self.is_dq:
            return self._dq_smem_bytes(*self.dq_buffers)
        qk_cols, v_cols = tiles_sm90.padded_dims(self.head_dim, self.head_dim_v)
        elements = self.block_n * (qk_cols + v_cols + (not self.has_roles) * max(qk_cols, v_cols))
        elements += self.block_m * ROWS_OF_CONSUMER * self.has_roles
        elements += self.block_m * (self.num_stages * qk_cols + self.other_stages * v_cols)
        stats = self.num_stages * (2 * self.block_m + 4 * self.also_dq) * 4
        num_barriers = 8 + 3 * self.num_stages + 2 * self.other_stages
        if self.also_dq:
            elements += self.ds_stages * self.block_m * self.block_n
            if self.has_dq_role:  # of four bytes: two of 64 rows, of one tile or of two
                elements += 2 * ROWS_OF_CONSUMER * 2 * padded_to_16(self.head_dim)
            num_barriers += 2 * self.ds_stages + self.num_sums_full + 2
        others = stats + _BARRIER_BYTES * num_barriers + _COORD_BYTES + self._feed_bytes
        return 2 * elements + self.mask_bytes + others

    @property
    def producer_registers_min(self) -> int:
        """Return a producer thread's registers, at least: more where it does not load alone."""
        if not self.is_dq:
            return 40
        return 32 if self.varlen == "packed" or self.mask is not None else 24

    @property
    def role_registers(self) -> tuple[int, ...]:
        """Return the registers of a consumer, of a producer and of dq's threads; see Sm90Plan."""
        if self.has_dq_role:
            return DQ_ROLE_REGISTERS[max(self.head_dim, self.head_dim_v) > 64]
        pool = self.max_registers * (self.num_consumers + 1)
        of_consumers = pool - self.producer_registers_min
        consumer = min(240, of_consumers // self.num_consumers // 8 * 8)
        return consumer, min(40, pool - consumer * self.num_consumers)

    @property
    def box_rows(self) -> dict[str, int]:
        """Return the tensors that the kernel reads and writes by TMA, and their boxes' rows."""
        of_queries, of_keys = ("q", "dout"), ("k", "v")
        own, walked = (of_queries, of_keys) if self.is_dq else (of_keys, of_queries)
        written = ("dq",) if self.is_dq else ("dk", "dv")
        rows = self.block_n if self.is_dq else self.block_m
        return dict.fromkeys((*own, *written), ROWS_OF_CONSUMER) | dict.fromkeys(walked, rows)

    @property
    def written(self) -> tuple[str, ...]:
        """Return the tensors that the kernel writes."""
        return ("dq", "delta") if self.is_dq else ("dk", "dv")

    def num_pieces(self, problem: Problem) -> int:
        """Return how many tiles blocks take one after the other: of rows of every head of q, or of
        keys of every head of k and v; of packed sequences as many as there can be."""
        total, rows, rows_of_tile = problem.total_k, problem.seqlen_k, self.block_n
        num_heads = problem.num_heads_q if self.is_dq else problem.num_heads_kv
        if self.is_dq:
            total, rows, rows_of_tile = problem.total_q, problem.seqlen_q, self.block_m
        if problem.varlen == "packed":
            return (total // rows_of_tile + problem.batch + 1) * num_heads
        heads = num_heads * problem.batch
        if self.heads is not None:
            heads = self.heads[1] * num_heads // problem.num_heads_kv
        return -(-rows // rows_of_tile) * heads

    def mask_gradient(self, problem: Problem) -> tuple[int, ...]:
        """Return the fields of MaskGradient in the kernel's argument: nothing, unless the kernel
        computes it (bwd_mask_sm90/plan.py)."""
        return ()

    def machine_code(self) -> Plan:
        """Return the plan that stands for all with the same machine code, see `Plan`."""
        return Plan.machine_code(replace(self, heads=None))

    def constants(self) -> dict[str, object]:
        """Return the kernel source's compile-time constants."""
        consumer_registers, producer_registers, *of_dq = self.role_registers
        # Named, as a slotted dataclass is another class than the one that super() sees here.
        constants = Plan.constants(self)
        del constants["LOAD_BYTES"]
        constants |= UNCUT | {
            "CONSUMER_REGISTERS": consumer_registers,
            "PRODUCER_REGISTERS": producer_registers,
            "DQ_REGISTERS": of_dq[0] if of_dq else producer_registers,
            "CHUNK": self.chunk,
            "OVERLAPS": self.overlaps,
            "MASK_LOAD_BYTES": self.mask_load_bytes,
            "MASK_IS_ROW": self.mask_is_row,
            "MASK_IS_SHIFTED": self.mask_is_shifted,
            "MASK_BY_ADDITION": True,
        }
        return constants | (self._dq_constants() if self.is_dq else self._dkdv_constants())

    def _dq_constants(self) -> dict[str, object]:
        q_buffers, has_out_buffer = self.dq_buffers
        return {
            "NUM_V_STAGES": self.other_stages,
            "Q_BUFFERS": q_buffers,
            "HAS_OUT_BUFFER": has_out_buffer,
        }

    def _dkdv_constants(self) -> dict[str, object]:
        return {
            "NUM_DO_STAGES": self.other_stages,
            "EARLY_DP": self.early_dp,
            "KEEPS_P": self.keeps_p,
            "HAS_ROLES": self.has_roles,
            "ALSO_DQ": self.also_dq,
            "DQ_ROLE": self.has_dq_role,
            "NUM_DS_STAGES": self.ds_stages,
            "ORDERED": self.ordered,
        }


class BwdPlans(NamedTuple):
    """Hold the plans that a backward pass launches, in this order."""

    dq: BwdSm90Plan
    dkdv: BwdSm90Plan


def obstacle(problem: Problem, needs_mask_grad: bool = False) -> str | None:
    """Return why the kernels cannot compute a call's gradient, or None. Some tensors are copied."""
    if problem.device != "cuda" or problem.arch != ARCH:
        return "the fused backward needs a Hopper GPU"
    return obstacle_anywhere(problem, needs_mask_grad)


def obstacle_anywhere(problem: Problem, needs_mask_grad: bool = False) -> str | None:
    """Return why the kernels cannot compute a call's gradient, whatever the device, or None."""
    if problem.dtype not in ("float16", "bfloat16"):
        return f"the fused backward takes float16 and bfloat16, not {problem.dtype}"
    if max(problem.head_dim, problem.head_dim_v) > HEAD_DIM_MAX:
        return f"the fused backward takes head_dim {HEAD_DIM_MAX} at most"
    if problem.page_size:
        return "the fused backward reads no keys and values in pages"
    if needs_mask_grad and problem.varlen != "none":
        return "the fused backward computes no gradient of a mask over sequences of other lengths"
    rows = max(problem.total_q * problem.num_heads_q, problem.total_k * problem.num_heads_kv)
    if problem.varlen == "packed" and rows + problem.batch >= _MAX_PACKED_ROWS:
        return "the fused backward counts the tiles of all packed sequences in 32 bits"
    return None


def select_plans(problem: Problem) -> BwdPlans:
    """Return the plans of a problem that has no obstacle."""
    of_problem = traits(problem) | tiles_sm90.mask_traits(problem)
    of_problem["folds_heads"] = 0  # it pays where queries are few, and there is little to compute
    return _plans(*tiles(problem), tuple(of_problem.items()))


@functools.lru_cache(maxsize=4096)
def _plans(dq: BwdTile, dkdv: BwdTile, fields: tuple[tuple[str, Any], ...]) -> BwdPlans:
    of_dq = make_plan(DQ_KERNEL, dq, dict(fields))
    return BwdPlans(of_dq, make_plan(DKDV_KERNEL, dkdv, dict(fields)))


def make_plan(kernel: str, tile: BwdTile, of_problem: dict[str, Any]) -> BwdSm90Plan:
    """Return the plan of a kernel with a tile; `of_problem` as plan.traits gives it."""
    return BwdSm90Plan(kernel=kernel, arch=ARCH, min_blocks=1, **tile._asdict(), **of_problem)
