"""Define every environment variable that flashcore reads, documented once.

Each is read when it is needed, not at import, so a test or a notebook may change it at any time.
"""

from __future__ import annotations

import difflib
import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from flashcore.base.temporary import private_dir
from flashcore.errors import notice_once


@dataclass(frozen=True, slots=True)
class Variable:
    """A Variable describes one environment variable.

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
RECORD = Variable(
    "FLASHCORE_RECORD",
    "nothing is recorded",
    "File that collects the calls of a run, for `flashcore build --calls`.",
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
    'GPU architecture whose kernel backend="sim" runs, 90 or sm_90: 75 has plain loads, 80 and up '
    "cp.async, 90 the Hopper kernel.",
)
TUNED = Variable(
    "FLASHCORE_TUNED",
    "1",
    "0 switches off the tile configurations that `flashcore tune` found on this machine, `rules` "
    "those that ship with flashcore as well; for shapes not seen yet.",
)
LAUNCHER = Variable(
    "FLASHCORE_LAUNCHER",
    "auto",
    "What makes eager calls: python, or compiled: C++ that a compiler on this machine builds once, "
    "which takes half of the host's time. auto: python until the first process that launches a "
    "kernel has built the other in the background. Read when the first kernel is launched.",
)

VARIABLES: tuple[Variable, ...] = (
    CACHE_DIR,
    BUNDLE,
    RECORD,
    CXX,
    SIM_SEED,
    SIM_ARCH,
    TUNED,
    LAUNCHER,
)


def unknown_variables() -> list[str]:
    """Return a sentence for each FLASHCORE_* variable that is set and means nothing."""
    prefix = "FLASHCORE_"
    known = [variable.name.removeprefix(prefix) for variable in VARIABLES]
    sentences = []
    for name in sorted(os.environ):
        own = name.upper().removeprefix(prefix)
        if name.upper().startswith(prefix) and name.removeprefix(prefix) not in known:
            close = difflib.get_close_matches(own, known, 1)
            there_are = f"there are {', '.join(prefix + other for other in known)}"
            meant = f"did you mean {prefix}{close[0]}?" if close else there_are
            sentences.append(f"the environment variable {name} means nothing to flashcore: {meant}")
    return sentences


@functools.cache
def notice_unknown_variables() -> None:
    """Warn, once a process, of FLASHCORE_* variables that mean nothing."""
    for sentence in unknown_variables():
        notice_once(sentence, sentence)


def _text(variable: Variable) -> str | None:
    notice_unknown_variables()
    return os.environ.get(variable.name, "").strip() or None


def _whole_number(
    variable: Variable, default: int, what: str, prefix: str = "", least: int = 0
) -> int:
    text = _text(variable)
    if text is None:
        return default
    digits = text.removeprefix(prefix)
    # isdecimal alone would let through digits of other scripts, which int() reads too.
    if not (digits.isascii() and digits.isdecimal() and int(digits) >= least):
        raise ValueError(
            f"{variable.name}={text!r} is not {what}; "
            f"set it to one, or unset it for the default ({variable.default})"
        )
    return int(digits)


def cache_dir() -> Path:
    """Return folder of the on-disk cache; it need not exist yet. A private temporary one, with a
    warning, where the one that was meant cannot be told."""
    wanted, trouble = wanted_cache_dir()
    if wanted is not None:
        return wanted
    private = private_dir()
    # Without any temporary folder, one that cannot be made: then nothing is kept.
    folder = Path(os.devnull, "flashcore") if private is None else private / "cache"
    notice_once(
        f"no cache: {trouble}",
        f"{trouble}, so compiled kernels are kept in {folder}; set {CACHE_DIR.name} to a folder "
        "that lasts",
    )
    return folder


def wanted_cache_dir() -> tuple[Path | None, str]:
    """Return the cache's folder as the environment says it, or None and why it cannot be told."""
    text = _text(CACHE_DIR)
    try:
        if text is not None:
            return Path(text).expanduser(), ""
        if sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME", ""))
            if not base.is_absolute():  # then the standard says to ignore it
                base = Path.home() / ".cache"
        return base / "flashcore", ""
    except RuntimeError:  # pathlib's, where a home is not known
        if text is not None:
            return None, f"{CACHE_DIR.name}={text}: no such user, or one without a home"
        return None, "this user has no home directory: HOME is not set, and there is no account"


def bundle() -> Path | None:
    """Return bundle of kernels compiled ahead of time, or None."""
    return _path(BUNDLE)


def record() -> Path | None:
    """Return file that collects the calls of this process, or None."""
    return _path(RECORD)


def _path(variable: Variable) -> Path | None:
    text = _text(variable)
    if text is None:
        return None
    try:
        return Path(text).expanduser()
    except RuntimeError:  # of a user without a home: whoever opens it says that there is none
        return Path(text)


def cxx() -> str | None:
    """Return C++ compiler for the simulator, or None to search for one."""
    return _text(CXX)


def sim_seed() -> int:
    """Return seed of the simulator's scheduler."""
    return _whole_number(SIM_SEED, 0, "a non-negative integer")


def sim_arch() -> int:
    """Return architecture (80 for sm_80) whose kernel the simulator runs."""
    return _whole_number(SIM_ARCH, 80, "an architecture, such as 90 or sm_90", "sm_", 75)


def tuned() -> bool:
    """Return whether tile configurations found on this machine are used."""
    return _tuned() == "1"


def tile_table() -> bool:
    """Return whether tile configurations that ship with flashcore are used."""
    return _tuned() != "rules"


def _tuned() -> str:
    text = _text(TUNED) or "1"
    if text not in ("0", "1", "rules"):
        raise ValueError(
            f"{TUNED.name}={text!r} is neither 0 nor 1 nor rules; set it to one, or unset it"
        )
    return text


def launcher() -> str:
    """Return what launches eager calls: "auto", "python" or "compiled"."""
    text = _text(LAUNCHER) or "auto"
    if text not in ("auto", "python", "compiled"):
        raise ValueError(
            f"{LAUNCHER.name}={text!r} is neither auto nor python nor compiled; set it to one, or "
            "unset it"
        )
    return text
