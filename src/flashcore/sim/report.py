"""Hold what a simulated run reports: its statistics when it was healthy, one alarm when it was
not."""

from __future__ import annotations

from dataclasses import dataclass

from flashcore.errors import FlashCoreError

# Kinds of alarm, and what each means. docs/simulator.md has the long form.
ALARM_KINDS = {
    "race": "two accesses, one of them a write, that no barrier orders",
    "uninitialized-read": "read of memory that nothing has written",
    "out-of-bounds": "access outside a shared array or a tensor",
    "misaligned": "access at an address that is not a multiple of its size",
    "async-pending": "an asynchronous copy or product that was not waited for",
    "atomic-order": "float atomics in no fixed order",
    "divergence": "lanes or threads that should meet wait in different places",
    "deadlock": "everybody waits",
    "double-write": "an output element with two owners",
    "unwritten-output": "an output element that nobody wrote",
    "counter-left": "a counter that is not back at 0 for the next launch",
    "read-only-write": "write to an input tensor",
    "mbarrier": "an mbarrier before its initialisation, with too many arrivals or bytes",
    "named-barrier": "a named barrier with different counts, or by more warps than it counts",
    "missing-fence": "a thread's write that reaches TMA or WGMMA without a proxy fence",
    "wgmma": "registers of a WGMMA touched before the wait, or without a fence or commit",
    "early-access": "global memory touched before the kernels ahead of this one have ended",
    "misuse": "arguments that the PTX ISA does not allow",
}
# Alarms that only kernels with prims_sm90.cuh can raise.
SM90_ALARM_KINDS = {"mbarrier", "named-barrier", "missing-fence", "wgmma", "early-access"}


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent is who accessed memory, and where in the kernel.

    Args:
        block: index of the thread block.
        warp: index in the block.
        lane: index in the warp, or None for the warp as a whole (a wmma load).
        file: kernel file.
        line: line in it.
    """

    block: int
    warp: int
    lane: int | None
    file: str
    line: int

    def __str__(self) -> str:
        lane = "all lanes" if self.lane is None else f"lane {self.lane}"
        return f"block {self.block}, warp {self.warp}, {lane} at {self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class SimReport:
    """A report holds the statistics of a healthy run.

    Args:
        seed: of the scheduler.
        blocks: thread blocks run.
        threads: of a block.
        switches: from one thread to another.
        smem_accesses: checked loads and stores of shared memory (a fragment's line counts as one).
        gmem_accesses: checked loads and stores of tensors.
        async_copies: cp.async and TMA transfers issued.
        barriers: block and warp barriers passed.
        warp_ops: shuffles, votes, wmma operations and warp barriers of a whole warp.
        build_s: seconds taken to compile the kernel, or to find it compiled.
        run_s: seconds taken to run it.
    """

    seed: int
    blocks: int
    threads: int
    switches: int
    smem_accesses: int
    gmem_accesses: int
    async_copies: int
    barriers: int
    warp_ops: int
    build_s: float
    run_s: float


class SimulationError(FlashCoreError):
    """The simulated kernel did something that it must not do.

    Args:
        kind: one of ALARM_KINDS.
        message: what happened, in a sentence.
        array: shared array or tensor, "" where none is concerned.
        element: index in the shared array, or offset in elements from the tensor's first.
        coordinates: the same as index into the tensor's dimensions, or None.
        agent: who did it; its `file` and `line` are also the error's. None when the run was over.
        other: whom it collided with, or None.
        details: state of every warp, for a deadlock or divergence.
        seed: of the scheduler.
        replay: command that runs the same again, "" if there is none.
    """

    def __init__(
        self,
        *,
        kind: str,
        message: str,
        array: str = "",
        element: int = -1,
        coordinates: tuple[int, ...] | None = None,
        agent: Agent | None = None,
        other: Agent | None = None,
        details: str = "",
        seed: int = 0,
        replay: str = "",
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.array = array
        self.element = element
        self.coordinates = coordinates
        self.agent = agent
        self.other = other
        self.details = details
        self.seed = seed
        self.replay = replay

    @property
    def file(self) -> str:
        """Return kernel file of the alarm, "" when the run was over."""
        return self.agent.file if self.agent else ""

    @property
    def line(self) -> int:
        """Return line in the file, 0 when the run was over."""
        return self.agent.line if self.agent else 0

    @property
    def place(self) -> str:
        """Return the element concerned, such as k_smem[17] or out[0, 1, 5, 63]; "" if none is."""
        if not self.array:
            return ""
        index = self.coordinates if self.coordinates is not None else (self.element,)
        return f"{self.array}[{', '.join(map(str, index))}]"

    def __str__(self) -> str:
        lines = [f"simulator: {self.kind}: {self.message}"]
        if self.place:
            lines.append(f"  element  {self.place}")
        if self.agent:
            lines.append(f"  by       {self.agent}")
        if self.other:
            lines.append(f"  against  {self.other}")
        lines += [f"  {line}" for line in self.details.splitlines()]
        lines.append(f"  seed     {self.seed}")
        if self.replay:
            lines.append(f"  replay   {self.replay}")
        return "\n".join(lines)
