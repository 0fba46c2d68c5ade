"""Test scripts/bootstrap.py: when it borrows a prepared Python's torch, and that what it makes
works."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bootstrap.py"

VERSION_FILE = """from typing import Optional

__all__ = ['__version__', 'debug', 'cuda', 'git_version', 'hip']
__version__ = '{version}'
debug = False
cuda: Optional[str] = {cuda}
git_version = '0123'
hip: Optional[str] = None
"""


@pytest.fixture(scope="module")
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("version", "cuda", "borrowed"),
    [
        ("2.11.0+cu130", "'13.0'", "2.11.0+cu130"),
        ("2.13.0a0+git1234", "'12.8'", "2.13.0a0+git1234"),
        ("2.13.0+cpu", "None", None),
        ("2.7.1+cu126", "'12.6'", None),  # older than pyproject.toml asks for
    ],
)
def test_borrows_only_a_cuda_torch_that_is_new_enough(
    bootstrap: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    version: str,
    cuda: str,
    borrowed: str | None,
) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "version.py").write_text(VERSION_FILE.format(version=version, cuda=cuda))
    spec = importlib.util.spec_from_file_location("torch", package / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "torch" else None)
    assert bootstrap.borrowable_torch() == borrowed


@pytest.mark.thorough
def test_borrowed_environment_runs_flashcore_without_a_network(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """This happens on a prepared GPU machine, with this test's own Python as the lender."""
    monkeypatch.setattr(bootstrap, "OPTIONAL", {"a_module_nobody_has": "a-module-nobody-has"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    folder = tmp_path / "venv"
    bootstrap.borrow(folder)
    for command in ("flashcore", "python"):
        assert (folder / "bin" / command).exists()
    done = subprocess.run(
        [folder / "bin" / "flashcore", "--version"], capture_output=True, text=True, check=False
    )
    assert done.stdout == f"flashcore {bootstrap.project_version()}\n", done.stderr
    code = "import sys, torch, pytest, flashcore; print(sys.prefix); print(torch.__file__)"
    done = subprocess.run(
        [folder / "bin" / "python", "-c", code], capture_output=True, text=True, check=True
    )
    prefix, torch_file = done.stdout.split()
    assert prefix == str(folder)
    assert not torch_file.startswith(str(folder))
    assert Path(sys.prefix) != folder


def test_a_missing_necessity_stops_with_its_name(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bootstrap, "NEEDED", {"a_module_nobody_has": "a-module-nobody-has"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(SystemExit, match="a-module-nobody-has"):
        bootstrap.borrow(tmp_path / "venv")
