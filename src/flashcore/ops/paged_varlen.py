"""Define attention of packed queries over a paged cache: sequences bring one query, a few or many
each, and a table assigns pages of keys and values to them.

Operators of torch: `flashcore::attention_paged_varlen_forward`,
`flashcore::attention_paged_varlen_backward`.

Lengths and page table lie on the device; the host reads them only where PyTorch itself computes.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from flashcore.backends.dispatch import choose_backend, warn_once
from flashcore.backends.packed import check_lengths, checked_max_seqlen, run_packed
from flashcore.backends.sinks import as_logits, lse_of_no_keys
from flashcore.launch.allocation import unseen_scores
from flashcore.ops import flops, paged, varlen
from flashcore.ops.eager import is_plain
from flashcore.ops.family import Family, Gradients
from flashcore.ops.length_calls import attend_lengths
from flashcore.ops.operators import Operators
from flashcore.plain.pages import (
    packed_backward_plain,
    packed_forward_plain,
    packed_inputs,
    packed_second_order,
    put_back_pair,
)
from flashcore.plain.trees import packed_part_of_tree
from flashcore.problem import Causal, Problem, Window
from flashcore.problem.memory_layout import as_batch
from flashcore.problem.options import Inputs, Options, Results, Wanted
from flashcore.problem.scales import part_of_scale, scales_of
from flashcore.problem.validation import (
    check_packed_tree_mask,
    check_plain_tensor,
    shape_text,
)


def attention_paged_varlen(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int | Tensor,
    *,
    causal: Causal = False,
    window: Window = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    return_max_score: bool = False,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    batch_invariant: bool = False,
    tree_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Compute attention of packed queries over a cache in pages, in one launch.

    Sequence b has queries cu_seqlens_q[b] to cu_seqlens_q[b + 1], clamped to q's rows; rows of no
    sequence attend to nothing. The rest is as in `attention_paged`.

    Args:
        q: [total_q, num_heads_q, head_dim].
        k_pages: [num_pages, num_heads_kv, page_size, head_dim], of any strides.
        v_pages: [num_pages, num_heads_kv, page_size, head_dim_v].
        page_table: int32, [batch, max_pages].
        seqlens_k: int32, [batch]: how many keys each sequence has.
        cu_seqlens_q: int32, [batch + 1].
        max_seqlen_q: the longest sequence of queries, or a bound on it; it helps to choose tiles,
            results do not depend on it.
        causal: False, True (a sequence's last query sees its last key) or "upper_left".
        window: (left, right), the keys visible on either side of the diagonal, or None.
        softcap: scores become softcap * tanh(score / softcap); None is off.
        scale: the factor of q.k; None is 1 / sqrt(head_dim).
        return_lse: whether the log-sum-exp of each row of scores is returned too.
        backend: "auto", "sm90", "wmma", "sim" or "torch".
        return_max_score: whether the largest score of each head of each sequence is, too.
        sinks: [num_heads_q], a logit of each head that joins the softmax; see `attention`.
        k_scale: as in `attention_paged`, of k_pages.
        v_scale: likewise, of v_pages.
        batch_invariant: give each sequence the same bits whatever is beside it; see `attention`.
        tree_mask: boolean, broadcastable to [batch, num_heads_q, m, m]. Of a sequence's
            n <= m queries, query i sees the last n keys where row i says so in columns [0, n), and
            all keys before them; a sequence of more queries has no tree. causal and window hold
            besides.

    Returns:
        out: [total_q, num_heads_q, head_dim_v], dtype of q; with return_lse the pair (out, lse):
        [num_heads_q, total_q]; with return_max_score max_score, [batch, num_heads_q], comes last.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or value.
        NotImplementedError: an unsupported tensor layout or device type.
        BackendUnavailableError: the backend cannot run here.
    """
    lengths = cu_seqlens_q, seqlens_k, page_table
    inputs = Inputs(
        q, k_pages, v_pages, seqlens_k=seqlens_k, cu_seqlens_q=cu_seqlens_q,
        page_table=page_table, sinks=sinks, max_seqlen_q=max_seqlen_q,  # type: ignore[arg-type]
        k_scale=k_scale, v_scale=v_scale, tree_mask=tree_mask,
    )  # fmt: skip
    scales = tuple(scales_of(inputs).values())
    others = *lengths, *scales
    if type(max_seqlen_q) is int and is_plain(others, q, k_pages, v_pages, tree_mask, sinks):

        def describe() -> Problem:
            options = Options.checked(causal, window, softcap, scale, batch_invariant)
            return packed_pages_problem(inputs, options)

        asked = causal, window, softcap, scale, return_lse, return_max_score
        longest = max_seqlen_q, page_table.shape[1]
        result = attend_lengths(
            q, k_pages, v_pages, tree_mask, lengths, sinks, asked, longest, backend, describe,
            batch_invariant, scales, None, tree_mask is not None,
        )  # fmt: skip
        if result is not None:
            return result
    options = Options.checked(causal, window, softcap, scale, batch_invariant)
    if not torch.compiler.is_compiling():  # then the operator's fake checks
        _check(inputs)
    bound = checked_max_seqlen("max_seqlen_q", max_seqlen_q, q.shape[0])
    returned: Tensor | tuple[Tensor, ...] = OPERATORS.attend(
        inputs._replace(max_seqlen_q=bound), options, Wanted(return_lse, return_max_score), backend
    )
    return returned


def _check(inputs: Inputs) -> None:
    """Raise unless ranks, dtypes, devices and numbers of sequences and pages fit."""
    q, cu_seqlens_q = inputs.q, inputs.cu_seqlens_q
    check_plain_tensor("q", q)
    if q.dim() != 3:
        raise ValueError(
            f"q has {q.dim()} dimensions (shape {shape_text(q)}); packed queries are [total_q, "
            "num_heads_q, head_dim]"
        )
    check_lengths("cu_seqlens_q", cu_seqlens_q, q)
    assert cu_seqlens_q is not None
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError("cu_seqlens_q is empty; for n sequences it has n + 1 entries, the first 0")
    if inputs.tree_mask is not None:
        check_packed_tree_mask(inputs.tree_mask, q, cu_seqlens_q.shape[0] - 1)
    paged.check(inputs._replace(q=_of_sequences(inputs), tree_mask=None))


def _of_sequences(inputs: Inputs) -> Tensor:
    """Return queries as if each sequence had all of them, [batch, num_heads_q, total_q,
    head_dim], without memory of their own."""
    assert inputs.cu_seqlens_q is not None
    batch = inputs.cu_seqlens_q.shape[0] - 1
    return as_batch(inputs.q[:, :, :]).expand(batch, -1, -1, -1)


def packed_pages_problem(inputs: Inputs, options: Options) -> Problem:
    """Validate the tensors of a call with packed queries and pages and describe them.

    Raises:
        TypeError, ValueError, NotImplementedError: as `attention_paged_varlen`.
    """
    _check(inputs)
    q, cu_seqlens_q = as_batch(inputs.q), inputs.cu_seqlens_q
    assert cu_seqlens_q is not None
    total_q = q.shape[2]
    longest = checked_max_seqlen("max_seqlen_q", inputs.max_seqlen_q, total_q)
    return dataclasses.replace(
        paged.pages_problem(q, inputs, options),
        batch=cu_seqlens_q.shape[0] - 1,
        seqlen_q=min(longest, total_q),
        varlen="packed_pages",
        total_q=total_q,
    )


def _compute(inputs: Inputs, options: Options, wanted: Wanted, asked: str) -> Results:
    problem = packed_pages_problem(inputs, options)
    problem = dataclasses.replace(problem, return_max_score=wanted.return_max_score)
    choice = choose_backend(problem, asked)
    if choice.is_fallback:
        warn_once(choice)
    if choice.backend == "torch":
        if inputs.tree_mask is not None:
            return _compute_one_by_one(problem, inputs, options, wanted)
        packed, _, _ = packed_inputs(inputs)
        return varlen.OPERATORS.family.compute(packed, options, wanted, "torch")
    return run_packed(choice.backend, problem, inputs)


def _compute_one_by_one(
    problem: Problem, inputs: Inputs, options: Options, wanted: Wanted
) -> Results:
    """Compute a call with trees by PyTorch: each sequence as one of `attention_paged`, with as much
    of its tree as it has queries."""
    q, tree, cu_seqlens_q = inputs.q, inputs.tree_mask, inputs.cu_seqlens_q
    assert cu_seqlens_q is not None
    assert tree is not None
    out = q.new_zeros((problem.total_q, problem.num_heads_q, problem.head_dim_v))
    lse = q.new_empty((problem.num_heads_q, problem.total_q), dtype=problem.lse_dtype)
    sinks = inputs.sinks
    lse_of_no_keys(lse, None if sinks is None else as_logits(sinks, problem.lse_dtype))
    max_score = unseen_scores(problem, q) if wanted.return_max_score else None
    ends = [min(max(0, end), problem.total_q) for end in cu_seqlens_q.tolist()]
    for b, (begin, end) in enumerate(itertools.pairwise(ends)):
        if begin >= end or problem.is_empty:
            continue
        rows, one = slice(begin, end), slice(b, b + 1)
        own = Inputs(
            as_batch(q[rows]), inputs.k, inputs.v, seqlens_k=_part(inputs.seqlens_k, one),
            page_table=_part(inputs.page_table, one), sinks=sinks,
            k_scale=part_of_scale(inputs.k_scale, one), v_scale=part_of_scale(inputs.v_scale, one),
            tree_mask=packed_part_of_tree(tree, b, end - begin),
        )  # fmt: skip
        found = paged.OPERATORS.family.compute(own, options, wanted, "torch")
        as_batch(out[rows]).copy_(found.out)
        lse[:, rows] = found.lse[0]
        if max_score is not None and found.max_score is not None:
            max_score[b] = found.max_score[0]
    return Results(out, lse, max_score)


def _part(x: Tensor | None, one: slice) -> Tensor:
    assert x is not None
    return x[one]


def _differentiate(
    arriving: Results,
    inputs: Inputs,
    results: Results,
    options: Options,
    needs: tuple[bool, ...],
    backend: str,
) -> Gradients:
    packed, *at = packed_inputs(inputs)
    dq, dk, dv, dsinks = varlen.OPERATORS.family.differentiate(
        arriving, packed, results, options, needs, backend
    )
    return dq, *put_back_pair((dk, dv), inputs, *at), dsinks


def _shapes(inputs: Inputs) -> Results:
    total_q, num_heads_q, _ = inputs.q.shape
    assert inputs.cu_seqlens_q is not None
    return Results(
        out=(total_q, num_heads_q, inputs.v.shape[3]),
        lse=(num_heads_q, total_q),
        max_score=(inputs.cu_seqlens_q.shape[0] - 1, num_heads_q),
    )


OPERATORS = Operators(
    Family(
        name="attention_paged_varlen",
        inputs=(
            "q", "k", "v", "page_table", "seqlens_k", "cu_seqlens_q", "max_seqlen_q", "sinks",
            "k_scale", "v_scale", "tree_mask",
        ),
        differentiable=("q", "k", "v", "sinks"),
        # A mapped batch has its own queries or pages: samples are computed one after the other.
        places={
            "q": None, "k": None, "v": None, "page_table": None, "seqlens_k": None,
            "cu_seqlens_q": None, "sinks": None, "k_scale": None, "v_scale": None,
            "tree_mask": None, "out": None, "lse": None, "max_score": None,
        },
        check=_check,
        compute=_compute,
        differentiate=_differentiate,
        shapes=_shapes,
        plain=packed_forward_plain,
        differentiate_plain=packed_backward_plain,
        second_order=packed_second_order,
        scores=flops.packed_paged_scores,
    )
)  # fmt: skip
