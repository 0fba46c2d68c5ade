"""python -m flashcore.sim replays a simulated run, as the report of an alarm says.

Exit status: 0 when there was no alarm, 1 when there was, 2 for a wrong command.
"""

from __future__ import annotations

import sys

import torch

from flashcore.backends.tiled import attention_backward_tiled, attention_tiled
from flashcore.sim.replay import Replay, parse_replay
from flashcore.sim.replay_backward import BackwardReplay
from flashcore.sim.report import SimulationError


def _difference(replay: Replay) -> float:
    """Return the largest difference of the output to the tile-wise PyTorch path in float64."""
    q, k, v = (tensor.double() for tensor in (replay.q, replay.k, replay.v))
    sinks = (replay.lengths or {}).get("sinks")
    expected, _ = attention_tiled(replay.problem, q, k, v, replay.mask, sinks=sinks)
    return float((replay.out.double() - expected).abs().max())


def _difference_of_gradients(replay: BackwardReplay) -> float | None:
    """Return the largest difference of what a backward kernel wrote to the tile-wise PyTorch path
    in float64; None where sequences differ in length."""
    x = replay.tensors
    if replay.problem.varlen != "none":
        return None
    q, k, v, out, lse, dout = (x[n].double() for n in ("q", "k", "v", "out", "lse", "dout"))
    dlse = x["dlse"].double() if "dlse" in x else None
    dq, dk, dv, _ = attention_backward_tiled(
        replay.problem, q, k, v, x.get("mask"), out, lse, dout, dlse, False
    )
    named = {"dq": dq, "dk": dk, "dv": dv}
    written = [name for name in replay.plan.written if name in named]
    return max((float((x[n].double() - named[n]).abs().max()) for n in written), default=None)


def main(words: list[str]) -> int:
    """Replay a run and say what came of it.

    Args:
        words: of the command line.

    Returns:
        The exit status.
    """
    try:
        replay = parse_replay(words)
    except ValueError as error:
        print(f"{error}\n\n{__doc__}", file=sys.stderr)
        return 2
    print(f"{replay.problem.describe()}: {replay.plan.describe()}")
    if not replay.inputs_are_saved:
        print("inputs: drawn from the seed (the failing run's own were not found)")
    try:
        report = replay.run()
    except SimulationError as error:
        print(error)
        return 1
    print(f"no alarm: {report}")
    if replay.plan.gate is not None:
        return 0
    if isinstance(replay, BackwardReplay):
        difference = _difference_of_gradients(replay)
    else:
        difference = _difference(replay)
    if difference is not None:
        print(f"largest difference from PyTorch in float64: {difference:.3g}")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
