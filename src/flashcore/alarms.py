"""What stopped a kernel, and in which phase of it: the simulator's alarms seen by kernel line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashcore.codegen import KERNELS_DIR

if TYPE_CHECKING:
    from flashcore.sim.plants import Plant

# Which phase of the kernel a function belongs to. "load" and "store" are not stages of their own:
# every gate runs them.
_PHASE_OF_FUNCTION = {
    "compute_scores": "qk",
    "mask_scores": "softmax",
    "strip_needs_mask": "softmax",
    "key_is_visible": "softmax",
    "apply_softcap": "softmax",
    "softmax_step": "softmax",
    "quad_max": "softmax",
    "accumulate_output": "pv",
    "gate_accumulate_serially": "pv_serial",
    "load_tile": "load",
    "load_keys": "load",
    "zero_padding": "load",
    "store_output": "store",
    "store_rows": "store",
    "quad_sum": "store",
}
_FUNCTION = re.compile(r"\bFC_DEVICE\b[^;={]*?\b(\w+)\s*\(|\bFC_KERNEL\((\w+)|auto (\w+) = \[&\]")


@dataclass(frozen=True, slots=True)
class Alarm:
    """Why a run was stopped.

    `kind` is the simulator's ("race", "deadlock", ...) or "cuda"; `summary` one line and `text` the
    whole report; `phase` the stage of the kernel that the line belongs to, None if it is not known.
    """

    kind: str
    summary: str
    text: str
    phase: str | None = None
    file: str | None = None
    line: int | None = None
    function: str | None = None


def from_error(error: Exception, plant: Plant | None = None) -> Alarm:
    """The alarm of an exception that a run raised.

    Args:
        error: a SimulationError, or what CUDA raised.
        plant: the bug that was planted; it may have moved the kernel's lines.
    """
    text = str(error).strip()
    lines = text.splitlines() or [type(error).__name__]
    agents = [a for a in (getattr(error, "agent", None), getattr(error, "other", None)) if a]
    kind = getattr(error, "kind", None) or type(error).__name__
    summary = f"{kind}: {getattr(error, 'message', '') or lines[0]}"
    if not agents:
        return Alarm(kind, summary, text)
    places = [(_function_at(agent, plant), agent) for agent in agents]
    function, agent = min(places, key=lambda place: _rank(_PHASE_OF_FUNCTION.get(place[0] or "")))
    return Alarm(
        kind=kind,
        summary=f"{summary} ({agent.file}:{agent.line})",
        text=text,
        phase=_PHASE_OF_FUNCTION.get(function or ""),
        file=agent.file,
        line=agent.line,
        function=function,
    )


def _rank(phase: str | None) -> int:
    """A race has two sides: the one in a stage names it, rather than a copy or the store."""
    return 2 if phase is None else 1 if phase in ("load", "store") else 0


def _function_at(agent: Any, plant: Plant | None) -> str | None:
    """Name of the device function, or of the kernel's lambda, that holds a line."""
    path = KERNELS_DIR / agent.file
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    if plant is not None and path.name == plant.file.rpartition("/")[2]:
        text = text.replace(plant.find, plant.replace)
    lines = text.splitlines()[: agent.line]
    for index in range(len(lines) - 1, -1, -1):
        # A signature may take several lines: join it up to its brace.
        found = _FUNCTION.search(" ".join(lines[index : index + 3]))
        if found and _FUNCTION.search(lines[index] + " " + "".join(lines[index + 1 : index + 2])):
            return next(name for name in found.groups() if name)
    return None
