"""Make the command that replays a simulated run; replay.py reads it and says which words it has."""

from __future__ import annotations

import ctypes
import hashlib
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from flashcore.base import env, store
from flashcore.compile.plant import Plant
from flashcore.kernels.bwd_sm90.plan import BwdSm90Plan
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.registry import PORTABLE, backward, kernel_of
from flashcore.problem import Problem
from flashcore.problem.memory_layout import MaskSpec
from flashcore.selection.select import select_plan
from flashcore.sim.placing import distinct, storage_offset

REPLAY_DEFAULTS: dict[str, object] = {
    "device": "cpu",
    "arch": 0,
    "softcap": 0.0,
    "window_left": -1,
    "window_right": -1,
    "diag_offset": 0,
    "causal": "none",
    "mask": None,
    "return_lse": True,
    "varlen": "none",
    "total_q": 0,
    "total_k": 0,
    "strided": "",
    "misaligned": "",
    "page_size": 0,
    "num_pages": 0,
    "page_table_stride": 0,
    "return_max_score": False,
    "has_sinks": False,
    "cache_dtype": "",
    "scale_strides": (0, 0, 0, 0),
}
LAYOUT = ".layout"  # behind a tensor's name: dims, sizes, strides and offset
_MAX_SAVED_BYTES = 256 * 2**20


def _to_text(value: object) -> str:
    if isinstance(value, MaskSpec):
        sizes = (value.load_bytes, value.size) if value.size else (value.load_bytes,)
        return ":".join((value.dtype, _to_text(value.strides), *map(str, sizes)))
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return repr(value) if isinstance(value, float) else str(value)


def _save_inputs(tensors: Mapping[str, Tensor]) -> Path | None:
    """Save the values, named by their content; None when they are too large, or on a full disk."""
    values = {name: distinct(tensor).contiguous() for name, tensor in tensors.items()}
    if sum(value.nbytes for value in values.values()) > _MAX_SAVED_BYTES:
        return None
    digest = hashlib.sha256()
    for name, value in values.items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(ctypes.string_at(value.data_ptr(), value.nbytes))
    path = env.cache_dir() / "sim" / "inputs" / f"{digest.hexdigest()[:16]}.pt"
    try:
        if not path.exists():
            content = io.BytesIO()
            torch.save(values, content)
            store.write(env.cache_dir(), "sim/inputs", path.name, content.getvalue())
    except OSError:
        return None
    return path


def replay_command(
    problem: Problem,
    plan: Plan,
    inputs: Mapping[str, Tensor],
    *,
    seed: int,
    plant: Plant | None,
) -> str:
    """Return the command line that runs the same again; the inputs are saved for it.

    Args:
        problem: as given to `simulate`.
        plan: as given to `simulate`.
        inputs: by name q, k, v and, where there is one, mask and gate_scores.
        seed: of the scheduler.
        plant: bug planted, or None.

    Returns:
        A line for a shell.
    """
    words = words_of(problem, plan, seed, plant)
    words += difference_of(plan, select_plan(problem, plan.arch, plan.gate, plan.kernel))
    for name, tensor in inputs.items():
        if storage_offset(tensor):
            words.append(f"{name}_offset={storage_offset(tensor)}")
    return command_of(words, inputs)


def words_of(problem: Problem, plan: Plan, seed: int, plant: Plant | None) -> list[str]:
    """Return the words that say what was run, as far as no field of the plan says it."""
    words = [f"seed={seed}", f"sim_arch={plan.arch}"]
    if kernel_of(plan) is not PORTABLE:
        words.append(f"kernel={plan.kernel}")
    if plan.gate is not None:
        words.append(f"gate={plan.gate}")
    if plant is not None:
        words.append(f"plant={plant.name}")
    for field in fields(problem):
        value = getattr(problem, field.name)
        if field.name not in REPLAY_DEFAULTS or value != REPLAY_DEFAULTS[field.name]:
            words.append(f"{field.name}={_to_text(value)}")
    return words


def difference_of(plan: Plan, chosen: Plan) -> list[str]:
    """Return the words that make the plan from the one that is chosen for such a problem."""
    return [
        f"plan.{field.name}={_to_text(getattr(plan, field.name))}"
        for field in fields(plan)
        if getattr(plan, field.name) != getattr(chosen, field.name)
    ]


def command_of(words: Sequence[str], inputs: Mapping[str, Tensor]) -> str:
    """Return the command of these words, and save the inputs for it."""
    saved = _save_inputs(inputs)
    words = [*words, *([] if saved is None else [f"inputs={saved}"])]
    return "python -m flashcore.sim " + " ".join(map(shlex.quote, words))


def backward_replay_command(
    problem: Problem,
    plan: BwdSm90Plan,
    tensors: Mapping[str, Tensor],
    *,
    seed: int,
    plant: Plant | None,
) -> str:
    """Return the command line that runs a backward kernel again; its inputs are saved for it.

    Args:
        problem: as given to `simulate_backward`.
        plan: as given to `simulate_backward`.
        tensors: as given to `simulate_backward`.
        seed: of the scheduler.
        plant: bug planted, or None.
    """
    words = words_of(problem, plan, seed, plant)
    words += difference_of(plan, backward(plan.kernel).chosen(problem, plan.gate))
    saved = dict(tensors)
    for name, x in tensors.items():
        layout = (x.dim(), *x.shape, *x.stride(), storage_offset(x))
        saved[name + LAYOUT] = torch.tensor(layout)
    return command_of(words, saved)
