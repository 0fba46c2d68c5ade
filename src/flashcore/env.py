"""Every environment variable that flashcore reads, documented once.

Each is read when it is needed, not at import, so a test or a notebook may change it at any time.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable.

    Args:
        name: the variable's name.
        default: what holds when it is unset or empty, in words.
        meaning: one sentence.
    """

    name: str
    default: str
    meaning: str


CACHE_DIR = Variable(
    "FLASHCORE_CACHE_DIR",
    "the user's cache directory, e.g. ~/.cache/flashcore",
    "Folder of the on-disk cache of compiled kernels and simulator builds.",
)
BUNDLE = Variable(
    "FLASHCORE_BUNDLE",
    "no bundle",
    "Bundle of kernels compiled ahead by `flashcore build`, read before the cache.",
)
CXX = Variable(
    "FLASHCORE_CXX",
    "the first of g++, clang++, c++ on PATH",
    "C++20 compiler that builds kernels for the simulator, and the launcher.",
)
SIM_SEED = Variable(
    "FLASHCORE_SIM_SEED",
    "0",
    'Scheduler seed of the simulator with backend="sim"; the same seed replays the same run.',
)
SIM_ARCH = Variable(
    "FLASHCORE_SIM_ARCH",
    "80",
    'GPU architecture whose kernel backend="sim" runs: 75 has plain loads, 80 and up cp.async, '
    "90 the Hopper kernel.",
)
TUNED = Variable(
    "FLASHCORE_TUNED",
    "1",
    "0 switches off the tile configurations that `flashcore tune` found on this machine, `rules` "
    "those that ship with flashcore as well; for shapes not seen yet.",
)
LAUNCHER = Variable(
    "FLASHCORE_LAUNCHER",
    "python",
    "compiled: a launcher in C++, built once by a compiler on this machine, saves an eager call "
    "some microseconds of the host's time. Read when the first kernel is launched.",
)

VARIABLES: tuple[Variable, ...] = (CACHE_DIR, BUNDLE, CXX, SIM_SEED, SIM_ARCH, TUNED, LAUNCHER)


def _text(variable: Variable) -> str | None:
    return os.environ.get(variable.name, "").strip() or None


def _non_negative_int(variable: Variable, default: int) -> int:
    text = _text(variable)
    if text is None:
        return default
    # isdecimal alone would let through digits of other scripts, which int() reads too.
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(
            f"{variable.name}={text!r} is not a non-negative integer; "
            f"set it to one, or unset it for the default ({variable.default})"
        )
    return int(text)


def cache_dir() -> Path:
    """Folder of the on-disk cache; it need not exist yet."""
    text = _text(CACHE_DIR)
    if text is not None:
        return Path(text).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "flashcore"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "flashcore"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashcore"


def bundle() -> Path | None:
    """Bundle of kernels compiled ahead of time, or None."""
    text = _text(BUNDLE)
    return None if text is None else Path(text).expanduser()


def cxx() -> str | None:
    """C++ compiler for the simulator, or None to search for one."""
    return _text(CXX)


def sim_seed() -> int:
    """Seed of the simulator's scheduler."""
    return _non_negative_int(SIM_SEED, 0)


def sim_arch() -> int:
    """Architecture (80 for sm_80) whose kernel the simulator runs."""
    return _non_negative_int(SIM_ARCH, 80)


def tuned() -> bool:
    """Whether tile configurations found on this machine are used."""
    return _tuned() == "1"


def tile_table() -> bool:
    """Whether tile configurations that ship with flashcore are used."""
    return _tuned() != "rules"


def _tuned() -> str:
    text = _text(TUNED) or "1"
    if text not in ("0", "1", "rules"):
        raise ValueError(
            f"{TUNED.name}={text!r} is neither 0 nor 1 nor rules; set it to one, or unset it"
        )
    return text


def launcher() -> str:
    """What launches eager calls: "python" or "compiled"."""
    text = _text(LAUNCHER) or "python"
    if text not in ("python", "compiled"):
        raise ValueError(
            f"{LAUNCHER.name}={text!r} is neither python nor compiled; set it to one, or unset it"
        )
    return text
