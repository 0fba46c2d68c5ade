"""Say what stopped a kernel, and in which phase of it: the simulator's alarms seen by kernel
line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashcore.compile.codegen import KERNELS_DIR
from flashcore.errors import CompileError
from flashcore.kernels.kernel import Kernel
from flashcore.kernels.registry import kernel_of
from flashcore.problem.folding import as_launched

if TYPE_CHECKING:
    from flashcore.compile.plant import Plant
    from flashcore.kernels.fwd_wmma.plan import Plan
    from flashcore.problem import Problem

# The phase of functions that their kernel does not name, by the start of the file's name.
_PHASE_OF_FILE = {
    "schedule": "schedule",
    "sequence": "schedule",
    "copy": "load",
    "rows": "load",
    "smem_tile": "load",
    "stream_k": "schedule",
    "folded_rows": "schedule",
    "band": "schedule",
    "pages": "load",
    "producer": "load",
    "float8": "load",
    "mask": "softmax",
    "softmax": "softmax",
    "totals": "full",  # the kernel itself alone adds up chunks of keys
    "merge": "store",
    "shares": "store",
    "split": "schedule",
}
# Of what is found when the run is over.
_PHASE_OF_KIND = {"counter-left": "schedule", "unwritten-output": "store"}
_FUNCTION = re.compile(r"(?:\bFC_DEVICE\b[^;={(]*\b|\bFC_KERNEL\()(\w+)\s*[(,]")
_LAMBDA = re.compile(r"^  const auto (\w+) = \[&\]")


@dataclass(frozen=True, slots=True)
class Alarm:
    """An alarm says why a run was stopped.

    `kind` is the simulator's ("race", "deadlock", ...), "cuda" or "compile"; `summary` one line and
    `text` the whole report; `phase` the stage of the kernel that the line belongs to, None if it is
    not known.
    `place` names tile, warp and lane, and `picture` draws the warps of the tile.
    """

    kind: str
    summary: str
    text: str
    phase: str | None = None
    file: str | None = None
    line: int | None = None
    function: str | None = None
    place: str = ""
    picture: str = ""


def from_error(error: Exception, problem: Problem, plan: Plan, plant: Plant | None = None) -> Alarm:
    """Return the alarm of an exception that a run raised.

    Args:
        error: a SimulationError, or what CUDA raised.
        problem: what was run; it turns a block's number into batch, head and rows.
        plan: how it was run.
        plant: the bug that was planted; it may have moved the kernel's lines.
    """
    text = str(error).strip()
    lines = text.splitlines() or [type(error).__name__]
    agent, other = getattr(error, "agent", None), getattr(error, "other", None)
    kind = getattr(error, "kind", None) or type(error).__name__
    summary = f"{kind}: {getattr(error, 'message', '') or lines[0]}"
    if agent is None:
        return Alarm(kind, summary, text, _PHASE_OF_KIND.get(kind))
    agents = [agent] if other is None else [agent, other]
    places = [(_function_at(entry, plant), entry) for entry in agents]
    phases = [_phase_of(function, entry, kernel_of(plan)) for function, entry in places]
    phase, (function, named) = min(
        zip(phases, places, strict=True), key=lambda place: _rank(place[0])
    )
    if kind == "deadlock":
        phase = None  # all wait, and the one that is named is no more to blame than the others
    if kind == "double-write" and str(getattr(error, "array", "")).startswith("gate_"):
        phase = "schedule"  # a gate writes what there is of a row tile: two blocks took this one
    warps = {entry.warp for entry in agents}
    if kind == "atomic-order" and len(warps) > 1:
        numbers = " and ".join(str(warp) for warp in sorted(warps))
        summary += f": atomics from several warps ({numbers}) to one element"
    return Alarm(
        kind=kind,
        summary=f"{summary} ({named.file}:{named.line})",
        text=text,
        phase=phase,
        file=named.file,
        line=named.line,
        function=function,
        place=_place(error, agents, problem, plan),
        picture=_picture(agents, problem, plan),
    )


# As g++ and clang++ write it, and as NVRTC does.
_COMPILE_ERROR = re.compile(
    r"^(?P<file>[^\s:()]+)(?::(?P<line>\d+)(?::\d+)?|\((?P<nvrtc_line>\d+)\)): "
    r"(?:fatal |catastrophic )?error[^:]*: (?P<message>.*)$",
    re.MULTILINE,
)


def from_compile_error(error: CompileError) -> Alarm:
    """Return the alarm of a kernel that a compiler rejects: its first error, with file and line."""
    text = str(error).strip()
    found = _COMPILE_ERROR.search(text)
    if found is None:
        return Alarm("compile", text.splitlines()[0], text)
    file, line = found["file"], int(found["line"] or found["nvrtc_line"])
    return Alarm("compile", f"{file}:{line}: {found['message']}", text, file=file, line=line)


def _tile(block: int, problem: Problem, plan: Plan) -> str:
    """Return what a block computes. A persistent one takes several row tiles, and an alarm does not
    say which it was at."""
    if plan.is_persistent:
        return f"block {block}"
    launched = as_launched(problem, plan.folds_heads)
    head_and_batch = block // -(-launched.seqlen_q // plan.block_m)
    batch, head = divmod(head_and_batch, launched.num_heads_q)
    return f"batch {batch}, head {head}, m_block {_m_block(block, problem, plan)}"


def _m_block(block: int, problem: Problem, plan: Plan) -> int:
    """Return row tile of a block, as tile/schedule.cuh orders them."""
    num_m_blocks = -(-as_launched(problem, plan.folds_heads).seqlen_q // plan.block_m)
    m_block = block % num_m_blocks
    return num_m_blocks - 1 - m_block if plan.has_window_right else m_block


def _place(error: Any, agents: Sequence[Any], problem: Problem, plan: Plan) -> str:
    """Return the alarm's tile, warp, lane and element in a line."""
    who = " against ".join(
        f"warp {entry.warp}, " + ("all lanes" if entry.lane is None else f"lane {entry.lane}")
        for entry in agents
    )
    element = f"; element {error.place}" if getattr(error, "place", "") else ""
    return f"{_tile(agents[0].block, problem, plan)}; {who}{element}"


def _picture(agents: Sequence[Any], problem: Problem, plan: Plan) -> str:
    """Return the rows of the alarm's tile by warp, with who was involved; rows within the tile,
    where the tile is not known."""
    first_row = 0
    if not plan.is_persistent:
        first_row = _m_block(agents[0].block, problem, plan) * plan.block_m
    lines = []
    for warp in range(plan.num_warps):
        row = first_row + (warp - plan.row_warps.start) * 16
        notes = [
            f"{name} at {entry.file}:{entry.line}"
            for name, entry in zip(("by", "against"), agents, strict=False)
            if entry.warp == warp and entry.block == agents[0].block
        ]
        bar = ("#" if notes else ".") * 16
        rows = f"{'keys' if plan.owns_keys else 'rows'} {row:5d} to {row + 15:5d}"
        if warp not in plan.row_warps:
            rows = f"{'producer':19s}"
        lines.append(f"warp {warp:2d} {rows} |{bar}| {', '.join(notes)}")
    return "\n".join(line.rstrip() for line in lines)


def _phase_of(function: str | None, agent: Any, kernel: Kernel[Any]) -> str | None:
    """Return the phase of a kernel that a function's line belongs to, or None."""
    if function is not None and function in kernel.phases:
        return kernel.phases[function]
    file = Path(agent.file).name
    return next((phase for start, phase in _PHASE_OF_FILE.items() if file.startswith(start)), None)


def _rank(phase: str | None) -> int:
    """Return the rank of a phase in a race, which has two sides: the one in a stage names it,
    rather than the store, and rather than a load, which is where another's mistake shows. What
    collides with the set-up came too early."""
    return {"setup": 0, "store": 2, "load": 3, None: 4}.get(phase, 1)


def _function_at(agent: Any, plant: Plant | None) -> str | None:
    """Name of the device function, or of the kernel's lambda, that holds a line."""
    path = KERNELS_DIR / agent.file
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    if plant is not None and path == KERNELS_DIR / plant.file:
        text = text.replace(plant.find, plant.replace)
    in_lambda = True
    for line in reversed(text.splitlines()[: agent.line]):
        if line.startswith("  };"):
            in_lambda = False  # the line lies behind this lambda
        found = _LAMBDA.search(line) if in_lambda else None
        found = found or _FUNCTION.search(line)
        if found:
            return found[1]
    return None
