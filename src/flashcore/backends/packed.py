"""Describe packed sequences as a Problem, and compute them on every backend.

q, k and v are [total, num_heads, dim], one sequence after the other; cu_seqlens says where each
begins. It lies on the device and is never read by the host, except where PyTorch itself computes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch

from flashcore.backends.dispatch import KERNELS, adapt_for, plan_of, prepare, without_autocast
from flashcore.backends.gradients import attention_gradients, choose_backward, computes_all
from flashcore.backends.gradients import gradients_with_lengths as fused_gradients
from flashcore.backends.sinks import as_logits, lse_of_no_keys
from flashcore.backends.tiled import attention_tiled
from flashcore.backends.torch_backward import packed_flash_gradients
from flashcore.base import env
from flashcore.launch.allocation import unseen_scores
from flashcore.launch.kernel_call import LENGTHS
from flashcore.problem import Causal, Problem, Window, widest_band
from flashcore.problem.memory_layout import as_batch, as_rows, with_strides_of_empty_like
from flashcore.problem.options import Inputs, Results
from flashcore.problem.scales import scales_of
from flashcore.problem.validation import (
    SEQLEN_MAX,
    certainly,
    check_device,
    check_plain_tensor,
    checked_causal,
    checked_window,
    shape_text,
    type_name,
)

Tensor = torch.Tensor

_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def check_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> None:
    """Raise unless ranks, dtypes and devices fit; what cu_seqlens holds only the device knows."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_plain_tensor(name, x)
        if x.dim() != 3:
            raise ValueError(
                f"{name} has {x.dim()} dimensions (shape {shape_text(x)}); packed sequences are "
                f"[total, num_heads, head_dim]: for a padded [batch, num_heads, seqlen, head_dim] "
                "tensor call flashcore.attention"
            )
        check_device(name, x, q)
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_lengths(name, x, q)
        if x.shape[0] == 0:
            raise ValueError(f"{name} is empty; for n sequences it has n + 1 entries, the first 0")
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k has {cu_seqlens_k.shape[0]} entries but cu_seqlens_q has "
            f"{cu_seqlens_q.shape[0]}; both have one a sequence, and one more"
        )


def check_lengths(name: str, x: object, q: Tensor) -> None:
    """Raise unless `x` is a contiguous int32 vector on q's device."""
    check_integers(name, x, q, 1, "one dimension")
    assert isinstance(x, Tensor)
    if not x.is_contiguous():
        raise ValueError(f"{name} is not contiguous; pass {name}.contiguous()")


def check_integers(name: str, x: object, q: Tensor, rank: int, dimensions: str) -> None:
    """Raise unless `x` is an int32 tensor on q's device with so many `dimensions`, as a message
    says it."""
    check_plain_tensor(name, x)
    assert isinstance(x, Tensor)
    if x.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {x.dtype}; it must be int32: pass {name}.int()")
    if x.dim() != rank:
        raise ValueError(f"{name} has shape {shape_text(x)}; it must have {dimensions}")
    check_device(name, x, q)


def readable(x: Tensor) -> bool:
    """Return whether the host may read a tensor's values: it has some, and nobody watches."""
    return (
        type(x) is Tensor
        and not x.is_meta
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not torch._C._len_torch_dispatch_stack()
    )


def checked_max_seqlen(name: str, value: object, rows: int) -> int:
    """Return a length as an int.

    Args:
        name: of the argument.
        value: an int, or a tensor with one element. One on a GPU is not read, for that would wait:
            all rows are a bound too.
        rows: how many there are.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and value.dtype in _INTEGERS:
        is_far = value.device.type != "cpu" or torch.compiler.is_compiling()
        value = rows if is_far or not readable(value) else int(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(
            f"{name} must be an int or an integer tensor with one element, but is {value!r} "
            f"({type_name(value)}); the longest sequence or any bound on it"
        )
    if certainly(value < 0):
        raise ValueError(f"{name}={value!r} must not be negative")
    # Any number is a bound, but an operator's integers have 64 bits.
    return rows if certainly(value > SEQLEN_MAX) else value  # type: ignore[return-value]


def packed_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: Causal = False,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    batch_invariant: bool = False,
    deterministic: bool = True,
) -> Problem:
    """Validate the arguments of `attention_varlen`; return the problem, with return_lse.

    Args:
        q: [total_q, num_heads_q, head_dim].
        k: [total_k, num_heads_kv, head_dim].
        v: [total_k, num_heads_kv, head_dim_v].
        cu_seqlens_q: int32, [batch + 1].
        cu_seqlens_k: int32, [batch + 1].
        max_seqlen_q: the longest sequence of queries.
        max_seqlen_k: the longest sequence of keys.
        causal: False, True (aligned at the lower right) or "upper_left".
        scale: the factor of q.k; None is 1 / sqrt(head_dim).
        window: (left, right), the keys visible on either side of the diagonal, or None.
        softcap: scores become softcap * tanh(score / softcap); None is off.
        sinks: [num_heads_q], a logit of each head that joins the softmax; or None.
        batch_invariant: as there.
        deterministic: as there.

    Raises:
        TypeError, ValueError, NotImplementedError: as `attention_varlen`.
    """
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    problem = Problem.from_tensors(
        as_batch(q), as_batch(k), as_batch(v), causal=causal, scale=scale, softcap=softcap,
        sinks=sinks, batch_invariant=batch_invariant, deterministic=deterministic,
    )  # fmt: skip
    total_q, total_k = q.shape[0], k.shape[0]
    left, right = widest_band(checked_causal(causal), checked_window(window), total_q, total_k)
    return dataclasses.replace(
        problem,
        batch=cu_seqlens_q.shape[0] - 1,
        seqlen_q=min(checked_max_seqlen("max_seqlen_q", max_seqlen_q, q.shape[0]), q.shape[0]),
        seqlen_k=min(checked_max_seqlen("max_seqlen_k", max_seqlen_k, k.shape[0]), k.shape[0]),
        window_left=left,
        window_right=right,
        diag_offset=0,
        return_lse=True,
        varlen="packed",
        total_q=total_q,
        total_k=total_k,
    )


def of_packed(inputs: Inputs) -> tuple[Any, ...]:
    """Return the arguments of `packed_problem`."""
    q, k, v, *_ = inputs
    lengths = inputs.cu_seqlens_q, inputs.cu_seqlens_k
    return q, k, v, *lengths, inputs.max_seqlen_q, inputs.max_seqlen_k


def run_packed(backend: str, problem: Problem, inputs: Inputs) -> Results:
    """Compute on a backend that `choose_backend` returned.

    Args:
        backend: "sm90", "wmma", "sim" or "torch"; not "torch" where keys lie in pages, as trees do.
        problem: the description of the tensors.
        inputs: of `attention_varlen`, or of `attention_paged_varlen`.

    Returns:
        out: [total_q, num_heads_q, head_dim_v], dtype of q.
        lse: [num_heads_q, total_q].
        max_score: [num_sequences, num_heads_q], or None unless problem.return_max_score.
    """
    q, k, v, cu_seqlens_q, cu_seqlens_k, _, _ = of_packed(inputs)
    others, sinks = {x: getattr(inputs, x) for x in LENGTHS[problem.varlen]}, inputs.sinks
    if sinks is not None:
        others["sinks"] = sinks = as_logits(sinks, problem.lse_dtype)
    others |= scales_of(inputs)
    if backend in KERNELS and not problem.is_empty:
        addresses = tuple(x.data_ptr() for x in (q, k, v, *others.values()))
        return Results(*prepare(backend, problem, q.device)(q, k, v, inputs.tree_mask, addresses))
    out = q.new_empty((problem.total_q, problem.num_heads_q, problem.head_dim_v))
    lse = q.new_empty((problem.num_heads_q, problem.total_q), dtype=problem.lse_dtype)
    if problem.is_empty or backend == "torch":
        out.zero_()
        lse_of_no_keys(lse, sinks)
    max_score = unseen_scores(problem, q) if problem.return_max_score else None
    if problem.is_empty:
        return Results(out, lse, max_score)
    if backend == "torch":
        row_maxima = None if max_score is None else torch.full_like(lse, -math.inf)
        with without_autocast(problem.device):
            for own, queries, keys in _sequences(problem, cu_seqlens_q, cu_seqlens_k):
                own_out, own_lse = attention_tiled(
                    own, as_batch(q[queries]), as_batch(k[keys]), as_batch(v[keys]), None,
                    None if row_maxima is None else row_maxima[None, :, queries],
                    sinks,
                )  # fmt: skip
                as_batch(out[queries]).copy_(own_out)
                lse[:, queries] = own_lse[0]
        if row_maxima is not None:
            max_score = max_score_of_rows(row_maxima, cu_seqlens_q)
        return Results(out, lse, max_score)
    from flashcore.sim import simulate

    adapted = adapt_for(backend, problem)
    problem = adapted.problem
    if problem.head_dim_v != out.shape[2]:
        out = q.new_empty((*out.shape[:2], problem.head_dim_v))
    plan = plan_of(problem, env.sim_arch())
    k, v = (k, v) if problem.has_pages else (as_batch(k), as_batch(v))
    tensors = adapted.tensors(as_batch(q), k, v, inputs.tree_mask)
    seed = env.sim_seed()
    simulate(problem, plan, *tensors, out, lse, None, others, max_score=max_score, seed=seed)
    return Results(adapted.result(out), lse, max_score)


def max_score_of_rows(row_maxima: Tensor, cu_seqlens_q: Tensor) -> Tensor:
    """Return the largest score of each head of each sequence, [num_sequences, num_heads_q], given
    those of packed rows, [num_heads_q, total_q]."""
    heads, total = row_maxima.shape
    rows = torch.arange(total, device=row_maxima.device)
    # Rows behind the last sequence count as one more.
    sequence = (rows[:, None] >= cu_seqlens_q[1:]).sum(-1)
    lowest = row_maxima.new_full((cu_seqlens_q.shape[0], heads), -math.inf)
    index = sequence[:, None].expand(total, heads)
    return lowest.scatter_reduce(0, index, row_maxima.mT, "amax")[:-1]


def packed_backward(
    problem: Problem, arriving: Results, inputs: Inputs, results: Results, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v.

    The fused kernels, or one of torch's operators, compute all sequences where they can; else each
    sequence is computed by itself, for which the host reads the lengths.

    Args:
        problem: the description of the call.
        arriving: gradients of out and lse, or None for zero.
        inputs: of `attention_varlen`.
        results: the forward's.
        backend: of the call, see `choose_backward`.

    Returns:
        dq, dk, dv: shapes and dtypes of q, k and v; 0 in rows of no sequence.
    """
    q, k, v, cu_seqlens_q, cu_seqlens_k, _, _ = of_packed(inputs)
    (out, lse), (dout, dlse) = results[:2], arriving[:2]
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    fused = fused_gradients(
        problem, as_batch(q), as_batch(k), as_batch(v), None, lengths, as_batch(out), lse,
        None if dout is None else as_batch(dout), dlse, backend,
    )  # fmt: skip
    if fused is not None:
        dq, dk, dv = map(as_rows, fused)
        like = with_strides_of_empty_like
        return like(q, dq), like(k, dk), like(v, dv)
    if dout is not None and not problem.is_empty:
        choice = choose_backward(problem, through_lse=dlse is not None, backend=backend)
        if choice.is_on_gpu:  # which could not be compiled
            backend = "torch"
            choice = choose_backward(problem, through_lse=dlse is not None, backend=backend)
        if computes_all(problem, choice):
            return packed_flash_gradients(
                problem, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, dout
            )
    gradients = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if problem.is_empty:
        return gradients
    with without_autocast(problem.device):
        for own, queries, keys in _sequences(problem, cu_seqlens_q, cu_seqlens_k):
            dq, dk, dv, _ = attention_gradients(
                own, as_batch(q[queries]), as_batch(k[keys]), as_batch(v[keys]), None,
                as_batch(out[queries]),
                lse[None, :, queries],
                None if dout is None else as_batch(dout[queries]),
                None if dlse is None else dlse[None, :, queries],
                False,
                backend,
            )  # fmt: skip
            as_batch(gradients[0][queries]).copy_(dq)
            as_batch(gradients[1][keys]).copy_(dk)
            as_batch(gradients[2][keys]).copy_(dv)
    return gradients


def _sequences(
    problem: Problem, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Iterator[tuple[Problem, slice, slice]]:
    """Yield each sequence that has queries and keys: its Problem, and its rows."""
    rows = rows_of_sequences(cu_seqlens_q, cu_seqlens_k, problem.total_q, problem.total_k)
    for queries, keys in rows:
        own = problem.of_sequence(queries.stop - queries.start, keys.stop - keys.start)
        yield own, queries, keys


def rows_of_sequences(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_q: int, total_k: int
) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of each sequence that has queries and keys, as the kernels clamp them
    (tile/sequence.cuh)."""
    begins_q, begins_k = (
        [min(max(0, begin), total) for begin in cu_seqlens.tolist()]
        for cu_seqlens, total in ((cu_seqlens_q, total_q), (cu_seqlens_k, total_k))
    )
    for b in range(len(begins_q) - 1):
        queries, keys = slice(*begins_q[b : b + 2]), slice(*begins_k[b : b + 2])
        if queries.start < queries.stop and keys.start < keys.stop:
            yield queries, keys
