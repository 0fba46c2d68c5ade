"""`pip install .` gives a small pure-Python wheel with everything in it that runs later."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import flashcore
from flashcore.base import machine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77", reason="builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, for setuptools leaves build/ and *.egg-info beside what it builds.
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignore)
    for item in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / item, source / item)
    code = "import setuptools.build_meta as backend, sys; print(backend.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


def test_wheel_is_pure_python_and_small(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 1_500_000


def test_wheel_holds_every_source_file(wheel: Path) -> None:
    """Each file under src/flashcore that git keeps; a new file type needs a package-data line."""
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "flashcore").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected - inside == set()
    assert any(entry.endswith("kernels/fwd_wmma/attn_fwd_wmma.cuh") for entry in inside)


def test_wheel_says_what_it_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    folder = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    about = Parser().parsestr(archive.read(folder).decode())
    assert about["Requires-Python"] == ">=3.10"
    assert about["License-Expression"] == "Apache-2.0"
    needs = about.get_all("Requires-Dist") or []
    always = {re.split(r"[^\w-]", need)[0] for need in needs if "extra ==" not in need}
    assert always == {"torch", "typer", "rich", "filelock"}
    assert set(about.get_all("Provides-Extra") or []) >= {"cuda", "cuda12", "bench", "test"}
    points = archive.read(folder.replace("METADATA", "entry_points.txt")).decode()
    assert "flashcore = flashcore.cli:main" in points


def test_wheel_has_the_version_of_the_sources_and_a_name_of_its_own(wheel: Path) -> None:
    """`flashcore` is another project's name on the package index."""
    assert wheel.name.startswith(f"flashcore_attention-{flashcore.__version__}-")


@pytest.mark.thorough
def test_a_source_tree_on_the_path_is_a_module_like_any_other(tmp_path: Path) -> None:
    """Nothing is installed there: the version does not come from a distribution's metadata."""
    code = (
        "import importlib.metadata as metadata, pydoc\n"
        "def missing(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = metadata.distribution = missing\n"
        "import flashcore\n"
        "from flashcore import *\n"
        "print(getattr(flashcore, '__version__', None), __version__, attention.__name__)\n"
        "print(hasattr(flashcore, 'no_such_name'), getattr(flashcore, '__wrapped__', None))\n"
        "print('attention' in pydoc.render_doc(flashcore))\n"
        "from flashcore.base.machine import versions\n"
        "print(versions()['flashcore'])\n"
    )
    shutil.copytree(
        ROOT / "src" / "flashcore",
        tmp_path / "flashcore",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    version = flashcore.__version__
    expected = [f"{version} {version} attention", "False None", "True", version]
    assert done.stdout.splitlines() == expected, done.stderr


def test_messages_name_packages_and_no_extra_of_a_distribution() -> None:
    """`pip install "flashcore[cuda]"` would install another project."""
    found = [
        path.name
        for path in (ROOT / "src" / "flashcore").rglob("*.py")
        if re.search(r"pip install\W+flashcore", path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("cuda", "packages"),
    [
        (None, ["cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc"]),
        ("13.0", ["cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc"]),
        ("12.8", ["cuda-core", '"cuda-bindings<13"', "nvidia-cuda-nvrtc-cu12"]),
    ],
)
def test_what_to_install_follows_torchs_cuda(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, packages: list[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert machine.install_command().split() == ["pip", "install", *packages]


def test_lock_pins_what_pyproject_asks_for() -> None:
    """Every requirement but torch has an exact version in requirements/, within its bounds."""
    requirements = pytest.importorskip("packaging.requirements")
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["cuda"], *extras["bench"], *extras["docs"]]
    asked += extras["test"]
    pins: dict[str, list[str]] = {}
    for file in (ROOT / "requirements").glob("*.txt"):
        for line in file.read_text(encoding="utf-8").splitlines():
            if "==" in line:
                name, _, rest = line.partition("==")
                pins.setdefault(name, []).append(rest.split(";")[0].strip())
    for text in asked:
        need = requirements.Requirement(text)
        if need.name != "torch":
            assert pins.get(need.name), f"{need.name} is not pinned"
            assert all(need.specifier.contains(pin) for pin in pins[need.name]), text
