"""Make the command that replays a simulated run; replay.py reads it and says which words it has."""

from __future__ import annotations

import ctypes
import hashlib
import io
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from flashcore.base import env, store
from flashcore.compile.plant import Plant
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.registry import PORTABLE, kernel_of
from flashcore.problem import Problem
from flashcore.problem.memory_layout import MaskSpec
from flashcore.selection.select import select_plan
from flashcore.sim.tensors import ADDRESS_ALIGNMENT

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
_MAX_SAVED_BYTES = 256 * 2**20


def _to_text(value: object) -> str:
    if isinstance(value, MaskSpec):
        return ":".join((value.dtype, _to_text(value.strides), str(value.load_bytes)))
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return repr(value) if isinstance(value, float) else str(value)


def _storage_offset(tensor: Tensor) -> int:
    """Return elements between an allocation's alignment and the tensor's first element."""
    return tensor.data_ptr() % ADDRESS_ALIGNMENT // tensor.element_size()


def distinct(tensor: Tensor) -> Tensor:
    """Return the tensor in four dimensions, each value once: broadcast dimensions cut to one
    element."""
    tensor = tensor.detach()[(None,) * (4 - tensor.dim())]
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
    return tensor


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
    chosen = select_plan(problem, plan.arch, plan.gate, plan.kernel)
    for field in fields(plan):
        value = getattr(plan, field.name)
        if value != getattr(chosen, field.name):
            words.append(f"plan.{field.name}={_to_text(value)}")
    for name, tensor in inputs.items():
        if _storage_offset(tensor):
            words.append(f"{name}_offset={_storage_offset(tensor)}")
    saved = _save_inputs(inputs)
    if saved is not None:
        words.append(f"inputs={saved}")
    return "python -m flashcore.sim " + " ".join(map(shlex.quote, words))
