"""Define attention over a paged cache: keys and values in pages that a table assigns to sequences.

Operators of torch: `flashcore::attention_paged_forward`, `flashcore::attention_paged_backward`.

Lengths and page table lie on the device; the host reads them only where PyTorch itself computes.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from flashcore.backends.packed import check_integers, check_lengths
from flashcore.ops import dense, flops, padded
from flashcore.ops.eager import is_plain
from flashcore.ops.family import Family, Gradients
from flashcore.ops.length_calls import attend_lengths
from flashcore.ops.operators import Operators
from flashcore.plain.pages import (
    keys_of_sequence,
    padded_inputs,
    paged_backward_plain,
    paged_forward_plain,
    paged_second_order,
    scattered_pair,
)
from flashcore.problem import Causal, Problem, Window, widest_band
from flashcore.problem.memory_layout import described_memory, mask_spec
from flashcore.problem.options import Inputs, Options, Results, Wanted
from flashcore.problem.scales import as_wide, check_scales_of, described_scales, scales_of
from flashcore.problem.validation import (
    SEQLEN_MAX,
    certainly,
    check_mask,
    check_qkv,
    checked_window,
    shape_text,
)

NAMES = ("seqlens_k", "page_table")  # in the order of launch.LENGTHS


def attention_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    *,
    causal: Causal = False,
    window: Window = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    return_max_score: bool = False,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    batch_invariant: bool = False,
    tree_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Compute attention of queries over a cache in pages.

    Key j of sequence b lies in page `page_table[b, j // page_size]`, row `j % page_size`. The
    forward pass never waits for the table or the lengths, and can be captured in a CUDA graph and
    replayed with others.

    Args:
        q: [batch, num_heads_q, seqlen_q, head_dim].
        k_pages: [num_pages, num_heads_kv, page_size, head_dim], of any strides: the transposed view
            of a cache [num_pages, page_size, num_heads_kv, head_dim] is read in place. The Hopper
            kernel takes pages of a multiple of 8 keys, the portable one any. dtype of q, or
            float8_e4m3fn with scales.
        v_pages: [num_pages, num_heads_kv, page_size, head_dim_v].
        page_table: int32, [batch, max_pages], rows of any stride. Sequences may share pages.
            Entries behind a sequence's last page are not read; others must be pages that there
            are, or the results are those of some other page.
        seqlens_k: int32, [batch]: how many keys each sequence has (clamped to 0 and to max_pages *
            page_size). The rest of its last page has no effect.
        causal: False, True (the last query sees the last key) or "upper_left"; see `attention`.
        window: (left, right), the keys visible on either side of the diagonal, or None.
        softcap: scores become softcap * tanh(score / softcap); None is off.
        scale: the factor of q.k; None is 1 / sqrt(head_dim).
        return_lse: whether the log-sum-exp of each row of scores is returned too.
        backend: "auto", "sm90", "wmma", "sim" or "torch".
        return_max_score: whether the largest score of each head is returned too.
        sinks: [num_heads_q], a logit of each head that joins the softmax; see `attention`.
        mask: boolean (True = attend) or additive, broadcastable to [batch, num_heads_q, seqlen_q,
            max_pages * page_size]: over the keys of each sequence, as the table has them in order.
        k_scale: float32, [], [num_heads_kv] or [batch, num_heads_kv], where k_pages is
            float8_e4m3fn; see `attention`.
        v_scale: likewise, of v_pages.
        batch_invariant: give each sequence the same bits whatever is beside it; see `attention`.
        tree_mask: boolean, broadcastable to [batch, num_heads_q, seqlen_q, seqlen_q]: which of the
            last seqlen_q keys a query sees, besides all before them; instead of mask.

    Returns:
        out: [batch, num_heads_q, seqlen_q, head_dim_v], dtype of q; with return_lse the pair (out,
        lse): [batch, num_heads_q, seqlen_q], float32 (float64 for float64 inputs); with
        return_max_score max_score comes last, see `attention`.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or value.
        NotImplementedError: an unsupported tensor layout or device type.
        BackendUnavailableError: the backend cannot run here.
    """
    inputs = Inputs(
        q, k_pages, v_pages, mask, seqlens_k, page_table=page_table, sinks=sinks, k_scale=k_scale,
        v_scale=v_scale, tree_mask=tree_mask,
    )  # fmt: skip
    either = mask if tree_mask is None else tree_mask
    scales = tuple(scales_of(inputs).values())
    if is_plain((seqlens_k, page_table, *scales), q, k_pages, v_pages, either, sinks):

        def describe() -> Problem:
            options = Options.checked(causal, window, softcap, scale, batch_invariant)
            return paged_problem(inputs, options)

        asked = causal, window, softcap, scale, return_lse, return_max_score
        lengths = seqlens_k, page_table
        result = attend_lengths(
            q, k_pages, v_pages, either, lengths, sinks, asked, None, backend, describe,
            batch_invariant, scales, None, tree_mask is not None,
        )  # fmt: skip
        if result is not None:
            return result
    options = Options.checked(causal, window, softcap, scale, batch_invariant)
    returned: Tensor | tuple[Tensor, ...] = OPERATORS.attend(
        inputs, options, Wanted(return_lse, return_max_score), backend
    )
    return returned


def check(inputs: Inputs) -> None:
    """Raise unless ranks, dtypes, devices and numbers of sequences and pages fit."""
    q, k, v, _, seqlens_k, *_ = inputs
    table = inputs.page_table
    check_scales_of(inputs)
    dense.check(as_wide(inputs))
    padded.check_tree_of(inputs)
    check_lengths("seqlens_k", seqlens_k, q)
    check_integers("page_table", table, q, 2, "two dimensions, [batch, max_pages]")
    assert table is not None
    assert seqlens_k is not None
    for name, x, what in (("seqlens_k", seqlens_k, "entries"), ("page_table", table, "rows")):
        if x.shape[0] != q.shape[0]:
            raise ValueError(
                f"{name} has {x.shape[0]} {what}, but q has batch {q.shape[0]}; it has one for "
                "each sequence"
            )
    if table.shape[1] > 1 and table.stride(1) != 1:
        raise ValueError(
            f"page_table has a stride of {table.stride(1)} between the pages of a sequence; pass "
            "page_table.contiguous()"
        )
    if v.shape[0] != k.shape[0]:
        raise ValueError(
            f"v has {v.shape[0]} pages but k has {k.shape[0]} (shapes {shape_text(v)} and "
            f"{shape_text(k)}); a page of keys needs one of values: [num_pages, num_heads_kv, "
            "page_size, dim]"
        )
    if certainly(k.shape[0] == 0) and not certainly(table.shape[1] == 0):
        raise ValueError(
            f"k has no pages (shape {shape_text(k)}), but page_table has {table.shape[1]} entries "
            "a sequence; a cache without pages goes with a table of shape [batch, 0]"
        )
    if certainly(k.shape[2] == 0):
        raise ValueError(f"k has page_size 0 (shape {shape_text(k)}); a page has at least one key")
    reach = table.shape[1] * k.shape[2]
    if certainly(reach > SEQLEN_MAX):
        raise NotImplementedError(
            f"page_table reaches {reach} keys ({table.shape[1]} pages of {k.shape[2]}); at most "
            f"{SEQLEN_MAX} are supported: pass fewer columns of it"
        )


def paged_problem(inputs: Inputs, options: Options) -> Problem:
    """Validate the tensors of a call with pages and describe them.

    Raises:
        TypeError, ValueError, NotImplementedError: as `attention_paged`.
    """
    check(inputs)
    return pages_problem(inputs.q, inputs, options)


def pages_problem(q: Tensor, inputs: Inputs, options: Options) -> Problem:
    """Describe a call whose keys and values lie in pages.

    Args:
        q: of the call, [batch, num_heads_q, seqlen_q, head_dim]. Packed queries come with batch 1;
            the caller replaces what they alone say.
        inputs: of the call, checked.
        options: of the call.
    """
    k, v, table = inputs.k, inputs.v, inputs.page_table
    assert table is not None
    num_pages, _, page_size, _ = k.shape
    # Of a page for each sequence; what lies where is said below.
    of_k, of_v = (
        x.new_empty((1, *x.shape[1:]), dtype=q.dtype).expand(q.shape[0], -1, -1, -1) for x in (k, v)
    )
    check_qkv(q, of_k, of_v)
    asked = {**options.asked(), "window": None}
    problem = Problem.from_tensors(q, of_k, of_v, return_lse=True, sinks=inputs.sinks, **asked)
    window = checked_window((options.window_left, options.window_right))
    reach = table.shape[1] * page_size
    if inputs.mask is not None:
        check_mask(inputs.mask, q, reach)
    tree = inputs.tree_mask
    either = inputs.mask if tree is None else tree
    left, right = widest_band(options.causal, window, q.shape[2], reach)
    return dataclasses.replace(
        problem,
        **described_memory(q, k, v),
        seqlen_k=reach,
        window_left=left,
        window_right=right,
        diag_offset=0,
        mask=None if either is None else mask_spec(either, tree is not None),
        varlen="pages",
        page_size=page_size,
        num_pages=num_pages,
        page_table_stride=table.stride(0),
        **described_scales(inputs),
    )


def _compute(inputs: Inputs, options: Options, wanted: Wanted, asked: str) -> Results:
    table = inputs.page_table
    assert table is not None

    def keys(b: slice, n: int) -> tuple[Tensor, Tensor]:
        entries = table[b.start]
        return keys_of_sequence(inputs.k, entries, n), keys_of_sequence(inputs.v, entries, n)

    problem = paged_problem(inputs, options)
    return padded.compute_lengths(problem, inputs, NAMES, keys, wanted, asked)


def _differentiate(
    arriving: Results,
    inputs: Inputs,
    results: Results,
    options: Options,
    needs: tuple[bool, ...],
    backend: str,
) -> Gradients:
    dq, dk, dv, dsinks = padded.differentiate(
        arriving, padded_inputs(inputs), results, options, needs, backend
    )
    return dq, *scattered_pair((dk, dv), inputs), dsinks


OPERATORS = Operators(
    Family(
        name="attention_paged",
        inputs=(
            "q", "k", "v", "mask", "page_table", "seqlens_k", "sinks", "k_scale", "v_scale",
            "tree_mask",
        ),
        differentiable=("q", "k", "v", "sinks"),
        places={
            "q": 0, "k": None, "v": None, "mask": "mask", "page_table": 0, "seqlens_k": 0,
            "sinks": None, "k_scale": None, "v_scale": None, "tree_mask": "mask", "out": 0,
            "lse": 0, "max_score": 0,
        },
        check=check,
        compute=_compute,
        differentiate=_differentiate,
        shapes=dense.shapes,
        plain=paged_forward_plain,
        differentiate_plain=paged_backward_plain,
        second_order=paged_second_order,
        scores=flops.paged_scores,
    )
)  # fmt: skip
