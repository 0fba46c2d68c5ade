"""Test `flashcore explain` for every kind of call: examples run, and say what Python says."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import flashcore
from flashcore.cli import app
from flashcore.cli.calls.explain import parse_lengths
from flashcore.cli.explain import explain
from flashcore.cli.output import to_json

ROOT = Path(__file__).resolve().parents[2]
HALF, INT32 = torch.float16, torch.int32
runner = CliRunner()


def examples() -> list[str]:
    """Return the command lines of the help and of the page."""
    texts = [str(explain.__doc__), (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")]
    found = [re.findall(r"^ +flashcore (explain .*?)(?: *#.*)?$", text, re.M) for text in texts]
    assert all(len(lines) > 5 for lines in found)
    return list(dict.fromkeys(line for lines in found for line in lines))


@pytest.mark.parametrize("line", examples())
def test_examples_run(line: str) -> None:
    result = runner.invoke(app, shlex.split(line))
    assert result.exit_code == 0, result.output
    for word in ("problem ", "backend ", "tiles ", "gradient "):
        assert word in result.stdout


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=HALF)


def int32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=INT32)


def eight(*shape: int) -> torch.Tensor:
    return half(*shape).to(torch.float8_e4m3fn)


def turned(*shape: int) -> torch.Tensor:
    return half(*shape).transpose(1, 2)


ONE = {"k_scale": torch.ones(()), "v_scale": torch.ones(())}
BOUNDS = {"max_seqlen_q": 512, "max_seqlen_k": 512}
SAME: dict[str, tuple[Any, dict[str, Any]]] = {
    "-b 3 -s 20 --seqlen-k 70 --seqlens-k --causal": (
        flashcore.explain,
        {
            "q": half(3, 8, 20, 64), "k": half(3, 8, 70, 64), "v": half(3, 8, 70, 64),
            "seqlens_k": int32(3), "causal": True,
        },
    ),
    "-b 3 -s 1 --seqlen-k 70 --cache-dtype float8_e4m3fn --heads-kv 2": (
        flashcore.explain,
        {
            "q": half(3, 8, 1, 64), "k": eight(3, 2, 70, 64), "v": eight(3, 2, 70, 64),
            "seqlens_k": int32(3), **ONE,
        },
    ),
    "--packed 2x512,17 --heads-kv 2 --head-dim-v 32 --sinks --batch-invariant": (
        flashcore.explain_varlen,
        {
            "q": half(1041, 8, 64), "k": half(1041, 2, 64), "v": half(1041, 2, 32), **BOUNDS,
            "cu_seqlens_q": int32(4), "cu_seqlens_k": int32(4), "sinks": torch.zeros(8),
            "batch_invariant": True,
        },
    ),
    "--packed 512,1 --seqlen-k 300": (
        flashcore.explain_varlen,
        {
            "q": half(513, 8, 64), "k": half(600, 8, 64), "v": half(600, 8, 64),
            "cu_seqlens_q": int32(3), "cu_seqlens_k": int32(3), "max_seqlen_q": 512,
            "max_seqlen_k": 300,
        },
    ),
    "-b 2 -s 3 --seqlen-k 100 --page-size 16 --append --causal --mask bool --layout bshd": (
        flashcore.explain_with_kvcache,
        {
            "q": turned(2, 3, 8, 64), "k_cache": turned(14, 16, 8, 64),
            "v_cache": turned(14, 16, 8, 64), "k_new": turned(2, 3, 8, 64),
            "v_new": turned(2, 3, 8, 64), "page_table": int32(2, 7), "seqlens_k": int32(2),
            "mask": torch.ones(1, 1, 3, 112, dtype=torch.bool),
        },
    ),
    "--packed 40,3x1 --seqlen-k 128 --page-size 16 --cache-dtype float8_e4m3fn": (
        flashcore.explain_with_kvcache,
        {
            "q": half(43, 8, 64), "k_cache": eight(32, 8, 16, 64),
            "v_cache": eight(32, 8, 16, 64), "page_table": int32(4, 8), "seqlens_k": int32(4),
            "cu_seqlens_q": int32(5), "max_seqlen_q": 40, "causal": False, **ONE,
        },
    ),
    "-b 2 -s 1 --seqlen-k 100 --append --window 9,0": (
        flashcore.explain_with_kvcache,
        {
            "q": half(2, 8, 1, 64), "k_cache": half(2, 8, 100, 64),
            "v_cache": half(2, 8, 100, 64), "k_new": half(2, 8, 1, 64),
            "v_new": half(2, 8, 1, 64), "seqlens_k": int32(2), "causal": False, "window": (9, 0),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", SAME)
def test_the_shell_says_what_python_says(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    function, given = SAME[line]
    want = function(**given, arch=90, file=io.StringIO())
    arguments = ["explain", *shlex.split(line), "--arch", "sm_90"]
    result = runner.invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(json.dumps(to_json(want)))
    assert runner.invoke(app, arguments).stdout == f"{want}\n"


def test_json_has_what_the_text_has() -> None:
    line = "explain -b 2 -s 1 --seqlen-k 64 --page-size 16 --append --arch sm_90 --json"
    document = json.loads(runner.invoke(app, shlex.split(line)).stdout)
    assert document["append"]["dtype"] == "float16"
    assert document["gradient"]["code"] == "none"
    assert document["problem"]["page_size"] == 16
    assert document["plan"]["varlen"] == "pages"
    assert document["warnings"] == []


def test_lengths_are_lists_of_numbers_and_multiples() -> None:
    assert parse_lengths("512, 2x17,0") == [512, 17, 17, 0]
    assert parse_lengths(None) is None
    for text in ("", "x4", "4x", "-1", "1.5"):
        with pytest.raises(typer.BadParameter, match="is no length"):
            parse_lengths(text)
