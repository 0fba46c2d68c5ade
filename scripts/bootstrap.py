"""Make the virtual environment that the Makefile's commands run in.

`make test` and `make demo` call this once, on a fresh clone. It uses the standard library alone and
never installs anything outside the environment's folder. There are two cases:

- The Python that runs this script already has a CUDA build of torch (a prepared GPU machine, often
  without a network). The new environment then *borrows* that Python's packages, and only what is
  missing is installed.
- Otherwise everything is installed from the package index, in the versions of requirements/. torch
  is the build for NVIDIA GPUs where one answers, and the CPU build where none does.

`TORCH="torch==2.12.0"` in the environment chooses another torch; pip's own PIP_* variables work.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
UV = "uv==0.13.9"
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 8)

# import name -> what to install; the first group is needed to run, the second only to check style
# and to build pages.
NEEDED = {
    "typer": "typer",
    "rich": "rich",
    "filelock": "filelock",
    "numpy": "numpy",
    "pytest": "pytest",
    "xdist": "pytest-xdist",
    "pytest_timeout": "pytest-timeout",
    "hypothesis": "hypothesis",
    "setuptools": "setuptools",
    "cuda.core": "cuda-core",
    "cuda.bindings": "cuda-bindings",
}
OPTIONAL = {
    "ruff": "ruff",
    "mypy": "mypy",
    "matplotlib": "matplotlib",
    "sphinx": "sphinx",
    "myst_parser": "myst-parser",
    "furo": "furo",
    "sphinx_copybutton": "sphinx-copybutton",
}


def say(text: str) -> None:
    """Print one line of progress, flushed so that it keeps its place among pip's output."""
    print(f"bootstrap: {text}", flush=True)


def run(command: list[str | Path], *, quiet: bool = False) -> bool:
    """Run a command without standard input; return whether it succeeded."""
    sink = subprocess.DEVNULL if quiet else None
    done = subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=sink,
        stderr=sink,
        check=False,
    )
    return done.returncode == 0


def has_gpu() -> bool:
    """Tell whether an NVIDIA driver with at least one GPU answers on this machine."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and run([tool, "--list-gpus"], quiet=True)


def borrowable_torch() -> str | None:
    """Return the version of a CUDA torch in the running Python, or None.

    Reads torch/version.py instead of importing torch, which would take seconds.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda[^=]*= '([^']+)'", text, re.MULTILINE)
    if version is None or cuda is None:
        return None
    major, minor = version.group(1).split(".")[:2]
    return version.group(1) if (int(major), int(minor)) >= OLDEST_TORCH else None


def site_folder(python: Path) -> Path:
    """Return the site-packages folder of the environment that `python` belongs to."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([str(python), "-c", code], text=True).strip())


def project_version() -> str:
    """Return flashcore's version, without importing it."""
    text = (ROOT / "src" / "flashcore" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    assert found
    return found.group(1)


def missing(python: Path, wanted: dict[str, str]) -> list[str]:
    """Return what to install for those of `wanted` that `python` cannot import."""
    code = (
        "import importlib.util, sys\n"
        "def found(name):\n"
        "    try: return importlib.util.find_spec(name) is not None\n"
        "    except ModuleNotFoundError: return False\n"
        "print('\\n'.join(n for n in sys.argv[1:] if not found(n)))"
    )
    out = subprocess.check_output([str(python), "-c", code, *wanted], text=True)
    return [wanted[name] for name in out.split()]


def borrow(folder: Path) -> None:
    """Make an environment that sees the running Python's packages and this repository's src/."""
    fresh = not (folder / "borrowed").is_file()
    venv.create(folder, with_pip=False, symlinks=True, clear=fresh)
    python = folder / "bin" / "python"
    site = site_folder(python)
    lenders = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    (site / "_borrowed.pth").write_text("\n".join(lenders) + "\n", encoding="utf-8")
    (site / "_flashcore.pth").write_text(f"{ROOT / 'src'}\n", encoding="utf-8")
    metadata = site / f"flashcore_attention-{project_version()}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: flashcore-attention\nVersion: {project_version()}\n",
        encoding="utf-8",
    )
    script = folder / "bin" / "flashcore"
    script.write_text(
        f"#!{python}\nimport sys\n\nfrom flashcore.cli import main\n\nsys.exit(main())\n",
        encoding="utf-8",
    )
    script.chmod(0o755)
    pip: list[str | Path] = [python, "-m", "pip", "install", "-q", "--retries", "0"]
    pip += ["-c", ROOT / "requirements" / "lock.txt"]
    needed = missing(python, NEEDED)
    if needed and not run([*pip, *needed]):
        sys.exit(f"bootstrap: this Python lacks {', '.join(needed)}, and pip cannot install them")
    optional = missing(python, OPTIONAL)
    if optional and not run([*pip, "--timeout", "5", *optional], quiet=True):
        say(f"going on without {', '.join(optional)} (no package index answers)")
    (folder / "borrowed").write_text("\n".join(lenders) + "\n", encoding="utf-8")


def install_torch(pip: list[str | Path], python: Path) -> bool:
    """Install torch: the GPU build where a GPU answers, else the CPU build if one can be had."""
    asked = os.environ.get("TORCH", "")
    if asked or has_gpu():
        return run([*pip, asked or TORCH])
    # A local index or folder may carry the CPU build under its own version label.
    if run([*pip, f"{TORCH}+cpu"], quiet=True):
        return True
    # uv knows PyTorch's index of CPU builds by itself.
    uv: list[str | Path] = [python, "-m", "uv", "pip", "install", "--python", python]
    if run([*pip, UV]) and run([*uv, "--torch-backend", "cpu", TORCH]):
        return True
    say(f"no CPU build found; installing plain {TORCH}, on Linux a download of several GB")
    return run([*pip, TORCH])


def install(folder: Path) -> None:
    """Make a self-contained environment from the package index, in pinned versions."""
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True, symlinks=True)
    pip: list[str | Path] = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    pip += ["-c", ROOT / "requirements" / "lock.txt"]
    say(f"installing {os.environ.get('TORCH', '') or TORCH}")
    if not install_torch(pip, python):
        sys.exit("bootstrap: torch could not be installed; pip's message is above")
    # With setuptools here, no isolated build environment has to be downloaded for flashcore itself.
    if not run([*pip, "setuptools", "numpy"]):
        sys.exit("bootstrap: setuptools could not be installed; pip's message is above")
    code = "import torch; print(torch.version.cuda or '')"
    cuda = subprocess.check_output([str(python), "-c", code], text=True).strip()
    extra = "cuda12" if cuda.startswith("12") else "cuda"
    if not cuda:
        pip += ["-c", ROOT / "requirements" / "lock-cpu.txt"]
    say(f"installing flashcore[{extra},bench,docs,test]")
    if not run([*pip, "--no-build-isolation", "-e", f"{ROOT}[{extra},bench,docs,test]"]):
        sys.exit("bootstrap: flashcore could not be installed; pip's message is above")


def main() -> None:
    """Choose between borrowing and installing, and leave a stamp for make."""
    if sys.version_info < OLDEST_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        sys.exit(f"bootstrap: this is Python {found}, 3.10 is the oldest: make PYTHON=python3.12")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder to make")
    folder: Path = parser.parse_args().venv.absolute()
    version = borrowable_torch()
    if version is not None and has_gpu():
        say(f"borrowing torch {version} and its neighbours from {sys.prefix}")
        borrow(folder)
    else:
        install(folder)
    (folder / "ready").touch()
    say(f"ready: {folder}")


if __name__ == "__main__":
    main()
