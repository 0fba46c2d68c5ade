"""scripts/bench_decode.py measures every kind of cache, with the peers that are there."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from flashcore.bench.compiling_ahead import compile_ahead
from flashcore.bench.decoding import measuring, tables
from flashcore.bench.decoding.cells import CELLS, MIXED, Cell, random_cells
from flashcore.bench.timing import Timing
from flashcore.launch import kernel_call

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_decode.py"
pytestmark = pytest.mark.filterwarnings("ignore::flashcore.FallbackWarning")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_decode", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_timer(calls: Mapping[str, Any], rounds: int) -> dict[str, Timing | str]:
    """Call everybody once; say that it took 2 us."""
    for call in calls.values():
        assert isinstance(call(), torch.Tensor)
    return {name: Timing(2e-6, (2e-6,) * rounds) for name in calls}


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"matmul_n": 1.0, "matmul_flops": 1e12, "copy_bytes": 1e12}
    monkeypatch.setattr(measuring.ceilings, "measure", lambda device, dtype: limits)
    monkeypatch.setattr(measuring, "time_on_cpu", fake_timer)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)  # it cannot be imported


def test_the_script_writes_what_a_page_quotes(
    script: ModuleType, fast: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "found.json"
    document = script.main(["--tiny", "--rounds", "1", "--json", str(path)])
    assert json.loads(path.read_text()) == document
    assert {"date", "versions", "gpu", "cpu", "command", "method"} <= set(document)
    rows = document["results"]
    ours = [row for row in rows if row["library"] == "flashcore"]
    assert {row["what"] for row in ours} == {
        measuring.WHOLE, *measuring.PAGED, *measuring.OTHERS,
    }  # fmt: skip
    assert all(row["seconds"] == 2e-6 for row in ours)
    assert all("flash_attn_interface" in x["skipped"] for x in rows if x["library"] == "fa3")
    text = tables.markdown(document)
    assert text in capsys.readouterr().out
    assert text.count("2.0 / -") == 2 * 5
    assert "fa3 / flashcore, the least" not in text  # there is nothing to compare with


def test_fa3_is_called_where_it_is_there(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def flash_attn_with_kvcache(q: Any, keys: Any, values: Any, **options: Any) -> torch.Tensor:
        seen.append(options)
        assert keys.shape == values.shape
        assert q.dim() == (3 if "cu_seqlens_q" in options else 4)
        return torch.zeros_like(q)

    module = SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    cell = Cell(2, 2, 1, 64, 70)
    rows = measuring.run("cpu", [cell], 1)["results"]
    assert not [row for row in rows if "skipped" in row]
    table_sizes = [None if x["page_table"] is None else x["page_table"].shape[1] for x in seen]
    assert table_sizes == [None, 5, 2, 1, 2, 2]
    assert "rotary_cos" in seen[-2]
    assert seen[-1]["max_seqlen_q"] == 70
    text = tables.markdown({"results": rows})
    assert "2.0 / 2.0" in text


def test_the_step_attends_to_what_it_appends(fast: None) -> None:
    """Each sequence gets one token, its last."""
    cell = Cell(2, 2, 1, 64, 70)
    cache = measuring.make_cache(cell, 64, "cpu")
    lengths = torch.tensor(cell.lengths(), dtype=torch.int32)
    q = torch.randn(2, 1, 2, 64, dtype=torch.bfloat16)
    before = cache.k.clone()
    measuring._steps(cell, q, cache, lengths)["flashcore"]()()
    assert (cache.k != before).flatten(2).any(-1).sum() == 2


def test_what_there_is_no_time_for_is_left_out(fast: None) -> None:
    cell = Cell(1, 2, 2, 64, 20)
    over = iter([False, True])
    rows = measuring.run("cpu", [cell, cell], 1, is_over=lambda: next(over))["results"]
    late = [row for row in rows if row.get("skipped") == "the time was over"]
    assert len(late) == 2 * (1 + len(measuring.PAGED) + len(measuring.OTHERS))


def test_lengths_are_the_same_in_every_run_and_one_is_the_longest() -> None:
    for cell in CELLS:
        lengths = cell.lengths()
        assert lengths == cell.lengths()
        assert len(lengths) == cell.batch
        assert max(lengths) == lengths[0] == cell.longest
        assert min(lengths) >= 1


def test_a_cell_by_chance_is_timed_in_pages_of_its_size(fast: None) -> None:
    rows = measuring.run("cpu", [Cell(2, 4, 2, 64, 100, page_size=48)], 1)["results"]
    ours = [row for row in rows if row["library"] == "flashcore"]
    assert [row["what"] for row in ours] == [measuring.WHOLE, measuring.OF_ITS_OWN]
    text = tables.markdown({"results": rows})
    assert text.splitlines()[2].startswith("| us, flashcore / fa3; page size |")
    assert "| B2 H4/2 D64 100, 48 |" in text


def test_a_chunk_beside_single_tokens_is_timed_in_pages_of_each_size(fast: None) -> None:
    cell = Cell(3, 4, 2, 64, 100, chunk=40)
    assert cell.lengths() == [40, 100, 100]
    rows = measuring.run("cpu", [cell], 1)["results"]
    ours = [row for row in rows if row["library"] == "flashcore"]
    assert [row["what"] for row in ours] == list(measuring.PAGED)
    assert "chunk of 40" in tables.markdown({"results": rows})
    assert MIXED.lengths().count(MIXED.longest) == MIXED.batch - 1


def test_a_part_may_be_asked_for(fast: None) -> None:
    rows = measuring.run("cpu", [Cell(2, 2, 2, 64, 30)], 1, only=["one piece", "step"])["results"]
    assert {row["what"] for row in rows} == {"one piece", "step"}


def test_means_and_the_least_ratio_are_of_what_both_did() -> None:
    common = {"cell": "B1", "page_size": 0, "chunk": 0, "seconds_at_copy_speed": 1e-6}
    found = {"one piece": (1e-6, 4e-6), "pages of 16": (2e-6, 2e-6), "pages of 64": (1e-6, None)}
    rows: list[dict[str, Any]] = []
    for what, seconds in found.items():
        for library, value in zip(("flashcore", "fa3"), seconds, strict=True):
            row = common | {"what": what, "library": library}
            rows.append(
                row | ({"skipped": "it is missing"} if value is None else {"seconds": value})
            )
    text = tables.markdown({"results": rows})
    assert "| B1 | 1.0 | 1.0 / 4.0 | 2.0 / 2.0 | 1.0 / - | - / - | - / - | 1.00 |" in text
    assert "of all 2.00 in the mean" in text


def test_cells_by_chance_are_those_of_their_seed() -> None:
    cells = random_cells(200, 3)
    assert cells == random_cells(200, 3)
    assert cells[:5] != random_cells(5, 4)
    assert len(set(cells)) == 200
    assert all(c.num_heads_q % c.num_heads_kv == 0 and c.head_dim % 8 == 0 for c in cells)
    assert {c.num_heads_q // c.num_heads_kv for c in cells} >= {1, 3, 5, 7}
    assert all(c.page_size % 16 == 0 and 16 <= c.page_size <= 256 for c in cells)
    assert any(c.page_size not in measuring.PAGE_SIZES for c in cells)


def test_rounds_that_spread_are_followed_by_more() -> None:
    asked: list[int] = []

    def timer(calls: Mapping[str, Any], rounds: int) -> dict[str, Timing | str]:
        asked.append(rounds)
        slow = 1.0 if "steady" in calls else 1.1
        return {name: Timing(1.0, (1.0, slow)) for name in calls} | {"other": "no time"}

    measuring._time(timer, {"steady": print}, 5)
    assert asked == [3]
    measuring._time(timer, {"moving": print}, 5)
    assert asked == [3, 3, 5]


def test_kernels_are_compiled_before_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call goes as far as its kernel's compilation, and no plan is compiled twice."""
    plans, compiled, done = ["plan", "plan", "other"], [], []

    class Compiler:
        def __enter__(self) -> Any:
            return lambda found: [compiled.append(plan) or (plan, None) for plan in found]

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr("flashcore.bench.compiling_ahead.Compiler", Compiler)
    before = kernel_call._compile

    def call(plan: Any) -> None:
        kernel_call._compile(plan)
        done.append(plan)

    compile_ahead([lambda p=plan: call(p) for plan in plans] + [lambda: done.append("known")])  # type: ignore[misc, arg-type]
    assert (compiled, done) == (["plan", "other"], ["known"])
    assert kernel_call._compile is before


@pytest.mark.gpu
def test_every_kind_of_cache_is_timed_on_the_gpu(script: ModuleType) -> None:
    rows = script.main(["--tiny", "--rounds", "1"])["results"]
    assert not [row for row in rows if row["library"] == "flashcore" and "skipped" in row]
