"""Run a backward kernel in the simulator on CPU tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashcore.kernels.bwd_sm90.params import LENGTHS, POINTERS, build_params_bwd_sm90
from flashcore.kernels.registry import kernel_of
from flashcore.sim.replay_command import backward_replay_command
from flashcore.sim.report import SimReport
from flashcore.sim.run import PERSISTENT_BLOCKS, simulate_plan
from flashcore.sim.tensors import SimTensor

if TYPE_CHECKING:
    from flashcore.compile.plant import Plant
    from flashcore.kernels.bwd_sm90.plan import BwdSm90Plan
    from flashcore.problem import Problem

_OF_ATTN = ("q", "k", "v", "mask", "out", "lse", "gate_scores", *LENGTHS)


def simulate_backward(
    problem: Problem,
    plan: BwdSm90Plan,
    tensors: dict[str, Tensor],
    *,
    seed: int = 0,
    plant: Plant | None = None,
) -> SimReport:
    """Run a plan's kernel in the simulator.

    Args:
        problem: validated description of the forward.
        plan: of one of the two kernels.
        tensors: as in params_bwd_sm90.build_params_bwd_sm90.
        seed: of the scheduler.
        plant: bug to plant, for testing the checks.

    Returns:
        Statistics of the run.

    Raises:
        SimulationError: the kernel did something that it must not do; the message ends with the
            command that replays the run.
        BackendUnavailableError: there is no C++ compiler.
    """
    maps = plan.box_rows
    placed = []
    for name, tensor in tensors.items():
        if name == "gate_scores" and plan.gate is None:
            continue
        fields = (f"{name}_map.base",) if name in maps else ()
        if name in _OF_ATTN:
            fields = (f"attn.{name}", *fields)
        elif name in POINTERS:
            fields = (name,)
        if fields:
            kind: dict[str, Any] = {"writable": name in plan.written}
            if name == "dq_sums" and plan.also_dq:
                kind = {"sums": True, "writable": plan.ordered, "complete": False}
                kind["any_order"] = not plan.ordered
            elif (name == "dq_turns" and plan.also_dq) or name == "delta_count":
                kind = {"counter": True}
            elif name == "delta" and plan.owns_keys:
                kind = {"late": "delta_count" in tensors}
            elif kind["writable"] and plan.heads is not None:
                kind["own"] = _own(name, tensor, plan.heads, problem)
            if name == "gate_scores":  # gate ds writes tiles that are visited; others read them
                kind = {"writable": plan.gate == "ds", "complete": False}
            placed.append(SimTensor(name, tensor, fields, **kind))
    counter = torch.zeros(int(plan.draws_tiles), dtype=torch.int32)
    if plan.draws_tiles:
        placed.append(SimTensor("tile_counter", counter, "attn.tile_counter", counter=True))
    grid = kernel_of(plan).num_blocks(problem, plan, PERSISTENT_BLOCKS)
    params = build_params_bwd_sm90(problem, plan, tensors, grid)
    return simulate_plan(
        plan, params, placed, counter, grid, seed, plant,
        lambda: backward_replay_command(problem, plan, tensors, seed=seed, plant=plant),
    )  # fmt: skip


def _own(name: str, x: Tensor, heads: tuple[int, int], problem: Problem) -> Tensor:
    """Return which elements of dq, dk, dv, delta or dq_sums belong to some heads of k and v, see
    BwdSm90Plan."""
    first, count = heads
    num_heads_kv = problem.num_heads_kv
    if name == "dq_sums":  # which has room for the heads of a launch
        is_own = torch.arange(x.shape[0]) < count * problem.group_size
        return is_own.reshape(-1, 1, 1).expand(x.shape)
    batch, own_heads = x.shape[:2]
    numbers = torch.arange(batch * num_heads_kv).repeat_interleave(own_heads // num_heads_kv)
    is_own = (numbers >= first) & (numbers < first + count)
    return is_own.reshape(batch, own_heads, *[1] * (x.dim() - 2)).expand(x.shape)
