"""Test the benchmark's shapes, peers and sums, on the CPU; times themselves are never looked at."""

from __future__ import annotations

import math
import sys
import types
import warnings
from dataclasses import asdict
from typing import Any

import pytest
import torch
from parameters import thorough_but

import flashcore
from flashcore.bench import libraries, peers, run
from flashcore.bench.libraries import Library
from flashcore.bench.reporting import report
from flashcore.bench.reporting.summary import summarize
from flashcore.bench.timing import Timing, orders
from flashcore.bench.workloads import GROUPS, Workload

OPTIONS = [
    Workload("x", 2, 4, 200, 32, True, "float32", 2, window=(20, 0)),
    Workload("x", 2, 4, 200, 32, False, "float32", mask="padding"),
    Workload("x", 2, 4, 200, 32, False, "float32", mask="bool"),
    Workload("x", 2, 4, 200, 32, False, "float32", mask="additive"),
    Workload("x", 2, 4, 200, 32, True, "float32", softcap=2.0),
    Workload("decode", 2, 4, 1, 32, False, "float32", 2, 300),
]
PACKED = Workload("varlen", 1, 4, 200, 32, True, "float32", 2, lengths=(120, 0, 3, 77))


def test_groups_have_the_shapes_that_they_promise() -> None:
    counts = {}
    for group, shapes in GROUPS.items():
        workloads = shapes()
        assert {w.group for w in workloads} == {group}
        assert len({w.name for w in workloads}) == len(workloads)
        counts[group] = len(workloads)
    assert counts == {
        "seed": 2,
        "sweep": 36,
        "gqa": 4,
        "small": 24,
        "window": 4,
        "masked": 8,
        "decode": 4,
        "decode-more": 8,
        "varlen": 6,
    }
    small = GROUPS["small"]()
    assert {(w.seqlen, w.causal) for w in small} == {
        (seqlen, causal) for seqlen in (128, 256, 512, 1024) for causal in (False, True)
    }


def test_work_is_counted_as_the_page_says() -> None:
    plain = Workload("x", 2, 4, 256, 64, False)
    assert plain.flops == 4 * 2 * 4 * 256 * 256 * 64
    assert plain.num_bytes == 2 * 4 * (2 * 4 * 256 * 64)
    assert plain.window_tiles == 4
    windowed = Workload("x", 1, 1, 512, 64, True, window=(128, 0))
    pairs = sum(min(i, 128) + 1 for i in range(512))
    assert windowed.flops == 4 * pairs * 64
    assert windowed.window_tiles == 1 + 2 + 2 + 2
    decode = Workload("x", 1, 32, 1, 128, False, "bfloat16", 8, 2048)
    assert decode.flops == 4 * 32 * 2048 * 128
    assert decode.num_bytes == 2 * 128 * (2 * 32 + 2 * 8 * 2048)
    assert decode.name == "B1 H32/8 S1/2048 D128 full"


@pytest.mark.parametrize("workload", thorough_but(OPTIONS[-1:], OPTIONS), ids=lambda w: w.name)
def test_every_option_is_checked_against_the_oracle(workload: Workload) -> None:
    rows = {row["library"]: row for row in run("cpu", rounds=1, workloads=[workload])["results"]}
    assert rows["flashcore"]["max_error"] < 1e-5
    took = {name: row for name, row in rows.items() if "seconds" in row}
    assert all(row["max_error"] < 1e-5 for row in took.values())
    assert ("sdpa" in took) == (workload.window is None and workload.softcap is None)
    assert "unfused" not in took


def test_packed_sequences_are_checked_against_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PACKED.flops == 2 * 4 * 32 * (120**2 + 3**2 + 77**2)
    assert PACKED.name == "4 sequences to 120 of 200 H4/2 D32 causal"
    (ours, *others) = run("cpu", rounds=1, workloads=[PACKED])["results"]
    assert ours["max_error"] < 1e-5
    assert {row["skipped"] for row in others} == {"does not take packed sequences"}
    right = flashcore.attention_varlen
    monkeypatch.setattr(
        flashcore, "attention_varlen", lambda *args, causal, backend: right(*args, backend=backend)
    )
    assert run("cpu", rounds=1, workloads=[PACKED])["results"][0]["max_error"] > 1e-2


@pytest.mark.parametrize("by_window", [False, True])
def test_peers_with_packed_sequences_are_asked_for_the_same(
    by_window: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_causal_function(*args: Any, is_causal: bool = False) -> torch.Tensor:
        return flashcore.attention_varlen(*args, causal=is_causal)

    def window_function(
        *args: Any, window_size: tuple[int, int] = (-1, -1)
    ) -> tuple[torch.Tensor, None]:
        return flashcore.attention_varlen(*args, window=window_size), None

    q, k, v = PACKED.tensors("cpu")
    wanted = libraries.flashcore_call("torch")(PACKED, q, k, v, None)()
    module = types.SimpleNamespace(
        varlen_attn=window_function if by_window else is_causal_function,
        flash_attn_func=None,
        flash_attn_varlen_func=lambda *args, causal: flashcore.attention_varlen(
            *args, causal=causal
        ),
    )
    for name in ("torch.nn.attention.varlen", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, module)
    assert torch.equal(peers._torch_varlen(PACKED, q, k, v, None)(), wanted)
    assert torch.equal(peers._fa3(PACKED, q, k, v, None)(), wanted)


def test_a_wrong_result_shows_as_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    right = flashcore.attention
    monkeypatch.setattr(
        flashcore, "attention", lambda *qkv, **options: right(*qkv, **options | {"window": (21, 0)})
    )
    (row, *_) = run("cpu", rounds=1, workloads=OPTIONS[:1])["results"]
    assert row["max_error"] > 1e-2


@pytest.mark.parametrize("workload", OPTIONS, ids=lambda w: w.name)
def test_flex_attention_is_asked_for_the_same(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    q, k, v = workload.tensors("cpu")
    mask = workload.mask_tensor("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would rather be compiled
        out = peers._flex(workload, q, k, v, mask)()
    wanted = libraries.flashcore_call("torch")(workload, q, k, v, mask)()
    assert torch.allclose(out, wanted, atol=1e-5)


@pytest.mark.parametrize("returns_lse", [False, True])
def test_rows_first_peers_get_their_layout_and_options(returns_lse: bool) -> None:
    seen: dict[str, Any] = {}

    def flash_attn_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        window_size: tuple[int | None, int | None] = (-1, -1),
        softcap: float = 0.0,
        num_splits: int = 1,
    ) -> Any:
        seen.update(
            shapes=[tuple(x.shape) for x in (q, k, v)],
            options=(causal, window_size, softcap, num_splits),
        )
        out = torch.zeros_like(q)
        return (out, "lse") if returns_lse else out

    workload = Workload("x", 2, 4, 16, 8, True, window=(3, 0), softcap=5.0)
    qkv = workload.tensors("cpu")
    out = peers.rows_first_call(flash_attn_func, workload, qkv, (3, None))()
    assert seen == {"shapes": [(2, 16, 4, 8)] * 3, "options": (True, (3, None), 5.0, 1)}
    assert out.shape == (2, 4, 16, 8)
    one_query = Workload("x", 1, 4, 1, 8, False, num_heads_kv=2, seqlen_k=30)
    peers.rows_first_call(flash_attn_func, one_query, one_query.tensors("cpu"), (-1, -1))()
    assert seen["shapes"] == [(1, 1, 4, 8), (1, 30, 2, 8), (1, 30, 2, 8)]
    assert seen["options"] == (False, (-1, -1), 0.0, 0)  # its own number of splits


def test_peers_that_cannot_be_imported_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.ModuleType("stand-in"))
    monkeypatch.setitem(sys.modules, "triton", None)
    found, left_out = peers.find_peers()
    assert "fa3" in [library.name for library in found]
    reasons = {row["library"]: row["reason"] for row in left_out}
    assert "triton cannot be imported" in reasons["flex"]
    document = {"results": [], "left_out": left_out}
    assert any(line.startswith("flex: triton cannot") for line in report.skipped(document))


def test_every_round_has_all_libraries_in_an_order_of_its_own() -> None:
    names = ["a", "b", "c", "d"]
    rounds = list(orders(names, 9))
    assert all(sorted(names_of_round) == names for names_of_round in rounds)
    assert len({tuple(names_of_round) for names_of_round in rounds}) > 4
    assert len({names_of_round[0] for names_of_round in rounds}) > 2
    assert rounds == list(orders(names, 9))


def test_libraries_can_be_left_out() -> None:
    workload = Workload("x", 1, 1, 8, 8, False, "float32")
    all_of_them = {row["library"] for row in run("cpu", rounds=1, workloads=[workload])["results"]}
    document = run("cpu", rounds=1, workloads=[workload], without=["sdpa-math"])
    assert {row["library"] for row in document["results"]} == all_of_them - {"sdpa-math"}
    assert document["left_out"] == [{"library": "sdpa-math", "reason": "not asked for"}]


def test_a_library_that_is_not_here_is_not_left_out_silently() -> None:
    workload = Workload("x", 1, 1, 8, 8, False, "float32")
    (entry,) = run("cpu", rounds=1, workloads=[workload], without=["sdpa-meth"])["left_out"]
    assert "no library has that name" in entry["reason"]
    assert "sdpa-math" in entry["reason"]


def test_shapes_that_there_is_no_time_for_say_so() -> None:
    workload = Workload("x", 1, 1, 8, 8, False, "float32")
    rows = run("cpu", rounds=1, workloads=[workload], minutes=0)["results"]
    assert {row["skipped"] for row in rows} == {"not begun within 0 minutes"}
    assert all("seconds" in row for row in run("cpu", rounds=1, workloads=[workload])["results"])


def test_a_peer_that_fails_to_prepare_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def prepare(*_: object) -> Any:
        raise TypeError("unexpected keyword\nlong story")

    ours = Library("flashcore", libraries.flashcore_call("auto"))
    module = sys.modules["flashcore.bench.run"]
    monkeypatch.setattr(module, "cpu_libraries", lambda: [ours, Library("new", prepare)])
    rows = run("cpu", rounds=1, workloads=[Workload("x", 1, 1, 8, 8, False, "float32")])["results"]
    assert [row.get("skipped") for row in rows] == [None, "unexpected keyword"]


def test_neither_a_shape_nor_a_result_that_fails_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def prepare(workload: Workload, *_: object) -> Any:
        return lambda: torch.zeros(3) if workload.seqlen == 8 else right

    small, large = (Workload("window", 1, 1, n, 8, False, "float32") for n in (8, 16))
    right = torch.zeros(1, 1, 16, 8)
    made = Workload.tensors

    def tensors(self: Workload, device: str) -> Any:
        if self.seqlen == 24:
            raise torch.OutOfMemoryError("out of memory\nlong story")
        return made(self, device)

    ours = Library("flashcore", libraries.flashcore_call("auto"))
    module = sys.modules["flashcore.bench.run"]
    monkeypatch.setattr(module, "cpu_libraries", lambda: [ours, Library("peer", prepare)])
    monkeypatch.setattr(Workload, "tensors", tensors)
    too_large = Workload("window", 1, 1, 24, 8, False, "float32")
    rows = run("cpu", rounds=1, workloads=[small, too_large, large])["results"]
    reasons = [row.get("skipped") for row in rows]
    assert reasons[1] is not None
    assert "seconds" not in rows[1]
    assert reasons == [None, reasons[1], "out of memory", "out of memory", None, None]
    assert [row["workload"] for row in rows[2:4]] == [too_large.name] * 2


def test_slow_compilers_are_timed_on_chosen_shapes_only() -> None:
    flex = Library("flex", peers._flex, libraries.EVERYTHING, compiles_slowly=True)
    chosen = [w for shapes in GROUPS.values() for w in shapes() if flex.skip_reason(w) is None]
    assert 10 < len(chosen) < 20
    assert {"sweep", "window", "masked", "gqa"} <= {w.group for w in chosen}


def timed(workload: Workload, library: str, microseconds: float) -> dict[str, Any]:
    return asdict(workload) | {
        "workload": workload.name,
        "library": library,
        "seconds": microseconds * 1e-6,
        "window_tiles": workload.window_tiles,
        "flops_per_second": 1e12,
        "bytes_per_second": 2e12,
        "fraction_of_limit": 0.5,
        "limited_by": "memory",
        "max_error": 1e-3,
        "mean_error": 1e-4,
    }


def test_summary_is_the_geometric_mean_over_the_best_peer() -> None:
    one, two = GROUPS["decode"]()[:2]
    rows = [
        timed(one, "flashcore", 10.0),
        timed(one, "flashcore-wmma", 1.0),  # ours too, so no peer
        timed(one, "fa3", 20.0),
        timed(one, "sdpa-cudnn", 30.0),
        timed(two, "flashcore", 10.0),
        timed(two, "sdpa-cudnn", 5.0),
        timed(two, "fa3", 9.0),
    ]
    found = summarize(rows)["decode"]
    assert found["vs_best_peer"] == pytest.approx(math.sqrt(2.0 * 0.5))
    assert (found["shapes"], found["ahead"], found["least"]) == (2, 1, 0.5)
    assert found["least_at"] == two.name
    assert found["vs"]["fa3"] == pytest.approx(math.sqrt(2.0 * 0.9))
    table = report.times_table(rows).splitlines()
    assert table[0].startswith("| us / GB/s | flashcore | flashcore-wmma | fa3 | sdpa-cudnn |")
    assert table[2].startswith(f"| {one.name} | 10.0 / 2000 | 1.0 / 2000 |")
    assert table[2].endswith("| 50% (memory) | 2.00x |")
    assert summarize([row for row in rows if row["library"] == "flashcore"]) == {}


def test_a_window_is_compared_with_its_share_of_the_tiles() -> None:
    full, windowed = GROUPS["window"]()[:2]
    assert (full.window_tiles, windowed.window_tiles) == (8256, 1116)
    times = ((full, 1000.0), (windowed, 200.0))
    rows = [timed(w, name, t) for w, t in times for name in ("flashcore", "fa3")]
    cost = summarize(rows)["window"]["window_cost"][windowed.name]["flashcore"]
    assert cost == pytest.approx(0.2 * 8256 / 1116)
    assert f"flashcore {cost:.2f}" in report.window_lines(rows)[0]


@pytest.mark.gpu
@pytest.mark.parametrize("group", sorted(GROUPS))
def test_flashcore_runs_every_group_on_the_gpu(group: str) -> None:
    from flashcore.bench.timing import time_on_gpu

    workload = min(GROUPS[group](), key=lambda w: w.flops)
    q, k, v = workload.tensors("cuda")
    call = libraries.flashcore_call("auto")(workload, q, k, v, workload.mask_tensor("cuda"))
    assert isinstance(time_on_gpu({"flashcore": call}, rounds=1)["flashcore"], Timing)
