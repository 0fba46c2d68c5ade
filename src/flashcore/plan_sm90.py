"""Plans of the Hopper kernel: which problems it serves, and its tile table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashcore.plan import Plan, smem_limits, traits

if TYPE_CHECKING:
    from flashcore.problem import Problem

KERNEL = "attn_fwd_sm90"
ARCH = 90
NUM_SMS = 132
GATES = ("qk", "softmax", "pv", "tile")  # pv_serial takes apart what only the portable kernel does

_BARRIER_BYTES = 8
_FEED_BYTES = 64  # tile/schedule_varlen.cuh


@dataclass(frozen=True, slots=True)
class Sm90Plan(Plan):
    """One compiled form of the Hopper kernel. See `Plan`.

    `ping_pong`: consumer warpgroups take turns at issuing to the tensor cores; `lazy_rescale`: the
    output is rescaled only when a maximum moved far; `separate_o`: O leaves through a buffer of its
    own, not through Q's; `tiles_per_unit`: row tiles that a block takes together
    (tile/schedule_sm90.cuh).
    """

    ping_pong: bool = False
    lazy_rescale: bool = True
    separate_o: bool = True
    tiles_per_unit: int = 1

    @property
    def params_struct(self) -> str:
        """AttnParams behind the tensor maps."""
        return "AttnSm90Params"

    @property
    def arch_suffix(self) -> str:
        """WGMMA and setmaxnreg belong to sm_90a."""
        return "a"

    @property
    def num_consumers(self) -> int:
        """Warpgroups of 64 query rows."""
        return self.block_m // 64

    @property
    def num_warps(self) -> int:
        """The consumers' and the producer's warpgroup."""
        return 4 * (self.num_consumers + 1)

    @property
    def chunk(self) -> int:
        """Columns of a tile that lie together in shared memory, swizzled as one."""
        return 64 if self.head_dim % 64 == 0 and self.head_dim_v % 64 == 0 else 32

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block: Q, `num_stages` tiles of K and V, O and barriers."""
        qk_cols = -(-self.head_dim // self.chunk) * self.chunk
        v_cols = -(-self.head_dim_v // self.chunk) * self.chunk
        elements = self.block_m * (qk_cols + (v_cols if self.separate_o else 0))
        elements += self.num_stages * self.block_n * (qk_cols + v_cols)
        feed_bytes = _FEED_BYTES if self.varlen == "packed" else 0
        return 2 * elements + _BARRIER_BYTES * (2 + 4 * self.num_stages) + feed_bytes

    @property
    def row_warps(self) -> range:
        """The consumers'; the producer's warpgroup comes first."""
        return range(4, self.num_warps)

    @property
    def keys_backwards(self) -> bool:
        """A row tile visits its key tiles from last to first."""
        return True

    @property
    def role_registers(self) -> tuple[int, int]:
        """Registers of a consumer and of a producer thread; setmaxnreg moves them from what the
        launch gave everybody, `max_registers`: a block that asks for more than it was given waits
        for ever."""
        return {1: (216, 40), 2: (240, 24), 3: (160, 32)}[self.num_consumers]

    def constants(self) -> dict[str, object]:
        """The kernel source's compile-time constants."""
        consumer_registers, producer_registers = self.role_registers
        # Named, as a slotted dataclass is another class than the one that super() sees here.
        constants = Plan.constants(self)
        del constants["NUM_WARPS"], constants["LOAD_BYTES"]
        return constants | {
            "CONSUMER_REGISTERS": consumer_registers,
            "PRODUCER_REGISTERS": producer_registers,
            "PING_PONG": self.ping_pong,
            "LAZY_RESCALE": self.lazy_rescale,
            "SEPARATE_O": self.separate_o,
            "TILES_PER_UNIT": self.tiles_per_unit,
        }


def obstacle(problem: Problem) -> str | None:
    """Why the Hopper kernel cannot serve a problem, or None. TMA reads 16-byte aligned rows."""
    if problem.load_bytes < 16:
        return (
            "TMA needs 16-byte aligned rows, and some address or stride of q, k or v is a multiple "
            f"of {problem.load_bytes} bytes only"
        )
    batch, rows_q, rows_k = problem.batch, problem.seqlen_q, problem.seqlen_k
    if problem.varlen == "packed":
        batch, rows_q, rows_k = 1, problem.total_q, problem.total_k
    for name, strides, sizes in (
        ("q", problem.q_strides, (batch, problem.num_heads_q, rows_q)),
        ("k", problem.k_strides, (batch, problem.num_heads_kv, rows_k)),
        ("v", problem.v_strides, (batch, problem.num_heads_kv, rows_k)),
    ):
        if any(stride == 0 and size > 1 for stride, size in zip(strides, sizes, strict=True)):
            return f"TMA reads no expanded tensor, and {name} has a stride of 0"
        if max(strides) >= 2**39:
            return f"TMA reads no stride of 2^40 bytes, as {name} has"
        if problem.varlen == "keys" and name != "q" and strides[2] and strides[0] % strides[2]:
            return f"with seqlens_k it needs batches that are whole rows apart, unlike {name}'s"
    if problem.varlen == "packed" and rows_q * problem.num_heads_q + batch >= 2**30:
        return "it counts the row tiles of all packed sequences in 32 bits"
    return None


def _of_mean_lengths(problem: Problem) -> Problem:
    """Packed sequences as a batch of equal ones, for the choice of tiles."""
    if problem.varlen != "packed":
        return problem
    batch = max(1, problem.batch)
    return dataclasses.replace(problem, batch=batch, seqlen_q=-(-problem.total_q // batch))


def _tiles(problem: Problem) -> Iterator[tuple[int, int, bool, bool]]:
    """(block_m, block_n, ping_pong, lazy_rescale) by measurement on an H200, best first; see
    docs/performance.md."""
    dim = max(problem.head_dim, problem.head_dim_v)
    heads = problem.batch * problem.num_heads_q
    plain = problem.mask is None and problem.softcap == 0.0
    if dim <= 64:
        bounded = problem.window_left >= 0 or problem.window_right >= 0
        long = problem.seqlen_k > (2048 if bounded else 1024)
        if plain and long and heads * problem.seqlen_q >= NUM_SMS * 192:
            yield 192, 112 if bounded else 128, True, False  # bounds cost registers
        yield 64, 128, False, False
        yield 128, 128, True, False
        return
    if dim <= 128:
        wide, narrow = (128, 128, True, True), (64, 128 if plain else 64, False, True)
        fills = heads * -(-problem.seqlen_q // 128) >= NUM_SMS
        yield from (wide, narrow) if fills else (narrow, wide)
    elif dim <= 192:
        yield 128, 96, True, True
    else:
        yield 128, 64 if plain else 32, True, True


def candidates(problem: Problem, gate: str | None = None) -> list[Plan]:
    """Tile configurations for a problem that the kernel can serve, best first. With a debug
    gate the warpgroups take no turns and no rescale is put off: a stage shows nothing but itself.

    Raises:
        ValueError: the kernel has no such gate.
    """
    if gate is not None and gate not in GATES:
        raise ValueError(f"gate={gate!r}: the Hopper kernel has the gates {', '.join(GATES)}")
    plans: list[Plan] = []
    problem = _of_mean_lengths(problem)
    heads = problem.batch * problem.num_heads_q
    for block_m, block_n, ping_pong, lazy_rescale in _tiles(problem):
        min_blocks = 2 if block_m == 64 else 1  # for the register count; fewer may fit
        # Pairs of row tiles even out the work of causal rows, where they still fill the GPU.
        pairs = heads * -(-problem.seqlen_q // (2 * block_m))
        in_pairs = (
            problem.varlen != "packed"
            and problem.window_right >= 0
            and pairs >= NUM_SMS * min_blocks
        )
        for separate_o in (True, False):
            plan = Sm90Plan(
                kernel=KERNEL,
                arch=ARCH,
                block_m=block_m,
                block_n=block_n,
                num_stages=2,
                min_blocks=min_blocks,
                ping_pong=ping_pong and gate is None,
                lazy_rescale=lazy_rescale and gate is None,
                separate_o=separate_o,
                tiles_per_unit=2 if in_pairs else 1,
                gate=gate,
                **traits(problem),
            )
            if not separate_o and problem.head_dim_v > problem.head_dim:
                continue  # O does not fit into Q's buffer
            if plan.smem_bytes <= smem_limits(ARCH)[0]:
                plans.append(plan)
                break
    return plans
