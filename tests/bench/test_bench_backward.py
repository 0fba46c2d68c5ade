"""Test the benchmark of the backward pass: shapes, peers, errors and sums, on the CPU; times
themselves are never looked at."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from parameters import thorough_but
from typer.testing import CliRunner

import flashcore
from flashcore.bench import backward, libraries, peers, run
from flashcore.bench.libraries import Library
from flashcore.bench.reporting import report
from flashcore.bench.reporting.summary import summarize
from flashcore.bench.run import joined
from flashcore.bench.shapes import parse_shape
from flashcore.bench.timing import Timing
from flashcore.bench.workloads import GROUPS, Workload
from flashcore.cli import app

OPTIONS = [
    Workload("x", 2, 4, 200, 32, True, "float32", 2, window=(20, 0)),
    Workload("x", 2, 4, 200, 32, False, "float32", mask="padding"),
    Workload("x", 2, 4, 200, 32, False, "float32", mask="bool"),
    Workload("x", 2, 4, 200, 32, False, "float32", mask="additive"),
    Workload("x", 2, 4, 200, 32, True, "float32", softcap=2.0),
    Workload("x", 2, 6, 100, 32, False, "float32", 2, 300),
    Workload("varlen", 1, 4, 200, 32, True, "float32", 2, lengths=(120, 0, 3, 77)),
]
SMALL = Workload("sweep", 2, 4, 40, 16, True, "float32", 2)


def timed(workload: Workload, **options: Any) -> dict[str, dict[str, Any]]:
    """Return the rows of a workload by library."""
    document = run("cpu", rounds=1, workloads=[workload], is_backward=True, **options)
    return {row["library"]: row for row in document["results"]}


def test_the_table_has_thirty_cells_of_the_same_work() -> None:
    cells = backward.GROUPS["sweep"]()
    assert len({cell.name for cell in cells}) == 30
    assert {cell.batch * cell.seqlen for cell in cells} == {16384}
    assert {cell.dtype for cell in cells} == {"bfloat16"}
    for group, shapes in backward.GROUPS.items():
        found = shapes()
        assert {w.group for w in found} == {group}
        assert len({w.name for w in found}) == len(found)


def test_work_is_counted_as_the_page_says() -> None:
    workload = Workload("x", 2, 8, 256, 64, True, "bfloat16", 2, 512)
    of_q, of_k = 2 * 8 * 256 * 64 * 2, 2 * 2 * 512 * 64 * 2
    lse = 4 * 2 * 8 * 256
    assert backward.num_bytes(workload) == 4 * of_q + 4 * of_k + lse
    row = timed(SMALL)["flashcore"]
    assert row["flops"] == 2.5 * SMALL.flops
    assert row["bytes"] == backward.num_bytes(SMALL)
    assert row["pass"] == "backward"


@pytest.mark.parametrize("workload", thorough_but(OPTIONS[-1:], OPTIONS), ids=lambda w: w.name)
def test_every_option_is_checked_against_the_oracle(workload: Workload) -> None:
    rows = timed(workload)
    assert rows["flashcore"]["max_error"] < 2e-5
    took = [row for row in rows.values() if "seconds" in row]
    assert all(row["max_error"] < 2e-5 for row in took)
    assert all(row["eager_seconds"] > 0 for row in took)
    assert set(rows) == {"flashcore", "sdpa"}


@pytest.mark.parametrize("wrong", ["dq", "dk", "dv"])
def test_a_wrong_gradient_shows_as_an_error(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(x.clone() for x in qkv)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
            names = ("dq", "dk", "dv")
            pairs = zip(names, gradients, strict=True)
            return tuple(x * 1.1 if name == wrong else x for name, x in pairs)

    right = flashcore.attention
    monkeypatch.setattr(
        flashcore, "attention", lambda *qkv, **options: right(*Wrong.apply(*qkv), **options)
    )
    assert timed(SMALL)["flashcore"]["max_error"] > 1e-2


def test_gradients_of_the_last_head_and_row_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    right = backward.bind

    def bind(*arguments: Any) -> Any:
        found = right(*arguments)

        def wrong() -> list[torch.Tensor]:
            gradients = [x.clone() for x in found.gradients()]
            gradients[0][0, -1, -1, -1] += 1
            return gradients

        return dataclasses.replace(found, gradients=wrong)

    monkeypatch.setattr(backward, "bind", bind)
    assert timed(SMALL)["flashcore"]["max_error"] > 0.9


def test_a_peer_without_a_backward_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(workload: Workload, q: torch.Tensor, *_: object) -> Any:
        return lambda: q.detach()

    ours = Library("flashcore", libraries.flashcore_call("auto"), libraries.EVERYTHING)
    monkeypatch.setattr(
        backward, "find_libraries", lambda device: ([ours, Library("new", prepare)], [])
    )
    workload = dataclasses.replace(SMALL, num_heads_kv=None)
    rows = timed(workload)
    assert "seconds" in rows["flashcore"]
    assert "does not require grad" in rows["new"]["skipped"]


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """Compute attention of [batch, seqlen, num_heads, head_dim]."""
    return flashcore.attention(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2)


def test_flash_attention_4_is_asked_for_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def flash_attn_func(*qkv: torch.Tensor, causal: bool, deterministic: bool = False) -> Any:
        asked.append(deterministic)
        return plain(*qkv, causal=causal), None

    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["flash_attn.cute"].flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    found = [x for x in peers.find_backward_peers()[0] if x.name.startswith("fa4")]
    monkeypatch.setattr(backward, "find_libraries", lambda device: (found, []))
    rows = timed(SMALL)
    assert {name: row["max_error"] < 1e-5 for name, row in rows.items()} == {
        "fa4": True,
        "fa4-deterministic": True,
    }
    assert set(asked) == {False, True}


def test_flash_attention_3_by_jax_is_asked_for_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_mha(*qkv: torch.Tensor, is_causal: bool) -> torch.Tensor:
        # Arrays of JAX have no other strides.
        assert all(x.is_contiguous() for x in qkv)
        return plain(*qkv, causal=is_causal)

    jax = types.ModuleType("jax")
    jax.dlpack = types.SimpleNamespace(from_dlpack=lambda x: x)  # type: ignore[attr-defined]
    jax.jit = lambda function: function  # type: ignore[attr-defined]
    jax.vjp = torch.func.vjp  # type: ignore[attr-defined]
    jax.block_until_ready = lambda arrays: None  # type: ignore[attr-defined]
    binding = types.ModuleType("flash_attn3_jax")
    binding.flash_mha = flash_mha  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.setitem(sys.modules, "flash_attn3_jax", binding)
    found = [x for x in peers.find_backward_peers()[0] if x.name == "fa3-jax"]
    monkeypatch.setattr(backward, "find_libraries", lambda device: (found, []))
    assert timed(SMALL)["fa3-jax"]["skipped"] == "built for head_dim 128 only"
    wide = dataclasses.replace(SMALL, head_dim=128)
    assert timed(wide)["fa3-jax"]["max_error"] < 1e-5
    # Tiles of 80 rows: the binding has room for 1024 rows of 1040, and for 384 of 320.
    full = dataclasses.replace(wide, causal=False)
    reasons = {
        rows: found[0].skip_reason(dataclasses.replace(full, seqlen=rows))
        for rows in (300, 1024, 2048)
    }
    assert reasons[300] is None
    assert "tiles of 80 rows" in str(reasons[1024])
    assert reasons[2048] == reasons[1024]


def row_of(workload: Workload, library: str, backward_us: float, both_us: float) -> dict[str, Any]:
    return Library(library, libraries.flashcore_call("auto")).row(workload) | {
        "pass": "backward",
        "seconds": backward_us * 1e-6,
        "eager_seconds": both_us * 1e-6,
        "flops_per_second": 1e12,
        "fraction_of_limit": 0.5,
        "limited_by": "compute",
        "max_error": 1e-3,
        "mean_error": 1e-4,
    }


def test_the_summary_has_both_passes_beside_the_best_of_each() -> None:
    rows = [
        row_of(SMALL, "flashcore", 10.0, 30.0),
        row_of(SMALL, "sdpa-cudnn", 20.0, 90.0),
        row_of(SMALL, "fa4", 40.0, 60.0),
    ]
    found = summarize(rows)["sweep"]
    assert found["vs_best_peer"] == pytest.approx(2.0)
    assert found["with_host"]["vs_best_peer"] == pytest.approx(2.0)
    assert found["with_host"]["vs"] == pytest.approx({"sdpa-cudnn": 3.0, "fa4": 2.0})
    assert [name for name, _ in report.means(rows)] == ["sweep", "sweep, with forward and host"]
    assert report.eager_table(rows).splitlines()[2].endswith("| 30.0 | 90.0 | 60.0 | 2.00x |")
    forward = [{name: x for name, x in row.items() if name != "pass"} for row in rows]
    assert "with_host" not in summarize(forward)["sweep"]


@pytest.mark.parametrize("group", [*GROUPS, *backward.GROUPS])
def test_a_name_is_read_as_the_shape_that_it_names(group: str) -> None:
    for workload in (GROUPS | backward.GROUPS)[group]():
        if workload.lengths is None:
            found = parse_shape(f"{workload.name} {workload.dtype}")
            assert found == dataclasses.replace(workload, group="given", compiles=False)
            assert found.name == workload.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("B1 H8 S64", "B, H, S and D are needed"),
        ("B1 H8 S64 D64 causl", "'causl'"),
        ("B1 H8 S64 D64 window 3", "'window 3'"),
        ("B1 H8 S64 D64 softcap", "'softcap'"),
        ("B1 H8 S64 D64 bool", "'bool'"),
        ("B1 H8 S64 D64/3", "'D64/3'"),
        ("B1 H8 S64 S64 D64", "'S64'"),
        ("B1 H8/3 S64 D64", "not a multiple of 3"),
        ("B0 H8 S64 D64", "size of 0"),
        ("", "are needed"),
    ],
)
def test_a_text_that_is_no_shape_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="shape=") as found:
        parse_shape(text)
    assert message in str(found.value)


def test_parts_of_a_run_are_shown_as_one_and_others_refused() -> None:
    other = dataclasses.replace(SMALL, seqlen=30)
    first, second = (run("cpu", rounds=1, workloads=[w], is_backward=True) for w in (SMALL, other))
    both = joined([first, second])
    assert both["summary"]["sweep"]["shapes"] == 2
    assert both["results"] == first["results"] + second["results"]
    assert joined([first]) == first
    assert both["command"] == first["command"]
    assert joined([first, second | {"command": "two"}])["command"] == f"{first['command']}; two"
    with pytest.raises(ValueError, match="measured in both"):
        joined([first, first])
    with pytest.raises(ValueError, match="pass differs: backward and forward"):
        joined([first, run("cpu", rounds=1, workloads=[other])])
    with pytest.raises(ValueError, match="versions differs"):
        joined([first, second | {"versions": {}}])
    with pytest.raises(ValueError, match="gpu differs"):
        joined([first, second | {"gpu": {"name": "another"}}])


def test_the_command_times_given_shapes(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    arguments = ["--device", "cpu", "--rounds", "1", "--shape", "B1 H2 S40 D16 causal float32"]
    done = CliRunner().invoke(app, ["bench", "--backward", *arguments, "-o", str(path), "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(path.read_text())
    assert document == json.loads(done.stdout)
    assert {row["workload"] for row in document["results"]} == {"B1 H2 S40 D16 causal"}
    assert {row["pass"] for row in document["results"]} == {"backward"}
    again = CliRunner().invoke(app, ["bench", "--from", str(path)])
    assert "with forward and host" in again.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("group", sorted(backward.GROUPS))
def test_every_group_runs_on_the_gpu(group: str) -> None:
    workload = min(backward.GROUPS[group](), key=lambda w: w.flops)
    (row, *_) = run("cuda", rounds=1, workloads=[workload], is_backward=True)["results"]
    assert row["library"] == "flashcore"
    assert row.get("skipped") is None
    assert row["by_graph"]
    assert row["max_error"] < 0.1
    assert row["mean_error"] < 1e-2
    assert isinstance(row["eager_seconds"], float)


@pytest.mark.gpu
def test_a_graph_holds_the_whole_backward_and_nothing_else() -> None:
    """A replay computes autograd's gradients, from the inputs as they are then."""
    workload = Workload("x", 1, 4, 300, 64, True, "bfloat16")
    leaves = [x.detach().requires_grad_() for x in workload.tensors("cuda")]
    dout = torch.randn(1, 4, 300, 64, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        passes = backward.bind(
            Library("flashcore", libraries.flashcore_call("auto")), workload, leaves, None, dout
        )
        passes.backward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = passes.gradients()
    with torch.cuda.stream(stream):
        dout.mul_(2)
        graph.replay()
        want = passes.gradients()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


@pytest.mark.gpu
def test_a_backward_that_fails_does_not_end_the_run() -> None:
    from flashcore.bench.timing import Passes, time_passes_on_gpu

    x = torch.zeros(1000, device="cuda")

    def broken() -> None:
        raise RuntimeError("no kernel for this")

    good = Passes(lambda: x + 1, lambda: x + 2, lambda: [x])
    outcomes = time_passes_on_gpu(
        {"bad": Passes(broken, broken, lambda: [x]), "good": good}, 3, torch.cuda.Stream()
    )
    assert outcomes["bad"] == "no kernel for this"
    assert isinstance(outcomes["good"], Timing)
    assert len(outcomes["good"].rounds) == 3
