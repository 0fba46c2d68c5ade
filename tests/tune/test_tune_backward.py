"""`flashcore tune --backward` with a stand-in for the GPU: which tiles of the backward kernels it
tries, what it keeps, and that gradients and `explain` go by it. Its times are made up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tune_standin import FakeCompiler, FakeTimer
from typer.testing import CliRunner

import flashcore
from flashcore.backends.backward_sm90 import plans_for, run_in_simulator
from flashcore.bench import backward as bench_backward
from flashcore.bench.workloads import Workload
from flashcore.cli import app
from flashcore.explanation import gradient
from flashcore.kernels.bwd_sm90 import plan_one
from flashcore.kernels.bwd_sm90.kernel import DKDV, DQ
from flashcore.kernels.bwd_sm90.plan import BwdSm90Plan, select_plans
from flashcore.kernels.bwd_sm90.tiles import SHORTLIST_DKDV, BwdTile
from flashcore.kernels.registry import kernel_of
from flashcore.problem import Problem
from flashcore.selection import compiling, tuned
from flashcore.selection.space import is_legal, schedules, tile_of, tiles, with_tile
from flashcore.tune import backward_timing, timing
from flashcore.tune.defaults import default_backward_plans
from flashcore.tune.search import Search
from flashcore.tune.shortlist import shortlist

SHAPE = ["tune", "--backward", "--seqlen", "4096", "--batch", "4", "--head-dim", "64", "--causal"]
LONG = Workload("x", 4, 16, 4096, 64, True, "bfloat16")


def defaults(head_dim: int, **options: Any) -> list[BwdSm90Plan]:
    workload = dataclasses.replace(LONG, head_dim=head_dim, **options)
    return default_backward_plans(workload, 90)[1]  # type: ignore[return-value]


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("options", [{"causal": False}, {}, {"softcap": 20.0}], ids=str)
def test_listed_configurations_fit(head_dim: int, options: dict[str, Any]) -> None:
    plans = defaults(head_dim, **options)
    assert len(plans) == (3 if head_dim <= 128 else 2)
    for default in plans:
        listed = [tiles(default), schedules(default), shortlist(default)]
        assert listed[0][0] == listed[2][0] == default
        assert is_legal(default)
        assert len({(plan.block_m, plan.block_n) for plan in listed[0]}) > 1
        for plan in (plan for some in listed for plan in some):
            assert plan.smem_bytes <= 232448
            assert plan.num_threads <= 512
            assert plan.also_dq == default.also_dq, "no tile makes another design of a plan"
            own, walked = (
                (plan.block_n, plan.block_m) if plan.owns_keys else (plan.block_m, plan.block_n)
            )
            assert own % 64 == walked % 16 == 0
            assert not plan.has_roles or own == 64
            assert not plan.also_dq or walked % 64 == 0
            assert with_tile(default, tile_of(plan)) == plan


def test_a_short_list_has_what_the_rules_take() -> None:
    assert BwdTile(128, 128, 3, 2, False, True, False) in SHORTLIST_DKDV
    for kernel in (DQ, DKDV):
        for head_dim in (64, 128, 192, 256):
            plan = next(plan for plan in defaults(head_dim) if plan.kernel == kernel.name)
            own = {name: getattr(plan, name) for name in BwdTile._fields}
            assert own in kernel.shortlist(plan) or head_dim == 64


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Pretend that there is a GPU that the command sees but does not use, and an empty cache."""
    monkeypatch.setattr(tuned, "gpu_name", lambda: "NVIDIA H999")
    monkeypatch.setattr(tuned, "gpu_arch", lambda: 90)
    monkeypatch.setattr(timing, "GpuTimer", lambda timeout: _Timer())
    monkeypatch.setattr(compiling, "Compiler", FakeCompiler)
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path))
    return tmp_path / "tuned-sm_90.json"


class _Timer(FakeTimer):
    """It finds 64 x 64 twice as fast as anything, in each kernel."""

    def time(self, plan: Any) -> float:
        return 1e-3 if (plan.block_m, plan.block_n) == (64, 64) else 2e-3


def asked(**options: Any) -> Problem:
    x = torch.empty(4, 16, 4096, 64, dtype=torch.float16)
    described = Problem.from_tensors(x, x, x, causal=True, **options)
    return dataclasses.replace(described, device="cuda", arch=90)


def sizes(problem: Problem) -> list[tuple[int, int]]:
    return [(plan.block_m, plan.block_n) for plan in plans_for(problem) if plan.is_persistent]


def test_gradients_and_explain_go_by_what_was_found(
    pretend_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sizes(asked())
    assert (64, 64) not in before
    result = CliRunner().invoke(app, [*SHAPE, "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["results"]
    assert [row["kernel"] for row in rows] == [DQ.name, DKDV.name, DKDV.name]
    assert sorted(entry.problem_class for entry in tuned.read(pretend_gpu))[-1].endswith("also_dq")
    assert sizes(asked()) == [(64, 64)]
    assert [plan.also_dq for plan in plans_for(asked()) if plan.owns_keys] == [True]
    capped = asked(softcap=3.0)
    rules = plan_one.select_one_kernel_plans(capped).main
    assert sizes(capped) == [(64, 128)] == [(rules.block_m, rules.block_n)], "nobody searched"
    monkeypatch.setenv("FLASHCORE_TUNED", "0")
    assert sizes(asked()) == before
    monkeypatch.delenv("FLASHCORE_TUNED")

    flashcore.set_gradient_workspace(0)
    try:
        assert sizes(asked()) == [(64, 64), (64, 64)]
    finally:
        flashcore.set_gradient_workspace()

    monkeypatch.setattr(
        gradient, "choose_backward",
        lambda *args, **options: gradient.BackwardChoice("sm90", "fused"),
    )  # fmt: skip
    monkeypatch.setattr(gradient, "plans_for", lambda problem: plans_for(asked()))
    find = tuned.find
    monkeypatch.setattr(gradient.tuned, "find", lambda problem, plan: find(asked(), plan))
    x = torch.empty(4, 16, 4096, 64, dtype=torch.float16, device="meta")
    text = str(flashcore.explain(x, x, x, causal=True))
    assert "gradient  sm90: fused" in text
    assert " 64 x 64 " in text
    assert f"note      {DKDV.name}: tiles were found by `flashcore tune` on NVIDIA H999" in text


def test_the_table_names_the_kernels(pretend_gpu: Path) -> None:
    text = " ".join(CliRunner().invoke(app, SHAPE).stdout.split())
    assert "2.00x" in text
    assert "tile 64x64 for" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backward", "--output", "x.json"], "which has no gradients"),
        (["--backward", "--backend", "wmma"], "has no backward kernels"),
        (["--backward", "--groups", "decode"], "decode is not one of sweep, gqa, small"),
    ],
)
def test_what_cannot_be_tuned_is_refused(words: list[str], message: str, pretend_gpu: Path) -> None:
    result = CliRunner().invoke(app, ["tune", *words])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_groups_are_those_of_the_backward_benchmark() -> None:
    from flashcore.cli.tune import _workloads

    assert _workloads("gqa", False, True) == bench_backward.GROUPS["gqa"]()
    assert _workloads(None, True, True) == bench_backward.GROUPS["sweep"]()


@pytest.mark.thorough
def test_a_kernel_is_timed_alone_and_its_gradients_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []

    def run(problem: Problem, plan: BwdSm90Plan, tensors: Any) -> None:
        ran.append(plan.kernel)
        run_in_simulator(problem, plan, tensors)
        if plan.num_stages == 1 and plan.owns_keys:
            tensors["dk"] *= 1.1

    monkeypatch.setattr(backward_timing, "run_on_gpu", run)
    inputs = backward_timing.BackwardInputs(Workload("x", 1, 1, 70, 32, True, "float16"), "cpu")
    dq, dkdv = (dataclasses.replace(plan, **tile) for plan, tile in zip(
        select_plans(inputs.problem),
        ({"block_m": 64, "block_n": 32}, {"block_m": 32, "block_n": 64}),
        strict=True,
    ))  # fmt: skip
    assert inputs.fits(dq)
    assert not inputs.fits(dataclasses.replace(dq, has_softcap=True))
    assert inputs.rules(dkdv) == select_plans(inputs.problem).dkdv
    call = inputs.timed_call(dkdv)
    assert ran == [DQ.name, DKDV.name]
    call()
    assert ran[2:] == [DKDV.name]
    one = inputs.rules(dataclasses.replace(dkdv, also_dq=True))
    call = inputs.timed_call(one)
    ran.clear()
    call()
    assert ran == ["attn_bwd_delta_sm90", DKDV.name, "attn_bwd_round_sm90"], "it counts on these"
    ran.clear()
    assert inputs.wrong(dq) is None
    assert timing.difference(inputs.run(dkdv)[1], inputs.run(dq)[1]) is None
    broken = dataclasses.replace(dkdv, num_stages=1, other_stages=1)
    assert "wrong result" in (inputs.wrong(broken) or "")
    assert timing._inputs_for(dq) is backward_timing.BackwardInputs
    assert kernel_of(dq).is_backward


@pytest.mark.gpu
def test_a_search_on_the_gpu() -> None:
    """Each kernel with two tiles besides its own; none is wrong."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the backward kernels need an sm_90 GPU")
    workload = Workload("x", 1, 4, 1024, 64, True, "bfloat16")
    plans = default_backward_plans(workload, 90)[1]
    with timing.GpuTimer(60.0) as timer:
        for default in plans:
            others = [plan for plan in shortlist(default) if plan != default][:2]
            found = Search(
                workload, default, FakeCompiler(), timer,
                sizes=lambda plan, others=others: others, variants=lambda plan: [],
            ).run()  # fmt: skip
            assert found.discarded == ()
            assert found.timed == 3
            assert 0.0 < found.seconds <= found.default_seconds < 1e-2
