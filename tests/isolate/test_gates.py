"""Test the debug gates: float64 models, the search for the first wrong value, and the verdict."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from flashcore.checks.cases import make_inputs
from flashcore.checks.reference import attention_oracle
from flashcore.compile.codegen import KERNELS_DIR
from flashcore.isolate import alarms, gates
from flashcore.isolate.diagnosis import key_split_hints
from flashcore.isolate.gate_models import Expected, GateModel
from flashcore.isolate.locate import compare
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.fwd_wmma.stages import STAGES
from flashcore.kernels.registry import BY_NAME, FORWARD
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.selection.select import select_plan
from flashcore.sim import Agent, SimulationError

PLAN_64 = Plan("attn_fwd_wmma", 80, "float16", 64, 64, 64, 64, num_stages=2, min_blocks=1)

CASES = [
    Case(seqlen_q=70, seqlen_k=150, head_dim=16, head_dim_v=16, num_heads_q=4),
    Case(seqlen_q=150, seqlen_k=70, head_dim=16, head_dim_v=24, causal="lower_right"),
    Case(seqlen_q=90, seqlen_k=200, head_dim=16, head_dim_v=16, window=(33, 5), softcap=5.0),
    Case(seqlen_q=90, seqlen_k=90, head_dim=16, head_dim_v=16, mask="additive"),
    Case(batch=2, seqlen_q=33, seqlen_k=90, head_dim=16, head_dim_v=16, mask="padding"),
]


def model_of(case: Case) -> tuple[GateModel, Problem]:
    inputs = make_inputs(case)
    q, k, v, mask = inputs.q, inputs.k, inputs.v, inputs.mask
    problem = Problem.from_tensors(q, k, v, mask=mask, return_lse=True, **case.options())
    return GateModel(problem, select_plan(problem), q, k, v, mask), problem


@pytest.mark.parametrize("case", CASES, ids=Case.describe)
def test_the_model_of_the_whole_kernel_is_the_oracle(case: Case) -> None:
    model, _ = model_of(case)
    lse, out = model.attention()
    inputs = make_inputs(case)
    want_out, want_lse = attention_oracle(
        inputs.q, inputs.k, inputs.v, mask=inputs.mask, **case.options()
    )
    torch.testing.assert_close(out.value, want_out)
    torch.testing.assert_close(lse.value, want_lse)


@pytest.mark.parametrize("case", CASES, ids=Case.describe)
def test_the_last_running_max_and_sum_give_the_lse(case: Case) -> None:
    model, _ = model_of(case)
    row_max, _, row_sum = model.softmax()
    lse, _ = model.attention()
    torch.testing.assert_close(row_max.value[..., -1] + row_sum.value[..., -1].log(), lse.value)


def test_only_tiles_without_a_visible_key_may_be_skipped() -> None:
    case = Case(seqlen_q=256, seqlen_k=256, head_dim=16, head_dim_v=16, causal="lower_right")
    model, problem = model_of(case)
    plan = dataclasses.replace(select_plan(problem), block_m=64, block_n=64)
    model.plan = plan
    blocks = model.skippable().reshape(4, 64, 4, 64).float().mean((1, 3))
    assert blocks.tolist() == torch.ones(4, 4).triu(1).tolist()


@pytest.mark.parametrize("spread", [1e3, 1e18])
def test_bounds_stay_finite_however_large_scores_are(spread: float) -> None:
    """P is between 0 and 1 and the output is a mean of V, whatever rounding does to the scores."""
    case = Case(seqlen_q=20, seqlen_k=70, dtype="bfloat16", causal="lower_right", spread=spread)
    model, _ = model_of(case)
    row_max, probabilities, row_sum = model.softmax()
    lse, out = model.attention()
    for expected in (row_max, probabilities, row_sum, lse, out):
        assert expected.tolerance.isfinite().all(), expected.name
    assert probabilities.tolerance.max() <= 1.001
    assert row_sum.tolerance.max() <= 71
    assert out.tolerance.max() <= 2.1 * model.v.abs().max()


def test_the_bounds_hold_for_float32_arithmetic_and_catch_a_lost_key() -> None:
    case = Case(seqlen_q=70, seqlen_k=150, head_dim=64)
    model, _ = model_of(case)
    inputs = make_inputs(case)
    (expected,) = model.qk()
    scores = inputs.q.float() @ inputs.k.float().mT
    assert compare(scores, expected, PLAN_64, "scores").ok
    _, out = model.attention()
    p = torch.softmax(model.scores, -1)
    right = (p.half().double() @ model.v).half()
    assert compare(right, out, PLAN_64, "out").ok
    p[0, 0, 11, 17] = 0.0
    lost = compare((p.half().double() @ model.v).half(), out, PLAN_64, "out")
    assert not lost.ok
    assert lost.first is not None
    assert (lost.first.head, lost.first.row) == (0, 11)


# (row, column) -> lane and accumulator element by the map in prims.cuh's accum_row and accum_col.
@pytest.mark.parametrize(
    ("row", "column", "warp", "lane", "element"),
    [(0, 0, 0, 0, 0), (1, 3, 0, 5, 1), (8, 0, 0, 0, 2), (17, 9, 1, 4, 5), (63, 15, 3, 31, 7)],
)
def test_a_wrong_score_names_tile_warp_lane_and_element(
    row: int, column: int, warp: int, lane: int, element: int
) -> None:
    value = torch.zeros(2, 3, 130, 200, dtype=torch.float64)
    actual = value.float()
    actual[1, 2, 64 + row, 128 + column] = 1.0
    check = compare(actual, Expected("scores", value, value + 1e-3), PLAN_64, "scores")
    assert check.wrong == 1
    assert check.first is not None
    found = check.first
    assert (found.batch, found.head, found.m_block, found.n_block) == (1, 2, 1, 2)
    assert (found.warp, found.lane, found.element) == (warp, lane, element)
    assert f"only warp {warp} of 4" in check.pattern
    assert check.picture.count("#") + check.picture.count("*") >= 1


def test_the_first_bad_value_is_the_first_that_is_computed() -> None:
    value = torch.zeros(1, 1, 128, 128, dtype=torch.float64)
    actual = value.float()
    actual[0, 0, 3, 100] = 1.0  # an earlier row, but a later key tile
    actual[0, 0, 60, 5] = 1.0
    check = compare(actual, Expected("scores", value, value + 1e-3), PLAN_64, "scores")
    assert check.first is not None
    assert (check.first.row, check.first.column) == (60, 5)


def test_what_was_not_written_is_wrong_unless_it_may_be_skipped() -> None:
    value = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    actual = value.float()
    actual[0, 0, 0, :3] = torch.nan
    optional = torch.zeros_like(value, dtype=torch.bool)
    optional[0, 0, 0, :2] = True
    check = compare(actual, Expected("scores", value, value + 1e-3, optional), PLAN_64, "scores")
    assert check.wrong == 1
    assert "?" in check.picture.splitlines()[1]


@pytest.mark.parametrize(("factor", "words"), [(0.0, "not at all"), (2.0, "twice")])
def test_keys_that_are_lost_or_counted_twice_are_named(factor: float, words: str) -> None:
    case = Case(seqlen_q=20, seqlen_k=100, num_heads_q=2)
    model, problem = model_of(case)
    p = torch.full_like(model.scores, 1 / problem.seqlen_k).half()
    weights = p.double()
    weights[..., 32:48] *= factor
    hints = key_split_hints((weights @ model.v).half(), p, model.v)
    assert hints == [f"keys 32-47 are counted {words}"]
    assert key_split_hints((p.double() @ model.v).half(), p, model.v) == []


@pytest.mark.parametrize(
    ("text", "phase"),
    [
        ("wmma_load_b_col(", "qk"),
        ("wmma_load_b_row(", "pv"),
        ("load_tile<BLOCK_N, HEAD_DIM_V", "load"),
        ("smem_store_packet(", "store"),
        ("block_sync();  // orders every thread", None),
    ],
)
def test_an_alarm_is_attributed_by_its_kernel_line(text: str, phase: str | None) -> None:
    lines = (KERNELS_DIR / "fwd_wmma/attn_fwd_wmma.cuh").read_text().splitlines()
    line = next(number for number, code in enumerate(lines, 1) if text in code)
    _, problem = model_of(CASES[0])
    agent = Agent(4, 1, 7, "fwd_wmma/attn_fwd_wmma.cuh", line)
    error = SimulationError(kind="race", message="two accesses", agent=agent)
    alarm = alarms.from_error(error, problem, select_plan(problem))
    assert alarm.phase == phase
    assert alarm.line == line
    # 70 rows and tiles of 64 or 128 of 4 heads: block 4 lies in head 2 with two tiles a head.
    assert re.match(r"batch \d, head \d, m_block \d; warp 1, lane 7", alarm.place)


# Debug gates and waits belong to whichever stage runs.
NO_PHASE = {"gates", "pipeline_sm90"}


def test_every_device_function_of_the_tiles_has_a_phase() -> None:
    """Every name that is known is one of a device function's, too."""
    written = set()
    for path in (*KERNELS_DIR.glob("*_*/*.cuh"), *KERNELS_DIR.glob("tile/*.cuh")):
        at = Agent(block=0, warp=0, lane=0, file=str(path.relative_to(KERNELS_DIR)), line=1)
        for line in path.read_text(encoding="utf-8").splitlines():
            found = alarms._FUNCTION.search(line) or alarms._LAMBDA.search(line)
            if found is None:
                continue
            written.add(found[1])
            # Backward kernels have no stages of isolate.
            is_forward = not path.stem.startswith("bwd_")
            if path.parent.name == "tile" and is_forward and path.stem not in NO_PHASE:
                phases = [alarms._phase_of(found[1], at, kernel) for kernel in FORWARD]
                assert any(phases), (path.name, found[1])
    for kernel in BY_NAME.values():
        assert set(kernel.phases) <= written, kernel.name


def test_the_healthy_kernel_passes_every_stage() -> None:
    case = Case(seqlen_q=70, seqlen_k=100, head_dim=16, head_dim_v=16, causal="lower_right")
    found = gates.isolate(case, "sim")
    assert found.ok
    assert [result.status for result in found.stages] == ["ok"] * len(STAGES)
    assert all(check.max_ratio < 1 for result in found.stages for check in result.checks)


@pytest.mark.parametrize(
    ("plant", "stage", "reason"),
    [
        ("pv-atomic", "pv", "atomics from several warps"),
        *(
            pytest.param(*values, marks=pytest.mark.thorough)
            for values in (
                ("k-overlap", "pv", "are counted twice"),
                ("accum-map", "softmax", "row_max"),
            )
        ),
    ],
)
def test_a_planted_bug_is_found_in_its_stage(plant: str, stage: str, reason: str) -> None:
    case = Case(num_heads_q=1, num_heads_kv=1, seqlen_q=70, seqlen_k=100)
    found = gates.isolate(case, "sim", plant=plant)
    assert found.first_wrong == stage
    assert reason in " ".join(found.why)
    status = {result.stage: result.status for result in found.stages}
    assert status["qk"] == "ok"
    assert status["full"] in ("wrong", "alarm")
    if stage == "pv":
        assert status["pv_serial"] == "ok"


@pytest.mark.parametrize(
    ("backend", "plant", "message"),
    [("gpu", None, "backend='gpu'"), ("sim", "gremlin", "pv-atomic"), ("wmma", "k-gap", "sim")],
)
def test_wrong_requests_say_what_there_is(backend: str, plant: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gates.find_plant(plant, backend)


def test_an_empty_case_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to compute"):
        gates.isolate(Case(seqlen_q=0), "sim")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=Case.describe)
def test_every_stage_is_right_on_the_gpu(case: Case) -> None:
    found = gates.isolate(case, "wmma")
    assert found.ok, found.why
