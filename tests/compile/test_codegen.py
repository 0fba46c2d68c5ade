"""Test source generation: what gates, targets and constants put into the one translation unit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from flashcore.compile.codegen import flatten, generate_source
from flashcore.kernels.bwd_sm90.plan import DKDV_KERNEL, DQ_KERNEL, BwdPlans, make_plan
from flashcore.kernels.bwd_sm90.tiles import BwdTile
from flashcore.kernels.fwd_sm90 import plan as plan_sm90
from flashcore.kernels.fwd_wmma.plan import GATES, Plan

PLAN = Plan("attn_fwd_wmma", 80, "float16", 64, 64, 64, 32, num_stages=2, min_blocks=5)


PLAN_SM90 = plan_sm90.Sm90Plan(
    plan_sm90.KERNEL, 90, "float16", 64, 64, 128, 64, num_stages=2, min_blocks=1
)


PLANS_BWD = BwdPlans(
    *(
        make_plan(
            kernel, BwdTile(64, 64, 2, 2), {"dtype": "float16", "head_dim": 64, "head_dim_v": 64}
        )
        for kernel in (DQ_KERNEL, DKDV_KERNEL)
    )
)


@pytest.mark.parametrize("plan", [PLAN, PLAN_SM90, *PLANS_BWD], ids=lambda plan: plan.kernel)
@pytest.mark.parametrize("target", ["ptx", "host"])
def test_source_without_a_gate_has_no_trace_of_one(plan: Plan, target: str) -> None:
    source = generate_source(plan, target)  # type: ignore[arg-type]
    assert "gate" not in source.lower()
    assert "//@" not in source


@pytest.mark.parametrize(
    ("plan", "gate"),
    [
        *((PLAN, gate) for gate in GATES),
        *((PLAN_SM90, gate) for gate in plan_sm90.GATES),
        *((PLANS_BWD.dq, gate) for gate in ("delta", "ds", "dq")),
        *((PLANS_BWD.dkdv, gate) for gate in ("ds", "dv", "dk")),
    ],
    ids=lambda value: getattr(value, "kernel", value),
)
def test_every_gate_makes_another_source(plan: Plan, gate: str) -> None:
    source = generate_source(dataclasses.replace(plan, gate=gate))
    assert "gate_scores" in source
    assert source != generate_source(plan)


def test_sources_hold_one_side_only() -> None:
    assert "asm volatile" in generate_source(PLAN, "ptx")
    assert "asm volatile" not in generate_source(PLAN, "host").replace("__asm__", "")


def test_constants_follow_the_types_they_name() -> None:
    source = generate_source(PLAN)
    assert source.index("struct float16") < source.index("using Element = float16;")
    assert "constexpr int BLOCK_N = 32;" in source
    assert "constexpr bool HAS_SOFTCAP = false;" in source


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    kernel = tmp_path / "sample.cuh"
    kernel.write_text("one\n//@if gate qk\ntwo\n//@else\nthree\n//@end\nfour\n")
    plain = flatten(kernel, "ptx").splitlines()
    gated = flatten(kernel, "ptx", gate="qk").splitlines()
    assert [line for line in plain if not line.startswith("#")] == ["one", "three", "four"]
    assert [line for line in gated if not line.startswith("#")] == ["one", "two", "four"]
    assert plain[plain.index("three") - 1] == '#line 5 "sample.cuh"'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("//@if gate\n", "without //@end"),
        ("//@if warp\n//@end\n", "unknown condition"),
        ("//@unless gate\n", "unknown directive"),
    ],
)
def test_a_mistaken_directive_is_an_error(tmp_path: Path, text: str, words: str) -> None:
    kernel = tmp_path / "sample.cuh"
    kernel.write_text(text)
    with pytest.raises(AssertionError, match=words):
        flatten(kernel, "ptx")


def test_a_missing_include_names_the_includer(tmp_path: Path) -> None:
    kernel = tmp_path / "sample.cuh"
    kernel.write_text('#include "nowhere.cuh"\n')
    with pytest.raises(FileNotFoundError, match=r"sample.cuh.*nowhere.cuh"):
        flatten(kernel, "ptx")
