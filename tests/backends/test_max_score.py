"""Test `return_max_score`: the largest score of each head before the softmax, on every backend."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from parameters import thorough_but
from plant_checks import check_text, undocumented
from torch import Tensor

import flashcore
from backends import GPU, WMMA, device_of
from flashcore.base import env
from flashcore.checks.accuracy import error_report, lse_error
from flashcore.checks.cases import make_inputs
from flashcore.checks.planned import with_fields
from flashcore.checks.reference import max_score_oracle
from flashcore.compile.codegen import generate_source
from flashcore.kernels.fwd_sm90.plan import KERNEL as KERNEL_SM90
from flashcore.kernels.fwd_wmma.plan import KERNEL, Plan
from flashcore.launch.allocation import unseen_scores
from flashcore.ops.paged import attention_paged
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.selection.select import select_plan
from flashcore.sim import Plant, SimulationError, simulate
from flashcore.sim.plants.max_score import PLANTS_MAX_SCORE, PLANTS_MAX_SCORE_SM90

LIMIT = 1e-4  # as of lse: |error| / (1 + |score|)
BACKENDS = ["torch", "sim-80", "sim-90", WMMA, GPU]


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the backend's name; "sim-90" is the simulator with the Hopper kernel."""
    name, _, arch = str(request.param).partition("-")
    if arch:
        monkeypatch.setenv(env.SIM_ARCH.name, arch)
    return name


every_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
FEW = ("growing to and fro", "window", "additive mask")  # of CASES


def score_error(max_score: Tensor, q: Tensor, k: Tensor, **options: Any) -> float:
    assert max_score.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert max_score.device == q.device
    want = max_score_oracle(q, k, **options)
    assert max_score.shape == want.shape == q.shape[:2]
    return lse_error(max_score, want)


# Lengths that leave rows and keys of a tile empty; heads that share one of k and v, folded
# where there are few queries, with keys split over blocks; scores that grow from key tile to key
# tile, which a maximum that lags behind would miss.
CASES = {
    "plain": Case(seqlen_q=70, seqlen_k=150, batch=2),
    "growing": Case(seqlen_q=70, seqlen_k=150, growth="slow", dtype="bfloat16"),
    "growing to and fro": Case(seqlen_q=100, seqlen_k=260, growth="zigzag", dtype="bfloat16"),
    "causal": Case(seqlen_q=150, seqlen_k=117, causal="lower_right", num_heads_q=4),
    "window": Case(seqlen_q=130, seqlen_k=130, window=(20, 3), head_dim=32, head_dim_v=40),
    "softcap": Case(seqlen_q=33, seqlen_k=150, softcap=2.0, spread=4.0),
    "large scores": Case(seqlen_q=70, seqlen_k=150, spread=1e15, dtype="bfloat16"),
    "scale": Case(seqlen_q=70, seqlen_k=65, scale=0.01, layout="bshd", tail=3),
    "bool mask": Case(seqlen_q=70, seqlen_k=117, mask="bool", seed=1),
    "additive mask": Case(seqlen_q=70, seqlen_k=117, mask="additive", causal="upper_left"),
    "padding": Case(seqlen_q=40, seqlen_k=90, mask="padding", batch=3),
    "decoding": Case(seqlen_q=1, seqlen_k=700, num_heads_q=8, num_heads_kv=2, batch=2),
    "few queries": Case(seqlen_q=5, seqlen_k=300, num_heads_q=6, causal="lower_right"),
}


@every_backend
@pytest.mark.parametrize("name", thorough_but(FEW, CASES))
def test_it_is_that_of_the_oracle(name: str, backend: str) -> None:
    case = CASES[name]
    x = make_inputs(case, device_of(backend))
    options = case.options() | {"mask": x.mask}
    out, lse, max_score = flashcore.attention(
        x.q, x.k, x.v, return_lse=True, return_max_score=True, backend=backend, **options
    )
    assert score_error(max_score, x.q, x.k, **options) <= LIMIT
    report = error_report(out, x.q, x.k, x.v, lse=lse, max_score=max_score, **options)
    assert report.ok, report


@every_backend
def test_scores_below_zero_are_above_those_of_rows_that_do_not_exist(backend: str) -> None:
    """Rows that fill up a row tile are zeros, and so are their scores."""
    device = device_of(backend)
    q = torch.rand(1, 4, 5, 64, device=device).half() + 0.5
    k = -torch.rand(1, 2, 37, 64, device=device).half() - 0.5
    for length in (1, 5):
        out, max_score = flashcore.attention(
            q[:, :, :length], k, k, return_max_score=True, backend=backend
        )
        assert out.shape == (1, 4, length, 64)
        assert (max_score < -1).all()
        assert score_error(max_score, q[:, :, :length], k) <= LIMIT


@every_backend
def test_where_no_key_is_seen_it_is_lowest(backend: str) -> None:
    device = device_of(backend)
    q, k = (torch.randn(2, 2, n, 64, device=device).half() for n in (33, 40))
    mask = torch.ones(2, 2, 33, 40, dtype=torch.bool, device=device)
    mask[0, 1] = False
    mask[1, 0, 1:] = False
    _, max_score = flashcore.attention(q, k, k, mask=mask, return_max_score=True, backend=backend)
    assert max_score[0, 1] == -math.inf
    assert score_error(max_score, q, k, mask=mask) <= LIMIT
    for keys, queries in ((k[:, :, :0], q), (k, q[:, :, :0])):
        _, max_score = flashcore.attention(
            queries, keys, keys, return_max_score=True, backend=backend
        )
        assert max_score.tolist() == [[-math.inf] * 2] * 2


@every_backend
def test_what_is_not_finite_is_seen(backend: str) -> None:
    device = device_of(backend)
    q, k = (torch.randn(1, 3, n, 64, device=device).half() for n in (70, 90))
    v = torch.randn(1, 3, 90, 64, device=device).half()
    q[0, 0, 66, 3], q[0, 1, 5], k[0, 1, 80] = math.nan, 6e4, 6e4
    infinite = torch.zeros(1, 3, 70, 90, device=device)
    infinite[0, 2, 9, 50] = math.inf
    _, max_score = flashcore.attention(
        q, k, v, mask=infinite, return_max_score=True, backend=backend
    )
    assert max_score[0, 0].isnan()
    assert max_score[0, 2] == math.inf
    assert score_error(max_score[:, 1:2], q[:, 1:2], k[:, 1:2]) <= LIMIT


LENGTHS = [90, 0, 17]


@every_backend
@pytest.mark.parametrize(
    "options", thorough_but([{}], [{}, {"causal": True}]), ids=["all", "causal"]
)
def test_lengths_of_a_padded_batch(options: dict[str, Any], backend: str) -> None:
    device = device_of(backend)
    q, k = (torch.randn(3, 2, n, 64, device=device).half() for n in (40, 90))
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    for b, n in enumerate(LENGTHS):
        k[b, :, n:] = 100.0  # must not be seen
    wanted = {"return_max_score": True, "backend": backend, **options}
    out, _, max_score = flashcore.attention(q, k, k, seqlens_k=lengths, return_lse=True, **wanted)
    for b, n in enumerate(LENGTHS):
        own = slice(b, b + 1)
        assert score_error(max_score[own], q[own], k[own, :, :n], **options) <= LIMIT
    again = flashcore.attention(q, k, k, seqlens_k=lengths, **wanted)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], max_score)


@every_backend
@pytest.mark.parametrize(
    "options", thorough_but([{"causal": True}], [{}, {"causal": True}]), ids=["all", "causal"]
)
def test_packed_sequences(options: dict[str, Any], backend: str) -> None:
    """Also sequences without queries or keys, and rows behind the last one."""
    device = device_of(backend)
    of_q, of_k = [40, 0, 70, 1, 9], [30, 3, 100, 17, 0]
    q = torch.randn(sum(of_q) + 5, 4, 64, device=device).half()
    k = torch.randn(sum(of_k) + 3, 2, 64, device=device).half()
    q[sum(of_q) :], k[sum(of_k) :] = 50.0, 50.0
    cu_q, cu_k = (torch.tensor([0, *x], device=device).cumsum(0).int() for x in (of_q, of_k))
    wanted = {"return_max_score": True, "backend": backend, **options}
    arguments = (q, k, k, cu_q, cu_k, max(of_q), max(of_k))
    out, lse, max_score = flashcore.attention_varlen(*arguments, return_lse=True, **wanted)
    assert max_score.shape == (5, 4)
    for b, (rows, keys) in enumerate(
        zip(q[: sum(of_q)].split(of_q), k[:150].split(of_k), strict=True)
    ):
        own_q, own_k = (x.transpose(0, 1)[None] for x in (rows, keys))
        assert score_error(max_score[b : b + 1], own_q, own_k, **options) <= LIMIT
    again = flashcore.attention_varlen(*arguments, **wanted)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], max_score)
    assert lse.shape == (4, 125)


@every_backend
def test_pages(backend: str) -> None:
    device = device_of(backend)
    q, pages = torch.randn(2, 4, 3, 64, device=device).half(), torch.randn(9, 2, 16, 64).half()
    pages = pages.to(device)
    table = torch.tensor([[3, 1, 8], [0, 2, 5]], dtype=torch.int32, device=device)
    lengths = [40, 17]
    found = attention_paged(
        q, pages, pages, table, torch.tensor(lengths, dtype=torch.int32, device=device),
        return_max_score=True, backend=backend,
    )  # fmt: skip
    for b, n in enumerate(lengths):
        k = pages[table[b].long()].transpose(0, 1).flatten(1, 2)[None, :, :n]
        assert score_error(found[1][b : b + 1], q[b : b + 1], k) <= LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_wide_dtypes(device: str, dtype: torch.dtype) -> None:
    q, k = (torch.randn(2, 2, n, 24, dtype=dtype, device=device) for n in (33, 40))
    out, max_score = flashcore.attention(q, k, k, return_max_score=True)
    limit = 1e-12 if dtype == torch.float64 else LIMIT
    assert score_error(max_score, q, k) <= limit
    assert error_report(out, q, k, k, max_score=max_score).ok


def tensors(seed: int, seqlen_q: int = 37, seqlen_k: int = 150) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        torch.randn(1, 2, n, 64, generator=generator).half() for n in (seqlen_q, seqlen_k, seqlen_k)
    )


@pytest.mark.parametrize(
    "backend", thorough_but(("torch",), ("torch", "sim-80", "sim-90")), indirect=True
)
def test_properties(backend: str) -> None:
    def largest(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return flashcore.attention(q, k, v, return_max_score=True, backend=backend, **options)[-1]

    for seed in range(3):
        q, k, v = tensors(seed)
        whole = largest(q, k, v)
        order = torch.randperm(150, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(largest(q, k[:, :, order], v), whole)  # the order of keys
        parts = [largest(q[:, :, :9], k, v), largest(q[:, :, 9:], k, v)]
        torch.testing.assert_close(torch.maximum(*parts), whole, rtol=1e-6, atol=1e-6)
        parts = [largest(q, k[:, :, :70], v[:, :, :70]), largest(q, k[:, :, 70:], v[:, :, 70:])]
        torch.testing.assert_close(torch.maximum(*parts), whole, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(largest(2 * q, k, v), 2 * whole)
        torch.testing.assert_close(largest(q, k, 3 * v), whole)
        shift = torch.full((1, 1, 1, 150), -5.0)
        torch.testing.assert_close(largest(q, k, v, mask=shift), whole - 5, rtol=1e-5, atol=1e-5)
        capped = largest(q, k, v, softcap=2.0)
        torch.testing.assert_close(capped, 2 * torch.tanh(whole / 2), rtol=1e-5, atol=1e-5)


def plan_of(kernel: str, problem: Problem, tile: dict[str, Any]) -> Plan:
    arch = 90 if kernel == KERNEL_SM90 else 80
    return with_fields(select_plan(problem, arch, kernel=kernel), tile)


@pytest.mark.parametrize("kernel", [KERNEL, KERNEL_SM90])
def test_a_call_that_does_not_ask_has_the_code_it_had(kernel: str) -> None:
    """A compile-time constant decides, so that nothing of it is left."""
    q, k, v = tensors(0)
    problem = Problem.from_tensors(q, k, v)
    asking = dataclasses.replace(problem, return_max_score=True)
    plain, other = (plan_of(kernel, p, {}) for p in (problem, asking))
    assert dataclasses.replace(other, returns_max_score=False) == plain
    changed = {
        name for name, value in other.constants().items() if plain.constants()[name] != value
    }
    lazy = {"LAZY_RESCALE"} if kernel == KERNEL_SM90 else set()
    assert changed == {"RETURNS_MAX_SCORE"} | lazy
    text = generate_source(plain, "ptx")
    assert "constexpr bool RETURNS_MAX_SCORE = false;" in text
    uses = [line for line in text.splitlines() if "raise_max_score(" in line]
    definition, *calls = uses
    assert definition.startswith("FC_DEVICE void")
    assert calls
    assert all(call.strip().startswith("if (RETURNS_MAX_SCORE)") for call in calls)


# Consumers that share keys, blocks that share keys, heads that are folded, chunks of keys.
SHARED = Case(seqlen_q=70, seqlen_k=250, head_dim=32, head_dim_v=32, growth="slow", spread=0.5)
FOLDED = dataclasses.replace(SHARED, seqlen_q=3, num_heads_q=8, causal="lower_right", growth="none")
RUNS: dict[str, tuple[str, Case, dict[str, Any]]] = {
    "wmma": (KERNEL, SHARED, {}),
    "chunks": (KERNEL, SHARED, {"block_m": 64, "block_n": 32, "keys_of_chunk": 64}),
    "folded": (KERNEL, FOLDED, {}),
    "turns": (KERNEL_SM90, SHARED, {"block_m": 128, "block_n": 32, "ping_pong": True}),
    "slices": (
        KERNEL_SM90,
        SHARED,
        {"block_m": 64, "block_n": 32, "key_slices": 3, "num_stages": 6},
    ),
    "splits": (KERNEL_SM90, SHARED, {"block_m": 64, "block_n": 32, "num_splits": 5}),
    "folded splits": (KERNEL_SM90, FOLDED, {"block_m": 64, "block_n": 32, "num_splits": 3}),
}


def run(name: str, seed: int = 0, plant: Plant | None = None) -> str:
    """Run a case in the simulator; return the alarm's kind, "wrong-result" or "healthy"."""
    kernel, case, tile = RUNS[name]
    x = make_inputs(case)
    problem = Problem.from_tensors(
        x.q, x.k, x.v, return_lse=True, return_max_score=True, **case.options()
    )
    out, lse = x.q.new_empty((*x.q.shape[:3], case.head_dim_v)), torch.empty(x.q.shape[:3])
    max_score = unseen_scores(problem, x.q)
    plan = plan_of(kernel, problem, tile)
    try:
        simulate(
            problem, plan, x.q, x.k, x.v, None, out, lse,
            max_score=max_score, seed=seed, plant=plant,
        )  # fmt: skip
    except SimulationError as error:
        return error.kind
    report = error_report(out, x.q, x.k, x.v, lse=lse, max_score=max_score, **case.options())
    return "healthy" if report.ok else "wrong-result"


@pytest.mark.parametrize("name", thorough_but(("chunks", "slices", "folded splits"), RUNS))
def test_kernels_are_free_of_races(name: str) -> None:
    assert {run(name, seed) for seed in range(4)} == {"healthy"}


SHOWN_BY = {
    "max-score-stored": ("wmma", "turns"),
    "max-score-of-padding": ("folded", "folded splits"),
    "max-score-of-one-head": ("folded", "folded splits"),
    "max-score-of-first-slice": ("slices",),
}
PLANTS = PLANTS_MAX_SCORE | PLANTS_MAX_SCORE_SM90


@pytest.mark.parametrize(
    "name", thorough_but(("max-score-stored", "max-score-of-first-slice"), PLANTS)
)
def test_a_planted_bug_is_caught(name: str) -> None:
    for shown_by in SHOWN_BY[name]:
        for seed in range(2):
            assert run(shown_by, seed, PLANTS[name]) == PLANTS[name].caught_by, shown_by


@pytest.mark.parametrize("name", PLANTS)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, PLANTS[name])


def test_the_documentation_lists_every_plant() -> None:
    assert undocumented(PLANTS) == []


@pytest.mark.parametrize("backend", thorough_but((WMMA, GPU), BACKENDS), indirect=True)
def test_a_sink_is_no_score(backend: str) -> None:
    """It joins the sum, not the maximum, however large it is; also where heads are folded."""
    device = device_of(backend)
    for seqlen_q in (1, 70):
        q = torch.randn(2, 8, seqlen_q, 64, device=device).half()
        k = torch.randn(2, 2, 300, 64, device=device).half()
        sinks = torch.linspace(-5, 200, 8, device=device)
        asked = {"return_max_score": True, "backend": backend}
        _, without = flashcore.attention(q, k, k, **asked)
        _, beside = flashcore.attention(q, k, k, sinks=sinks, **asked)
        assert torch.equal(beside, without)
        assert score_error(beside, q, k) <= LIMIT
