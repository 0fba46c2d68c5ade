"""Test the file of tuned configurations: what is used, what is ignored, and that it never breaks a
call."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import flashcore
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.problem import Problem
from flashcore.selection import tuned
from flashcore.selection.select import candidates, select_plan
from flashcore.selection.space import tile_of

pytestmark = pytest.mark.usefixtures("nothing_ships")

GPU = "NVIDIA H999"


def problem(seqlen: int = 1024, head_dim: int = 64, **options: Any) -> Problem:
    x = torch.empty(1, 8, seqlen, head_dim, dtype=torch.float16)
    described = Problem.from_tensors(x, x, x, **options)
    return dataclasses.replace(described, device="cuda", arch=90)


def entry(asked: Problem, **changes: Any) -> tuned.Entry:
    """Return another tile than the table's."""
    default = candidates(asked)[0]
    tile = tile_of(default) | {"block_m": 128, "block_n": 80, "min_blocks": 1}
    if default.kernel == "attn_fwd_sm90":
        tile |= {"num_stages": 2, "key_slices": 1}
    found = tuned.Entry(
        gpu=GPU,
        kernel=default.kernel,
        version=tuned.kernel_version(default.kernel),
        problem_class=tuned.problem_class(asked),
        tile=tile,
        seconds=1e-3,
        default_seconds=2e-3,
        measured_on="B1 H8 S1024 D64 full",
        date="2026-01-02T03:04:05+00:00",
    )
    return dataclasses.replace(found, **changes)


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(tuned, "gpu_name", lambda: GPU)
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path))
    return tuned.path_for(90)


def size(plan: Plan) -> tuple[int, int]:
    return plan.block_m, plan.block_n


def test_what_is_saved_is_used(file: Path) -> None:
    asked = problem()
    default = select_plan(asked)
    assert size(default) != (128, 80)
    tuned.save(file, [entry(asked)])
    assert tuned.read(file) == [entry(asked)]
    assert select_plan(asked) == dataclasses.replace(default, **entry(asked).tile)
    # Of the same class: the other dtype, another stride, nearly the length.
    assert size(select_plan(dataclasses.replace(asked, dtype="bfloat16"))) == (128, 80)
    assert size(select_plan(problem(seqlen=900))) == (128, 80)


@pytest.mark.parametrize(
    "other",
    [
        problem(seqlen=2048),
        problem(head_dim=128),
        problem(causal=True),
        problem(softcap=3.0),
        dataclasses.replace(problem(), batch=4),
        dataclasses.replace(problem(), varlen="keys"),
        dataclasses.replace(problem(), device="cpu", arch=0),
    ],
    ids=tuned.problem_class,
)
def test_other_problems_go_by_the_table(other: Problem, file: Path) -> None:
    tuned.save(file, [entry(problem())])
    assert select_plan(other, 90) == candidates(other, 90)[0]


def test_gates_and_other_kernels_go_by_the_table(file: Path) -> None:
    asked = problem()
    tuned.save(file, [entry(asked)])
    assert select_plan(asked, gate="qk") == candidates(asked, gate="qk")[0]
    assert select_plan(asked, kernel="attn_fwd_wmma").kernel == "attn_fwd_wmma"
    assert select_plan(asked, 80) == candidates(asked, 80)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "0123456789abcdef"},
        {"gpu": "NVIDIA H200"},
        {"tile": {}},
        {"tile": {"block_m": 128}},
    ],
    ids=str,
)
def test_entries_of_other_times_and_places_are_ignored(changes: dict[str, Any], file: Path) -> None:
    asked = problem()
    tuned.save(file, [entry(asked, **changes)])
    assert select_plan(asked) == candidates(asked)[0]


def test_an_illegal_tile_is_ignored(file: Path) -> None:
    """Whatever a file says, no kernel is launched that cannot run."""
    asked = problem()
    for bad in ({"block_n": 4096}, {"block_m": 64, "key_slices": 2, "ping_pong": False}):
        tuned.save(file, [entry(asked, tile=entry(asked).tile | bad)])
        assert select_plan(asked) == candidates(asked)[0]


def test_the_version_is_that_of_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tuned.kernel_version("attn_fwd_sm90")
    assert before != tuned.kernel_version("attn_fwd_wmma")
    tuned.kernel_version.cache_clear()
    monkeypatch.setattr(tuned, "flatten", lambda *_: "another kernel")
    assert tuned.kernel_version("attn_fwd_sm90") != before
    tuned.kernel_version.cache_clear()


def test_it_can_be_switched_off(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = problem()
    tuned.save(file, [entry(asked)])
    monkeypatch.setenv("FLASHCORE_TUNED", "0")
    assert select_plan(asked) == candidates(asked)[0]
    monkeypatch.setenv("FLASHCORE_TUNED", "perhaps")
    with pytest.raises(ValueError, match="neither 0 nor 1 nor rules"):
        select_plan(asked)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"schema": 99, "entries": []}',
        '{"schema": 1, "entries": [{}]}',
        '{"schema": 1, "entries": 7}',
        "\udcff",
    ],
    ids=str,
)
def test_a_corrupted_file_is_ignored_with_a_warning(content: str, file: Path) -> None:
    asked = problem()
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.warns(RuntimeWarning, match=r"tuned-sm_90\.json is ignored"):
        assert select_plan(asked) == candidates(asked)[0]
    tuned.save(file, [entry(asked)])
    assert size(select_plan(asked)) == (128, 80)


def test_a_field_of_a_wrong_type_is_corruption(file: Path) -> None:
    tuned.save(file, [entry(problem())])
    document = json.loads(file.read_text())
    document["entries"][0]["tile"] = [1, 2]
    file.write_text(json.dumps(document))
    tuned._read.cache_clear()
    with pytest.warns(RuntimeWarning, match="tile is"):
        assert tuned.read(file) == []


def test_saving_adds_replaces_and_drops(file: Path) -> None:
    one, two = entry(problem()), entry(problem(seqlen=4096))
    tuned.save(file, [one])
    tuned.save(file, [two])
    again = dataclasses.replace(one, seconds=0.5e-3)
    tuned.save(file, [again])
    assert sorted(tuned.read(file), key=lambda e: e.key) == sorted(
        [again, two], key=lambda e: e.key
    )
    tuned.save(file, [], dropped=[one])
    assert tuned.read(file) == [two]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_explain_says_so(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = problem()
    monkeypatch.setattr(Problem, "from_tensors", lambda *_, **__: asked)
    x = torch.empty(1, 8, 1024, 64, dtype=torch.float16)
    plain = flashcore.explain(x, x, x, file=io.StringIO())
    assert not any("flashcore tune" in note for note in plain.notes)
    tuned.save(file, [entry(asked)])
    found = flashcore.explain(x, x, x, file=io.StringIO())
    assert found.plan is not None
    assert size(found.plan) == (128, 80)
    assert plain.plan in found.alternatives
    (note,) = [note for note in found.notes if "flashcore tune" in note]
    assert f"on {GPU}, 2026-01-02, with B1 H8 S1024 D64 full" in note
    assert not any("come from" in note for note in found.notes)


def test_a_kernels_version_is_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(text: str) -> str:
        monkeypatch.setattr(tuned, "flatten", lambda *_: text)
        return tuned.kernel_version.__wrapped__("attn_fwd_wmma")

    code = '#line 1 "a.cuh"\nint x;\nint y;\n'
    assert version(code) == version('// new\n\n#line 3 "a.cuh"\n  int x;  // said\nint y;\n')
    assert version(code) != version(code.replace("y", "z"))
