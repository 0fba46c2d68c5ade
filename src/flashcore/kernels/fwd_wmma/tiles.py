"""Choose the portable kernel's tiles: enumerate, filter for legality, rank. Pure functions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flashcore.kernels.fwd_wmma import params
from flashcore.kernels.fwd_wmma.plan import (
    HEAD_DIM_64_MAX_REGISTERS,
    HEAD_DIM_64_MAX_SMEM_BYTES,
    KERNEL,
    REGISTERS_PER_SM,
    VARLEN_KINDS,
    Plan,
    padded,
    traits,
)
from flashcore.kernels.limits import blocks_that_fit, smem_limits
from flashcore.kernels.stream_k import (
    FEW_BYTES,
    LEAST_BYTES,
    MOST_TILES,
    ROWS_OF_GROUP,
    key_tile_bytes,
    share_row_bytes,
    visible_keys,
)
from flashcore.problem.exactness import (
    MAX_KEYS_OF_A_SUM,
    MAX_SHARE_BYTES,
    is_cut,
    keys_of_chunk,
)
from flashcore.problem.folding import (
    are_few_queries,
    as_launched,
    heads_of_packed_rows,
    mean_sequences,
    most_keys,
)

if TYPE_CHECKING:
    from flashcore.problem import Problem

# SMs of the usual GPU of an architecture: T4, A100, RTX 3090, RTX 4090, H200, B200, RTX 5090. Which
# calls are cut depends on it, into how many parts on the GPU at hand.
_FEWEST_SMS = 8  # that a GPU has
_NUM_SMS = {75: 40, 80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
# K and V of a row tile that is cut, at least: some 10 us for an SM (fwd_sm90/splits.py), of which
# the half and more that is saved is more than what handing over takes, 1 to 3 us.
_CUT_BYTES = 4 * LEAST_BYTES


def _estimated_registers(plan: Plan) -> int:
    """Return an estimate of a thread's registers: accumulators of the scores and of O, and what the
    compile gate showed the rest to need."""
    rest = 48
    if plan.arch < 80:
        rest += 8  # the copies go through registers
    if plan.mask is not None and not has_tight_budget(plan):
        rest += 24  # addresses and values of the mask
    if plan.page_size:
        rest += 16  # each row that a thread copies has an address of its own
    if plan.stream_k and not has_tight_budget(plan):
        rest += 24  # the next piece, and what is handed over
        rest += 24 * _has_totals_of_pieces(plan)
        rest += 8 * (plan.packs_queries and plan.cache_dtype != "" and plan.has_softcap)
    if plan.head_dim % 64 and max(plan.head_dim, plan.head_dim_v) > 64:
        rest += 16  # few threads share a row, so each copies more packets
    return plan.block_n // 2 + padded(plan.head_dim_v) // 2 + rest


def _has_totals_of_pieces(plan: Plan) -> bool:
    """Return whether a piece of keys that blocks share may be too long for one sum."""
    return plan.stream_k and plan.packs_queries and plan.keys_of_chunk > 0


def has_tight_budget(plan: Plan) -> bool:
    """Return whether the register budget of head_dim 64 holds; a debug gate is outside of it, and
    so are a mask tensor with seqlens_k, pages, a large softcap, pieces with totals and, on sm_75,
    keys that blocks share, which would spill."""
    exempt = plan.gate is not None or (plan.varlen == "keys" and plan.mask is not None)
    exempt |= plan.softcap_is_large or plan.page_size > 0 or (plan.stream_k and plan.arch < 80)
    exempt |= _has_totals_of_pieces(plan)
    return max(plan.head_dim, plan.head_dim_v) <= 64 and not exempt


def _min_blocks(plan: Plan) -> int:
    """Return the blocks an SM that shared memory and registers, or the tight budget, allow."""
    most = 5 * 128 // plan.num_threads
    if has_tight_budget(plan):
        return most
    by_smem = blocks_that_fit(plan.smem_bytes, plan.arch)
    by_registers = REGISTERS_PER_SM // (_estimated_registers(plan) * plan.num_threads)
    return max(1, min(by_smem, by_registers, most))


def _enumerate(base: Plan) -> Iterator[Plan]:
    # Double-buffered where copies are asynchronous; of bytes there is one more stage.
    num_stages = 1 if base.arch < 80 else 3 if base.cache_dtype else 2
    for block_m in (128, 64):
        for block_n in (128, 64, 32, 16):
            plan = dataclasses.replace(
                base, block_m=block_m, block_n=block_n, num_stages=num_stages
            )
            yield dataclasses.replace(plan, min_blocks=_min_blocks(plan))


def _is_legal(plan: Plan) -> bool:
    if plan.smem_bytes > smem_limits(plan.arch)[0]:
        return False
    if has_tight_budget(plan):
        takes_more = plan.mask is not None or plan.stream_k
        if takes_more and plan.head_dim_v > 32 and plan.block_n > 16:
            return False  # a mask, or the next piece, takes what wider tiles' scores would
        if plan.smem_bytes > HEAD_DIM_64_MAX_SMEM_BYTES:
            return False
        return _estimated_registers(plan) <= HEAD_DIM_64_MAX_REGISTERS
    is_wide = max(plan.head_dim, plan.head_dim_v) > 192
    if plan.arch < 80 and is_wide and (plan.block_n > 16 or _has_totals_of_pieces(plan)):
        return False  # head_dim 224 spills there: copies, scores and O meet in registers
    return _estimated_registers(plan) <= 240 or plan.block_n == 16  # narrower ones there are none


def _rank(plan: Plan) -> tuple[int, ...]:
    """Return a rank, of which smaller is better: warps resident on an SM to hide latencies, as far
    as that paid; narrow key tiles, whose scores leave registers for more warps; small row tiles,
    which make more blocks. Measured on sm_90, see docs/performance.md."""
    resident_warps = min(12, plan.min_blocks * plan.num_warps)
    return (-resident_warps, abs(plan.block_n - 32), plan.block_m)


def _shares_keys(problem: Problem, plan: Plan) -> bool:
    """Return whether blocks share the keys of row tiles, cut by the device (tile/stream_k.cuh):
    where that lets at least twice as many SMs read keys, or lengths may differ, so that blocks of
    short sequences would wait for those of long ones."""
    if plan.gate is not None:
        return False
    if problem.batch_invariant:
        return is_cut(problem)
    if problem.packs_queries and not are_few_queries(problem):
        return False
    launched = _as_seen(problem, plan)
    heads, rows = launched.batch * launched.num_heads_q, launched.seqlen_q
    row_tiles = heads * -(-rows // plan.block_m)
    keys = visible_keys(launched)
    most_tiles = row_tiles * -(-keys // plan.block_n)
    if most_tiles >= MOST_TILES or _has_too_many_shares(problem, plan, keys):
        return False
    of_key = key_tile_bytes(1, problem.head_dim, problem.head_dim_v)
    few_rows = problem.packs_queries or rows <= ROWS_OF_GROUP
    leaves_idle = 2 * row_tiles <= _usual_sms(plan.arch)
    if leaves_idle and keys * of_key >= _CUT_BYTES:
        return few_rows or keys >= max(4096, 8 * rows)
    all_keys = most_keys(problem) * problem.num_heads_kv
    lengths_differ = problem.varlen != "none" and problem.batch > 1
    return few_rows and lengths_differ and all_keys * of_key > FEW_BYTES


def _usual_sms(arch: int) -> int:
    """Return the SMs of the usual GPU of an architecture. One that is not listed counts as the last
    before it."""
    return _NUM_SMS[max((known for known in _NUM_SMS if known <= arch), default=min(_NUM_SMS))]


def _as_seen(problem: Problem, plan: Plan) -> Problem:
    """Return the problem as the kernel sees it; packed sequences as a batch of equal ones."""
    if problem.packs_queries:
        return mean_sequences(problem, heads_of_packed_rows(problem))
    return as_launched(problem, plan.folds_heads)


def _has_too_many_shares(problem: Problem, plan: Plan, keys: int) -> bool:
    """Return whether shares of pieces of a chunk each would take too much memory."""
    if problem.packs_queries or not plan.keys_of_chunk:
        return False
    rows = problem.batch * problem.num_heads_q * problem.seqlen_q
    most_shares = max(1, keys // plan.keys_of_chunk)
    return most_shares * rows * share_row_bytes(plan.out_cols) > MAX_SHARE_BYTES


def _width_of_all_layouts(base: Plan) -> int:
    """Return the keys of a tile that a batch-invariant call has, however its sequences lie in
    memory: the best of pages, which leave the fewest registers, that every layout can have. Above
    head_dim 192 before sm_80 keys of packed sequences are not cut: no tile is legal there."""

    def widths(varlen: str, is_cut: bool) -> list[int]:
        has_pages = varlen in ("pages", "packed_pages")
        page_size = (base.page_size or 16) if has_pages else 0
        alike = dataclasses.replace(base, varlen=varlen, page_size=page_size, stream_k=is_cut)
        legal = (plan for plan in _enumerate(alike) if _is_legal(plan))
        return [plan.block_n for plan in sorted(legal, key=_rank)]

    kinds = itertools.product(VARLEN_KINDS, (False, True))
    of_layouts = [found for varlen, is_cut in kinds if (found := widths(varlen, is_cut))]
    return next(n for n in widths("pages", True) if all(n in others for others in of_layouts))


def _cut(plan: Plan, problem: Problem) -> Plan:
    """Return the plan with keys shared by blocks, in pieces of one length if others might have too
    many keys for one sum, or of packed queries with totals (totals_wmma.cuh). Of narrow key tiles
    one more is under way: an SM that reads 33 KB/us, 1 us after it asked, has 33 KB under way."""
    is_narrow = plan.block_n <= 16 and plan.arch >= 80
    cut = dataclasses.replace(
        plan,
        stream_k=True,
        batch_invariant=problem.batch_invariant,
        num_stages=2 * plan.num_stages - 1 if is_narrow else plan.num_stages,
        folds_heads=heads_of_packed_rows(problem) if problem.packs_queries else plan.folds_heads,
    )
    cut = dataclasses.replace(cut, min_blocks=_min_blocks(cut))
    if problem.packs_queries:
        return cut  # a piece may be all of a sequence, and has totals
    longest = params.grid_size(problem, cut) * problem.seqlen_k // (_FEWEST_SMS * cut.min_blocks)
    return cut if longest > MAX_KEYS_OF_A_SUM else dataclasses.replace(cut, keys_of_chunk=0)


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
    legal = sorted((plan for plan in _enumerate(base) if _is_legal(plan)), key=_rank)
    if problem.batch_invariant and gate is None:
        width = _width_of_all_layouts(base)
        legal = [plan for plan in legal if plan.block_n == width]
    found: list[Plan] = []
    for plan in legal:
        if plan.block_m == ROWS_OF_GROUP and _shares_keys(problem, plan):
            found.append(_cut(plan, problem))
    return [plan for plan in found if _is_legal(plan)] + legal
