"""Make plans of the kernel that computes the gradient of an additive mask.

`attn_bwd_dmask_sm90` follows the kernel of dq, whose delta it reads. It computes two products of
the scores, and adds up what batches, heads and queries that share an element of the mask have.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashcore.kernels.bwd_sm90.plan import ARCH, BwdSm90Plan
from flashcore.kernels.bwd_sm90.tiles import UNCUT
from flashcore.kernels.fwd_sm90 import tiles as tiles_sm90
from flashcore.kernels.fwd_sm90.tiles import mask_traits
from flashcore.kernels.fwd_wmma.plan import Plan, traits
from flashcore.kernels.limits import smem_limits

if TYPE_CHECKING:
    from flashcore.problem import Problem

DMASK_KERNEL = "attn_bwd_dmask_sm90"
_BARRIER_BYTES = 8
_PACKET_BYTES = 16
_STAGES_MAX = 8
# Blocks that run side by side on an H200, and by how much a tile's walk may be divided: shares take
# 4 bytes an element of the mask each, 34 MB together at most.
_NUM_SMS = 132
_PIECES_MAX = 4 * _NUM_SMS
_IS_BUSY = 0.9  # of the SMs' time, where sums are not divided further


@dataclass(frozen=True, slots=True)
class MaskPlan(BwdSm90Plan):
    """A MaskPlan is one compiled form of the kernel. See `Plan`.

    A block takes tiles of `block_m` queries and `block_n` keys of the mask. `sums_batch`,
    `sums_heads` and `sums_rows`: which dimensions of the mask have size 1. `num_shares`: blocks
    that divide the sum of a tile. `out_bytes`: of one store.
    """

    sums_batch: bool = False
    sums_heads: bool = False
    sums_rows: bool = False
    num_shares: int = 1
    out_bytes: int = _PACKET_BYTES

    @property
    def is_dq(self) -> bool:
        """Return True: the kernel goes over rows of q."""
        return True

    @property
    def draws_tiles(self) -> bool:
        """Return False: blocks stride over the tiles."""
        return False

    @property
    def producer_registers_min(self) -> int:
        """Return the registers of its one producer thread; consumers need the others."""
        return 24

    @property
    def smem_bytes(self) -> int:
        """Return the dynamic shared memory of a block: chunks of columns, the mask, and where rows
        are summed those of each warp."""
        tile = self.num_stages * (self.block_m + self.block_n) * self.chunk * 2
        sums = 4 * self.num_consumers * self.block_n * 4 * self.sums_rows
        return tile + self.mask_bytes + sums + 2 * _BARRIER_BYTES * self.num_stages

    @property
    def box_rows(self) -> dict[str, int]:
        """Return the tensors that the kernel reads by TMA, and their boxes' rows."""
        return dict.fromkeys(("q", "dout"), self.block_m) | dict.fromkeys(("k", "v"), self.block_n)

    @property
    def written(self) -> tuple[str, ...]:
        """Return the tensor that the kernel writes."""
        return ("dmask_shares",) if self.num_shares > 1 else ("dmask",)

    def shape(self, problem: Problem) -> tuple[int, int, int, int]:
        """Return the shape of the gradient."""
        return (
            1 if self.sums_batch else problem.batch,
            1 if self.sums_heads else problem.num_heads_q,
            1 if self.sums_rows else problem.seqlen_q,
            problem.seqlen_k,
        )

    def shares_shape(self, problem: Problem) -> tuple[int, ...]:
        """Return the shape of what the blocks that divide a sum write, float32; of each row the
        first seqlen_k elements are meant."""
        *outer, _ = self.shape(problem)
        return self.num_shares, *outer, self._row_stride(problem)

    def _row_stride(self, problem: Problem) -> int:
        return -(-problem.seqlen_k // 4) * 4 if self.num_shares > 1 else problem.seqlen_k

    def mask_gradient(self, problem: Problem) -> tuple[int, ...]:
        """Return the fields of MaskGradient in the kernel's argument."""
        batch, heads, *_ = self.shape(problem)
        return batch, heads, self.num_shares, self._row_stride(problem)

    def num_pieces(self, problem: Problem) -> int:
        """Return the number of tiles of the mask, times the shares of each."""
        batch, heads, rows, keys = self.shape(problem)
        row_tiles, key_tiles = -(-rows // self.block_m), -(-keys // self.block_n)
        return batch * heads * row_tiles * key_tiles * self.num_shares

    def num_steps(self, problem: Problem) -> int:
        """Return how many tiles of scores are added to one of the mask."""
        steps = problem.batch if self.sums_batch else 1
        steps *= problem.num_heads_q if self.sums_heads else 1
        return steps * (-(-problem.seqlen_q // self.block_m) if self.sums_rows else 1)

    def machine_code(self) -> MaskPlan:
        """Return the plan that stands for all with the same machine code: see `Plan`."""
        return dataclasses.replace(
            self, sums_batch=False, sums_heads=False, num_shares=min(2, self.num_shares)
        )

    def constants(self) -> dict[str, object]:
        """Return the kernel source's compile-time constants."""
        consumer_registers, producer_registers = self.role_registers
        constants = Plan.constants(self)
        del constants["LOAD_BYTES"]
        constants |= UNCUT
        return constants | {
            "CONSUMER_REGISTERS": consumer_registers,
            "PRODUCER_REGISTERS": producer_registers,
            "CHUNK": self.chunk,
            "MASK_LOAD_BYTES": self.mask_load_bytes,
            "MASK_IS_ROW": self.mask_is_row,
            "MASK_IS_SHIFTED": self.mask_is_shifted,
            "MASK_BY_ADDITION": False,
            "SUMS_ROWS": self.sums_rows,
            "IN_SHARES": self.num_shares > 1,
            "OUT_BYTES": self.out_bytes,
        }


@functools.lru_cache(maxsize=4096)
def select_mask_plan(problem: Problem, shape: tuple[int, int, int, int]) -> MaskPlan:
    """Return the plan for a mask of a shape.

    Args:
        problem: of the forward, with the mask.
        shape: of the mask, four dimensions; the last one is seqlen_k.
    """
    sums_batch, sums_heads, sums_rows = (size == 1 for size in shape[:3])
    of_problem: dict[str, Any] = traits(problem) | mask_traits(problem) | {"folds_heads": 0}
    # Rows that are expanded in memory have a gradient each, which takes their place.
    of_problem["mask_is_row"] = sums_rows
    element = tiles_sm90.MASK_ELEMENT_BYTES[of_problem["mask"]]
    has_packets = problem.seqlen_k * element % _PACKET_BYTES == 0
    is_wide = 128 < max(problem.head_dim, problem.head_dim_v) < 256
    is_loose = not has_packets or of_problem["mask_load_bytes"] < _PACKET_BYTES
    plan = MaskPlan(
        kernel=DMASK_KERNEL,
        arch=ARCH,
        block_m=128,
        block_n=112 if element == 4 and (is_loose or is_wide) else 128,  # 128 spilled 8 to 88 bytes
        num_stages=_STAGES_MAX,
        min_blocks=1,
        sums_batch=sums_batch,
        sums_heads=sums_heads,
        sums_rows=sums_rows,
        out_bytes=_PACKET_BYTES if has_packets else element,
        **of_problem,
    )
    while plan.smem_bytes > smem_limits(ARCH)[0]:
        plan = dataclasses.replace(plan, num_stages=plan.num_stages - 1)
    return dataclasses.replace(plan, num_shares=num_shares(problem, plan))


def num_shares(problem: Problem, plan: MaskPlan) -> int:
    """Return by how many blocks the sum of a tile is divided: so many that the GPU is busy, where
    the mask has few tiles."""
    tiles = dataclasses.replace(plan, num_shares=1).num_pieces(problem)
    most = max(1, min(plan.num_steps(problem), _PIECES_MAX // max(1, tiles)))

    def busy(shares: int) -> float:
        pieces = tiles * shares
        return pieces / (-(-pieces // _NUM_SMS) * _NUM_SMS)

    return next(
        (n for n in range(1, most + 1) if busy(n) >= _IS_BUSY), max(range(1, most + 1), key=busy)
    )
