"""Run a plan that is given, not chosen: what `verify` and `isolate` do beside the public functions.

A tile is a few fields of a Plan by name, as `flashcore isolate --tile` takes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.registry import forward_of
from flashcore.selection.space import tile_of

if TYPE_CHECKING:
    from flashcore.compile.plant import Plant
    from flashcore.kernels.kernel import ForwardKernel
    from flashcore.problem import Problem

_PLAINEST: dict[str, Any] = {
    "num_stages": 2,
    "min_blocks": 1,
    "ping_pong": False,
    "lazy_rescale": True,
    "q_buffers": 1,
    "key_slices": 1,
    "num_splits": 1,
    "stream_k": False,
}
_SHORT = {"stages": "num_stages", "blocks": "min_blocks", "splits": "num_splits"}


def parse_tile(text: str) -> dict[str, Any]:
    """Return the fields of a tile: "128x64,ping_pong,num_stages=3" has four.

    Raises:
        ValueError: a word is neither MxN, nor a field, nor field=value.
    """
    tile: dict[str, Any] = {}
    for word in text.split(","):
        name, equals, value = (part.strip() for part in word.partition("="))
        block_m, cross, block_n = name.partition("x")
        if not equals and cross and block_m.isdecimal() and block_n.isdecimal():
            tile |= {"block_m": int(block_m), "block_n": int(block_n)}
        elif value in ("true", "false") or (name and not equals):
            tile[_SHORT.get(name, name)] = value != "false"
        elif name and value.isdecimal():
            tile[_SHORT.get(name, name)] = int(value)
        else:
            raise ValueError(
                f"tile={text!r}: {word!r} is neither rows x keys, such as 128x64, nor a field, "
                "such as ping_pong, num_stages=3 or lazy_rescale=false"
            )
    return tile


def format_tile(tile: Mapping[str, Any]) -> str:
    """Return the text that `parse_tile` reads."""
    words = [f"{tile['block_m']}x{tile['block_n']}"] if {"block_m", "block_n"} <= set(tile) else []
    for name, value in tile.items():
        if name in ("block_m", "block_n") and words:
            continue
        if value is True:
            words.append(name)
        else:
            words.append(f"{name}={str(value).lower()}")
    return ",".join(words)


def with_fields(plan: Plan, tile: Mapping[str, Any]) -> Plan:
    """Return the plan with fields of its tile changed. A tile that says how large it is, is a new
    one: its other fields are the plainest there are (two stages, nothing shared, no turns). O
    leaves in as few parts as fit, unless the tile says in how many. The portable kernel also has
    `keys_of_chunk`, how many keys one of its sums goes over, which no tile says otherwise.

    Raises:
        ValueError: the kernel has no such field, a value is of another type, or the tile does not
            fit the GPU.
    """
    kernel = forward_of(plan)
    own = tile_of(plan) | {name: getattr(plan, name) for name in kernel.beside_the_tile}
    for name, value in tile.items():
        if name not in own or type(own[name]) is not type(value):
            fields = ", ".join(f"{n} ({type(x).__name__})" for n, x in own.items())
            raise ValueError(
                f"tile={format_tile(tile)!r}: {name}={value!r} is no field of a tile of "
                f"{plan.kernel}, which has {fields}"
            )
    if {"block_m", "block_n"} <= set(tile):
        plainest = {name: value for name, value in _PLAINEST.items() if name in own}
        plainest["num_stages"] = 2 * int(tile.get("key_slices", 1)) if plan.arch >= 80 else 1
        if plan.gate is not None:
            plainest.pop("lazy_rescale", None)
        tile = plainest | dict(tile)
    changed = dataclasses.replace(plan, **tile)
    if "o_parts" not in tile:
        changed = kernel.fitted(changed)
    if not kernel.is_legal(changed):
        raise ValueError(
            f"tile={format_tile(tile)!r} is not one that {plan.kernel} can have on sm_{plan.arch} "
            f"with head_dim {plan.head_dim} and {plan.head_dim_v}: too much shared memory or too "
            "many registers, or fields that exclude each other (see flashcore.selection.space)"
        )
    return changed


def fits(plan: Plan, tile: Mapping[str, Any]) -> bool:
    """Return whether `with_fields` takes the tile."""
    try:
        with_fields(plan, tile)
    except ValueError:
        return False
    return True


def under_gate(kernel: ForwardKernel[Any], tile: Mapping[str, Any]) -> dict[str, Any]:
    """Return a kernel's tile as a debug gate leaves it."""
    return {name: kernel.off_under_a_gate.get(name, value) for name, value in tile.items()}


def compile_planned(plan: Plan, is_on_gpu: bool, plant: Plant | None = None) -> None:
    """Compile a plan, for the GPU or for the simulator.

    Raises:
        CompileError, BackendUnavailableError: what compiling it raises.
    """
    if is_on_gpu:
        from flashcore.compile.jit import compile_plan

        compile_plan(plan)
        return
    from flashcore.compile.codegen import generate_source
    from flashcore.sim.build import load_kernel

    load_kernel(generate_source(plan, "host", plant))


def run_planned(
    problem: Problem,
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    gate_buffers: dict[str, Tensor] | None = None,
    lengths: dict[str, Tensor] | None = None,
    *,
    max_score: Tensor | None = None,
    seed: int = 0,
    plant: Plant | None = None,
) -> None:
    """Run a plan where its tensors are: on their GPU, and wait for it, or in the simulator.

    Args:
        problem: what the call asks for.
        plan: the kernel and tile to run.
        q: [batch, num_heads_q, seqlen_q, head_dim], or [total_q, num_heads_q, head_dim].
        k: the keys, in the same layout.
        v: the values, in the same layout.
        mask: the mask tensor, or None.
        out: where the output is written.
        lse: where the log-sum-exp is written, or None.
        gate_buffers: what a debug gate reads and writes, by name.
        lengths: tensors of the sequences' lengths, if they differ, and of sinks.
        max_score: where the largest scores are raised, or None.
        seed: of the simulator's scheduler.
        plant: bug to plant, in the simulator.

    Raises:
        SimulationError, CompileError, BackendUnavailableError, torch.AcceleratorError: what running
            it raises.
    """
    if q.is_cuda:
        from flashcore.launch.kernel_call import run_kernel

        run_kernel(problem, plan, q, k, v, mask, out, lse, gate_buffers, lengths, max_score)
        torch.cuda.synchronize()
        return
    from flashcore.sim import simulate

    simulate(
        problem, plan, q, k, v, mask, out, lse, gate_buffers, lengths,
        max_score=max_score, seed=seed, plant=plant,
    )  # fmt: skip
