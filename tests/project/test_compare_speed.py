"""Test scripts/compare_speed.py: what it makes of two versions' times, and its two processes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flashcore.bench.workloads import Workload, cpu_shapes

ROOT = Path(__file__).resolve().parents[2]


class Stub:
    """A stub is a version whose replays take what it is told, the warm-up's ten times as long."""

    def __init__(self, *seconds: float, problem: str = "") -> None:
        self.seconds_left = [time for each in seconds for time in (10 * each, each)]
        self.problem = problem
        self.num_calls: list[int] = []

    def prepare(self, workload: Workload, num_calls: int = 0) -> int:
        if self.problem:
            raise RuntimeError(self.problem)
        self.num_calls.append(num_calls)
        return num_calls or 7

    def seconds(self) -> float:
        return self.seconds_left.pop(0)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("compare_speed")


def test_ratios_are_of_rounds_and_warm_ups_do_not_count(script: ModuleType) -> None:
    base, now = Stub(1.0, 2.0, 4.0), Stub(1.5, 2.0, 4.0)
    row = script.compare(base, now, cpu_shapes()[0], 3)
    assert row["rounds_ratios"] == [1.5, 1.0, 1.0]
    assert (row["ratio"], row["base_seconds"], row["seconds"]) == (1.0, 2.0, 2.0)
    assert (base.num_calls, now.num_calls) == ([0], [7])  # both replay equally many


def test_a_version_that_fails_is_named(script: ModuleType) -> None:
    row = script.compare(Stub(1.0), Stub(problem="no kernel"), cpu_shapes()[0], 1)
    assert row["error"] == "no kernel"
    assert "ratio" not in row


def test_wrong_bases_and_groups_end_with_2(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["no-such-commit", "--tiny"], [str(ROOT), "--tiny", "--groups", "wide"]):
        with pytest.raises(SystemExit) as ended:
            script.main(arguments)
        assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "base 'no-such-commit' is no folder" in told
    assert "--groups wide: there are seed," in told


@pytest.mark.thorough
def test_two_processes_time_a_shape(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    arguments = [str(ROOT), "--tiny", "--rounds", "1", "--limit", "1e9", "--json", str(path)]
    assert script.main(arguments) == 0
    document: dict[str, Any] = json.loads(path.read_text())
    assert [row["workload"] for row in document["results"]] == ["B1 H8 S64 D64 full"]
    assert document["results"][0]["seconds"] > 0
