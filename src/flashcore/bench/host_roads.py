"""Time every road to a launch: the host's microseconds of an eager call, and what it may take."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flashcore
from flashcore.bench.cache_roads import cache_calls
from flashcore.bench.reporting.report import table
from flashcore.bench.timing import first_line
from flashcore.compat.flash_attn import flash_attn_func
from flashcore.launch import launcher


class Road(NamedTuple):
    """A Road is one way to call flashcore or torch.

    Args:
        call: makes one eager call.
        than: the road that its bar is a multiple of; "" for none.
        bar: by how much of that road's time it may take.
        layers: calls of attention behind one another that `call` makes; its time is that of one.
        launched_by: "python" or "compiled", as FLASHCORE_LAUNCHER has it.
        differentiates: whether `call` has a backward pass.
    """

    call: Callable[[], object]
    than: str = ""
    bar: float | None = None
    layers: int = 1
    launched_by: str = "python"
    differentiates: bool = False


# As many as a small model has; then what autograd takes once in a step counts little.
LAYERS = 16
CALLS = 200  # in a row; their kernels fit the GPU's queue


def roads(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Road]:
    """Return the roads by name.

    Args:
        q: [batch, num_heads, seqlen, head_dim].
        k: like q.
        v: like q.
    """
    sdpa = torch.nn.functional.scaled_dot_product_attention
    batch, _, seqlen, _ = q.shape
    mask = torch.ones(1, 1, seqlen, seqlen, dtype=torch.bool, device=q.device)
    seqlens_k = torch.full((batch,), seqlen - 1, dtype=torch.int32, device=q.device)
    ends = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * seqlen
    rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    rows_q, rows_k, rows_v = rows
    packed_q, packed_k, packed_v = (x.flatten(0, 1) for x in rows)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    dout = torch.ones_like(q)

    def step(function: Callable[..., Any]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(*leaves), leaves, dout)

    keys = [[x.detach().clone().requires_grad_() for x in (k, v)] for _ in range(LAYERS)]

    def steps(function: Callable[..., Any]) -> Callable[[], object]:
        def step() -> object:
            x = leaves[0]
            for pair in keys:
                x = function(x, *pair)
            return torch.autograd.grad(x, [leaves[0], *itertools.chain(*keys)], dout)

        return step

    def packed_step() -> object:
        q, k, v = packed_leaves
        out = flashcore.attention_varlen(q, k, v, ends, ends, seqlen, seqlen)
        return torch.autograd.grad(out, packed_leaves, packed_dout)

    packed_leaves = [x.detach().clone().requires_grad_() for x in (packed_q, packed_k, packed_v)]
    packed_dout = torch.ones_like(packed_q)
    dense_step = "attention, forward and backward"
    training = "scaled_dot_product_attention of torch, forward and backward"
    layers = f"{training}, of {LAYERS} layers"
    compiled = {}
    if q.is_cuda:  # the compiled launcher launches kernels
        compiled = {
            f"{dense_step}, compiled launcher": Road(
                step(flashcore.attention), training, 0.7, launched_by="compiled"
            ),
            f"{dense_step}, of {LAYERS} layers, compiled launcher": Road(
                steps(flashcore.attention), layers, 0.7, LAYERS, "compiled"
            ),
        }
    calls = {
        "attention": Road(lambda: flashcore.attention(q, k, v)),
        "attention, mask": Road(lambda: flashcore.attention(q, k, v, mask=mask), "attention", 1.3),
        "attention, seqlens_k": Road(
            lambda: flashcore.attention(q, k, v, seqlens_k=seqlens_k), "attention", 1.3
        ),
        "attention_varlen": Road(
            lambda: flashcore.attention_varlen(
                packed_q, packed_k, packed_v, ends, ends, seqlen, seqlen
            ),
            "attention",
            1.3,
        ),
        "flash_attn_func": Road(lambda: flash_attn_func(rows_q, rows_k, rows_v), "attention", 1.2),
        "scaled_dot_product_attention": Road(
            lambda: flashcore.scaled_dot_product_attention(q, k, v),
            "scaled_dot_product_attention of torch",
            0.9,
        ),
        "scaled_dot_product_attention of torch": Road(lambda: sdpa(q, k, v)),
    }
    calls |= {
        name: Road(call, "" if bar is None else "attention", bar)
        for name, (call, bar) in cache_calls(q, k).items()
    }
    passes = {
        dense_step: Road(step(flashcore.attention), training, 0.7),
        f"{dense_step}, mask": Road(
            step(functools.partial(flashcore.attention, mask=mask)), dense_step, 1.3
        ),
        f"{dense_step}, seqlens_k": Road(
            step(functools.partial(flashcore.attention, seqlens_k=seqlens_k)), dense_step, 1.3
        ),
        "attention_varlen, forward and backward": Road(packed_step, dense_step, 1.3),
        training: Road(step(sdpa)),
        f"{dense_step}, of {LAYERS} layers": Road(steps(flashcore.attention), layers, 0.7, LAYERS),
        layers: Road(steps(sdpa), layers=LAYERS),
    } | compiled
    return calls | {name: road._replace(differentiates=True) for name, road in passes.items()}


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rounds: int,
    host_us: Callable[[Callable[[], object], int], float],
) -> list[dict[str, Any]]:
    """Time the roads in turns: those without a backward pass first, for a pass runs in autograd's
    thread, and what the calling thread does next, woken on another core perhaps, takes up to half
    as long again.

    Args:
        q: [batch, num_heads, seqlen, head_dim], without a gradient.
        k: like q.
        v: like q.
        rounds: timed ones; another warms up.
        host_us: microseconds of a call, of so many in a row.

    Returns:
        For each road plain values: road; us, its median, and of_dense, that over the time of
        `attention`, or skipped, why it did not run; than and bar as in Road, and ratio, its time
        over that of the road `than`.
    """
    known, failed = roads(q, k, v), {}
    samples: dict[str, list[float]] = {}
    for name, road in known.items():
        try:
            with launcher.using(road.launched_by):
                road.call()
            samples[name] = []
        except Exception as error:  # whatever a road raises is a reason to leave it out
            failed[name] = first_line(error)
    for differentiates in (False, True):
        turns = {x: samples[x] for x in samples if known[x].differentiates is differentiates}
        for _ in range(rounds + 1):
            for name, times in turns.items():
                road = known[name]
                with launcher.using(road.launched_by):
                    road.call()  # the launcher starts with nothing prepared
                    times.append(host_us(road.call, CALLS // road.layers) / road.layers)
    medians = {name: statistics.median(times[1:]) for name, times in samples.items()}
    rows: list[dict[str, Any]] = []
    for name, road in known.items():
        if name in failed:
            rows.append({"road": name, "skipped": failed[name]})
            continue
        row: dict[str, Any] = {"road": name, "us": medians[name]}
        if "attention" in medians:
            row["of_dense"] = medians[name] / medians["attention"]
        if road.than in medians:
            row |= {"than": road.than, "bar": road.bar, "ratio": medians[name] / medians[road.than]}
        rows.append(row)
    return rows


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a table's rows: road, us, over dense, over the road of its bar, bar."""
    lines = []
    for row in rows:
        if "us" not in row:
            lines.append([row["road"], "-", "-", "-", "-"])
            continue
        of_dense = f"{row['of_dense']:.2f}" if "of_dense" in row else "-"
        ratio, bar = (f"{row[x]:.2f}" if x in row else "-" for x in ("ratio", "bar"))
        lines.append([row["road"], f"{row['us']:.1f}", of_dense, ratio, bar])
    return lines


HEADINGS = ("eager call", "us", "of dense", "of its peer", "bar")


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table. The peer is `attention`, or torch's own where the road has such a one."""
    return table(list(HEADINGS), cells(rows))
