"""Test the debug gates and isolate with the Hopper kernel; see test_gates.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from parameters import thorough_but

from flashcore.base import env
from flashcore.checks.cases import make_inputs
from flashcore.compile.codegen import KERNELS_DIR
from flashcore.isolate import alarms, gates
from flashcore.isolate.choosing import kernel_to_run
from flashcore.isolate.gate_models import Expected, GateModel
from flashcore.isolate.locate import compare
from flashcore.kernels.fwd_sm90 import plan as plan_sm90
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.selection.select import select_plan
from flashcore.sim import PLANTS, PLANTS_SM90, Agent, SimulationError
from flashcore.sim.report import ALARM_KINDS

KERNEL = plan_sm90.KERNEL
STAGES = ["qk", "softmax", "pv", "tile", "full"]
# Three key tiles of 128, or two; empty rows, skipped tiles at both ends, every kind of score.
CASES = [
    Case(num_heads_kv=1, seqlen_q=70, seqlen_k=290, head_dim=96, head_dim_v=96),
    Case(
        batch=2,
        seqlen_q=200,
        seqlen_k=150,
        head_dim=24,
        head_dim_v=40,
        causal="lower_right",
        mask="additive",
        dtype="bfloat16",
    ),
    Case(seqlen_q=300, seqlen_k=300, head_dim=16, head_dim_v=16, window=(33, 5), softcap=5.0),
]


def problem_of(case: Case) -> Problem:
    inputs = make_inputs(case)
    return Problem.from_tensors(
        inputs.q, inputs.k, inputs.v, mask=inputs.mask, return_lse=True, **case.options()
    )


@pytest.mark.parametrize("case", thorough_but(CASES[1:2], CASES), ids=Case.describe)
def test_the_healthy_kernel_passes_every_stage(case: Case) -> None:
    found = gates.isolate(case, "sim", arch=90)
    assert found.ok, found.why
    assert (found.kernel, [result.stage for result in found.stages]) == (KERNEL, STAGES)
    assert [result.status for result in found.stages] == ["ok"] * len(STAGES)
    assert all("gate" in result.plan for result in found.stages[:-1])


@pytest.mark.parametrize(
    ("plant", "stage", "reason"),
    [
        ("no-commit", "pv", "wgmma"),
        *(
            pytest.param(*values, marks=pytest.mark.thorough)
            for values in (
                ("turn-not-handed-on", "full", "what the gates switch off"),
                ("no-init-fence", "setup", "mbar_init_fence"),
                ("o-part-overwritten", "store", "race"),
                ("share-sum-lost", "full", "lse"),
            )
        ),
    ],
)
def test_a_planted_bug_is_found_in_its_stage(plant: str, stage: str, reason: str) -> None:
    case = Case(num_heads_q=2, seqlen_q=150, seqlen_k=290, head_dim=96, head_dim_v=96)
    found = gates.isolate(case, "sim", plant=plant)  # the plant says which kernel
    assert found.kernel == KERNEL
    assert found.first_wrong == stage
    assert reason in " ".join(found.why)
    alarms_raised = {result.alarm.kind for result in found.stages if result.alarm is not None}
    assert alarms_raised <= ALARM_KINDS.keys()  # it ran
    before = STAGES[: STAGES.index(stage)] if stage in STAGES else []
    assert [result.status for result in found.stages[: len(before)]] == ["ok"] * len(before)


def test_the_page_says_where_every_planted_bug_is_found() -> None:
    page = Path(__file__).parents[2] / "docs" / "debugging.md"
    text = page.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [name for name in PLANTS_SM90 if not any(f"`{name}`" in row for row in rows)] == []


# The model against plain attention over the keys that the gate leaves.
@pytest.mark.parametrize("case", CASES, ids=Case.describe)
def test_the_model_of_one_tile_takes_the_last_keys_that_a_row_tile_sees(case: Case) -> None:
    inputs, problem = make_inputs(case), problem_of(case)
    plan = select_plan(problem, 90, "tile")
    model = GateModel(problem, plan, inputs.q, inputs.k, inputs.v, inputs.mask)
    lse, _ = model.attention(first_tile_only=True)
    for first_row in range(0, case.seqlen_q, plan.block_m):
        rows = slice(first_row, min(first_row + plan.block_m, case.seqlen_q))
        seen = model.in_window[rows].any(0).nonzero()
        last = int(seen.max()) // plan.block_n if seen.numel() else 0
        keys = slice(last * plan.block_n, (last + 1) * plan.block_n)
        torch.testing.assert_close(
            lse.value[:, :, rows], torch.logsumexp(model.scores[:, :, rows, keys], -1)
        )


def test_the_model_of_the_running_values_goes_from_the_last_tile_to_the_first() -> None:
    case = CASES[0]
    inputs, problem = make_inputs(case), problem_of(case)
    plan = select_plan(problem, 90, "softmax")
    model = GateModel(problem, plan, inputs.q, inputs.k, inputs.v, None)
    row_max, _, row_sum = model.softmax()
    lse, _ = model.attention()
    torch.testing.assert_close(row_max.value[..., 0] + row_sum.value[..., 0].log(), lse.value)
    last = model.scores[..., (model.num_n_blocks() - 1) * plan.block_n :]
    torch.testing.assert_close(row_max.value[..., -1], last.amax(-1))


def test_a_wrong_value_names_a_consumer_warp_and_the_first_in_the_kernels_order() -> None:
    plan = select_plan(problem_of(CASES[0]), 90, "qk")
    value = torch.zeros(1, 1, 128, 2 * plan.block_n, dtype=torch.float64)
    actual = value.float()
    actual[0, 0, 3, 5] = 1.0  # an earlier key, but a later tile
    actual[0, 0, 17, plan.block_n + 9] = 1.0
    check = compare(actual, Expected("scores", value, value + 1e-3), plan, "scores")
    assert check.first is not None
    assert (check.first.row, check.first.n_block, check.first.warp) == (17, 1, 4 + 1)
    assert f"only warp 4, 5 of {plan.block_m // 16}" in check.pattern


@pytest.mark.parametrize(
    ("text", "phase"),
    [
        ("wgmma_ss<", "qk"),
        ("wgmma_rs<", "pv"),
        ("smem.k_loads.load(", "load"),
        ("stmatrix_x4(", "store"),
        ("raise_registers<", "setup"),
        ("wgmma_wait<OVERLAP", None),
    ],
)
def test_an_alarm_is_attributed_by_its_kernel_line(text: str, phase: str | None) -> None:
    file, line = next(
        (file, number)
        for file in sorted(path.name for path in (KERNELS_DIR / "fwd_sm90").glob("*.cuh"))
        for number, code in enumerate((KERNELS_DIR / "fwd_sm90" / file).read_text().splitlines(), 1)
        if text in code
    )
    problem = problem_of(CASES[0])
    agent = Agent(1, 5, 7, f"fwd_sm90/{file}", line)
    error = SimulationError(kind="race", message="two accesses", agent=agent)
    alarm = alarms.from_error(error, problem, select_plan(problem, 90))
    assert alarm.phase == phase
    assert alarm.place == "block 1; warp 5, lane 7"
    assert "warp  0 producer" in alarm.picture
    deadlock = SimulationError(kind="deadlock", message="nobody can go on", agent=agent)
    assert alarms.from_error(deadlock, problem, select_plan(problem, 90)).phase is None


def test_the_plant_the_backend_and_the_architecture_say_which_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    portable = select_plan(problem_of(CASES[0]), 80).kernel
    assert kernel_to_run("sm90") == kernel_to_run("sim", arch=90) == KERNEL
    assert kernel_to_run("wmma") == kernel_to_run("sim") == portable
    assert kernel_to_run("sim", "early-release") == KERNEL
    assert kernel_to_run("sim", "accum-map") == portable
    monkeypatch.setenv(env.SIM_ARCH.name, "90")
    assert kernel_to_run("sim") == kernel_to_run("sim", "accum-map") == KERNEL
    assert kernel_to_run("sim", "pv-atomic") == portable
    assert {name for name in PLANTS_SM90 if name in PLANTS} == {"accum-map"}


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ({}, {"arch": 80}, "sm_90 alone"),
        ({"offset": 1}, {}, "16-byte aligned"),
        ({}, {"plant": "pv-atomic"}, "not a bug of attn_fwd_sm90"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(
    case: dict[str, int], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gates.isolate(Case(**case), "sim", kernel=KERNEL, **options)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=Case.describe)
def test_every_stage_is_right_on_the_gpu(case: Case) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper kernel needs an sm_90 GPU")
    # The second takes the tiles that fill the GPU.
    for asked in (case, dataclasses.replace(case, seqlen_q=600, seqlen_k=500, num_heads_q=32)):
        found = gates.isolate(asked, "sm90")
        assert found.ok, found.why
