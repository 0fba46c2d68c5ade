"""Test `flashcore tune --grid`: the measurement of the table that ships, with stand-ins for the
GPU."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import standin
import torch
from tune_standin import FakeCompiler, FakeTimer
from typer.testing import CliRunner

from flashcore.base import machine
from flashcore.bench.workloads import Workload
from flashcore.checks.reference import attention_oracle
from flashcore.cli import app
from flashcore.kernels.fwd_sm90 import shortlist as listed_sm90
from flashcore.kernels.fwd_sm90.plan import Sm90Plan
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.limits import smem_limits
from flashcore.problem import Problem
from flashcore.selection import compiling, tile_table, tuned
from flashcore.selection.select import candidates
from flashcore.selection.space import is_legal, tile_of
from flashcore.tune import grid, timing
from flashcore.tune.defaults import default_plan
from flashcore.tune.search import Found
from flashcore.tune.session import Session, Task, tasks_for
from flashcore.tune.shortlist import shortlist

pytestmark = pytest.mark.usefixtures("nothing_ships")


def base(head_dim: int, causal: bool = True) -> Plan:
    asked = Workload("x", 4, 16, 4096, head_dim, causal, "bfloat16")
    return default_plan(asked, "sm90", 90)[1]


def test_the_grid_covers_what_it_says() -> None:
    cells = grid.cells()
    assert 150 <= len(cells) <= 260  # of which each takes about half a second
    assert len({cell.name for cell in cells}) == len(cells)
    counts = Counter((cell.head_dim, cell.causal) for cell in cells)
    assert set(counts) == {(dim, causal) for dim in tile_table.HEAD_DIMS for causal in (0, 1)}
    for dim in (64, 128, 256):
        here = [cell for cell in cells if cell.head_dim == dim]
        assert {cell.seqlen for cell in here} == {2**n for n in range(7, 15)}
        assert min(cell.batch * cell.num_heads for cell in here) == 2
        assert max(cell.batch * cell.num_heads * cell.seqlen for cell in here) == 2**25 // dim
    # A run that is cut short has seen some of everything.
    assert len({(cell.head_dim, cell.causal) for cell in cells[: len(cells) // 3]}) == len(counts)


def test_no_size_in_between_is_far_from_the_grid() -> None:
    """But for head_dims that are measured at fewer lengths."""
    sizes: dict[int, list[tile_table.Size]] = {}
    for cell in (cell for cell in grid.cells() if cell.head_dim in (64, 128, 256)):
        heads = cell.batch * cell.num_heads
        sizes.setdefault(cell.head_dim, []).append(tile_table.Size(heads, cell.seqlen, cell.seqlen))
    for known in sizes.values():
        for heads in range(1, 600, 7):
            for length in range(100, 20000, 523):
                asked = tile_table.Size(heads, length, length)
                nearest = min(tile_table.distance(asked, size, 132) for size in known)
                assert nearest <= tile_table.MAX_DISTANCE, asked


@pytest.mark.parametrize("head_dim", [*range(8, 257, 24), 256])
@pytest.mark.parametrize("causal", [False, True])
def test_listed_tiles_fit(head_dim: int, causal: bool) -> None:
    default = base(head_dim, causal)
    plans = shortlist(default)
    assert plans[0] == default
    assert 8 <= len(set(plans)) == len(plans) <= 15
    for plan in plans:
        assert isinstance(plan, Sm90Plan)
        assert is_legal(plan)
        assert plan.min_blocks * (plan.smem_bytes + 1024) <= smem_limits(90)[1]


def test_a_listed_tile_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    default = base(128)
    listed = [listed_sm90._tile(*size) for size in ((128, 1024), (192, 128), (128, 96))]
    monkeypatch.setitem(listed_sm90._BY_HEAD_DIM, 128, listed)
    assert [(plan.block_m, plan.block_n) for plan in shortlist(default)[1:]] == [(128, 96)]


def test_the_portable_kernel_has_no_short_list() -> None:
    default = default_plan(Workload("x", 1, 8, 512, 64, True), "wmma", 80)[1]
    assert len(shortlist(default)) > 5


class Listener(FakeCompiler):
    """Remember what it was asked to compile."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: list[list[Plan]] = []

    def __call__(self, plans: Sequence[Plan]) -> Any:
        self.asked.append(list(plans))
        return super().__call__(plans)


class Kept:
    """Only remember what was found."""

    def __init__(self) -> None:
        self.found: list[Found] = []

    def key(self, problem: Problem, plan: Plan) -> str:
        return repr(tile_table.Size.of(problem)) + tile_table.class_of(problem)

    def keep(self, problem: Problem, found: Found) -> None:
        self.found.append(found)


def some_tasks(keeper: Kept, count: int = 6) -> list[Task]:
    cells = grid.cells()[:count]
    return tasks_for([*cells, *cells], "auto", 90, keeper, shipped=False)


def test_everything_is_compiled_before_the_first_is_timed() -> None:
    keeper, compiler, timer = Kept(), Listener(), FakeTimer()
    tasks = some_tasks(keeper)
    assert len(tasks) == 6
    session = Session(tasks, keeper, compiler, timer, brief=True)
    steps: list[int] = []
    session.run(lambda done, text: steps.append(done))
    first = set(compiler.asked[0])
    assert {plan.dtype for plan in first} == {"float16", "bfloat16"}
    machine_code = {compiling._source(plan) for plan in first}
    for asked in compiler.asked[1:]:
        assert {compiling._source(plan) for plan in asked} <= machine_code
    assert session.found == keeper.found
    assert (len(session.found), sum(steps)) == (6, 6)


def test_one_that_fails_does_not_end_the_session() -> None:
    keeper = Kept()
    tasks = some_tasks(keeper)
    bad = tasks[2][2]
    timer = FakeTimer(broken={(bad.block_m, bad.block_n): "the GPU is on fire"})
    session = Session(tasks, keeper, FakeCompiler(), timer, brief=True)
    session.run()
    assert len(session.failures) >= 1
    assert len(session.found) + len(session.failures) == 6
    assert "the GPU is on fire" in session.failures[0]


def test_time_that_is_over_leaves_out_the_rest() -> None:
    keeper = Kept()
    session = Session(some_tasks(keeper), keeper, FakeCompiler(), FakeTimer(), True, minutes=0.0)
    session.run()
    assert (session.found, session.left_out) == ([], 6)


def test_a_table_lists_what_is_nearly_the_fastest_and_the_rules() -> None:
    (workload, problem, default) = some_tasks(Kept(), 1)[0]
    close, slow = (dataclasses.replace(default, block_n=n) for n in (48, 80))
    winner = dataclasses.replace(default, block_n=144)
    seconds = ((default, 2.0), (winner, 1.0), (close, 1.05), (slow, 1.2))
    found = Found(workload, default, winner, 2.0, 1.0, seconds, 4, (), ())
    other = (dataclasses.replace(problem, batch=99), found)
    about = {"gpu": {"num_sms": 132}}
    table = grid.table_of(about, [(problem, found), other])
    assert table == grid.table_of(about, [other, (problem, found)])
    cell = next(cell for cell in table.cells if cell.size == tile_table.Size.of(problem))
    tiles = [tile_of(plan) for plan in (default, winner, close)]
    assert [table.tiles[number] for number in cell.seconds] == tiles
    assert table.tiles[cell.rules] == tile_of(default)
    assert list(cell.seconds.values()) == [2.0, 1.0, 1.05]


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Pretend that there is a GPU that the command sees but does not use, an empty cache, and a
    grid of six shapes."""
    gpu = machine.Gpu("NVIDIA H999", 90, 132, 2**37, "580", 700.0, 1980.0)
    cells = grid.cells()[:6]
    monkeypatch.setattr(machine, "gpu", lambda: gpu)
    monkeypatch.setattr(tuned, "gpu_name", lambda: gpu.name)
    monkeypatch.setattr(tuned, "gpu_arch", lambda: gpu.arch)
    monkeypatch.setattr(grid, "cells", lambda: cells)
    monkeypatch.setattr(timing, "GpuTimer", lambda timeout: FakeTimer())
    monkeypatch.setattr(compiling, "Compiler", FakeCompiler)
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "folder" / "tiles-sm_90.json"


def test_the_command_writes_a_table_that_can_ship(pretend_gpu: Path) -> None:
    result = CliRunner().invoke(app, ["tune", "--grid", "--output", str(pretend_gpu), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    table = tile_table.from_json(pretend_gpu.read_text())
    assert len(table.cells) == len(document["results"]) == 6
    assert table.about["gpu"]["name"] == "NVIDIA H999"
    assert {"date", "command", "versions"} <= set(table.about)
    version = tuned.kernel_version("attn_fwd_sm90")
    assert table.about["kernels"] == {"attn_fwd_sm90": version}
    for workload in grid.cells():
        problem, rules = default_plan(workload, "auto", 90)
        choice = tile_table.choose(table, problem, rules)
        assert choice is not None
        timer = FakeTimer()
        fastest = min(map(timer.time, shortlist(rules)))
        assert timer.time(choice.plan) <= fastest
    assert not tuned.path_for(90).exists()


def test_the_report_ends_with_the_gain(pretend_gpu: Path) -> None:
    result = CliRunner().invoke(app, ["tune", "--grid"])
    assert result.exit_code == 0, result.output
    assert "geometric mean gain of 6 shapes: " in result.stdout.splitlines()[-1]
    assert len(tuned.read(tuned.path_for(90))) > 0


def test_an_aborted_run_leaves_a_table(pretend_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(FakeTimer):
        def in_turns(self, workload: Workload, plans: Sequence[Plan]) -> list[timing.Outcome]:
            if len(self.finals) == 4:
                raise KeyboardInterrupt
            return super().in_turns(workload, plans)

    monkeypatch.setattr(timing, "GpuTimer", lambda timeout: Interrupted())
    result = CliRunner().invoke(app, ["tune", "--grid", "--output", str(pretend_gpu)])
    assert result.exit_code == 1
    assert len(tile_table.from_json(pretend_gpu.read_text()).cells) == 4


def test_a_file_that_cannot_be_written_is_named(pretend_gpu: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    result = CliRunner().invoke(app, ["tune", "--grid", "-o", str(tmp_path / "plain" / "x.json")])
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr
    result = CliRunner().invoke(app, ["tune", "--grid", "--groups", "gqa"])
    assert result.exit_code == 2
    assert "exclude each other" in result.output


def test_a_compiler_that_dies_is_replaced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [plan for plan in shortlist(base(128)) if plan.num_stages == 2]
    deadly = plans[3]
    pools: list[Any] = []

    class Pool:
        def __init__(self, **options: Any) -> None:
            self.dead = False
            pools.append(self)

        def submit(self, function: Any, plan: Plan) -> Future[str | None]:
            future: Future[str | None] = Future()
            self.dead |= plan == deadly
            if self.dead:
                future.set_exception(BrokenProcessPool("a process died"))
            else:
                future.set_result(None)
            return future

        def shutdown(self, **options: Any) -> None:
            pass

    monkeypatch.setattr(compiling, "ProcessPoolExecutor", Pool)
    with compiling.Compiler(workers=2) as compile_plans:
        found = dict(compile_plans(plans))
        assert len(pools) == 2
        assert {plan for plan in plans if found[plan] is None} >= set(plans[:3])
        assert found[deadly] == "the compiler's process died"
        # A plan whose outcome is known is not compiled again.
        assert dict(compile_plans(plans)) == found
        assert len(pools) == 2


def test_the_child_times_checks_and_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child runs on the CPU, with the oracle in place of the kernel; a tile of 80 keys is
    wrong."""
    tensors, checks = Workload.tensors, []

    def run(self: Any, plan: Plan) -> list[torch.Tensor]:
        checks.append((self.workload, plan))
        w = self.workload
        out = attention_oracle(self.q, self.k, self.v, causal=w.causal)[0].to(self.q.dtype)
        return [out * 1.1 if plan.block_n == 80 and w.seqlen > 400 else out]

    monkeypatch.setattr(Workload, "tensors", lambda self, device: tensors(self, "cpu"))
    monkeypatch.setattr(timing._Inputs, "run", run)
    monkeypatch.setattr(timing._Inputs, "rules", lambda self, like: candidates(self.problem)[0])
    monkeypatch.setattr(timing._Inputs, "timed_call", lambda self, plan: plan)
    monkeypatch.setattr(timing, "quick_seconds", lambda call: 0.25)
    monkeypatch.setattr(
        timing,
        "time_on_gpu",
        lambda calls, rounds: {name: timing.Timing(0.5, (0.5,)) for name in calls},
    )
    ours, theirs = Pipe()
    child = threading.Thread(target=timing.serve_gpu, args=(theirs,), daemon=True)
    monkeypatch.setattr(compiling, "ignore_interrupts", lambda: None)
    child.start()

    def ask(*question: Any) -> Any:
        ours.send(question)
        assert ours.poll(60)
        return ours.recv()

    long = Workload("x", 1, 2, 512, 64, True, "bfloat16")
    right = default_plan(long, "sm90", 90)[1]
    wrong = dataclasses.replace(right, block_n=80)
    assert ask("quick", long, [right, wrong]) == ([0.25, 0.25], True)
    (fine, reason), sound = ask("check", long, [right, wrong])
    assert (fine, sound) == (0.0, True)
    assert "wrong result" in reason
    assert ask("in_turns", long, [right, wrong]) == ([0.5, reason], True)
    before = len(checks)
    assert ask("check", long, [right]) == ([0.0], True)
    assert len(checks) == before
    # Another workload has the same small one, whose verdict stands.
    longer = dataclasses.replace(long, seqlen=640)
    ask("check", longer, [right])
    assert [w.seqlen for w, _ in checks[before:]] == [640, 640]
    for is_sound in (True, False):
        monkeypatch.setattr(timing, "context_is_sound", lambda answer=is_sound: answer)
        answer, sound = ask("no such question", long, [right])
        assert "no such question" in answer[0]
        assert sound == is_sound
    ours.close()
    child.join(60)
    assert not child.is_alive()


@pytest.mark.parametrize("causal", [False, True])
def test_plans_are_launched_as_attention_would(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once to be timed and once to be checked; see standin.py."""
    driver = standin.install(monkeypatch).driver
    tensors = Workload.tensors
    monkeypatch.setattr(Workload, "tensors", lambda self, device: tensors(self, "cpu"))
    inputs = timing._Inputs(Workload("x", 2, 8, 300, 64, causal, "bfloat16"))
    for plan in shortlist(candidates(inputs.problem, kernel="attn_fwd_sm90")[0]):
        assert inputs.fits(plan)
        out = inputs.timed_call(plan)()
        assert out.shape == inputs.q.shape
        assert inputs.run(plan)[0].isnan().all()  # as nothing has really run
        timed, checked = driver.launches[-2:]
        row_tiles = 2 * 8 * -(-300 // plan.block_m)
        assert timed.grid == checked.grid == min(row_tiles, 132 * plan.min_blocks)
        assert timed.threads == checked.threads == plan.num_threads
        assert timed.params.attn.out == out.data_ptr()
