"""Test what isolate says in a line: it agrees with the table, and names what is known by its
name."""

from __future__ import annotations

import dataclasses
import re

import pytest
from typer.testing import CliRunner

from flashcore.backends.dispatch import KERNELS
from flashcore.checks import verify
from flashcore.checks.cases import make_inputs
from flashcore.checks.planned import with_fields
from flashcore.cli.app import app
from flashcore.compile.codegen import KERNELS_DIR, kernel_file
from flashcore.errors import CompileError
from flashcore.isolate import gates
from flashcore.isolate.alarms import Alarm, from_compile_error
from flashcore.isolate.diagnosis import verdict
from flashcore.isolate.isolation import StageResult
from flashcore.kernels.fwd_sm90.kernel import SM90 as SM90_KERNEL
from flashcore.kernels.fwd_sm90.plan import Sm90Plan
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.selection.select import select_plan
from flashcore.sim import Agent, Plant, SimulationError
from flashcore.sim.barrier_names import name_barriers
from flashcore.sim.plants import index

WMMA, SM90 = KERNELS["wmma"], KERNELS["sm90"]
CASE = Case(num_heads_q=1, num_heads_kv=1, seqlen_q=70, seqlen_k=100)


def plant(monkeypatch: pytest.MonkeyPatch, kernel: str, find: str, replace: str) -> str:
    """Make a bug of this test's own known by the name that is returned."""
    file = kernel_file(kernel).relative_to(KERNELS_DIR).as_posix()
    own = Plant("own", "", file, find, replace, "")
    monkeypatch.setattr(index, "BY_KERNEL", {kernel: {own.name: own}})
    return own.name


def plan_sm90(tile: dict[str, object]) -> Sm90Plan:
    x = make_inputs(CASE)
    plan = with_fields(select_plan(Problem.from_tensors(x.q, x.k, x.v), 90), tile)
    assert isinstance(plan, Sm90Plan)
    return plan


def test_a_kernel_that_does_not_compile_is_said_to_be_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = plant(monkeypatch, WMMA, "cp_async_commit();\n  };", "cp_async_comit();\n  };")
    lines = (kernel_file(WMMA)).read_text(encoding="utf-8").splitlines()
    line = next(i for i, text in enumerate(lines, 1) if text.strip() == "cp_async_commit();")
    found = gates.isolate(CASE, "sim", plant=name)
    assert found.first_wrong == "compile"
    assert [result.status for result in found.stages] == ["not compiled", *["not run"] * 5]
    assert re.match(rf"fwd_wmma/{WMMA}\.cuh:{line}: .*cp_async_comit", found.why[0])
    assert len(found.why) == 1  # no hints about copies

    result = CliRunner().invoke(app, ["isolate", "--plant", name, "--seqlen", "70"])
    assert result.exit_code == 1
    assert "the kernel does not compile (gate qk)" in result.stdout
    assert f"{WMMA}.cuh:{line}: " in result.stdout
    assert "first wrong stage" not in result.stdout

    results = verify.verify("sim", indices=range(5), plant=name)
    assert [(result.ok, result.does_not_compile) for result in results] == [(False, True)]


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ("tile/copy.cuh:12:5: error: no such thing", "tile/copy.cuh:12: no such thing"),
        ("tile/copy.cuh(12): error: no such thing", "tile/copy.cuh(12) here"),
        ("a.cuh:7: fatal error: out of words", "a.cuh:7: out of words"),
        ("ld: undefined symbol", "it does not compile:"),
    ],
)
def test_the_first_error_of_a_compiler_is_found(text: str, summary: str) -> None:
    alarm = from_compile_error(CompileError(f"it does not compile:\nIn file x:\n{text}\nmore"))
    assert alarm.summary == summary.replace("(12) here", ":12: no such thing")
    assert alarm.text.endswith("more")


def results(**status: tuple[str, str | None]) -> list[StageResult]:
    return [
        StageResult(
            stage,
            f"title of {stage}",
            "",
            state,
            alarm=None if state == "ok" else Alarm("race", "race: two accesses", "", phase),
        )
        for stage, (state, phase) in status.items()
    ]


def test_no_stage_that_is_right_by_itself_is_named() -> None:
    right = ("ok", None)
    found = results(qk=right, softmax=right, pv=right, tile=right, full=("alarm", "qk"))
    name, why = verdict(found, SM90)
    assert name == "full"
    assert "a line of title of qk, but gate qk" in why[0]
    assert any("asked for once more" in reason for reason in why)
    name, why = verdict(results(qk=("alarm", "store"), full=("alarm", "store")), SM90)
    assert name == "store"
    assert "from the store phase while gate qk ran" in why[0]
    name, _ = verdict(results(qk=right, softmax=("alarm", "pv")), SM90)
    assert name == "pv"


@pytest.mark.thorough
def test_a_rescale_behind_the_product_is_not_blamed_on_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = (kernel_file(WMMA)).read_text(encoding="utf-8")
    rescale, product = "    rescale_output(out, rescale);\n", "    accumulate_output(out, scores,"
    begin = text.index(rescale)
    end = text.index("\n", text.index(product, begin))
    find = text[begin:end]
    moved = find.replace(rescale, "\n") + " " + rescale.strip()
    name = plant(monkeypatch, WMMA, find, moved)
    found = gates.isolate(CASE, "sim", plant=name)
    assert found.first_wrong == "tile"
    why = " ".join(found.why)
    assert "gate pv alone does not compile, so it says nothing: fwd_wmma/attn_fwd_wmma.cuh:" in why
    assert "rescaled behind P@V" in why
    assert "look at: the rescale of O" in why


@pytest.mark.parametrize(
    "tile",
    [
        {"block_m": 128, "block_n": 64, "num_stages": 3, "q_buffers": 2},
        {"block_m": 64, "block_n": 64, "num_stages": 6, "key_slices": 3},
        {"block_m": 64, "block_n": 64, "load_stages": 5},
    ],
)
def test_the_mbarriers_are_named_in_the_kernels_order(tile: dict[str, object]) -> None:
    cache_dtype = "float8_e4m3fn" if "load_stages" in tile else ""
    plan = dataclasses.replace(plan_sm90({}), **tile, cache_dtype=cache_dtype)  # type: ignore[arg-type]
    text = (KERNELS_DIR / "fwd_sm90" / "pipeline_sm90.cuh").read_text(encoding="utf-8")
    struct = text[text.index("struct Barriers {") : text.index("};")]
    members = list(dict.fromkeys(re.findall(r"\b([a-z_]+_(?:full|empty))\b", struct)))
    offsets = text[text.index("return {first,") :].partition("};")[0].partition("{")[2]
    slots = plan.q_buffers * plan.block_m // 64
    merging = 2 * (plan.key_slices > 1)
    sizes = {
        "NUM_Q_SLOTS": slots, "NUM_STAGES": plan.num_stages, "LOAD_STAGES": plan.load_stages,
        "first": 0, "ring": 2 * slots, "loads": 2 * slots + 4 * plan.num_stages + merging,
    }  # fmt: skip
    begins = [eval(offset, {}, sizes) for offset in re.split(r",\s*", offsets)]
    places = SM90_KERNEL.barrier_places(plan)
    for member, begin in zip(members, begins, strict=True):
        is_there = {"merge": bool(merging), "load": plan.has_float8}
        if all(there for word, there in is_there.items() if word in member):
            assert places[begin] == (member, 0)
    stages = plan.num_stages + plan.load_stages
    assert len(places) == 2 * slots + 4 * stages + merging


def test_an_alarm_names_the_mbarrier_that_is_waited_for() -> None:
    plan = plan_sm90({"block_m": 64, "block_n": 64, "num_stages": 4, "key_slices": 2})
    agent = Agent(0, 0, 3, "fwd_sm90/producer_sm90.cuh", 28)
    error = SimulationError(
        kind="deadlock",
        message="waits for barriers[14] in phase 0",
        array="barriers",
        element=14,
        agent=agent,
        details="warp 0: lane 3 in mbar_wait at x.cuh:1: barriers[14] in phase 0; barriers[99]",
    )
    name_barriers(error, plan)
    assert error.place == "v_empty[0]"
    assert str(error).count("v_empty[0]") == 3
    assert "barriers[14]" not in str(error)
    assert "barriers[99]" in str(error)


@pytest.mark.thorough
def test_a_deadlock_says_who_waits_for_what() -> None:
    case = Case(num_heads_q=1, num_heads_kv=1, seqlen_q=70, seqlen_k=200)
    found = gates.isolate(case, "sim", plant="wrong-parity")
    assert found.first_wrong == "pv"
    why = " ".join(found.why)
    assert "barriers[" not in why
    assert "warp 0 waits for v_empty[0] at fwd_sm90/producer_sm90.cuh:" in why
    assert re.search(
        r"warps 4, 5, 6, 7.* wait for v_full\[0\] at fwd_sm90/attn_fwd_sm90\.cuh:", why
    )


def test_a_case_of_verify_is_taken_apart_by_its_number() -> None:
    """A packed one: the kernel without its gates."""
    arguments = ["isolate", "--backend", "sim", "--arch", "sm_90", "--seed", "0", "--case", "7"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    drawn = verify.draw(0, 7, "sim", 90)
    assert drawn.case.describe() in " ".join(result.stdout.split())
    assert "tile 128x32,ping_pong" in " ".join(result.stdout.split())
    assert result.stdout.count("not run") == 4


@pytest.mark.thorough
def test_a_tile_can_be_given_and_listed() -> None:
    shape = ["--heads", "1", "--seqlen", "70"]
    result = CliRunner().invoke(app, ["isolate", *shape, "--tile", "64x16,stages=1", "--json"])
    assert result.exit_code == 0, result.output
    assert '"tile": {' in result.stdout
    assert "tile 64x16 warps 4 stages 1" in result.stdout
    listed = CliRunner().invoke(app, ["isolate", "--backend", "sm90", "--tile", "list"])
    assert "192x128,num_stages=3" in listed.stdout
    wrong = CliRunner().invoke(app, ["isolate", *shape, "--tile", "64x16,turns"])
    assert wrong.exit_code == 2
    assert "turns" in wrong.output
