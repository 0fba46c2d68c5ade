"""Simulate both kernels with sinks, in the forms that end a row in other places: keys split over
blocks, shared by warpgroups, in chunks; heads as rows of one; packed and padded sequences."""

from __future__ import annotations

import ctypes
import dataclasses
import shlex
from typing import Any

import pytest
import standin
import torch
from parameters import thorough_but

import flashcore
from flashcore.checks.accuracy import error_report
from flashcore.checks.cases import make_inputs
from flashcore.checks.planned import with_fields
from flashcore.compile.codegen import generate_source
from flashcore.compile.plant import Plant
from flashcore.isolate.gates import isolate
from flashcore.kernels.fwd_wmma.plan import SIM_ARCH
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.selection.select import select_plan
from flashcore.sim import SimulationError, simulate
from flashcore.sim.replay import parse_replay

_FOLDED = {"num_heads_q": 6, "num_heads_kv": 2, "seqlen_q": 3}
# name -> (architecture, tile, case)
FORMS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "wmma": (SIM_ARCH, {}, {"mask": "bool", "seqlen_q": 70}),
    "wmma, folded": (SIM_ARCH, {}, _FOLDED | {"causal": "lower_right"}),
    "wmma, chunks": (SIM_ARCH, {"block_m": 64, "block_n": 32, "keys_of_chunk": 64}, {}),
    "sm90": (90, {}, {"causal": "lower_right", "seqlen_q": 150}),
    "sm90, scaled scores": (90, {}, {"mask": "additive", "softcap": 5.0}),
    "sm90, shared keys": (90, {"block_m": 64, "block_n": 32, "key_slices": 2, "num_stages": 4}, {}),
    "sm90, split": (90, {"block_m": 64, "block_n": 32, "num_splits": 3}, {"mask": "padding"}),
    "sm90, split, folded": (
        90, {"block_m": 64, "block_n": 32, "num_splits": 2}, _FOLDED | {"window": (60, 0)},
    ),
    "sm90, part of a group": (
        90,
        {"block_m": 64, "block_n": 32, "num_splits": 2},
        _FOLDED | {"num_heads_q": 12, "folds_heads": 2},
    ),
}  # fmt: skip


def run(name: str, seed: int = 0, plant: Plant | None = None) -> tuple[torch.Tensor, Any]:
    """Return lse, and the report of the error rule."""
    arch, tile, fields = FORMS[name]
    fields = {"seqlen_q": 40, "seqlen_k": 117, "head_dim": 32, "head_dim_v": 32} | fields
    folds_heads = fields.pop("folds_heads", None)
    case = Case(**fields, sinks=True, seed=seed)
    x = make_inputs(case)
    assert x.sinks is not None
    problem = Problem.from_tensors(
        x.q, x.k, x.v, mask=x.mask, sinks=x.sinks, return_lse=True, **case.options()
    )
    plan = with_fields(select_plan(problem, arch), tile)
    if folds_heads is not None:
        plan = dataclasses.replace(plan, folds_heads=folds_heads)
    out, lse = torch.empty_like(x.q), torch.empty(x.q.shape[:3])
    others = {"sinks": x.sinks}
    simulate(problem, plan, x.q, x.k, x.v, x.mask, out, lse, None, others, seed=seed, plant=plant)
    report = error_report(out, x.q, x.k, x.v, lse=lse, mask=x.mask, sinks=x.sinks, **case.options())
    return lse, report


# The ends of a row that differ most stay in the fast run.
CHEAP = "wmma, folded", "wmma, chunks", "sm90, shared keys", "sm90, split, folded"


@pytest.mark.parametrize("name", thorough_but(CHEAP, FORMS))
def test_every_form_is_right_and_raises_no_alarm(name: str) -> None:
    for seed in range(3):
        lse, report = run(name, seed)
        assert report.ok, f"seed {seed}: {report}"
        assert lse.isfinite().all()


@pytest.mark.thorough
@pytest.mark.parametrize("kernel", ["attn_fwd_wmma", "attn_fwd_sm90"])
def test_isolate_models_every_stage(kernel: str) -> None:
    case = Case(seqlen_q=40, seqlen_k=70, head_dim=32, head_dim_v=32, sinks=True)
    found = isolate(case, "sim", kernel=kernel)
    assert found.first_wrong is None, found
    assert {stage.status for stage in found.stages} == {"ok"}


@pytest.mark.parametrize("arch", [SIM_ARCH, 90])
def test_without_sinks_the_source_reads_none(arch: int) -> None:
    x = make_inputs(Case(sinks=True))
    without = select_plan(Problem.from_tensors(x.q, x.k, x.v), arch)
    plan = select_plan(Problem.from_tensors(x.q, x.k, x.v, sinks=x.sinks), arch)
    assert "constexpr bool HAS_SINKS = false;" in generate_source(without)
    assert generate_source(plan) == generate_source(without).replace(
        "HAS_SINKS = false", "HAS_SINKS = true"
    )


def test_the_replay_of_a_run_has_its_sinks() -> None:
    plant = Plant(
        name="reads-too-far",
        title="a sink behind the last",
        file="tile/softmax.cuh",
        find="gmem_load(p.tensors.sinks + (head_idx * heads_of_rows + head));",
        replace="gmem_load(p.tensors.sinks + (head_idx + 1000));",
        caught_by="out-of-bounds",
    )
    with pytest.raises(SimulationError) as found:
        run("wmma", plant=plant)
    words = [word for word in shlex.split(found.value.replay)[3:] if not word.startswith("plant=")]
    replay = parse_replay(words)
    assert replay.problem.has_sinks
    assert replay.lengths is not None
    x = make_inputs(Case(seqlen_q=70, seqlen_k=117, head_dim=32, head_dim_v=32, mask="bool",
                         sinks=True))  # fmt: skip
    assert x.sinks is not None
    assert torch.equal(replay.lengths["sinks"], x.sinks)
    replay.run()


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("road", ["dense", "padded", "packed"])
def test_a_launch_is_told_where_the_sinks_are(
    road: str, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second call, of other tensors of the same kinds, is looked up."""
    machine = standin.install(monkeypatch, arch)
    ends, seqlens_k = torch.tensor([0, 40, 80]).int(), torch.tensor([30, 40]).int()
    for call in range(2):
        if call:
            monkeypatch.setattr(Problem, "from_tensors", None)  # it is known
        sinks = torch.randn(4)
        if road == "packed":
            q, k, v = (torch.randn(80, heads, 64).half() for heads in (4, 2, 2))
            flashcore.attention_varlen(q, k, v, ends, ends, 40, 40, sinks=sinks)
        else:
            q, k, v = (torch.randn(2, heads, 40, 64).half() for heads in (4, 2, 2))
            given = {"seqlens_k": seqlens_k} if road == "padded" else {}
            flashcore.attention(q, k, v, sinks=sinks, **given)
        told = machine.driver.launches[-1].params
        told = told.attn if arch == 90 else told
        assert [told.q, told.k, told.v, told.sinks] == [x.data_ptr() for x in (q, k, v, sinks)]
        assert (told.seqlens_k or 0) == (seqlens_k.data_ptr() if road == "padded" else 0)
        assert (told.cu_seqlens_k or 0) == (ends.data_ptr() if road == "packed" else 0)
    assert len(machine.driver.launches) == 2


def test_sinks_of_two_bytes_are_converted_and_parameters_are_looked_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = standin.install(monkeypatch)
    q = torch.randn(2, 4, 40, 64).half()
    sinks = torch.nn.Parameter(torch.randn(4).half())
    seen = []

    def read(params: Any) -> None:
        seen.append((ctypes.c_float * 4).from_address(params.attn.sinks)[:])

    machine.driver.on_params = read
    with torch.no_grad():
        for _ in range(2):
            flashcore.attention(q, q.clone(), q.clone(), sinks=sinks)
    assert seen == [sinks.detach().float().tolist()] * 2
    with pytest.raises(TypeError, match="sinks has dtype"):
        flashcore.attention(q, q.clone(), q.clone(), sinks=torch.zeros(4).bfloat16())
    assert len(machine.driver.launches) == 2
