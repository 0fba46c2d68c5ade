"""The sample of the compile gate stands for all configurations, and says so when it does not."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from flashcore.cli import app, resources
from flashcore.compile import jit
from flashcore.compile.compiler import CompiledKernel
from flashcore.kernels.bwd_mask_sm90.plan import DMASK_KERNEL
from flashcore.kernels.bwd_sm90.plan import DKDV_KERNEL, DQ_KERNEL
from flashcore.kernels.bwd_sm90.plan_one import DELTA_KERNEL, ROUND_KERNEL
from flashcore.kernels.fwd_sm90.plan import KERNEL as SM90_KERNEL
from flashcore.kernels.fwd_wmma.plan import KERNEL, SUPPORTED_ARCHS, Plan
from flashcore.kernels.registry import kernel_of
from flashcore.selection import compile_gate
from flashcore.selection.backward_configurations import backward_configurations
from flashcore.selection.building import append_units
from flashcore.selection.compile_gate import (
    cell_of,
    expected_room,
    missed_by_sample,
    over_budget,
    sample,
)
from flashcore.selection.configurations import Configuration, configurations
from flashcore.selection.registers import spare_registers

runner = CliRunner()


@pytest.fixture(scope="module")
def every() -> list[Configuration]:
    return configurations() + backward_configurations()


@pytest.fixture(scope="module")
def checked(every: list[Configuration]) -> list[Configuration]:
    return compile_gate.checked(every)


def of_kernels(found: list[Configuration], aspect: Callable[[Configuration], Any]) -> set[Any]:
    return {(entry.plan.kernel, aspect(entry)) for entry in found}


def test_the_sample_has_every_kernel_architecture_and_head_dim(
    checked: list[Configuration],
) -> None:
    sampled = sample(checked)
    assert {cell_of(entry.plan) for entry in sampled} == {cell_of(entry.plan) for entry in checked}
    assert {cell.arch for cell in map(cell_of, (e.plan for e in sampled))} == set(SUPPORTED_ARCHS)
    of_backward = {DQ_KERNEL, DKDV_KERNEL, DELTA_KERNEL, ROUND_KERNEL, DMASK_KERNEL}
    assert {entry.plan.kernel for entry in sampled} == {KERNEL, SM90_KERNEL} | of_backward


def test_the_sample_has_every_variant_and_every_dtype(
    checked: list[Configuration],
) -> None:
    def dtype(entry: Configuration) -> str:
        return entry.plan.dtype

    def variants(found: list[Configuration]) -> set[tuple[bool, str]]:
        return {(kernel_of(entry.plan).is_backward, entry.variant) for entry in found}

    assert of_kernels(sample(checked), dtype) == of_kernels(checked, dtype)
    assert variants(sample(checked)) == variants(checked)


OPTIONS = {"HAS_WINDOW_LEFT", "HAS_WINDOW_RIGHT", "HAS_SOFTCAP", "RETURNS_MAX_SCORE", "FOLDED"}
OPTIONS |= {"MASK_KIND", "MaskElement"}
WIDTHS = {"HEAD_DIM", "HEAD_DIM_V", "CHUNK", "LOAD_CHUNK"}
SAME = ("kernel", "arch", "has_window_left", "has_window_right", "has_softcap", "mask", "varlen")


def tells(other: Plan, plan: Plan) -> bool:
    """Return whether the text of a plan is another one's but for options that only that one has, if
    it is portable, or but for fewer columns, if its warps have roles."""
    own, others = plan.constants(), other.constants()
    differing = {name for name in own if own[name] != others.get(name)} - {"SMEM_BYTES"}
    if plan.role_registers:
        return differing <= WIDTHS and plan.head_dim < other.head_dim
    off = all(own[name] in (False, 0, "bool") for name in differing)
    return plan.kernel == KERNEL and bool(differing) and differing <= OPTIONS and off


def tells_by_registers(other: Plan, plan: Plan) -> bool:
    """Return whether another tile leaves no role more registers, and a consumer some fewer."""
    off = [] if plan.role_registers else [name for name in SAME if not getattr(plan, name)]
    alike = all(name in off or getattr(other, name) == getattr(plan, name) for name in SAME)
    others_fit = all(map(int.__le__, other.role_registers[1:], plan.role_registers[1:]))
    fewer = 48 if plan.kernel == KERNEL else 16 if plan.kernel == SM90_KERNEL else 32
    return alike and others_fit and spare_registers(plan) - spare_registers(other) >= fewer


def tile_of(plan: Plan) -> tuple[str, int, int, int]:
    return plan.kernel, plan.arch, plan.block_m, plan.block_n


def test_what_is_not_checked_is_told_by_another(
    every: list[Configuration], checked: list[Configuration]
) -> None:
    """Where the dtype decides the tile, both are compiled; and both of what is used most."""
    listed, plans = {entry.plan for entry in every}, {entry.plan for entry in checked}
    of_tile = defaultdict(list)
    for plan in plans:
        of_tile[tile_of(plan)].append(plan)
    kinds = Counter()
    for entry in every:
        plan = entry.plan
        if plan in plans:
            continue
        if plan.dtype == "float16" or entry.ships:
            mask = "bfloat16" if plan.mask == "float16" else plan.mask
            twin = dataclasses.replace(plan, dtype="bfloat16", mask=mask)
            plan = twin if twin in listed else plan
            used_most = entry.variant in ("full", "causal", "masked") and plan.head_dim == 128
            assert entry.ships or plan != twin or not used_most
        causal = dataclasses.replace(plan, has_window_right=True, returns_max_score=False)
        if causal in listed and entry.ships and entry.variant in ("full", "max-score"):
            plan = causal
            kinds["what ships"] += 1
        if plan not in plans and plan.arch == 89 and not plan.cache_dtype:
            plan = dataclasses.replace(plan, arch=86)
            kinds["the same code"] += 1
        if plan not in plans and plan.head_dim != 128:
            others = (other for other in of_tile[tile_of(plan)] if tells(other, plan))
            kinds["more options" if plan.kernel == KERNEL else "more columns"] += 1
            plan = next(others, plan)
        if plan not in plans:
            plan = next(other for other in plans if tells_by_registers(other, plan))
            kinds["more registers"] += 1
        assert plan in plans, entry
    assert len(kinds) == 5, kinds


def test_every_variant_is_checked_at_the_usual_width(
    every: list[Configuration], checked: list[Configuration]
) -> None:
    usual = ([e for e in found if e.plan.head_dim == 128] for found in (every, checked))
    listed, kept = (of_kernels(found, lambda entry: entry.variant) for found in usual)
    assert listed == kept


def left_out(kept: Configuration, **fields: Any) -> bool:
    """Return whether a plan is left out because of another one, which has other fields."""
    other = dataclasses.replace(kept, plan=dataclasses.replace(kept.plan, **fields))
    assert other in compile_gate.checked([other, kept])
    return kept not in compile_gate.checked([other, kept])


def test_options_tell_of_fewer_but_not_of_others() -> None:
    (entry,) = configurations(archs=[80], head_dims=[64], dtypes=["bfloat16"], variants=["full"])
    assert left_out(entry, has_window_right=True, mask="bool")
    assert not left_out(entry, has_window_right=True, block_n=2 * entry.plan.block_n)
    assert not left_out(entry, has_window_right=True, varlen="keys")
    assert not left_out(entry, arch=86)
    entry = dataclasses.replace(entry, plan=dataclasses.replace(entry.plan, mask="bool"))
    assert not left_out(entry, mask="bfloat16", has_softcap=True)
    assert left_out(entry, has_softcap=True)
    usual = dataclasses.replace(entry.plan, head_dim=128, head_dim_v=128)
    entry = dataclasses.replace(entry, plan=usual)
    assert not left_out(entry, has_softcap=True)


def test_masks_of_the_backward_are_tried_in_pairs() -> None:
    """Every two of: the mask's elements, its rows, the options that have tiles of their own."""
    listed = backward_configurations()

    def traits(plan: Plan) -> tuple[str, str, str]:
        is_aligned = plan.mask_load_bytes == 16 and not plan.mask_is_shifted  # type: ignore[attr-defined]
        row = "one" if plan.mask_is_row else "aligned" if is_aligned else "loose"  # type: ignore[attr-defined]
        band = "bounded" if plan.has_window_right else "full"
        return str(plan.mask), row, "capped" if plan.has_softcap else band

    for kernel in (DQ_KERNEL, DKDV_KERNEL):
        for head_dim in (32, 40, 64, 72, 80, 96, 128, 160, 192, 256):
            found = {
                traits(entry.plan)
                for entry in listed
                if entry.plan.kernel == kernel
                and entry.plan.mask is not None
                and (entry.plan.head_dim, entry.plan.dtype) == (head_dim, "bfloat16")
            }
            for one, other in ((0, 1), (0, 2), (1, 2)):
                pairs = {(known[one], known[other]) for known in found}
                assert len(pairs) == 9, (kernel, head_dim, pairs)


def test_the_sample_has_the_variants_with_the_least_room(checked: list[Configuration]) -> None:
    sampled = sample(checked)
    for cell in {cell_of(entry.plan) for entry in checked}:
        ours = [entry for entry in sampled if cell_of(entry.plan) == cell]
        others = [
            entry
            for entry in checked
            if cell_of(entry.plan) == cell
            and entry.variant not in {known.variant for known in ours}
        ]
        known = {entry.variant for entry in checked if cell_of(entry.plan) == cell}
        most = compile_gate.SAMPLED_VARIANTS[bool(ours[0].plan.role_registers)]
        wanted = min(most, len(known))  # a variant may have its own dims
        assert len({entry.variant for entry in ours}) >= wanted
        worst = sorted(expected_room(entry.plan) for entry in ours)[wanted - 1]
        assert all(expected_room(entry.plan) >= worst for entry in others), cell


def test_the_sample_is_small_and_does_not_depend_on_chance(checked: list[Configuration]) -> None:
    sampled = sample(checked)
    assert sampled == sample(list(checked))
    assert sampled == sample(sampled)  # and what is nearest stays so among itself
    assert len(sampled) * 4 < len(checked)


def measured(entry: Configuration, room: int) -> tuple[Configuration, jit.Resources]:
    plan = entry.plan
    registers = plan.max_registers - room
    found = jit.Resources(
        plan.kernel, f"sm_{plan.arch}", plan.head_dim, plan.dtype, registers, 0, 0, 1
    )
    return entry, found


def test_the_whole_gate_finds_a_sample_that_misses_what_is_nearest(
    checked: list[Configuration],
) -> None:
    sampled = set(sample(checked))
    portable = [entry for entry in checked if cell_of(entry.plan) == (KERNEL, 80, 128)]
    left_out = next(entry for entry in portable if entry not in sampled)

    def missed(room: int) -> list[str]:
        return missed_by_sample(
            [measured(entry, room if entry is left_out else 24) for entry in checked]
        )

    assert missed(24) == []
    assert missed(17) == []  # registers are handed out in eights
    (line,) = missed(16)
    assert left_out.variant in line
    assert "sm_80 head_dim 128" in line


def test_what_a_kernel_with_roles_is_launched_with_says_nothing(
    checked: list[Configuration],
) -> None:
    hopper = [entry for entry in checked if entry.plan.kernel == SM90_KERNEL]
    assert missed_by_sample([measured(entry, i % 50) for i, entry in enumerate(hopper)]) == []


def test_backward_kernels_are_listed_where_they_are() -> None:
    found = backward_configurations()
    of_one = {DKDV_KERNEL, DELTA_KERNEL, ROUND_KERNEL}
    assert {entry.plan.kernel for entry in found} == {DQ_KERNEL, DMASK_KERNEL} | of_one
    masked = {e.plan.kernel for e in backward_configurations(variants=["masked"])}
    assert masked == {DQ_KERNEL, DKDV_KERNEL}
    roles = {len(e.plan.role_registers) for e in found if e.plan.kernel == DKDV_KERNEL}
    assert roles == {2, 3}, "of a consumer and a producer, and of dq where it is computed too"
    assert {entry.plan.arch for entry in found} == {90}
    assert {entry.plan.varlen for entry in found} >= {"none", "keys"}
    assert {entry.plan.mask is not None for entry in found} == {False, True}
    assert len({entry.plan for entry in found}) == len(found)
    checked = compile_gate.checked(found)
    assert {e.variant for e in checked} == {e.variant for e in found}
    assert len(checked) < len(found)
    assert {"full-any-order", "causal-any-order"} <= {e.variant for e in sample(found)}
    assert backward_configurations(archs=[80]) == []


def test_registers_are_printed_by_role_and_kernel(compiler: Compiler) -> None:
    shown = ["resources", "--arch", "sm_90", "--head-dim", "64", "--variant", "full"]
    text = runner.invoke(app, [*shown, "--dtype", "bfloat16"]).stdout
    for words in ("bwd_dkdv_sm90", "/200/40/72", "bwd_dq_sm90", "bwd_delta_sm90", "fwd_sm90"):
        assert words in text


def test_the_gate_reports_a_spill_of_a_backward_kernel(compiler: Compiler) -> None:
    arguments = ["resources", "--kernel", DKDV_KERNEL, "--head-dim", "64", "--check", "-q"]
    assert runner.invoke(app, arguments).exit_code == 0
    assert {plan.kernel for plan in compiler.plans} == {DKDV_KERNEL}
    compiler.spilling = {compiler.plans[0]}
    done = runner.invoke(app, arguments)
    assert done.exit_code == 1
    assert f"{DKDV_KERNEL} sm_90 head_dim 64" in done.stdout


def test_serialised_products_are_over_budget_and_a_fence_more_is_not() -> None:
    (entry, *_) = backward_configurations(head_dims=[128], variants=["full"])
    fence = "ptxas info : (C7519) warpgroup.arrive is injected in around line 3"
    serialised = "ptxas info : (C7510) Potential Performance Loss: wgmma is serialized"
    _, found = measured(entry, 16)
    assert over_budget(entry, dataclasses.replace(found, remarks=(fence,))) == []
    (line,) = over_budget(entry, dataclasses.replace(found, remarks=(fence, serialised)))
    assert line.endswith(serialised)


def test_each_text_that_appends_is_compiled_once_and_one_for_each_architecture() -> None:
    every = list(append_units(SUPPORTED_ARCHS, ["float16", "bfloat16"]).values())
    found = compile_gate.checked_to_append(every)
    assert {unit[0] for unit in found} == {unit[0] for unit in every}
    assert {unit[1] for unit in found} == set(SUPPORTED_ARCHS)
    assert len(found) <= len({unit[0] for unit in every}) + len(SUPPORTED_ARCHS)
    assert compile_gate.checked_to_append(found) == found
    assert set(compile_gate.sampled_to_append(found)) <= set(found)


def test_a_kernel_that_appends_has_a_budget() -> None:
    (unit, *_) = append_units([90], ["float16"]).values()
    few = CompiledKernel(unit[2], "sm_90", "cubin", b"", 72, 0, 0, 1)
    assert resources._append_row(unit, few).violations == []
    many = dataclasses.replace(few, registers=136, spill_bytes=8)
    spilled, crowded = resources._append_row(unit, many).violations
    assert "8 spilled bytes" in spilled
    assert "136 registers, 128 allowed" in crowded


class Compiler:
    """Stand for NVRTC: count plans; `spilling` ones spill, `crowded` ones take all registers."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self.spilling: set[Plan] = set()
        self.crowded: set[Plan] = set()

    def __call__(self, plan: Plan) -> jit.Resources:
        self.plans.append(plan)
        return jit.Resources(
            plan.kernel,
            f"sm_{plan.arch}",
            plan.head_dim,
            plan.dtype,
            plan.max_registers - (0 if plan in self.crowded else 16),
            plan.smem_bytes,
            4 if plan in self.spilling else 0,
            1,
        )


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler()
    monkeypatch.setattr(jit, "resources", found)
    monkeypatch.setattr("flashcore.base.machine.available_cores", lambda: 1)  # no second process
    return found


ARGUMENTS = ("resources", "--kernel", KERNEL, "--head-dim", "128", "--check")


def test_a_check_prints_one_line_unless_the_table_is_asked_for(compiler: Compiler) -> None:
    done = runner.invoke(app, [*ARGUMENTS, "-q"])
    assert done.exit_code == 0
    assert done.stdout == f"{len(compiler.plans)} configurations, all within budget\n"
    with_table = runner.invoke(app, [*ARGUMENTS, "--table", "-q"])
    assert with_table.exit_code == 0
    assert len(with_table.stdout.splitlines()) > len(compiler.plans) // 2
    without_check = runner.invoke(app, [*ARGUMENTS[:-1], "-q"])
    assert "decode-masked" in without_check.stdout


def test_a_check_of_the_sample_compiles_little_and_says_how_much(compiler: Compiler) -> None:
    runner.invoke(app, [*ARGUMENTS, "-q"])
    num_known = len(compiler.plans)
    compiler.plans.clear()
    done = runner.invoke(app, [*ARGUMENTS, "--sample", "-q"])
    assert done.exit_code == 0
    num_sampled = len(set(compiler.plans))
    assert 0 < num_sampled < num_known
    assert done.stdout == (
        f"a sample of {num_sampled} of {num_known} configurations, all within budget\n"
    )


def test_a_check_prints_only_what_is_over_budget(compiler: Compiler) -> None:
    runner.invoke(app, [*ARGUMENTS, "--sample", "-q"])
    compiler.spilling = {compiler.plans[0]}
    done = runner.invoke(app, [*ARGUMENTS, "--sample", "-q"])
    assert done.exit_code == 1
    over, summary = done.stdout.splitlines()
    assert "4 spilled bytes, 0 allowed" in over
    assert summary.endswith("configurations, 1 over budget")


@pytest.mark.thorough
def test_the_whole_check_fails_where_the_sample_misses(compiler: Compiler) -> None:
    runner.invoke(app, [*ARGUMENTS, "--sample", "-q"])
    sampled = set(compiler.plans)
    runner.invoke(app, [*ARGUMENTS, "-q"])
    compiler.crowded = set(compiler.plans) - sampled
    for extra in ((), ("--json",)):
        done = runner.invoke(app, [*ARGUMENTS, "-q", *extra])
        assert done.exit_code == 1
        assert "--sample misses" in done.stderr
    assert {row["violations"] == [] for row in json.loads(done.stdout)} == {True}
    assert runner.invoke(app, [*ARGUMENTS, "--sample", "-q"]).exit_code == 0
