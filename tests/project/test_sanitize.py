"""Test that scripts/sanitize.py calls no run clean that was not: its reading of the tools' output,
the rows that it runs, and what it makes of their results."""

from __future__ import annotations

import importlib
import re
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flashcore.kernels import registry

ROOT = Path(__file__).resolve().parents[2]

BANNER = "========= COMPUTE-SANITIZER"
MEMCHECK = [
    "========= Invalid __global__ write of size 2 bytes",
    "=========     at attn_fwd_wmma+0x1a40 in store.cuh:31",
    "=========     by thread (3,0,0) in block (7,0,0)",
    "=========",
]
RACECHECK = [
    "========= Error: Race reported between Write access at attn_fwd_wmma+0x900 in pipeline.cuh:40",
    "=========     and Read access at attn_fwd_wmma+0xd10 in attn_fwd_wmma.cuh:88 [1024 hazards]",
    "=========",
]


@pytest.fixture
def sanitize(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("sanitize")


def test_clean_run(sanitize: ModuleType) -> None:
    log = [BANNER, "@case 0 ok", "@case 1 ok", "========= ERROR SUMMARY: 0 errors"]
    outcome = sanitize.read_log(log, 0, 2)
    assert outcome.clean
    assert outcome.verdicts == ["clean", "clean"]


@pytest.mark.parametrize("text", [MEMCHECK, RACECHECK], ids=["memcheck", "racecheck"])
def test_finding_is_put_to_its_case(sanitize: ModuleType, text: list[str]) -> None:
    summary = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
    log = [BANNER, "@case 0 ok", *text, "@case 1 ok", summary]
    outcome = sanitize.read_log(log, sanitize.FOUND, 2)
    assert outcome.verdicts == ["clean", "1 findings"]
    assert not outcome.clean


def test_finding_that_ends_the_run_is_put_to_its_case(sanitize: ModuleType) -> None:
    end = ["========= Target application returned an error", "========= ERROR SUMMARY: 1 error"]
    outcome = sanitize.read_log([BANNER, "@case 0 ok", *MEMCHECK, *end], sanitize.FOUND, 3)
    assert outcome.verdicts == ["clean", "1 findings", "not run"]
    assert outcome.problem is not None


def test_failure_of_another_kind_is_no_finding(sanitize: ModuleType) -> None:
    for line in ("Error: Device not supported", "Target application returned an error"):
        log = [BANNER, f"========= {line}", "========= ERROR SUMMARY: 0 errors"]
        outcome = sanitize.read_log(log, 255, 1)
        assert outcome.verdicts == ["not run"]
        assert not outcome.clean


@pytest.mark.parametrize(
    ("log", "status"),
    [
        ([BANNER, "@case 0 ok", "@case 1 wrong", "========= ERROR SUMMARY: 0 errors"], 0),
        ([BANNER, "@case 0 ok", "@case 1 late", "========= ERROR SUMMARY: 0 errors"], 0),
        ([BANNER, "@case 0 ok", "@case 1 error: X", "========= ERROR SUMMARY: 0 errors"], 0),
        ([BANNER, "@case 0 ok", "========= ERROR SUMMARY: 0 errors"], 0),
        ([BANNER, "@case 0 ok", "@case 1 ok"], 0),
        ([BANNER, "@case 0 ok", "@case 1 ok", "========= ERROR SUMMARY: 0 errors"], 1),
        ([BANNER, "@case 0 ok", "@case 1 ok", "========= ERROR SUMMARY: 2 errors"], 0),
        ([BANNER, "@case 0 ok", "@case 1 ok", "========= ERROR SUMMARY: 0 errors"], 86),
        (["========= Error: Device not supported", "========= ERROR SUMMARY: 0 errors"], 255),
        ([], 127),
    ],
    ids=[
        "wrong",
        "late",
        "error",
        "stopped",
        "no-summary",
        "crashed",
        "unplaced",
        "status",
        "device",
        "empty",
    ],
)
def test_anything_else_is_not_clean(sanitize: ModuleType, log: list[str], status: int) -> None:
    assert not sanitize.read_log(log, status, 2).clean


def test_every_tool_and_planted_bug_is_known(sanitize: ModuleType) -> None:
    plants = pytest.importorskip(
        "flashcore.sim.plants.wmma", reason="lists the planted bugs"
    ).PLANTS
    assert set(sanitize.SELF_TEST.values()) <= set(plants)
    assert set(sanitize.SELF_TEST) <= set(sanitize.TOOLS)
    assert set(sanitize.TOOLS) == {"memcheck", "racecheck", "synccheck"}


def kernels_of_the_source() -> set[str]:
    """Return the entry points of the device text, but for the check of a GPU's element map."""
    folder = ROOT / "src" / "flashcore" / "kernels"
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*/*.cuh"))
    return set(re.findall(r"^FC_KERNEL\((\w+),", text, re.MULTILINE)) - {"wmma_probe"}


def test_rows_and_tools_know_every_kernel(sanitize: ModuleType) -> None:
    kernels = kernels_of_the_source()
    assert {name for call in sanitize.CALLS for name in call.kernels} == kernels
    assert set(registry.BY_NAME) <= kernels
    assert all(name.startswith(sanitize.KERNELS) for name in kernels)
    names = [row.describe() for row in sanitize.CALLS]
    assert len({*names}) == len(names), "seeds are made of names"


def test_every_call_can_be_judged(sanitize: ModuleType) -> None:
    """PyTorch computes each of them, and memory that no kernel wrote is wrong, whatever it holds:
    zeros, NaN, or the results of another call."""
    wrong_results = importlib.import_module("sanitize_calls").wrong_results
    before: dict[Any, torch.Tensor] = {}
    for call in sanitize.CALLS:
        results = {name: x.detach() for name, x in call.results("cpu", "torch").items()}
        again = call.results("cpu", "torch")
        assert not wrong_results(again, results), call.name
        for name, x in results.items():
            place = name, x.shape, x.dtype
            old = before.get(place, torch.zeros_like(x))
            for unwritten in (torch.zeros_like(x), x.float().fill_(torch.nan), old):
                assert wrong_results(again | {name: unwritten}, results), (call.name, name)
            before[place] = x


def test_calls_of_one_kernel_are_those_that_it_can_compute(
    sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the simulator, where a backend falls back to PyTorch as on a GPU."""
    monkeypatch.setenv("FLASHCORE_SIM_ARCH", "90")
    call = next(call for call in sanitize.CALLS if call.by_one)
    wrong_results = importlib.import_module("sanitize_calls").wrong_results
    with call.by_kernels():
        found = call.results("cpu", "sim")
    assert not wrong_results(found, call.results("cpu", "torch"))
    with pytest.raises(AssertionError, match="instead of a kernel"), call.by_kernels():
        call.results("cpu", "torch")
    with pytest.raises(AssertionError, match="nobody asked"), call.by_kernels():
        pass


def test_a_row_fails_alone_and_none_begins_late(
    sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_row(row: str, plant: str | None) -> bool:
        if row == "raises":
            raise ValueError("it cannot\nat all")
        return row == "right"

    monkeypatch.setattr(sanitize, "run_row", run_row)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    sanitize.run_rows(["right", "raises", "wrong"], None, None)
    sanitize.run_rows(["right"], None, time.time() - 1)
    lines = capsys.readouterr().out.splitlines()
    errors = "@case 1 error: ValueError: it cannot"
    assert lines == ["@case 0 ok", errors, "@case 2 wrong", "@case 0 late"]
    outcome = sanitize.read_log([*lines, "========= ERROR SUMMARY: 0 errors"], 0, 4)
    assert outcome.verdicts == ["clean", errors.removeprefix("@case 1 "), "wrong", "not run"]


def test_rows_are_chosen_by_their_text_and_the_gpu(sanitize: ModuleType) -> None:
    everything = sanitize.chosen("", True)
    assert everything == list(range(len(sanitize.CASES) + len(sanitize.CALLS)))
    portable = [sanitize.ROWS[number] for number in sanitize.chosen("", False)]
    assert portable[: len(sanitize.CASES)] == list(sanitize.CASES)
    assert {row.backend for row in portable[len(sanitize.CASES) :]} == {"wmma"}
    found = [sanitize.ROWS[number].describe() for number in sanitize.chosen("merge", True)]
    assert found
    assert all("merge" in name for name in found)
    assert sanitize.chosen("gradients by one", False) == []
