"""Test all planted bugs by name: each has a kernel and a call that shows it, and `verify` finds
those that show with some tiles, schedules, lengths or scores alone."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from pathlib import Path

import pytest
from plant_checks import check_text, undocumented

from flashcore.checks import verify
from flashcore.checks.paged_cases import PagedCase
from flashcore.checks.varlen_cases import VarlenCase
from flashcore.isolate import backward, gates, plant_calls, plant_stages, registry
from flashcore.kernels.bwd_mask_sm90.plan import DMASK_KERNEL
from flashcore.kernels.bwd_sm90.plan import DKDV_KERNEL, DQ_KERNEL
from flashcore.kernels.fwd_wmma.plan import SIM_ARCH
from flashcore.kernels.registry import BY_NAME
from flashcore.kernels.stage import Stage
from flashcore.problem.case import Case
from flashcore.sim import Plant, plants
from flashcore.sim.plants import index
from flashcore.sim.plants.schedules import PLANTS_SCHEDULES, PLANTS_SCHEDULES_SM90
from flashcore.sim.report import ALARM_KINDS

pytestmark = pytest.mark.thorough

BACKWARD_KERNELS = {DQ_KERNEL, DKDV_KERNEL, DMASK_KERNEL}
SM90, WMMA = "attn_fwd_sm90", "attn_fwd_wmma"
EVERY = registry.all_planted()
DRAWN = [planted for planted in EVERY if planted.drawn is not None]
BACKWARD = [planted for planted in EVERY if planted.kernel in BACKWARD_KERNELS]
SIZES = {WMMA: (150, 64), SM90: (300, 96)}  # as the command takes them


def arch_of(kernel: str) -> int:
    return 90 if kernel == SM90 else SIM_ARCH


def test_every_planted_bug_is_in_the_registry() -> None:
    folder = Path(plants.__file__).parent
    written = {
        line.split('"')[1]
        for path in folder.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("        name=")
    }
    assert len(written) > 140
    assert set(index.names()) == written


def test_every_dictionary_of_planted_bugs_is_in_the_registry() -> None:
    registered = {(planted.plant, planted.kernel) for planted in EVERY}
    kernels = {"SM90": {SM90}, "SPLIT": {SM90}}
    found, missing = set(), []
    for module in pkgutil.walk_packages(plants.__path__, "flashcore.sim.plants."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if not name.startswith("PLANTS") or not isinstance(value, dict):
                continue
            if value in index.BESIDE.values():
                continue  # see test_sim_plants_append.py
            found.add(name)
            of = kernels.get(name.rpartition("_")[2], {SM90, WMMA})
            if name == "PLANTS_BWD_MASK_SM90":
                of = {DMASK_KERNEL}
            elif name.startswith("PLANTS_BWD"):
                of = {DQ_KERNEL} if "_DQ_" in name else {DKDV_KERNEL}
            missing += [
                f"{name}: {plant.name}"
                for plant in value.values()
                if not any((plant, kernel) in registered for kernel in of)
            ]
    assert {"PLANTS", "PLANTS_SM90", "PLANTS_TOTALS", "PLANTS_BWD_ROLES_SM90"} <= found
    assert missing == []


def test_no_call_is_left_of_a_planted_bug_that_is_gone() -> None:
    for kernel, calls in plant_calls.CALLS.items():
        assert calls.keys() <= index.BY_KERNEL[kernel].keys()


def test_every_planted_bug_has_a_stage_of_its_kernel() -> None:
    without = [
        planted.plant.name
        for planted in EVERY
        if BY_NAME[planted.kernel].suspects_of(planted.stage) is None
    ]
    assert without == []
    for kernel, stages in plant_stages.STAGES.items():
        listed = [name for names in stages.values() for name in names]
        assert sorted(listed) == sorted(
            {planted.plant.name for planted in EVERY if planted.kernel == kernel}
        )


# They are found though nobody chose the case for them: it is one of those that are drawn anyway.
@pytest.mark.parametrize("planted", DRAWN, ids=lambda planted: planted.plant.name)
def test_verify_finds_it(planted: registry.Planted) -> None:
    assert planted.drawn is not None
    arch, name = arch_of(planted.kernel), planted.plant.name
    (found,) = verify.verify("sim", indices=[planted.drawn], arch=arch, plant=name)
    assert not found.ok
    kind = "wrong-result" if found.error is None else found.error.split(": ")[2]
    assert kind in (planted.plant.caught_by, *planted.plant.or_by), found.describe()
    assert found.isolate is not None
    assert f"--case {planted.drawn} " in found.isolate + " "


def test_without_a_bug_the_same_cases_pass() -> None:
    for kernel in (SM90, WMMA):
        indices = sorted({p.drawn for p in DRAWN if p.kernel == kernel and p.drawn is not None})
        results = verify.verify("sim", indices=indices, arch=arch_of(kernel))
        assert [result.describe() for result in results if not result.ok] == []


def up_to(name: str, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Return the stages that tell whether `name` is the first wrong one: none behind it, unless it
    is a phase outside of them."""
    names = [stage.name for stage in stages]
    return stages[: names.index(name) + 1] if name in names else stages


def planted_case(name: str, kernel: str) -> tuple[registry.Planted, Case | VarlenCase | PagedCase]:
    planted = registry.find_plant(name, "sim", kernel)
    seqlen, head_dim = SIZES[kernel]
    base = Case(seqlen_q=seqlen, seqlen_k=seqlen, head_dim=head_dim, head_dim_v=head_dim)
    return planted, planted.case(base)


# One of each group, and of each stage that is not tried elsewhere; where is what --plant list says.
@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("one-stage-unordered", WMMA),
        ("neighbours-query", WMMA),
        ("coord-late", SM90),
        ("draws-left", SM90),
        ("passed-over-kept", SM90),
        ("outgrown-not-awaited", SM90),
        ("outgrown-unmasked", SM90),
        ("mask-row-mixed-up", SM90),
        ("mask-row-again", SM90),
        ("mask-shift-forgotten", SM90),
        ("split-never-last", SM90),
        ("counter-left", SM90),
        ("sum-of-the-neighbour", SM90),
        ("large-max-product", SM90),
        ("large-max-twice", WMMA),
        ("large-max-left", SM90),
        ("large-max-of-first-part", SM90),
        ("totals-not-rescaled", WMMA),
        ("totals-counted-twice", WMMA),
        ("totals-lost", WMMA),
        ("packed-tree-whole", WMMA),
        ("packed-tree-of-rows", SM90),
        ("packed-q-row-by-row", WMMA),
    ],
)
def test_isolate_finds_it_where_the_list_says(
    name: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted, case = planted_case(name, kernel)
    stages = up_to(planted.stage, BY_NAME[kernel].stages)
    until_then = dataclasses.replace(BY_NAME[kernel], stages=stages)
    monkeypatch.setattr(gates, "BY_NAME", {**BY_NAME, kernel: until_then})
    found = gates.isolate(case, "sim", plant=name, kernel=kernel)
    assert found.first_wrong == planted.stage, found.why


# The one bug of each stage with which isolate runs all stages before it. Each is more builds of the
# planted kernel, so the others have their own stage alone, where that is one.
FROM_THE_START = {(planted.kernel, planted.stage): planted for planted in reversed(BACKWARD)}


@pytest.mark.parametrize("planted", BACKWARD, ids=lambda planted: planted.plant.name)
def test_isolate_finds_every_bug_of_the_backward_kernels(
    planted: registry.Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = planted.plant
    stages = up_to(planted.stage, backward.STAGES)
    if FROM_THE_START[planted.kernel, planted.stage] is not planted and planted.stage != "full":
        stages = tuple(x for x in stages if x.name == planted.stage) or stages
    monkeypatch.setattr(backward, "STAGES", stages)
    found = gates.isolate(planted.case(Case()), "sim", plant=plant.name, kernel=planted.kernel)
    assert found.first_wrong == planted.stage, found.why
    bad = next(result for result in found.stages if not result.ok)
    kind = "wrong-result" if bad.alarm is None else bad.alarm.kind
    assert kind in (plant.caught_by, *plant.or_by)
    if bad.alarm is None:
        assert bad.stage == planted.stage
        check = bad.first_bad_check()
        assert check is not None
        assert check.first is not None


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("large-max-product", WMMA),
        ("totals-lost", WMMA),
        ("packed-tree-whole", WMMA),
        ("packed-tree-whole", SM90),
        ("packed-tree-of-rows", SM90),
    ],
)
def test_without_the_bug_isolate_finds_nothing(name: str, kernel: str) -> None:
    planted, case = planted_case(name, kernel)
    found = gates.isolate(case, "sim", kernel=kernel, tile=planted.tile)
    assert found.ok, found.why


# Changes that only cost time are no faults: more waiting, more ordering, less put off.
SLOW = (
    Plant(
        "a-barrier-more",
        "",
        f"fwd_sm90/{SM90}.cuh",
        "  const bool leads = warp_idx() % 4 == 0 && elect_lane();\n",
        "  named_barrier_sync(STORE_BARRIER + c.index, 128);"
        " const bool leads = warp_idx() % 4 == 0 && elect_lane();\n",
        "",
    ),
    Plant(
        "no-overlap",
        "",
        f"fwd_sm90/{SM90}.cuh",
        "wgmma_wait<OVERLAP ? 1 : 0>();",
        "wgmma_wait<0>();",
        "",
    ),
    Plant(
        "never-asked-ahead",
        "",
        "fwd_sm90/consumer_sm90.cuh",
        "  c.v_is_there = mbar_test(bar.v_full + c.k_state.stage(), c.k_state.parity());\n"
        "  c.k_is_there = mbar_test(bar.k_full + next.stage(), next.parity());",
        "  c.v_is_there = false;\n  c.k_is_there = false;",
        "",
    ),
)


@pytest.mark.parametrize("slow", SLOW, ids=lambda plant: plant.name)
def test_what_only_costs_time_is_silent(slow: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "BY_KERNEL", {SM90: {slow.name: slow}})
    results = verify.verify("sim", indices=[1, 2], arch=90, plant=slow.name)
    assert [result.describe() for result in results if not result.ok] == []


@pytest.mark.parametrize("name", [*PLANTS_SCHEDULES, *PLANTS_SCHEDULES_SM90])
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, (PLANTS_SCHEDULES | PLANTS_SCHEDULES_SM90)[name])


def test_the_documentation_lists_every_plant() -> None:
    of_forward = (name for kernel in (WMMA, SM90) for name in index.BY_KERNEL[kernel])
    assert undocumented(of_forward) == []
    # Of the others see test_sim_plants_bwd_sm90.py.
    assert {kernel for kernel in index.BY_KERNEL if "bwd" in kernel} == BACKWARD_KERNELS


def test_bugs_that_isolate_does_not_take_say_what_runs_them() -> None:
    """A test file that is there, and that knows the kernel's bugs."""
    root = Path(__file__).resolve().parents[2]
    for kernel, bugs in index.BESIDE.items():
        test = index.TEST_OF_BESIDE[kernel]
        assert "PLANTS_" in (root / test).read_text(encoding="utf-8")
        for name in bugs:
            with pytest.raises(ValueError, match=f"{kernel}, which isolate .* {test} runs it"):
                registry.find_plant(name, "sim", kernel)


def test_wrong_names_say_what_there_is() -> None:
    with pytest.raises(ValueError, match="plant='gremlin' is not one of pv-atomic"):
        registry.find_plant("gremlin", "sim")
    with pytest.raises(ValueError, match="'pv-atomic' is not a bug of attn_fwd_sm90, but of"):
        registry.find_plant("pv-atomic", "sim", SM90)
    with pytest.raises(ValueError, match="needs backend='sim'"):
        verify.verify("torch", plant="pv-atomic")
    assert {planted.plant.caught_by for planted in EVERY} <= {
        *ALARM_KINDS,
        "wrong-result",
    }
