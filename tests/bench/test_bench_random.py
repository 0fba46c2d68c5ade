"""Test `flashcore bench --random`: the shapes that it draws, its sums, and that no peer holds it
up."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flashcore.bench import libraries, peers, run
from flashcore.bench.libraries import Library
from flashcore.bench.random_shapes import random_shapes
from flashcore.bench.reporting import report
from flashcore.bench.reporting.summary import worst
from flashcore.bench.workloads import Workload
from flashcore.cli import app
from flashcore.tune.defaults import default_plan


def test_shapes_are_drawn_from_all_kinds() -> None:
    shapes = random_shapes(300, 7)
    assert shapes == random_shapes(300, 7)
    assert shapes[:20] != random_shapes(20, 4)
    assert len({w.name for w in shapes}) == 300
    assert {w.group for w in shapes} == {"random"}
    assert {w.head_dim for w in shapes} >= {64, 96, 128, 192, 256}
    assert min(w.seqlen for w in shapes) < 100
    assert max(w.seqlen for w in shapes) > 10000
    assert sum(w.seqlen % 64 != 0 for w in shapes) > 250
    for count in (
        sum(not w.causal for w in shapes),
        sum(w.causal and w.window is None for w in shapes),
        sum(w.window is not None for w in shapes),
        sum(w.heads_kv < w.num_heads for w in shapes),
        sum(w.heads_kv == w.num_heads for w in shapes),
        sum(w.dtype == "float16" for w in shapes),
        sum(w.batch > 1 for w in shapes),
    ):
        assert 30 < count < 270
    for w in shapes:
        assert w.num_heads % w.heads_kv == 0
        assert w.flops <= 2e12
        assert w.num_bytes <= 2**30
        if w.window is not None:
            assert w.window[0] < w.seqlen
    assert sum(w.compiles for w in shapes) == 3
    assert all(default_plan(w, "auto", 90)[1] for w in shapes[:20])


def row(name: str, library: str, seconds: float) -> dict[str, Any]:
    return {"group": "random", "workload": name, "library": library, "seconds": seconds}


def test_the_worst_are_named() -> None:
    rows = [row(f"shape {n}", "flashcore", 1.0) for n in range(7)]
    rows += [row(f"shape {n}", "fa3", 0.5 + 0.1 * n) for n in range(6)]
    rows += [row("shape 4", "sdpa-cudnn", 0.25)]
    found = worst(rows, "random")
    assert [(name, peer) for name, _, peer in found] == [
        ("shape 4", "sdpa-cudnn"),
        ("shape 0", "fa3"),
        ("shape 1", "fa3"),
        ("shape 2", "fa3"),
        ("shape 3", "fa3"),
    ]
    assert found[0][1] == 0.25
    assert worst(rows, "sweep") == []
    assert "shape 4, 0.25x the speed of sdpa-cudnn" in report.worst_lines(rows)[0]
    assert report.worst_lines([entry | {"group": "sweep"} for entry in rows]) == []


def test_random_shapes_need_a_gpu() -> None:
    result = CliRunner().invoke(app, ["bench", "--random", "3", "--device", "cpu"])
    assert result.exit_code == 2
    assert "needs a GPU" in result.output


def test_a_peer_that_compiles_for_ever_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The alarm rings at once here; nobody waits."""
    before = signal.getsignal(signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, 1000.0)  # somebody else's, such as pytest-timeout

    def compile_for_ever(function: Any, **options: Any) -> Any:
        return lambda *args, **options: signal.raise_signal(signal.SIGALRM)

    monkeypatch.setattr(torch, "compile", compile_for_ever)
    flex = Library("flex", peers._flex, libraries.EVERYTHING)
    monkeypatch.setitem(run.__globals__, "cpu_libraries", lambda: [flex])
    shape = Workload("x", 1, 1, 64, 32, False, "float32")
    (found,) = run("cpu", rounds=1, workloads=[shape])["results"]
    assert found["skipped"] == "compiling took longer than 60 s"
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.setitimer(signal.ITIMER_REAL, 0.0)[0] > 900.0


def test_outside_the_main_thread_there_is_no_alarm() -> None:
    before = signal.getsignal(signal.SIGALRM)
    entered = []

    def body() -> None:
        with peers._time_limit("nothing"):
            entered.append(signal.getsignal(signal.SIGALRM))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert entered == [before]
