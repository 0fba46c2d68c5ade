"""`flashcore tune` with a stand-in for the GPU: it lists what is legal, and picks what is right and
fast."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from tune_standin import FakeCompiler, FakeTimer
from typer.testing import CliRunner

from flashcore.bench.workloads import GROUPS, Workload
from flashcore.cli import app
from flashcore.compile.jit import Resources
from flashcore.kernels.fwd_sm90.candidates import traits_sm90
from flashcore.kernels.fwd_sm90.plan import Sm90Plan
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.limits import smem_limits
from flashcore.selection import compiling, tuned
from flashcore.selection.space import is_legal, schedules, tile_of, tiles, with_tile
from flashcore.tune import search, timing
from flashcore.tune.defaults import default_plan

pytestmark = pytest.mark.usefixtures("nothing_ships")

LONG = Workload("x", 4, 16, 4096, 128, True, "bfloat16")


def base(workload: Workload = LONG, backend: str = "sm90", arch: int = 90) -> Plan:
    return default_plan(workload, backend, arch)[1]


def workload(head_dim: int, **options: Any) -> Workload:
    return dataclasses.replace(LONG, head_dim=head_dim, **options)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_listed_configurations_of_the_hopper_kernel_fit(head_dim: int, causal: bool) -> None:
    default = base(workload(head_dim, causal=causal))
    listed = tiles(default)
    assert listed[0] == default
    plans = [*listed, *(plan for first in listed for plan in schedules(first))]
    assert len(listed) > 5
    assert len({(plan.block_m, plan.block_n) for plan in listed}) > 5
    for plan in plans:
        assert isinstance(plan, Sm90Plan)
        assert plan.smem_bytes <= 232448
        consumer, producer = plan.role_registers
        # setmaxnreg waits for registers that a block was not given, for ever.
        asked_for = 128 * (plan.num_consumers * consumer + producer)
        assert asked_for <= plan.max_registers * plan.num_threads
        assert asked_for * plan.min_blocks <= 65536
        assert not plan.ping_pong or plan.num_consumers > 1
        assert with_tile(default, tile_of(plan)) == plan


@pytest.mark.parametrize("arch", [75, 80, 90])
def test_listed_configurations_of_the_portable_kernel_fit(arch: int) -> None:
    asked = dataclasses.replace(LONG, dtype="float16")
    listed = tiles(base(asked, "wmma", arch))
    assert len(listed) > 5
    for plan in listed:
        assert plan.smem_bytes * plan.min_blocks <= smem_limits(arch)[1]
        assert plan.max_registers * plan.num_threads * plan.min_blocks <= 65536
        assert arch >= 80 or plan.num_stages == 1
        assert schedules(plan) == []


def test_a_tile_has_nothing_of_the_problem() -> None:
    problem, plan = default_plan(LONG, "sm90", 90)
    given = {"kernel", "arch", "load_bytes", "gate"} | set(traits_sm90(problem))
    given |= {"mask_load_bytes", "mask_is_row", "mask_is_shifted", "keys_of_chunk"}
    given |= {"stream_k", "load_stages", "strips", "loaders"}
    fields = {field.name for field in dataclasses.fields(plan)}
    assert set(tile_of(plan)) == fields - given


@pytest.mark.parametrize(
    "tile",
    [
        {"block_m": 100},
        {"block_m": 256},
        {"block_n": 24},
        {"block_n": 256},  # shared memory
        {"block_m": 64, "ping_pong": True},  # nobody to take turns with
        # Of consumers that share keys one may have a key tile more, and wait for its turn for ever.
        {"block_m": 64, "ping_pong": True, "key_slices": 2, "num_stages": 4},
        {"block_m": 64, "ping_pong": False, "key_slices": 2},  # a stage each would deadlock
        {"num_stages": 0},
        {"num_stages": 1},
        {"num_stages": True},
        {"o_parts": 3},
        {"q_buffers": 3},
        {"block_m": 128.0},
        {"color": "red"},
    ],
    ids=str,
)
def test_what_is_not_legal_is_refused(tile: dict[str, Any]) -> None:
    default = base()
    own = tile_of(default)
    assert with_tile(default, own) == default
    assert with_tile(default, own | tile) is None
    missing = {name: value for name, value in own.items() if name != "block_n"}
    assert with_tile(default, missing) is None


def test_the_compilers_report_rules_out() -> None:
    plan = base()
    fine = Resources(plan.kernel, "sm_90", 128, plan.dtype, plan.max_registers, 1000, 0, 1000)
    assert compiling.rejection(plan, fine) is None

    def reason(**changes: Any) -> str:
        return str(compiling.rejection(plan, dataclasses.replace(fine, **changes)))

    assert reason(spill_bytes=8) == "spills 8 bytes"
    assert reason(remarks=("(C7510) serialized",)) == "(C7510) serialized"
    assert "would hang" in reason(registers=plan.max_registers - 8)
    assert reason(registers=-1) == "None"  # PTX: the driver compiles, nobody knows


@pytest.mark.thorough
def test_configurations_are_compiled() -> None:
    pytest.importorskip("cuda.core")
    default = base(workload(64, causal=False))
    # No tile that the rules think legal is known to spill.
    wide = dataclasses.replace(default, block_m=128, block_n=256, num_stages=2)
    with compiling.Compiler(workers=1) as compile_plans:
        found = dict(compile_plans([default, wide]))
    assert found[default] is None
    assert "spills" in str(found[wide])


def run(timer: FakeTimer, compiler: FakeCompiler | None = None) -> search.Found:
    return search.Search(LONG, base(), compiler or FakeCompiler(), timer).run()


def test_a_final_that_was_held_up_is_run_again() -> None:
    class HeldUp(FakeTimer):
        def in_turns(self, workload: Workload, plans: Sequence[Plan]) -> list[timing.Outcome]:
            first, *others = super().in_turns(workload, plans)
            assert isinstance(first, float)
            return [first * (1.3 if len(self.finals) == 1 else 1.0), *others]

    timer = HeldUp(gain=0.99, schedule=1.0)
    found = run(timer)
    assert len(timer.finals) == 2
    assert found.winner == base()
    assert found.default_seconds == timer.time(base())
    timer = FakeTimer()
    run(timer)
    assert len(timer.finals) == 1


def test_the_fastest_size_and_then_the_fastest_schedule_wins() -> None:
    timer = FakeTimer()
    steps: list[tuple[str, int, int]] = []
    found = search.Search(LONG, base(), FakeCompiler(), timer, lambda *s: steps.append(s)).run()
    winner = found.winner
    assert isinstance(winner, Sm90Plan)
    assert (winner.block_m, winner.block_n, winner.num_stages) == (128, 96, 3)
    assert (found.seconds, found.default_seconds) == (pytest.approx(0.45e-3), 1e-3)
    assert all(is_legal(plan) for plan in timer.asked)
    ((default, *others),) = timer.finals  # has them in turns
    assert default == found.default == base()
    assert len(others) == 3
    assert [plan for plan, _ in found.finalists] == [default, *others]
    assert {what for what, _, _ in steps} == {"compiling", "timing"}
    assert all(done <= total for _, done, total in steps)


def test_a_gain_within_the_noise_changes_nothing() -> None:
    found = run(FakeTimer(gain=0.99, schedule=1.0))
    assert found.winner == found.default == base()
    assert found.seconds == found.default_seconds
    assert run(FakeTimer(gain=0.97, schedule=1.0)).winner != base()


@pytest.mark.parametrize("how", ["broken", "wrong"])
def test_wrong_and_hanging_configurations_cannot_win(how: str) -> None:
    timer = FakeTimer(**{how: {(128, 96): "no good"}})  # type: ignore[arg-type]
    found = run(timer)
    assert found.winner == base()
    assert {why for _, why in found.discarded} == {"no good"}
    # Others take its place in the final.
    assert len(timer.finals[-1]) == 4
    assert all(plan.block_n != 96 or plan.block_m != 128 for plan in timer.finals[-1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_spills_in_either_dtype_cannot_win(dtype: str) -> None:
    timer = FakeTimer()
    found = run(timer, FakeCompiler({(128, 96, dtype): "spills 4 bytes"}))
    assert found.winner == base()
    timed = {(plan.block_m, plan.block_n) for plan in timer.asked}
    assert ((128, 96) in timed) == (dtype != LONG.dtype)


def test_a_table_that_fails_is_an_error() -> None:
    default = base()
    with pytest.raises(search.DefaultFailedError, match="the GPU is on fire"):
        run(FakeTimer(broken={(default.block_m, default.block_n): "the GPU is on fire"}))


def serve(connection: Connection) -> None:
    """Run a child that answers, dies or hangs, as the plans ask."""
    while True:
        what, _, plans = connection.recv()
        if plans[0].block_m == 128:
            os._exit(3)
        if plans[0].block_m == 192:
            threading.Event().wait()  # nobody sets it
        connection.send(([0.0 if what == "check" else 0.5] * len(plans), True))


@pytest.mark.thorough  # four seconds
def test_a_child_that_dies_or_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    good, deadly, hanging = (dataclasses.replace(base(), block_m=rows) for rows in (64, 128, 192))
    with timing.GpuTimer(60.0, serve) as timer:
        assert timer.in_turns(LONG, [good, good]) == [0.5, 0.5]
        assert timer.quick(LONG, deadly) == "the process that ran it died"
        assert timer.quick(LONG, good) == 0.5
        assert timer.check(LONG, good) is None
        child = timer._child
        monkeypatch.setattr(timer, "timeout_seconds", 0.05)
        assert timer.check(LONG, hanging) == "did not end in 0 s"
        assert not child.is_alive()
        assert timer._child is None


def test_outputs_that_differ_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(1, 2, 256, 64, generator=generator)
    reference = right.bfloat16()
    assert timing.difference(reference, reference) is None
    rounded = (right * (1 + 2**-10)).bfloat16()
    assert timing.difference(rounded, reference) is None
    one_row = reference.clone()
    one_row[0, 1, 77] = 0.0
    assert "distance" in str(timing.difference(one_row, reference))
    unwritten = reference.clone()
    unwritten[0, 0, 0, 0] = torch.nan
    assert "wrong result" in str(timing.difference(unwritten, reference))
    assert "mean distance" in str(timing.difference(reference * 1.02, reference))


@pytest.mark.parametrize("group", sorted(set(GROUPS) - {"varlen"}))
def test_small_workloads_have_the_same_options(group: str) -> None:
    for full in GROUPS[group]():
        small = timing.small_workload(full)
        plan = default_plan(full, "auto", 90)[1]
        assert small.flops < 2e9
        changed = default_plan(small, "auto", 90)[1]
        for name in ("has_window_left", "has_window_right", "has_softcap", "mask", "dtype"):
            assert getattr(changed, name) == getattr(plan, name)


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Pretend that there is a GPU that the command sees but does not use, and an empty cache."""
    monkeypatch.setattr(tuned, "gpu_name", lambda: "NVIDIA H999")
    monkeypatch.setattr(tuned, "gpu_arch", lambda: 90)
    monkeypatch.setattr(timing, "GpuTimer", lambda timeout: FakeTimer())
    monkeypatch.setattr(compiling, "Compiler", FakeCompiler)
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path))
    return tmp_path / "tuned-sm_90.json"


SHAPE = ["tune", "--seqlen", "4096", "--batch", "4", "--causal"]


def test_the_command_keeps_the_winner(pretend_gpu: Path) -> None:
    result = CliRunner().invoke(app, [*SHAPE, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    (row,) = document["results"]
    assert document["geometric_mean_gain"] == pytest.approx(1 / 0.45)
    assert (document["failures"], document["left_out"]) == ([], 0)
    assert row["workload"] == "B4 H16 S4096 D128 causal"
    assert (row["winner"]["block_m"], row["winner"]["block_n"]) == (128, 96)
    assert row["seconds"] < row["default_seconds"]
    (entry,) = tuned.read(pretend_gpu)
    assert (entry.gpu, entry.kernel, entry.tile) == ("NVIDIA H999", "attn_fwd_sm90", row["winner"])
    text = CliRunner().invoke(app, SHAPE).stdout
    assert "2.22x" in text
    assert "tile 128x96 for 192x80" in text


def test_where_the_table_wins_an_old_entry_goes(
    pretend_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CliRunner().invoke(app, SHAPE)
    assert len(tuned.read(pretend_gpu)) == 1
    monkeypatch.setattr(timing, "GpuTimer", lambda timeout: FakeTimer(gain=2.0))
    assert CliRunner().invoke(app, SHAPE).exit_code == 0
    assert tuned.read(pretend_gpu) == []


def test_ctrl_c_keeps_what_was_found(pretend_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(FakeTimer):
        def quick(self, workload: Workload, plan: Plan) -> timing.Outcome:
            if workload.seqlen == 8192:
                raise KeyboardInterrupt
            return super().quick(workload, plan)

    monkeypatch.setattr(timing, "GpuTimer", lambda timeout: Interrupted())
    result = CliRunner().invoke(app, ["tune", "--groups", "gqa", "--json"])
    assert result.exit_code == 1
    assert [row["workload"] for row in json.loads(result.stdout)["results"]] == [
        "B1 H32/8 S2048 D128 causal",
        "B1 H64/8 S2048 D128 causal",
    ]
    assert len(tuned.read(pretend_gpu)) == 2
    assert "what was found so far is kept" in result.stderr


def test_packed_sequences_are_not_tuned(pretend_gpu: Path) -> None:
    result = CliRunner().invoke(app, ["tune", "--groups", "varlen"])
    assert result.exit_code == 2
    assert "--groups varlen is not one of" in result.output
    assert not pretend_gpu.exists()


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "gpu_name", lambda: None)
    result = CliRunner().invoke(app, ["tune", "--json"])
    assert result.exit_code == 1
    assert "sees no GPU" in json.loads(result.stdout)["error"]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "wmma"])
def test_configurations_are_checked_and_timed_on_the_gpu(backend: str) -> None:
    asked = Workload("x", 1, 8, 512, 64, True, "float16")
    default = default_plan(asked, backend, tuned.gpu_arch())[1]
    plans = [plan for plan in tiles(default)[:4] if compiling.obstacle(plan) is None]
    assert timing.context_is_sound()
    with timing.GpuTimer() as timer:
        assert [timer.check(asked, plan) for plan in plans] == [None] * len(plans)
        outcomes = [*timer.in_turns(asked, plans), *(timer.quick(asked, plan) for plan in plans)]
    assert all(isinstance(outcome, float) and outcome > 0 for outcome in outcomes), outcomes
