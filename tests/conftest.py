"""Provide what all tests share: the gpu marker, one compile cache for all workers, hypothesis
settings."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Before flashcore is imported. Kernels and simulator builds are cached by the text of their source,
# so one folder serves all workers and later runs, and a changed source can never find an old entry.
os.environ.setdefault("FLASHCORE_CACHE_DIR", str(ROOT / ".cache" / "flashcore"))
# torch may crash while it saves what it compiled for a backward pass (pytorch/pytorch#177442).
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

# Inductor would build programs that ask which vectors this machine has, and no test is about them.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")

import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from hypothesis.database import DirectoryBasedExampleDatabase  # noqa: E402

IN_CI = bool(os.environ.get("CI"))  # there the same examples every time

settings.register_profile(
    "flashcore",
    deadline=None,  # the first example may compile a kernel
    derandomize=IN_CI,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
    database=None if IN_CI else DirectoryBasedExampleDatabase(ROOT / ".cache" / "hypothesis"),
    print_blob=True,
)
settings.load_profile("flashcore")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="fail where there is no CUDA GPU")
    parser.addoption(
        "--launcher",
        choices=["python", "compiled"],
        default="python",
        help="what launches in tests that do not say it themselves (default: python)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--require-gpu") and not torch.cuda.is_available():
        raise pytest.UsageError(f"--require-gpu: {_why_no_gpu()}")
    os.environ["FLASHCORE_LAUNCHER"] = config.getoption("--launcher")
    # Workers inherit what the process that starts them sets, and that one is told with -n alone.
    count = os.environ.get("PYTEST_XDIST_WORKER_COUNT") or config.getoption("numprocesses", None)
    workers = int(count or 1)
    # Also of programs that tests start. More threads than cores wait for each other in busy loops.
    # So a number from outside counts only if it is lower.
    threads = max(1, (os.cpu_count() or 1) // workers)
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(threads, int(given)) if given.isdecimal() and int(given) else threads
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


@pytest.fixture
def nothing_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the tiles that ship away: a test goes by rules, and what the test itself provides."""
    from flashcore.selection import tile_table

    monkeypatch.setattr(tile_table, "read", lambda arch: None)


# Thousands of tests and all that they import live to the end. A garbage collector that went over
# them again and again took 5 of the 12 seconds of collecting them, and a tenth of a test's time.
@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=_why_no_gpu())
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return f"needs a CUDA GPU: torch {torch.__version__} is a build without CUDA"
    return f"needs a CUDA GPU: torch {torch.__version__} finds none (see flashcore doctor)"
