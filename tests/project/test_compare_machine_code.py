"""Test scripts/compare_machine_code.py, which must call no kernel unchanged that is not: its
reading of what nvdisasm prints, and what it makes of two source trees."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

# Of a kernel for sm_90a, as nvdisasm 13.0 lists it, much shortened: a loop that waits, multiplies
# and, seldom, does more (.L_x_3), and within that another loop without products.
LISTING = """\
	.section	.text.attn,"ax",@progbits
        .size           attn,(.L_x_9 - attn)
attn:
.text.attn:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   ULDC.64 UR16, c[0x0][0x198] ;
        /*0020*/                   UMOV UR4, 0x400 ;
.L_x_1:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3+URZ+0x20c00], R4 ;
        /*0040*/                   BSSY B0, `(.L_x_2) ;
        /*0050*/              @!P1 BRA `(.L_x_4) ;
.L_x_2:
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0070*/                   FMUL R5, R24, c[0x0][0x210] ;
        /*0080*/               @P0 BRA `(.L_x_3) ;
.L_x_5:
        /*0090*/                   ISETP.NE.AND P2, PT, R9, RZ, PT ;
        /*00a0*/               @P2 BRA `(.L_x_1) ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   FADD R5, R5, -R6 ;
        /*00d0*/                   BRA `(.L_x_5) ;
.L_x_4:
        /*00e0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3+URZ+0x20c00], R4 ;
        /*00f0*/              @!P1 BRA `(.L_x_4) ;
        /*0100*/                   BRA `(.L_x_2) ;
.L_x_6:
        /*0110*/                   BRA `(.L_x_6);
.L_x_9:
"""


@pytest.fixture
def machine_code(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("machine_code")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("compare_machine_code")


def with_waits(stall: int) -> bytes:
    """Return a section of 18 instructions that the scheduler is told `stall` with."""
    return b"".join(bytes(8) + (stall << 41).to_bytes(8, "little") for _ in range(18))


@pytest.mark.parametrize(
    ("find", "replace", "kind"),
    [
        ("c[0x0][0x210]", "c[0x0][0x2a0]", "same code"),
        ("`(.L_x_5)", "`(.L_x_5)", "same code"),
        ("@P2 BRA `(.L_x_1)", "@P2 BRA `(.L_x_2)", "other registers"),
        ("[R3+URZ+0x20c00], R4 ;\n        /*0040*/", "[R3+URZ+0x20800], R4 ;\n        /*0040*/",
         "other numbers"),
        ("UMOV UR4, 0x400", "UMOV UR4, -0x400", "other numbers"),
        ("FMUL R5, R24", "FMUL R6, R24", "other registers"),
        ("@P0 BRA", "@!P0 BRA", "other registers"),
        ("FADD R5, R5, -R6", "FADD R5, R5, R6", "other registers"),
        ("FADD R5", "FADD.FTZ R5", "other instructions"),
        ("FADD R5", "FMUL R5", "other instructions"),
    ],
)  # fmt: skip
def test_a_difference_has_its_name(
    machine_code: ModuleType, find: str, replace: str, kind: str
) -> None:
    assert LISTING.count(find) == 1
    base = machine_code.read_code(LISTING)
    now = machine_code.read_code(LISTING.replace(find, replace))
    assert machine_code.difference(base, now)[0] == kind


def test_instructions_in_another_order(machine_code: ModuleType) -> None:
    lines = LISTING.splitlines()
    first, second = (next(i for i, x in enumerate(lines) if n in x) for n in ("LDC R1", "UMOV"))
    lines[first], lines[second] = lines[second], lines[first]
    base, now = machine_code.read_code(LISTING), machine_code.read_code("\n".join(lines))
    assert machine_code.difference(base, now)[0] == "other order"


def test_waits_count(machine_code: ModuleType) -> None:
    base, now = (machine_code.read_code(LISTING, with_waits(stall)) for stall in (5, 6))
    assert machine_code.difference(base, base) == ("same code", "")
    assert machine_code.difference(base, now) == ("other waits", "")


def test_what_runs_on_every_way_round(machine_code: ModuleType) -> None:
    """Neither what a branch may pass over nor the wait's own loop is among it."""
    found = machine_code.read_code(LISTING).in_loops()
    assert found == Counter(SYNCS=1, BSSY=1, BRA=3, HGMMA=1, FMUL=1, ISETP=1)


def test_a_seldom_way_is_told_from_the_usual_one(machine_code: ModuleType) -> None:
    added = "        /*00d0*/                   FADD R5, R5, R7 ;\n"
    base = machine_code.read_code(LISTING)
    often, seldom = (
        machine_code.read_code(LISTING.replace(before, added + before))
        for before in ("        /*0080*/", "        /*00d0*/")
    )
    assert machine_code.difference(base, often) == (
        "other instructions",
        "18 -> 19, FADD 1 -> 2; on every way round products 8 -> 9, FADD 0 -> 1",
    )
    assert machine_code.difference(base, seldom) == (
        "other instructions",
        "18 -> 19, FADD 1 -> 2; on every way round products 8 -> 8",
    )


def test_comments_are_no_difference(script: ModuleType) -> None:
    source = '#line 3 "a.cuh"\n// why\nint x =  1;  // one\n'
    assert script.text_of(source) == script.text_of("int x = 1; /* another\n reason */\n")
    assert script.text_of(source) != script.text_of(source.replace("1;", "2;"))


def test_what_differs_makes_the_run_fail(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [("attn a", "same text", ""), ("attn b", "same code", "")]
    assert script.report(iter(same))
    assert capsys.readouterr().out == "attn: 1 same code, 1 same text\n"
    assert not script.report(iter([*same, ("attn c", "other waits", "")]))
    assert "attn c: other waits\n" in capsys.readouterr().out


@pytest.mark.thorough
def test_this_tree_is_as_itself(script: ModuleType) -> None:
    """A process lists a tree's configurations, and nothing is compiled where texts are the same."""
    asked = ["--kernel", "bwd_delta", "--head-dim", "64", "--variant", "full"]
    units = script.units_of(SCRIPTS.parent, asked, None)
    assert {unit.kernel for unit in units.values()} == {"attn_bwd_delta_sm90"}
    assert script.units_of(SCRIPTS.parent, asked, set(units)) == units
    pair = (unit := next(iter(units.values())), unit)
    assert script.compare(pair) == (script.SAME_TEXT, "")


def test_a_tree_without_a_package_is_refused(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "src" / "flashcore").mkdir(parents=True)
    (tmp_path / "src" / "flashcore" / "__init__.py").write_text("")
    with pytest.raises(RuntimeError, match="configurations cannot be listed"):
        script.units_of(tmp_path, [], None)
