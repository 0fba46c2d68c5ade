"""scripts/measure_release.py runs each part within its time, and says what became of it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import typer

from flashcore.cli import app

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("measure_release")


class Runs:
    """Stand for subprocess.run: write the files, or do what a test says of a word in the command.

    Args:
        outcomes: by that word, an exit status, or None for one that never ends.
    """

    def __init__(self, **outcomes: int | None) -> None:
        self.outcomes, self.commands = outcomes, []

    def __call__(self, command: list[str], **options: Any) -> SimpleNamespace:
        self.commands.append(command[1:])
        for word, outcome in self.outcomes.items():
            if word in " ".join(command):
                if outcome is None:
                    raise subprocess.TimeoutExpired(command, options["timeout"])
                return SimpleNamespace(returncode=outcome, stdout=None)
        if command[-1].endswith(".json"):
            Path(command[-1]).write_text("{}")
        printed = "{}" if options.get("stdout") == subprocess.PIPE else None
        return SimpleNamespace(returncode=0, stdout=printed)


@pytest.fixture
def runs(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Runs:
    runs = Runs()
    monkeypatch.setattr(script.subprocess, "run", runs)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return runs


def test_every_part_leaves_its_file(script: ModuleType, runs: Runs, tmp_path: Path) -> None:
    """For rings of four there are too few GPUs; the others go on."""
    arguments = ["--part", "all", "--seconds", "300", "--json-dir", str(tmp_path / "results")]
    assert script.main([*arguments, "--gpu", "gpu"]) == 1
    found = {path.name for path in (tmp_path / "results").iterdir()}
    paths = [script.file_of(x, "gpu", Path()) for n, x in script.PARTS.items() if n != "rings-4"]
    assert found == {path.name for path in paths if path is not None}
    assert len(runs.commands) == len(script.PARTS) - 1  # nothing is drawn from files elsewhere


@pytest.mark.parametrize(
    ("outcomes", "says"),
    [
        ({"bench-host": 3}, "host FAILED: exit status 3"),
        ({"bench-host": None}, "host FAILED: not done within 100 seconds"),
        ({"bench-host": 0}, "host FAILED: wrote no"),
    ],
)
def test_a_part_that_fails_is_named_and_ends_no_other(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    outcomes: dict[str, int | None],
    says: str,
) -> None:
    """A file of an earlier run is none of this one."""
    (tmp_path / "h200-host.json").write_text("old")
    runs.outcomes = outcomes
    parts = ["--part", "host", "--part", "decode"]
    assert script.main([*parts, "--seconds", "100", "--json-dir", str(tmp_path)]) == 1
    assert says in capsys.readouterr().err
    assert (tmp_path / "h200-decode.json").is_file()


def test_pages_are_drawn_again_from_their_own_folder(script: ModuleType, runs: Runs) -> None:
    runs.outcomes = {"bench-host": 1}
    script.main(["--part", "host"])
    assert runs.commands[-1] == ["scripts/readme_results.py"]


@pytest.mark.parametrize("arguments", [[], ["--part", "host", "--seconds", "10"]])
def test_wrong_arguments_are_refused(
    script: ModuleType, runs: Runs, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert "--part" in capsys.readouterr().err or arguments
    assert not runs.commands


def test_the_list_names_every_file_and_page(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--list"]) == 0
    text = capsys.readouterr().out
    for name, part in script.PARTS.items():
        assert f"{name}: {part.about}" in text
        assert all(page in text for page in part.pages)
    assert str(ROOT) not in text


def test_pages_quote_the_files_that_they_are_drawn_from(script: ModuleType) -> None:
    drawn = {path: tuple(pages) for path, pages in load("readme_results").SOURCES.items()}
    quoted = {
        script.file_of(part, "h200", script.RESULTS): part.pages
        for part in script.PARTS.values()
        if part.pages
    }
    assert quoted == drawn


def test_the_tools_know_the_options_that_they_get(script: ModuleType) -> None:
    commands: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for part in script.PARTS.values():
        command = part.command(500.0, "x.json")
        options = {word for word in command[2:] if word.startswith("--")}
        if command[:2] == ["-m", "flashcore"]:
            known = {name for x in commands[command[2]].params for name in x.opts}
        elif command[0] == "-m":
            known = {"--require-gpu"}
        else:
            known = {x for x in options if f'"{x}"' in (ROOT / command[0]).read_text()}
        assert options <= known, command


def test_time_is_left_for_what_has_begun(script: ModuleType) -> None:
    for part in script.PARTS.values():
        command = part.command(600.0, "x.json")
        for option, seconds in (("--minutes", 60), ("--limit-s", 1)):
            if option in command:
                assert 0 < float(command[command.index(option) + 1]) * seconds < 600
