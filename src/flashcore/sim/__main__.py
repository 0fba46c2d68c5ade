"""python -m flashcore.sim replays a simulated run, as the report of an alarm says.

Exit status: 0 when there was no alarm, 1 when there was, 2 for a wrong command.
"""

from __future__ import annotations

import sys

import torch

from flashcore.backends.tiled import attention_tiled
from flashcore.sim.replay import Replay, parse_replay
from flashcore.sim.report import SimulationError


def _difference(replay: Replay) -> float:
    """Return largest difference of the output to the tile-wise PyTorch path in float64."""
    q, k, v = (tensor.double() for tensor in (replay.q, replay.k, replay.v))
    sinks = (replay.lengths or {}).get("sinks")
    expected, _ = attention_tiled(replay.problem, q, k, v, replay.mask, sinks=sinks)
    return float((replay.out.double() - expected).abs().max())


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
    if replay.plan.gate is None:
        print(f"largest difference from PyTorch in float64: {_difference(replay):.3g}")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
