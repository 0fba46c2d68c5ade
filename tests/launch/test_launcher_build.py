"""Test whether the compiled launcher is asked for, and what happens where it cannot be built."""

from __future__ import annotations

import shutil
import sysconfig

import pytest
import standin
from test_launcher import tensors

import flashcore
from flashcore.base import env
from flashcore.launch import launcher
from flashcore.launch.launcher import background, build
from flashcore.ops import calls


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    """Act as if nobody had asked for the launcher in this process, nor ever on this machine."""
    standin.install(monkeypatch)
    monkeypatch.setattr(launcher, "attend", None)
    monkeypatch.setattr(launcher, "_start", launcher._start.__wrapped__)
    monkeypatch.setattr(build, "load", build.load.__wrapped__)
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    return monkeypatch


def test_python_launches_where_it_is_asked_for(unbuilt):
    unbuilt.setattr(launcher, "_use", lambda module: pytest.fail("nobody asked for it"))
    unbuilt.setattr(background, "start", lambda use: pytest.fail("nobody asked for it"))
    unbuilt.setenv(env.LAUNCHER.name, "python")
    flashcore.attention(*tensors())
    unbuilt.setattr(calls, "_calls", {})
    unbuilt.setenv(env.LAUNCHER.name, "rust")
    with pytest.raises(ValueError, match="'rust' is neither auto nor python nor compiled"):
        flashcore.attention(*tensors())


@pytest.mark.parametrize("what", ["no compiler", "no headers", "not C++", "no module"])
def test_without_it_python_launches_and_a_warning_says_why(unbuilt, tmp_path, what):
    unbuilt.setenv(env.LAUNCHER.name, "compiled")
    match = "does not compile the launcher"
    if what == "no compiler":
        unbuilt.setenv(env.CXX.name, "no-such-compiler")
        match = "no such program"
    elif what == "no headers":
        unbuilt.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        match = r"Python\.h is missing: apt install"
    else:
        source = tmp_path / "launcher.cpp"
        source.write_text("void no_module() {}" if what == "no module" else "module flashcore")
        unbuilt.setattr(build, "SOURCE", source)
        match = "cannot be built or loaded" if what == "no module" else match
    with pytest.warns(RuntimeWarning, match=match) as caught:
        out = flashcore.attention(*tensors())
    assert [x.filename for x in caught] == [__file__]  # who called flashcore
    assert out.shape == (2, 4, 40, 64)
    assert launcher.attend is None


@pytest.mark.thorough  # half a minute, where the launcher is not built yet
def test_a_damaged_file_counts_as_missing(monkeypatch, tmp_path):
    try:
        built = build.load().__spec__.origin
    except flashcore.FlashCoreError as error:
        pytest.skip(f"no launcher: {error}")
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    path, builds = tmp_path / build.KIND / build.library_name(), []
    path.parent.mkdir()
    path.write_bytes(b"no library")

    def compile_file(compiler, arguments, target, what):
        builds.append(target)
        shutil.copy(built, target)

    monkeypatch.setattr(build, "compile_file", compile_file)
    for _ in range(2):
        assert build.load.__wrapped__().__spec__.origin == str(path)
    assert [target.name for target in builds] == [path.name]
