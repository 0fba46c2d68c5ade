"""Define the compile gate: what a configuration may take of a GPU, and the sample that stands for
all.

The whole gate compiles every configuration. The sample takes those nearest to a spill, by what
their plans say, and the whole gate checks, by what the compiler says, that they still are. Pure
functions: nothing is compiled here.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.registry import PORTABLE, forward_of, kernel_of
from flashcore.selection.registers import spare_registers

if TYPE_CHECKING:
    from flashcore.compile.jit import Resources
    from flashcore.selection.building import Unit
    from flashcore.selection.configurations import Configuration

# The number of a cell's variants in the sample: of a kernel whose registers the compiler reports,
# and of one whose warps have roles.
SAMPLED_VARIANTS = {False: 2, True: 1}
# Registers hardly depend on the dtype. Where nothing but that differs, one of them tells whether a
# change to a kernel has made it spill; the other is compiled of these, at the usual width.
_IN_BOTH_DTYPES = ("full", "causal", "masked")
# Here, at the usual width, every variant and architecture is compiled, whatever others tell of it.
_HEAD_DIM_IN_FULL = 128
# Constants of the portable kernel's text by which it does more. A text that differs from another in
# nothing but more of these takes as many registers or more (109 of 109 texts). The Hopper kernels
# do not keep to that: with soft-capping or a bound some of them need fewer registers.
_OPTIONS = (
    *("HAS_WINDOW_LEFT", "HAS_WINDOW_RIGHT", "HAS_SOFTCAP", "RETURNS_MAX_SCORE"),
    *("FOLDED", "MASK_KIND"),
)
_BESIDE_OPTIONS = ("MaskElement", "SMEM_BYTES")
# Of the Hopper kernels, where warps have roles, one with a wider head_dim and else the same text
# (tile, options, registers of the roles) holds more: compiled for both with so few registers that
# one spills, from 0.7 to 0.45 of a consumer's, it spills as many bytes or more (24 of 24 texts).
_WIDTHS = ("HEAD_DIM", "HEAD_DIM_V", "CHUNK", "LOAD_CHUNK", "SMEM_BYTES")
# What a thread needs beside its accumulators, a consumer's where warps have roles, depends on the
# options more than on the tile: 32 to 72 registers of the Hopper kernels, 24 to 88 of the portable
# one. Where one text gets along with so many, another that differs in nothing but these does not
# spill with some more (`Kernel.registers_between_tiles`): 28 of 28 pairs of the forward Hopper
# kernel with 16; 6 of 6 for caches of 8 bits, 7 of 7 of dq, 5 of 5 of dk and dv with 32; 36 of 36
# of the portable kernel with 48. The first one had as few as it took (2026-11-30). With no more
# than those 8 of the 28 spilled, with 16 1 of the 7, with 32 2 of the 36.
_TILE = (
    *_WIDTHS,
    *("BLOCK_M", "BLOCK_N", "NUM_STAGES", "LOAD_STAGES", "NUM_V_STAGES", "NUM_DO_STAGES"),
    *("NUM_DS_STAGES", "Q_BUFFERS", "O_PARTS", "MIN_BLOCKS", "NUM_WARPS", "KEY_SLICES"),
    *("SPLIT_KV", "PING_PONG", "LAZY_RESCALE", "WHOLE_ROWS", "CONSUMER_REGISTERS"),
    *("PRODUCER_REGISTERS", "CONVERTER_REGISTERS", "DQ_REGISTERS", "LOAD_BYTES"),
)
# Of the same text the compiler makes the same machine code for both, byte by byte (94 of 94 plans),
# but for caches of 8 bits, which sm_89 has instructions for.
_SAME_CODE = (86, 89)
# Registers of a thread that an option takes (a bound of the band, soft-capping, a mask, lengths):
# the portable kernel's median on sm_75 and sm_80.
_REGISTERS_OF_AN_OPTION = 4
# Of options that take more of the portable kernel's: pieces that are cut alike in any batch, rows
# that lie in pages, caches of 8 bits, sums that begin anew. They are those with which two variants
# of each of the 49 cells find what the compiler shows to be nearest (2026-11-29: by less than 8
# registers in each, 36 in all).
_REGISTERS_OF_PIECES = 32
_REGISTERS_OF_PAGES = 28
_REGISTERS_OF_FLOAT8 = 12
_REGISTERS_OF_TOTALS = 48
# What a kernel that appends to a cache may take. One text took at most 72 registers, and at most 12
# more on one architecture than on another (16 texts, 2026-11-29): one of them tells of the others.
APPEND_REGISTERS = 128
# ptxas has added a warpgroup.arrive: a product's operands in registers are fenced once more, and
# products still overlap.
_FENCE_ADDED = "(C7519)"
# Registers are handed out in eights: nearer to a spill by less than that is as near.
_REGISTER_STEP = 8


class Cell(NamedTuple):
    """Name what the sample has configurations of each of."""

    kernel: str
    arch: int
    head_dim: int


def cell_of(plan: Plan) -> Cell:
    """Return the cell of the sample that a plan belongs to."""
    return Cell(plan.kernel, plan.arch, plan.head_dim)


def expected_room(plan: Plan) -> int:
    """Return an estimate of how many registers a thread has left before it spills. It is for
    comparing plans of one cell: what all of them need is not subtracted."""
    num_options = sum(
        (
            plan.has_window_left,
            plan.has_window_right,
            plan.has_softcap,
            plan.mask is not None,
            plan.varlen != "none",
            plan.stream_k,
        )
    )
    needed = _REGISTERS_OF_AN_OPTION * num_options
    needed += _REGISTERS_OF_PIECES * plan.batch_invariant
    needed += _REGISTERS_OF_PAGES * (plan.page_size > 0)
    needed += _REGISTERS_OF_FLOAT8 * (plan.cache_dtype != "")
    needed += _REGISTERS_OF_TOTALS * (plan.keys_of_chunk > 0)
    return spare_registers(plan) - needed


def checked(found: Iterable[Configuration]) -> list[Configuration]:
    """Return the configurations that the gate has to see: those but for which it is told by
    another. A bfloat16 kernel stands for the same in float16, see _IN_BOTH_DTYPES. What ships was
    found to spill in neither (tune/search.py), and of its tiles a causal kernel stands for the one
    without a mask and the one that keeps a maximum besides: their text is nearly the same.

    At all head_dims but the usual, one of sm_86 stands for that of sm_89, a portable kernel with
    more options for one with fewer, and a Hopper kernel for narrower ones with the same text.
    Each stands, too, for those whose tile leaves more registers. Of these stay what ships, and at
    the usual head_dim each variant's nearest to a spill. The sample's stay in any case."""
    found = _without_same_code(_without_twins(found))
    found = _without_fewer_options(found)
    nearest = _nearest(found)
    return _without_roomier(_without_narrower(found, nearest), nearest)


def checked_to_append(units: Iterable[Unit]) -> list[Unit]:
    """Return the kernels that append to a cache which the gate has to see: each text for the last
    architecture that has it, and one text for each architecture; see APPEND_REGISTERS."""
    units = list(units)
    of_text = {unit[0]: unit for unit in units}
    chosen = {*of_text.values(), *sampled_to_append(units)}
    return [unit for unit in units if unit in chosen]


def sampled_to_append(units: Sequence[Unit]) -> list[Unit]:
    """Return the first of these kernels for each architecture."""
    return list({unit[1]: unit for unit in reversed(units)}.values())


def _without_twins(found: Iterable[Configuration]) -> list[Configuration]:
    found = list(found)
    plans = {entry.plan for entry in found}

    def is_told(entry: Configuration) -> bool:
        plan = entry.plan
        causal = dataclasses.replace(plan, has_window_right=True, returns_max_score=False)
        if entry.ships and entry.variant in ("full", "max-score") and causal in plans:
            return True
        if plan.dtype != "float16":
            return False
        mask = "bfloat16" if plan.mask == "float16" else plan.mask
        is_usual = entry.variant in _IN_BOTH_DTYPES and plan.head_dim == _HEAD_DIM_IN_FULL
        has_twin = dataclasses.replace(plan, dtype="bfloat16", mask=mask) in plans
        return has_twin and (entry.ships or not is_usual)

    return [entry for entry in found if not is_told(entry)]


def _without_same_code(found: Sequence[Configuration]) -> list[Configuration]:
    plans = {entry.plan for entry in found}
    told_by, told = _SAME_CODE
    return [
        entry
        for entry in found
        if entry.plan.arch != told
        or entry.plan.head_dim == _HEAD_DIM_IN_FULL
        or entry.plan.cache_dtype
        or dataclasses.replace(entry.plan, arch=told_by) not in plans
    ]


def _without_fewer_options(found: Sequence[Configuration]) -> list[Configuration]:
    left_out = (*_OPTIONS, *_BESIDE_OPTIONS)
    alike: dict[Hashable, list[dict[str, object]]] = defaultdict(list)
    for entry in found:
        alike[_text_beside(entry.plan, left_out)].append(entry.plan.constants())

    def is_told(entry: Configuration) -> bool:
        if kernel_of(entry.plan) is not PORTABLE or entry.plan.head_dim == _HEAD_DIM_IN_FULL:
            return False
        own = entry.plan.constants()
        others = alike[_text_beside(entry.plan, left_out)]
        return any(_has_more(other, own) for other in others)

    return [entry for entry in found if not is_told(entry)]


def _has_more(other: Mapping[str, object], own: Mapping[str, object]) -> bool:
    """Return whether a text has all options that another has, in the same way, and more."""
    more = [name for name in _OPTIONS if other[name] != own[name]]
    same_mask = not own["MASK_KIND"] or other["MaskElement"] == own["MaskElement"]
    return bool(more) and same_mask and not any(own[name] for name in more)


def _without_narrower(found: Sequence[Configuration], sampled: set[Plan]) -> list[Configuration]:
    widest: dict[Hashable, int] = defaultdict(int)
    for entry in found:
        text = _text_beside(entry.plan, _WIDTHS)
        widest[text] = max(widest[text], min(entry.plan.head_dim, entry.plan.head_dim_v))
    return [
        entry
        for entry in found
        if not entry.plan.role_registers
        or entry.plan.head_dim == _HEAD_DIM_IN_FULL
        or entry.plan in sampled
        or max(entry.plan.head_dim, entry.plan.head_dim_v)
        >= widest[_text_beside(entry.plan, _WIDTHS)]
    ]


def _without_roomier(found: Sequence[Configuration], sampled: set[Plan]) -> list[Configuration]:
    alike: dict[Hashable, list[Plan]] = defaultdict(list)
    stays = sampled | {entry.plan for entry in found if entry.ships}
    known = set[tuple[Cell, str]]()
    for entry in sorted(found, key=lambda entry: expected_room(entry.plan)):
        plan = entry.plan
        if kernel_of(plan).registers_between_tiles(plan) is not None:
            alike[_text_beside(plan, _TILE)].append(plan)
            variant = cell_of(plan), entry.variant
            is_nearest = variant not in known
            if plan.head_dim == _HEAD_DIM_IN_FULL and (is_nearest or plan.dtype == "float16"):
                stays.add(plan)
            known.add(variant)
    told = {
        plan
        for plans in alike.values()
        for plan in plans
        if any(_leaves_fewer(other, plan) for other in plans)
    }
    return [entry for entry in found if entry.plan in stays or entry.plan not in told]


def _leaves_fewer(other: Plan, plan: Plan) -> bool:
    """Return whether each role has no more registers with another plan's tile, and a consumer so
    many fewer beside its accumulators that this one does not spill unless that one does."""
    enough = kernel_of(plan).registers_between_tiles(plan)
    fewer = spare_registers(plan) - spare_registers(other)
    roles = zip(other.role_registers[1:], plan.role_registers[1:], strict=True)
    return enough is not None and fewer >= enough and all(theirs <= own for theirs, own in roles)


def _text_beside(plan: Plan, left_out: Iterable[str]) -> Hashable:
    """Return what a kernel's text is made from, but for some of its constants."""
    beside = sorted((k, str(v)) for k, v in plan.constants().items() if k not in left_out)
    return plan.kernel, plan.arch, tuple(beside)


def sample(found: Iterable[Configuration]) -> list[Configuration]:
    """Return the configurations that stand for all: those with the least room, SAMPLED_VARIANTS of
    each cell that differ in their variant, and one of each variant, forward and backward, and of
    each dtype of a kernel. The latter show that a variant's text compiles: they are the narrowest,
    which compile in half the time.

    Args:
        found: configurations in any order; of two with the same room the first is taken.

    Returns:
        Part of `found`, in its order.
    """
    found = list(found)
    forms: dict[tuple[bool | str, str], Plan] = {}
    for entry in sorted(found, key=lambda e: (e.plan.head_dim, expected_room(e.plan))):
        forms.setdefault((kernel_of(entry.plan).is_backward, entry.variant), entry.plan)
        forms.setdefault((entry.plan.kernel, entry.plan.dtype), entry.plan)
    chosen = _nearest(found) | set(forms.values())
    return [entry for entry in found if entry.plan in chosen]


def _nearest(found: Iterable[Configuration]) -> set[Plan]:
    """Return those of each cell with the least room, SAMPLED_VARIANTS that differ in their
    variant."""
    cells: dict[Cell, dict[str, Plan]] = defaultdict(dict)
    for entry in sorted(found, key=lambda entry: expected_room(entry.plan)):
        cell = cells[cell_of(entry.plan)]
        if len(cell) < SAMPLED_VARIANTS[bool(entry.plan.role_registers)]:
            cell.setdefault(entry.variant, entry.plan)
    return {plan for cell in cells.values() for plan in cell.values()}


def over_budget(entry: Configuration, found: Resources) -> list[str]:
    """Return what a configuration takes more of than it may, one line each."""
    plan = entry.plan
    where = (
        f"{found.kernel} {found.arch} head_dim {found.head_dim} {found.dtype} {entry.variant} "
        f"{plan.block_m}x{plan.block_n}"
    )
    lines = []
    if found.spill_bytes > 0:
        lines.append(f"{where}: {found.spill_bytes} spilled bytes, 0 allowed")
    lines += [f"{where}: {remark}" for remark in found.remarks if _FENCE_ADDED not in remark]
    budget = None if kernel_of(plan).is_backward else forward_of(plan).budget_of(plan)
    if found.head_dim == 64 and budget is not None:
        registers, smem_bytes = budget
        if found.registers > registers:
            lines.append(f"{where}: {found.registers} registers, {registers} allowed")
        if found.smem_bytes > smem_bytes:
            lines.append(
                f"{where}: {found.smem_bytes} bytes of shared memory, {smem_bytes} allowed"
            )
    return lines


def missed_by_sample(found: Sequence[tuple[Configuration, Resources]]) -> list[str]:
    """Return a line for each cell in which the sample leaves out what the compiler shows to be
    nearest to a spill: its estimate no longer holds.

    Args:
        found: configurations and what the compiler said of them. Kernels whose warps have roles
            are left out: the compiler reports what they are launched with, whatever they need.
    """
    rooms: dict[Cell, list[tuple[int, Configuration]]] = defaultdict(list)
    for entry, resources in found:
        if resources.registers >= 0 and not entry.plan.role_registers:
            room = entry.plan.max_registers - resources.registers
            rooms[cell_of(entry.plan)].append((room, entry))
    chosen = {entry.plan for entry in sample(entry for entry, _ in found)}
    lines = []
    for cell, measured in rooms.items():
        least, nearest = min(measured, key=lambda item: item[0])
        sampled = min(room for room, entry in measured if entry.plan in chosen)
        if sampled - least >= _REGISTER_STEP:
            lines.append(
                f"{cell.kernel} sm_{cell.arch} head_dim {cell.head_dim}: "
                f"{nearest.variant} has {least} registers left, what the sample takes {sampled}; "
                "mend expected_room in selection/compile_gate.py"
            )
    return lines
