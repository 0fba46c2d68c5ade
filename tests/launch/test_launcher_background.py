"""Test that the compiled launcher is built in the background, and who launches meanwhile."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import standin
from test_launcher import tensors

import flashcore
from flashcore.base import env, store
from flashcore.errors import BackendUnavailableError
from flashcore.launch import launcher
from flashcore.launch.launcher import background, build, trial

BUILDER = "flashcore.launch.launcher.build"


class Builder:
    """Stand for the process that builds: it ends when it is told to, and leaves a module."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module: object = None
        self.has_begun, self.may_end = threading.Event(), threading.Event()
        self.commands: list[list[str]] = []
        monkeypatch.setattr(build, "load_built", lambda: self.module)
        monkeypatch.setattr(
            background, "subprocess", SimpleNamespace(DEVNULL=subprocess.DEVNULL, Popen=self.popen)
        )

    def popen(self, command: list[str], **options: Any) -> Builder:
        assert options["start_new_session"]
        assert options["env"]["CUDA_VISIBLE_DEVICES"] == ""
        self.commands.append(command)
        self.has_begun.set()
        return self

    def wait(self) -> None:
        assert self.may_end.wait(60)


class Module:
    """Stand for the launcher's module, which leaves all calls to Python but remembers them."""

    def __init__(self) -> None:
        self.asked = 0

    def configure(self, *given: object) -> None:
        pass

    def attend(self, *asked: object) -> None:
        self.asked += 1


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Builder:
    """Act as if this process had launched nothing yet, on a machine with an empty cache."""
    standin.install(monkeypatch)
    monkeypatch.setattr(launcher, "attend", None)
    monkeypatch.setattr(launcher, "_start", launcher._start.__wrapped__)
    monkeypatch.setattr(background, "_thread", None)
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    monkeypatch.delenv(env.LAUNCHER.name)
    monkeypatch.setattr(build, "check_headers", lambda: None)
    return Builder(monkeypatch)


def test_python_launches_until_it_is_built(builder: Builder) -> None:
    flashcore.attention(*tensors())
    assert launcher.attend is None
    assert builder.has_begun.wait(60)
    assert [command[1:] for command in builder.commands] == [["-m", BUILDER]]
    builder.module = module = Module()
    builder.may_end.set()
    background.wait()
    flashcore.attention(*tensors())
    assert module.asked == 1
    assert len(builder.commands) == 1


def test_what_is_built_serves_from_the_first_launch_on(builder: Builder) -> None:
    builder.module = module = Module()
    flashcore.attention(*tensors())
    flashcore.attention(*tensors())
    assert module.asked == 1
    assert not builder.commands


def test_one_process_has_it_built_while_others_wait(builder: Builder) -> None:
    with store.lock(f"{build.library_name()}-in-the-background"):
        flashcore.attention(*tensors())
        assert launcher.attend is None
        builder.module = module = Module()
    background.wait()
    flashcore.attention(*tensors())
    assert module.asked == 1
    assert not builder.commands


def test_a_bench_waits_until_it_is_settled(builder: Builder) -> None:
    threading.Thread(target=builder.may_end.set).start()
    assert launcher.settled() == "python"  # the process left nothing
    assert len(builder.commands) == 1


@pytest.mark.parametrize(
    "what", ["no compiler", "no headers", "failed before", "embedded", "nothing built"]
)
def test_python_launches_where_it_cannot_be_built_and_nothing_is_said(
    builder: Builder, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, what: str
) -> None:
    def no_headers() -> None:
        raise BackendUnavailableError("Python's header is missing")

    reason = ""
    if what == "no compiler":
        monkeypatch.setattr(build, "load_built", build.library_name)
        monkeypatch.setenv(env.CXX.name, "no-such-compiler")
        reason = "no such program"
    elif what == "no headers":
        monkeypatch.setattr(build, "check_headers", no_headers)
        reason = "header is missing"
    elif what == "failed before":
        store.keep(build.KIND, build.failure_name(), b"it rejects the source")
        reason = "it rejects the source"
    elif what == "embedded":
        monkeypatch.setattr(build.sys, "executable", "/usr/sbin/uwsgi")
        reason = "embedded"
    builder.may_end.set()
    out = flashcore.attention(*tensors())
    background.wait()
    assert out.shape == (2, 4, 40, 64)
    assert launcher.attend is None
    assert bool(builder.commands) == (what == "nothing built")
    assert reason in background.obstacle()
    assert bool(background.obstacle()) == bool(reason)
    assert not [x for x in recwarn if "flashcore" in str(x.filename)]


def test_a_build_that_failed_is_remembered(
    builder: Builder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "launcher.cpp"
    source.write_text("module flashcore")
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setattr(build, "load", build.load.__wrapped__)
    monkeypatch.setattr(build, "_step_back", lambda: None)
    assert build.main() == 1
    assert "does not compile the launcher" in background.obstacle()
    source.write_text("module flashcore;")  # another source may be one that it compiles
    assert background.obstacle() == ""


def test_a_trial_finds_what_does_not_work() -> None:
    assert "something else than out and lse" in trial.trouble_of(Module())
    assert trial.main(__file__).startswith("ImportError")


@pytest.mark.thorough  # half a minute
def test_it_is_built_in_the_background(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All of it, with a compiler."""
    standin.install(monkeypatch)
    monkeypatch.setattr(launcher, "attend", None)
    monkeypatch.setattr(background, "_thread", None)
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    monkeypatch.delenv(env.LAUNCHER.name)
    if background.obstacle():
        pytest.skip(f"no launcher: {background.obstacle()}")
    launcher._start.__wrapped__()
    flashcore.attention(*tensors())
    background.wait()
    assert launcher.attend is not None
    module = build.load_built()
    assert module.__spec__.origin.startswith(str(tmp_path))
    assert trial.trouble_of(module) == ""
