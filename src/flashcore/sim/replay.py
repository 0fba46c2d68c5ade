"""Read the command that replays a simulated run (replay_command.py), and make the run.

    python -m flashcore.sim seed=17 batch=1 num_heads_q=2 ... [plan.block_m=64] [inputs=FILE]

The words are the fields of Problem (those that differ from REPLAY_DEFAULTS), of the plan where it
is not the one that select_plan takes, and the run's own: seed, sim_arch, gate, plant, and how far a
tensor starts behind its allocation. Inputs are read from the file that the failing run saved, or
drawn anew from the seed: what a kernel accesses depends on shapes and strides, rarely on values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashcore.compile.plant import Plant
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.registry import BY_NAME, PORTABLE, backward
from flashcore.launch.allocation import unseen_scores
from flashcore.problem import Problem
from flashcore.problem.memory_layout import MaskSpec
from flashcore.selection.select import select_plan
from flashcore.sim.placing import place
from flashcore.sim.plants.index import find_plant
from flashcore.sim.replay_backward import BackwardReplay, load_replay
from flashcore.sim.replay_command import REPLAY_DEFAULTS
from flashcore.sim.report import SimReport
from flashcore.sim.run import simulate

# Whose place in an allocation is kept.
_PLACED = ("q", "k", "v", "mask", "page_table", "k_scale", "v_scale")


def _from_text(text: str, name: str, like: object) -> Any:
    if name == "mask":
        if text == "None":
            return None
        dtype, strides, *sizes = text.split(":")
        return MaskSpec(dtype, _integers(strides), *map(int, sizes))  # type: ignore[arg-type]
    if name.endswith("_strides") or (name == "heads" and text != "None"):
        return _integers(text)
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    try:
        return float(text) if isinstance(like, float) or name == "scale" else int(text)
    except ValueError:
        return text


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


@dataclass(frozen=True, slots=True)
class Replay:
    """A replay is a run to repeat: what `simulate` takes, and what it fills."""

    problem: Problem
    plan: Plan
    seed: int
    plant: Plant | None
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    out: Tensor
    lse: Tensor
    gate_buffers: dict[str, Tensor] | None
    lengths: dict[str, Tensor] | None
    inputs_are_saved: bool
    max_score: Tensor | None = None

    def run(self) -> SimReport:
        """Run it. Raises SimulationError as the first run did."""
        return simulate(
            self.problem,
            self.plan,
            self.q,
            self.k,
            self.v,
            self.mask,
            self.out,
            self.lse if self.problem.return_lse else None,
            self.gate_buffers,
            self.lengths,
            max_score=self.max_score,
            seed=self.seed,
            plant=self.plant,
        )


def parse_replay(words: Sequence[str]) -> Replay | BackwardReplay:
    """Read the words of a replay command.

    Args:
        words: `name=value`, see the module's docstring.

    Returns:
        The run to repeat.

    Raises:
        ValueError: a word is unknown or a field is missing; the message names it.
    """
    given = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is not name=value")
        given[name] = text

    def take(name: str, default: str) -> str:
        return given.pop(name, default)

    problem_values: dict[str, Any] = {}
    for field in fields(Problem):
        if field.name in given:
            default = REPLAY_DEFAULTS.get(field.name)
            problem_values[field.name] = _from_text(given.pop(field.name), field.name, default)
        elif field.name in REPLAY_DEFAULTS:
            problem_values[field.name] = REPLAY_DEFAULTS[field.name]
        else:
            raise ValueError(f"{field.name} is missing")
    problem = Problem(**problem_values)
    arch, gate = int(take("sim_arch", "80")), take("gate", "") or None
    name = take("kernel", PORTABLE.name)
    if name not in BY_NAME:
        raise ValueError(f"kernel={name!r} is not one of {', '.join(BY_NAME)}")
    kernel = BY_NAME[name]
    plan: Any
    if kernel.is_backward:
        plan = backward(name).chosen(problem, gate)
    else:
        plan = select_plan(problem, arch, gate, name)
    changes = {
        field.name: _from_text(given.pop(f"plan.{field.name}"), field.name, None)
        for field in fields(plan)
        if f"plan.{field.name}" in given
    }
    plan = dataclasses.replace(plan, **changes)
    seed, plant_name = int(take("seed", "0")), take("plant", "")
    plant = find_plant(plant_name, plan.kernel) if plant_name else None
    path = take("inputs", "")
    if kernel.is_backward:
        if given:
            raise ValueError(f"unknown: {', '.join(given)}")
        return load_replay(problem, plan, seed, plant, path)
    offsets = {name: int(take(f"{name}_offset", "0")) for name in _PLACED}
    if given:
        raise ValueError(f"unknown: {', '.join(given)}")
    return _make(problem, plan, seed, plant, path, offsets)


def _lengths(
    problem: Problem, values: Mapping[str, Tensor], offsets: Mapping[str, int]
) -> dict[str, Tensor] | None:
    """Return the saved lengths of the sequences, or equal ones, and the sinks; None where there are
    none to give."""
    steps = torch.arange(problem.batch + 1, dtype=torch.int32)
    lengths: dict[str, Tensor] = {}
    if problem.packs_queries:
        lengths["cu_seqlens_q"] = steps * (problem.total_q // problem.batch)
    if problem.varlen == "packed":
        lengths["cu_seqlens_k"] = steps * (problem.total_k // problem.batch)
    elif problem.varlen != "none":
        lengths["seqlens_k"] = torch.full_like(steps[1:], problem.seqlen_k)
    lengths = {name: values.get(name, even).flatten() for name, even in lengths.items()}
    if problem.has_pages:
        shape = 1, 1, problem.batch, problem.seqlen_k // problem.page_size
        pages = torch.arange(shape[2] * shape[3], dtype=torch.int32) % problem.num_pages
        table = values.get("page_table", pages.reshape(shape))
        strides = 0, 0, problem.page_table_stride, 1
        lengths["page_table"] = place(table, shape, strides, offsets["page_table"])[0, 0]
    if problem.has_sinks:
        lengths["sinks"] = values.get("sinks", torch.zeros(problem.num_heads_q)).flatten()
    if problem.cache_dtype:
        shape = 1, 1, problem.batch, problem.num_heads_kv
        of_scales = problem.scale_strides
        for name, of in (("k_scale", of_scales[:2]), ("v_scale", of_scales[2:])):
            scale = values.get(name, torch.ones(shape))
            lengths[name] = place(scale, shape, (0, 0, *of), offsets[name])[0, 0]
    return lengths or None


def _make(
    problem: Problem,
    plan: Plan,
    seed: int,
    plant: Plant | None,
    path: str,
    offsets: Mapping[str, int],
) -> Replay:
    values = torch.load(path, weights_only=True) if path and Path(path).is_file() else {}
    generator = torch.Generator().manual_seed(seed)
    rows_q = (problem.batch, problem.num_heads_q, problem.seqlen_q)
    rows_k = (problem.batch, problem.num_heads_kv, problem.seqlen_k)
    rows_out: tuple[int, ...] = (*rows_q, problem.head_dim_v)
    rows_lse: tuple[int, ...] = rows_q
    if problem.packs_queries:
        rows_q = (1, problem.num_heads_q, problem.total_q)
        rows_k = (1, problem.num_heads_kv, problem.total_k)
        rows_out = (problem.total_q, problem.num_heads_q, problem.head_dim_v)
        rows_lse = (problem.num_heads_q, problem.total_q)
    if problem.has_pages:
        rows_k = (problem.num_pages, problem.num_heads_kv, problem.page_size)

    def tensor(name: str, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> Tensor:
        drawn = torch.randn(shape, generator=generator)
        typed = drawn > 0 if dtype in ("bool", "tree") else drawn.to(getattr(torch, dtype))
        return place(values.get(name, typed), shape, strides, offsets[name])

    dtype = problem.dtype
    q = tensor("q", (*rows_q, problem.head_dim), (*problem.q_strides, 1), dtype)
    dtype = problem.cache_dtype or dtype
    k = tensor("k", (*rows_k, problem.head_dim), (*problem.k_strides, 1), dtype)
    v = tensor("v", (*rows_k, problem.head_dim_v), (*problem.v_strides, 1), dtype)
    spec = problem.mask
    mask = None
    if spec is not None:
        columns = problem.seqlen_q if spec.dtype == "tree" else problem.seqlen_k
        shape = (*rows_q, columns)
        if problem.packs_queries:  # then it is a tree
            shape = (problem.batch, problem.num_heads_q, spec.size, spec.size)
        mask = tensor("mask", shape, spec.strides, spec.dtype)
    gate_buffers = None
    if plan.gate is not None:
        num_n_blocks = -(-problem.seqlen_k // plan.block_n)
        scores = values.get("gate_scores")
        if scores is None:
            uniform = 1.0 / max(problem.seqlen_k, 1)
            scores = torch.full((*rows_q, problem.seqlen_k), uniform)
        gate_buffers = {
            "gate_scores": scores.clone(),
            "gate_row_max": torch.empty((*rows_q, num_n_blocks)),
            "gate_row_sum": torch.empty((*rows_q, num_n_blocks)),
        }
    return Replay(
        problem,
        plan,
        seed,
        plant,
        q,
        k,
        v,
        mask,
        torch.empty(rows_out, dtype=problem.torch_dtype),
        torch.empty(rows_lse, dtype=torch.float32),
        gate_buffers,
        _lengths(problem, values, offsets),
        bool(values),
        unseen_scores(problem, q) if problem.return_max_score else None,
    )
