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

from flashcore.bench import decoding
from flashcore.bench.timing import Timing

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
    monkeypatch.setattr(decoding.ceilings, "measure", lambda device, dtype: limits)
    monkeypatch.setattr(decoding, "time_on_cpu", fake_timer)
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
        decoding.WHOLE, *decoding.PAGED, *decoding.OTHERS,
    }  # fmt: skip
    assert all(row["seconds"] == 2e-6 for row in ours)
    assert all("flash_attn_interface" in x["skipped"] for x in rows if x["library"] == "fa3")
    text = decoding.markdown(document)
    assert text in capsys.readouterr().out
    assert text.count("2.0 / -") == 2 * 5


def test_fa3_is_called_where_it_is_there(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def flash_attn_with_kvcache(q: Any, keys: Any, values: Any, **options: Any) -> torch.Tensor:
        seen.append(options)
        assert (q.shape[1], keys.shape) == (1, values.shape)
        return torch.zeros_like(q)

    module = SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    cell = decoding.Cell(2, 2, 1, 64, 70)
    rows = decoding.run("cpu", [cell], 1)["results"]
    assert not [row for row in rows if "skipped" in row]
    tables = [None if x["page_table"] is None else x["page_table"].shape[1] for x in seen]
    assert tables == [None, 5, 2, 1, 2]
    assert "rotary_cos" in seen[-1]
    text = decoding.markdown({"results": rows})
    assert "2.0 / 2.0" in text


def test_the_step_attends_to_what_it_appends(fast: None) -> None:
    """Each sequence gets one token, its last."""
    cell = decoding.Cell(2, 2, 1, 64, 70)
    cache = decoding.make_cache(cell, 64, "cpu")
    lengths = torch.tensor(cell.lengths(), dtype=torch.int32)
    q = torch.randn(2, 1, 2, 64, dtype=torch.bfloat16)
    before = cache.k.clone()
    decoding._steps(cell, q, cache, lengths)["flashcore"]()()
    assert (cache.k != before).flatten(2).any(-1).sum() == 2


def test_what_there_is_no_time_for_is_left_out(fast: None) -> None:
    cell = decoding.Cell(1, 2, 2, 64, 20)
    over = iter([False, True])
    rows = decoding.run("cpu", [cell, cell], 1, is_over=lambda: next(over))["results"]
    late = [row for row in rows if row.get("skipped") == "the time was over"]
    assert len(late) == 2 * (1 + len(decoding.PAGED) + len(decoding.OTHERS))


def test_lengths_are_the_same_in_every_run_and_one_is_the_longest() -> None:
    for cell in decoding.CELLS:
        lengths = cell.lengths()
        assert lengths == cell.lengths()
        assert len(lengths) == cell.batch
        assert max(lengths) == lengths[0] == cell.longest
        assert min(lengths) >= 1


@pytest.mark.gpu
def test_every_kind_of_cache_is_timed_on_the_gpu(script: ModuleType) -> None:
    rows = script.main(["--tiny", "--rounds", "1"])["results"]
    assert not [row for row in rows if row["library"] == "flashcore" and "skipped" in row]
