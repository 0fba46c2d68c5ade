"""Test a cache that several users share, and one on a full disk or one mounted noexec.

Needs root; what this is about is tested by test_store.py too, in one process.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_store import contents, start_empty

from flashcore.base import env, store
from flashcore.compile import cxx
from flashcore.errors import BackendUnavailableError

SRC = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return start_empty(tmp_path, monkeypatch)


as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="needs root and setpriv, to be several users",
)

CODE = """
import sys
sys.path.insert(0, sys.argv[1])
from flashcore.base import env
from flashcore.base import store
print(store.find("sim", "a.so"), store.keep("sim", sys.argv[2], b"another") is not None)
print(store.find("sim", sys.argv[2]))
"""


def as_user(uid: int, name: str, **variables: str) -> list[str]:
    command = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", sys.executable]
    done = subprocess.run(
        [*command, "-c", CODE, str(SRC), name],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", **variables},
        cwd="/",
    )
    if "Permission denied" in done.stderr and "flashcore" not in done.stderr:
        pytest.skip("another user cannot run this Python")
    assert done.returncode == 0, done.stderr
    return [*done.stdout.splitlines(), done.stderr]


@pytest.fixture
def open_folder(tmp_path: Path) -> Iterator[Path]:
    """Return a folder that every user can reach, which pytest's are not."""
    tempfile.tempdir = None
    folder = Path(tempfile.mkdtemp(prefix="flashcore-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@as_root
@pytest.mark.parametrize("bits", [0o755, 0o1777, 0o777], ids=["read-only", "sticky", "writable"])
def test_users_share_a_cache(open_folder: Path, bits: int) -> None:
    cache, tmp = open_folder / "cache", open_folder / "tmp"
    for folder, own in ((cache, bits), (tmp, 0o1777)):
        folder.mkdir()
        folder.chmod(own)
    variables = {env.CACHE_DIR.name: str(cache), "TMPDIR": str(tmp)}
    store.write(cache, "sim", "a.so", store.seal(b"first"))
    found, again, stderr = as_user(54321, "b.so", **variables)
    assert (found, again) == ("b'first' True", "b'another'")
    assert (cache / "sim" / "b.so").exists() == (bits != 0o755)
    assert ("RuntimeWarning" in stderr) == (bits == 0o755)
    (cache / "sim" / "a.so").chmod(0o600)  # somebody's umask
    found, again, _ = as_user(54321, "a.so", **variables)
    assert (found, again) == ("None True", "b'another'")
    assert store.unseal((cache / "sim" / "a.so").read_bytes()) == b"first"


@as_root
def test_a_user_without_account_and_home_has_a_cache(open_folder: Path) -> None:
    open_folder.chmod(0o1777)
    found, again, stderr = as_user(54321, "b.so", TMPDIR=str(open_folder))
    assert (found, again) == ("None True", "b'another'")
    assert "no home directory" in stderr
    found, again, _ = as_user(54321, "a.so", TMPDIR=str(open_folder))
    assert again == "b'another'"


@pytest.fixture
def small_disk(open_folder: Path) -> Iterator[Path]:
    """Make a file system of its own of 64 KiB, mounted noexec, or skip."""
    place = open_folder / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,noexec,mode=1777", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("needs root and the permission to mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@as_root
def test_a_full_disk_keeps_no_half_files(small_disk: Path, cache: Path) -> None:
    os.environ[env.CACHE_DIR.name] = str(small_disk)  # the fixture's, which restores it
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        kept = store.keep("sim", "a.so", b"x" * 100_000)
    assert kept is not None
    assert small_disk not in kept.parents
    assert contents(small_disk) == []


@as_root
def test_a_library_on_a_disk_mounted_noexec(small_disk: Path, cache: Path) -> None:
    os.environ[env.CACHE_DIR.name] = str(small_disk)
    try:
        compiler = cxx.find_compiler("a test")
    except BackendUnavailableError as error:
        pytest.skip(str(error))

    def build(path: Path) -> None:
        source = path.with_name("source.cpp")
        source.write_text('extern "C" int answer() { return 42; }')
        arguments = ["-shared", "-fPIC", "-nostdlib", "-s", str(source)]
        cxx.compile_file(compiler, arguments, path, "a test")

    def load(path: Path) -> ctypes.CDLL:
        return ctypes.CDLL(str(path))

    with pytest.warns(RuntimeWarning, match="mounted noexec"):
        library = cxx.load_or_build("sim", "answer.so", build, load, OSError, "a test")
    assert library.answer() == 42
