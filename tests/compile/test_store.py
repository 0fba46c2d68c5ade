"""Test what processes and users leave each other on disk: modes, damage, full disks, locks, no
home.

test_store_users.py has the same with several users and with disks of its own, which needs root.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flashcore import errors
from flashcore.base import env, store, temporary
from flashcore.compile import compiler, cxx, jit
from flashcore.errors import BackendUnavailableError


def start_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test an empty cache, an empty private folder, and nobody warned yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(env.CACHE_DIR.name, str(folder))
    monkeypatch.delenv(env.BUNDLE.name, raising=False)
    monkeypatch.setattr(errors, "_warned", set())
    for name in ("_damaged", "_repaired"):
        monkeypatch.setattr(store, name, set())
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(temporary.tempfile, "tempdir", str(tmp_path / "tmp"))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return start_empty(tmp_path, monkeypatch)


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
@pytest.mark.usefixtures("umask")
def test_a_file_has_the_mode_that_the_umask_gives(cache: Path, mask: int) -> None:
    os.umask(mask)
    path = store.keep("kernels/nvrtc-1.2", "a.bin", b"code")
    assert path == cache / "kernels" / "nvrtc-1.2" / "a.bin"
    assert mode(path) == 0o666 & ~mask


@pytest.mark.parametrize("bits", [0o1777, 0o2775, 0o700])
@pytest.mark.usefixtures("umask")
def test_folders_have_the_mode_of_the_cache(cache: Path, bits: int) -> None:
    """Else a folder that the first user makes is closed to the second."""
    cache.mkdir()
    cache.chmod(bits)
    store.keep("kernels/nvrtc-1.2", "a.bin", b"code")
    assert mode(cache / "kernels") == mode(cache / "kernels" / "nvrtc-1.2") == bits


def test_a_folder_that_is_in_the_way_of_a_file_is_no_folder(cache: Path) -> None:
    cache.mkdir()
    (cache / "sim").write_text("in the way")
    with pytest.warns(RuntimeWarning, match=env.CACHE_DIR.name):
        kept = store.keep("sim", "a.so", b"code")
    assert kept is not None
    assert cache not in kept.parents
    assert store.find("sim", "a.so") == b"code"


@pytest.mark.parametrize("keep_bytes", [0, 1, 20, -1])
def test_a_file_that_is_cut_off_is_missing_and_is_replaced(cache: Path, keep_bytes: int) -> None:
    path = store.keep("sim", "a.so", b"code" * 100)
    assert path is not None
    path.write_bytes(path.read_bytes()[:keep_bytes])
    assert store.find("sim", "a.so") is None
    assert path.exists()  # whoever makes it anew replaces it
    assert store.keep("sim", "a.so", b"code") == path
    assert store.find("sim", "a.so") == b"code"


def fail_to_replace(monkeypatch: pytest.MonkeyPatch, below: Path, code: int) -> None:
    """Stand for a disk that is full when a file is to get its name, or one that is not ours to
    change."""
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if below in Path(target).parents:
            raise OSError(code, os.strerror(code), str(target))
        replace(source, target)

    monkeypatch.setattr(store.os, "replace", failing)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EPERM, errno.EROFS])
def test_what_cannot_be_written_leaves_nothing_and_goes_elsewhere(
    cache: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    fail_to_replace(monkeypatch, cache, code)
    with pytest.warns(RuntimeWarning, match=env.CACHE_DIR.name) as caught:
        kept = [store.keep("sim", name, b"code") for name in ("a.so", "b.so")]
    assert None not in kept
    assert len(caught) == 1
    assert contents(cache) == []
    assert store.find("sim", "a.so") == store.find("sim", "b.so") == b"code"


def test_another_users_file_is_neither_replaced_nor_removed(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache / "sim" / "a.so"
    path.parent.mkdir(parents=True)
    path.write_bytes(store.seal(b"theirs"))
    access = os.access
    monkeypatch.setattr(
        store.os, "access", lambda p, bits: Path(p) != path and access(p, bits), raising=True
    )
    with pytest.warns(RuntimeWarning, match="another user's"):
        kept = store.keep("sim", "a.so", b"ours")
    assert kept not in (None, path)
    assert store.unseal(path.read_bytes()) == b"theirs"


def test_stale_temporary_files_go_and_others_stay(cache: Path) -> None:
    folder = cache / "sim"
    folder.mkdir(parents=True)
    for name in ("killed.tmp", "busy.tmp", "old.so"):
        (folder / name).write_bytes(b"half")
    for name in ("killed.tmp", "old.so"):
        os.utime(folder / name, (0, 0))
    store.keep("sim", "a.so", b"code")
    assert contents(folder) == ["a.so", "busy.tmp", "old.so"]


def test_a_user_without_a_home_gets_a_private_folder_and_hears_of_it_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(env.CACHE_DIR.name)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home(self: object = None) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(env.Path, "home", no_home)
    with pytest.warns(RuntimeWarning, match="no home directory.*FLASHCORE_CACHE_DIR") as caught:
        folders = [env.cache_dir(), env.cache_dir()]
    assert len(caught) == 1
    assert folders == [tmp_path / "tmp" / f"flashcore-{os.geteuid()}" / "cache"] * 2
    assert mode(folders[0].parent) == 0o700
    assert store.folders() == folders[:1]


def test_a_home_that_is_nobodys_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.CACHE_DIR.name, "~no-such-user/x")
    with pytest.warns(RuntimeWarning, match="FLASHCORE_CACHE_DIR=~no-such-user/x: no such user"):
        assert env.cache_dir().name == "cache"
    monkeypatch.setenv(env.BUNDLE.name, "~no-such-user/kernels.bundle")
    assert env.bundle() == Path("~no-such-user/kernels.bundle")


def test_a_relative_xdg_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(env.CACHE_DIR.name)
    monkeypatch.setenv("XDG_CACHE_HOME", "~/.cache")
    assert env.cache_dir() == Path.home() / ".cache" / "flashcore"


@pytest.mark.parametrize("taken_by", ["an open folder", "a link", "a file"])
def test_what_somebody_put_in_the_private_folders_place_is_not_used(
    cache: Path, tmp_path: Path, taken_by: str
) -> None:
    """Libraries are loaded from there."""
    place = tmp_path / "tmp" / f"flashcore-{os.geteuid()}"
    if taken_by == "an open folder":
        place.mkdir()
        place.chmod(0o777)
    elif taken_by == "a link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "theirs")
    else:
        place.write_text("")
    found = temporary.private_dir()
    assert found is not None
    assert found != place
    assert mode(found) == 0o700
    assert temporary.private_dir() == found


def test_without_any_temporary_folder_nothing_is_kept_and_nothing_fails(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(temporary.tempfile, "gettempdir", none)
    monkeypatch.setenv(env.CACHE_DIR.name, os.devnull + "/cache")
    with pytest.warns(RuntimeWarning, match="cannot be kept"):
        assert store.keep("sim", "a.so", b"code") is None
    assert store.find("sim", "a.so") is None
    with store.lock("a"):
        pass


KERNEL = compiler.CompiledKernel("copy", "sm_80", "cubin", b"code", 8, 0, 0, 128)


@pytest.fixture
def fake_nvrtc(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count what is compiled, without NVRTC."""
    compiled: list[str] = []

    def compile_uncached(source: str, *_: object) -> compiler.CompiledKernel:
        compiled.append(source)
        return KERNEL

    monkeypatch.setattr(jit, "compile_uncached", compile_uncached)
    monkeypatch.setattr(jit, "nvrtc_version", lambda: (13, 0))
    return compiled


compile_source = jit.compile_source.__wrapped__


def test_of_eight_that_miss_at_once_one_compiles(
    fake_nvrtc: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads stand for processes: their locks exclude each other likewise. The one that compiles
    takes until all have come for the lock."""
    lock, compile_uncached = store.lock, jit.compile_uncached
    came = threading.Semaphore(0)

    def watched_lock(name: str) -> contextlib.AbstractContextManager[bool]:
        came.release()
        return lock(name)

    def slow_compile(*arguments: Any) -> compiler.CompiledKernel:
        for _ in range(8):
            came.acquire()
        return compile_uncached(*arguments)

    monkeypatch.setattr(store, "lock", watched_lock)
    monkeypatch.setattr(jit, "compile_uncached", slow_compile)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: compile_source("source", 80, "copy"), range(8)))
    assert results == [KERNEL] * 8
    assert fake_nvrtc == ["source"]


def test_what_another_process_compiled_meanwhile_is_taken(
    fake_nvrtc: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def lock(name: str) -> Iterator[bool]:
        store.keep("kernels/nvrtc-13.0", f"{name}.bin", jit.pack(KERNEL))
        yield True

    monkeypatch.setattr(store, "lock", lock)
    assert compile_source("source", 80, "copy") == KERNEL
    assert fake_nvrtc == []


def test_one_has_a_lock_at_a_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0)

    def can_have(name: str) -> bool:
        with store.lock(name) as is_held:
            return is_held

    with ThreadPoolExecutor(1) as other, store.lock("a") as is_held:
        assert is_held
        assert other.submit(can_have, "a").result() is False
        assert other.submit(can_have, "b").result() is True
    assert can_have("a")


def test_a_lock_that_is_never_given_back_delays_and_does_not_stop(
    fake_nvrtc: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0)
    with store.lock(jit.cache_key("source", 80)):
        assert compile_source("source", 80, "copy") == KERNEL
    assert fake_nvrtc == ["source"]


def test_a_warm_cache_serves_without_nvrtc(
    fake_nvrtc: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_source("source", 80, "copy")

    def missing(*_: object) -> None:
        raise BackendUnavailableError("NVRTC was not found")

    monkeypatch.setattr(jit, "nvrtc_version", missing)
    monkeypatch.setattr(jit, "compile_uncached", missing)
    assert compile_source("source", 80, "copy") == KERNEL
    with pytest.raises(BackendUnavailableError, match="NVRTC"):
        compile_source("another source", 80, "copy")


def load_text(path: Path) -> str:
    """Stand for dlopen; refuses what lies in a folder called noexec."""
    if any("noexec" in part for part in path.parts):
        raise OSError("failed to map segment from shared object")
    return path.read_text(errors="replace").partition("\n")[0]


def load_or_build(builds: list[Path]) -> str:
    def build(path: Path) -> None:
        builds.append(path)
        path.write_text("library")

    return cxx.load_or_build("sim", "kernel-1.so", build, load_text, OSError, "the simulator")


def test_what_cannot_be_executed_in_the_cache_is_loaded_from_the_private_folder(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path / "noexec"))
    builds: list[Path] = []
    with pytest.warns(RuntimeWarning, match="mounted noexec"):
        assert [load_or_build(builds) for _ in range(3)] == ["library"] * 3
    assert len(builds) == 1


def test_where_nothing_can_be_executed_the_error_says_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "noexec"
    folder.mkdir()
    monkeypatch.setattr(temporary.tempfile, "tempdir", str(folder))
    monkeypatch.setenv(env.CACHE_DIR.name, str(folder / "cache"))
    with pytest.raises(BackendUnavailableError, match=r"noexec, set FLASHCORE_CACHE_DIR or TMPDIR"):
        load_or_build([])


def test_a_build_leaves_no_folder_behind_without_a_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(env.CACHE_DIR.name, os.devnull + "/cache")
    builds: list[Path] = []
    with pytest.warns(RuntimeWarning, match=env.CACHE_DIR.name):
        assert [load_or_build(builds) for _ in range(3)] == ["library"] * 3
    assert len(builds) == 1
    assert [path.name for path in (tmp_path / "tmp").iterdir()] == [f"flashcore-{os.geteuid()}"]
    assert contents(tmp_path / "tmp") == ["kernel-1.so", "kernel-1.so.lock"]


def test_an_error_while_building_is_said_in_words(cache: Path) -> None:
    def build(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(BackendUnavailableError, match="No space left on device; set TMPDIR"):
        cxx.load_or_build("sim", "kernel-1.so", build, load_text, OSError, "the simulator")
