"""scripts/sanitize.py must not call a run clean that was not: its reading of the tools' output."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "sanitize.py"

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


@pytest.fixture(scope="module")
def sanitize() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sanitize", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sanitize"] = module
    spec.loader.exec_module(module)
    return module


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
        ([BANNER, "@case 0 ok", "========= ERROR SUMMARY: 0 errors"], 0),
        ([BANNER, "@case 0 ok", "@case 1 ok"], 0),
        ([BANNER, "@case 0 ok", "@case 1 ok", "========= ERROR SUMMARY: 0 errors"], 1),
        ([BANNER, "@case 0 ok", "@case 1 ok", "========= ERROR SUMMARY: 2 errors"], 0),
        ([BANNER, "@case 0 ok", "@case 1 ok", "========= ERROR SUMMARY: 0 errors"], 86),
        (["========= Error: Device not supported", "========= ERROR SUMMARY: 0 errors"], 255),
        ([], 127),
    ],
    ids=["wrong", "stopped", "no-summary", "crashed", "unplaced", "status", "device", "empty"],
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
