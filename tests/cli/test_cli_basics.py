"""Test what all commands share: help that teaches, one JSON document, exit status 0, 1 and 2."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from flashcore.cli import app, output
from flashcore.cli.options import parse_archs, parse_window
from flashcore.cli.output import seconds, to_json
from flashcore.errors import FlashCoreError

COMMANDS = ["demo", "doctor", "verify", "isolate", "resources", "build", "explain", "bench", "tune"]
runner = CliRunner()


def test_help_names_every_command_and_shows_examples() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    assert [name for name in COMMANDS if name not in result.stdout] == []
    assert "flashcore isolate --plant pv-atomic" in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_an_example(name: str) -> None:
    result = runner.invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert f"flashcore {name}" in result.stdout


def test_it_runs_as_a_module_and_knows_its_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flashcore", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("flashcore ")


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from flashcore.cli import app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "--window", "3"], "LEFT,RIGHT"),
        (["explain", "--mask", "checkers"], "none, bool, triangle, padding, additive"),
        (["explain", "--dtype", "int8"], "float16, bfloat16"),
        (["isolate", "--head-dim", "264"], "256"),
        (["explain", "--causal", "--causal-upper-left"], "exclude each other"),
        (["explain", "--heads", "8", "--heads-kv", "3"], "3"),
        (["explain", "--softcap", "-1"], "softcap"),
        (["explain", "--arch", "sm_70"], "sm_75"),
        (["explain", "--packed", "17,long"], "--packed long is no length"),
        (["explain", "--packed", "4x"], "512,300,17"),
        (["explain", "--packed", "4x9", "--batch", "3"], "has the lengths of all"),
        (["explain", "--packed", "9", "--mask", "bool"], "packed sequences take none"),
        (["explain", "--packed", "9", "--seqlens-k"], "--page-size"),
        (["explain", "--cache-dtype", "int8"], "float8_e4m3fn"),
        (["explain", "--layout", "hsbd"], "bhsd, bshd"),
        (["build", "--arch", "sm_104", "--output", "x.bundle"], "sm_103"),
        (["isolate", "--backend", "gpu"], "sim"),
        (["isolate", "--plant", "gremlin"], "pv-atomic"),
        (["isolate", "--backend", "sm90", "--plant", "pv-atomic"], "not a bug of"),
        (["isolate", "--backend", "sm90", "--arch", "sm_80"], "sm_90 alone"),
        (["isolate", "--seqlen", "0"], "nothing to compute"),
        (["isolate", "--dtype", "float32"], "float16"),
        (["verify", "--backend", "gpu"], "torch"),
        (["verify", "--backend", "torch", "--arch", "sm_90"], "--backend sim"),
        (["verify", "--cases", "0"], "--cases"),
        (["resources", "--variant", "fast"], "causal"),
        (["resources", "--kernel", "attn_bwd", "--head-dim", "64"], "attn_fwd_wmma"),
        (["resources", "--kernel", "sm90", "--arch", "sm_80"], "wmma, attn_fwd_wmma"),
        (["isolate", "--tile", "64x16,turns=2"], "turns=2 is no field"),
        (["isolate", "--plant", "no-clamp", "--causal"], "leave out --causal"),
        (["verify", "--backend", "sim", "--plant", "swizzle"], "not a bug of attn_fwd_wmma"),
        (["verify", "--backend", "torch", "--plant", "swizzle"], "backend='sim'"),
        (["verify", "--backward", "--backend", "sim", "--arch", "sm_80"], "no backward kernels"),
        (["verify", "--backward", "--backend", "sim", "--plant", "swizzle"], "stale-stats"),
        (["verify", "--backward", "--backend", "torch", "--plant", "stale-stats"], "backend='sim'"),
        (["build"], "--arch"),
        (["bench", "--device", "tpu"], "cpu"),
        (["bench", "--device", "cpu", "--groups", "gqa"], "without a GPU"),
        (["bench", "--shape", "B1 H8 S64"], "B, H, S and D are needed"),
        (["bench", "--match", "D512"], "no shape's name"),
        (["tune", "--groups", "huge"], "small"),
        (["tune", "--groups", "gqa", "--seqlen", "64"], "exclude each other"),
        (["tune", "--seqlen", "64", "--dtype", "float32"], "no kernel"),
        (["tune", "--seqlen", "64", "--heads", "8", "--heads-kv", "3"], "not a multiple"),
        (["tune", "--backend", "sim"], "sm90"),
        (["bench", "--from", "missing.json"], "missing.json"),
    ],
)
def test_wrong_usage_is_exit_status_2_and_says_the_way_out(
    arguments: list[str], message: str
) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2, result.output
    # rich breaks and frames lines; the message must survive that.
    words = " ".join(result.stderr.replace("│", " ").split())
    assert message in words
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "--causal", "--seqlen", "100", "--mask", "bool", "--layout", "bshd"],
        ["verify", "--backend", "torch", "--cases", "2"],
        ["isolate", "--plant", "list"],
    ],
)
def test_json_is_one_document_and_nothing_else(arguments: list[str]) -> None:
    result = runner.invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    json.loads(result.stdout)


def test_json_values_are_plain() -> None:
    assert to_json({"a": math.inf, "b": math.nan, "c": (1, {2})}) == {
        "a": "inf",
        "b": None,
        "c": [1, [2]],
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [(9.41e-6, "9.41 us"), (1.334e-3, "1.33 ms"), (2.1, "2.10 s"), (0.25, "250 ms")],
)
def test_durations_have_three_digits(value: float, text: str) -> None:
    assert seconds(value) == text


def test_option_values() -> None:
    assert parse_window("128,0") == (128, 0)
    assert parse_window(None) is None
    assert parse_archs("sm_80, 90") == [80, 90]
    with pytest.raises(typer.BadParameter, match="sm_80"):
        parse_archs("hopper")


@pytest.mark.parametrize("width", [40, 60, 80, 110, 200])
def test_tables_cut_nothing(width):
    """Numbers stay in one piece, text wraps or is folded, and no line is wider than the console."""
    import io

    from rich.console import Console

    from flashcore.cli.output import table

    numbers = ["159.3 / 431", "286.4 / 240", "192x128", "1024", "1.14x"]
    rows = [["B32 H32 S512 D64", "sm_90", *numbers, "[green]right[/]", "a sentence of many words"]]
    rows += [["seed", "bfloat16", *numbers, "WRONG", "x" * 50]]
    columns = ["case", "kind", "us / TFLOP/s", "flashcore", "tiles", "seqlen", "of", "is", "note"]
    stream = io.StringIO()
    Console(file=stream, width=width).print(table("title", columns, rows))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for piece in [*numbers, "sm_90", "bfloat16", "right", "sentence", "seed"]:
        assert piece in text, piece
    assert text.count("x") >= 50
    assert "…" not in text


@pytest.mark.parametrize("flag", [None, "-q", "-v"])
def test_commands_are_quiet_or_verbose_on_request(flag, capsys):
    """-q silences progress and notes; -v adds the traceback to an error's one line."""

    def failing(as_json: output.JsonFlag = False) -> None:
        """Fail."""
        with output.command(as_json) as out, out.progress("working"):
            out.note("a note")
            raise FlashCoreError("the reason")

    app = typer.Typer()
    app.command()(output.with_verbosity(failing))
    with pytest.raises(SystemExit) as left:
        app([] if flag is None else [flag])
    assert left.value.code == 1
    text = capsys.readouterr().err
    assert "the reason" in text
    assert ("a note" in text) == ("working" in text) == (flag != "-q")
    assert ("Traceback" in text) == (flag == "-v")
