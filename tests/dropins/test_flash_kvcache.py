"""Test flash-attn's functions over a cache, of versions 2 and 3: layouts, defaults, meaning."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from cache_steps import Step, check_step, make_step
from torch import Tensor

from flashcore.compat import flash_attn, flash_attn_3

pytestmark = pytest.mark.filterwarnings("ignore::flashcore.FallbackWarning")

BOTH = pytest.mark.parametrize(
    "function", [flash_attn.flash_attn_with_kvcache, flash_attn_3.flash_attn_with_kvcache]
)
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
INT32 = torch.int32


def arguments(step: Step, function: Any) -> dict[str, Any]:
    """Return a step's arguments as flash-attn has them: heads next to last."""
    given = step.arguments()
    found = {n: given[n].transpose(1, 2) for n in ("q", "k_cache", "v_cache")}
    if step.new is not None:
        found |= {"k": given["k_new"].transpose(1, 2), "v": given["v_new"].transpose(1, 2)}
    is_3 = function is flash_attn_3.flash_attn_with_kvcache
    found |= {"cache_seqlens": step.seqlens_k}
    return found | {"page_table" if is_3 else "block_table": step.page_table}


def check(step: Step, function: Any, options: dict[str, Any], **plain: Any) -> None:
    """Call a function, and hold its results and its caches to the oracle."""
    given = arguments(step, function)
    out, lse = function(**given, **options, return_softmax_lse=True)
    assert out.is_contiguous()
    q, k_new = plain.pop("q", None), plain.pop("k_new", None)
    caches = given["k_cache"].transpose(1, 2), given["v_cache"].transpose(1, 2)
    check_step(step, (out.transpose(1, 2), lse), caches, q=q, k_new=k_new, **plain)
    again = function(**arguments(step, function), **options)
    assert torch.equal(again, out)


SHAPES: dict[str, dict[str, Any]] = {
    "one token": {},
    "a few, in pages": {"seqlen_q": 3, "page_size": 8, "heads_third": True},
    "none new": {"seqlen_q": 3, "seqlen_new": 0},
}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window_size": (4, 1)}, {"window": (4, 1)}),
    "softcap, scale": ({"softcap": 2.0, "softmax_scale": 0.4}, {"softcap": 2.0, "scale": 0.4}),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@BOTH
@DEVICES
def test_options_mean_what_flash_attn_says(
    device: str, function: Any, shape: str, name: str
) -> None:
    options, plain = OPTIONS[name]
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    step = make_step([3, 17, 0, 31], dtype=dtype, device=device, **SHAPES[shape])
    check(step, function, {**options, "num_splits": 3}, **plain)


def turned(x: Tensor, position: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return [batch, heads, seqlen, dim] with pairs 0 and 1, 2 and 3 ... rotated."""
    a, b = x[..., 0::2], x[..., 1::2]
    c, s = cos[position][:, None], sin[position][:, None]
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)


ANGLE = torch.arange(40, dtype=torch.float64)[:, None] * 0.5 ** torch.arange(8)
COS, SIN = ANGLE.cos(), ANGLE.sin()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (5, 5)}])
@pytest.mark.parametrize("seqlen_new", [3, 5])
@BOTH
def test_rotations_are_where_flash_attn_has_them(
    function: Any, seqlen_new: int, options: dict[str, Any]
) -> None:
    """Queries begin at cache_seqlens; all of them are there if neither causal nor windowed."""
    step = make_step([3, 17, 0], seqlen_q=3, seqlen_new=seqlen_new)
    before = step.seqlens_k.long()[:, None]
    at = before + torch.arange(3) * bool(options)
    assert step.new is not None
    plain: dict[str, Any] = {"q": turned(step.q, at, COS, SIN)}
    plain["k_new"] = turned(step.new[0], before + torch.arange(seqlen_new), COS, SIN)
    plain |= {"causal": True} if "causal" in options else {}
    plain |= {"window": (5, 5)} if "window_size" in options else {}
    check(step, function, {**options, "rotary_cos": COS, "rotary_sin": SIN}, **plain)


def test_rotations_begin_where_rotary_seqlens_says() -> None:
    step = make_step([3, 17], seqlen_q=2)
    begin = torch.tensor([9, 30], dtype=INT32)
    at = begin.long()[:, None] + torch.arange(2)
    assert step.new is not None
    options = {"rotary_cos": COS, "rotary_sin": SIN, "rotary_seqlens": begin, "causal": True}
    q, k_new = turned(step.q, at, COS, SIN), turned(step.new[0], at, COS, SIN)
    check(step, flash_attn_3.flash_attn_with_kvcache, options, q=q, k_new=k_new, causal=True)


@BOTH
def test_lengths_may_be_one_number_or_none(function: Any) -> None:
    step = make_step([30, 30], seqlen_q=2)
    given = arguments(step, function)
    want = function(**given)
    given = arguments(step, function) | {"cache_seqlens": 30}
    assert torch.equal(function(**given), want)
    full = {n: given[n] for n in ("q", "k_cache", "v_cache")}
    assert torch.equal(function(**full), want)


@pytest.mark.parametrize("pad", [[0, 0], [4, 1]])
@pytest.mark.parametrize("slopes", [None, [0.5, 0.25, 0.125, 0.0625], [[1, 2, 3, 4], [4, 3, 2, 1]]])
def test_rows_padding_and_slopes(slopes: Any, pad: list[int]) -> None:
    step = make_step([5, 12, 9], seqlen_q=2)
    rows, leftpad = torch.tensor([2, 0], dtype=INT32), torch.tensor(pad, dtype=INT32)
    chosen = Step(step.q[:2], step.caches, tuple(x[:2] for x in step.new), [9, 5])  # type: ignore[union-attr,arg-type]
    given = arguments(chosen, flash_attn.flash_attn_with_kvcache)
    given["k_cache"][2, : pad[0]] = given["v_cache"][2, : pad[0]] = torch.nan
    weights = None if slopes is None else torch.tensor(slopes, dtype=torch.float32)
    out = flash_attn.flash_attn_with_kvcache(
        **given, causal=True, cache_batch_idx=rows, cache_leftpad=leftpad, alibi_slopes=weights
    )
    for b, (row, end) in enumerate(((2, 11), (0, 7))):
        own = slice(b, b + 1)
        k, v = (given[n][row : row + 1, pad[b] : end] for n in ("k_cache", "v_cache"))
        assert torch.equal(k[0, -2:], given["k"][b])
        if weights is not None and weights.dim() == 2:
            weights = torch.tensor(slopes[b], dtype=torch.float32)
        want = flash_attn.flash_attn_func(given["q"][own], k, v, causal=True, alibi_slopes=weights)
        torch.testing.assert_close(out[own], want)
        weights = None if slopes is None else torch.tensor(slopes, dtype=torch.float32)


@pytest.mark.parametrize("grad", [False, True])
@BOTH
def test_the_result_has_no_gradient(function: Any, grad: bool) -> None:
    given = arguments(make_step([3, 17]), function)
    given["q"].requires_grad_(grad)
    assert not function(**given).requires_grad


def ends(*counts: int) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(INT32)


@DEVICES
def test_packed_queries_over_pages_as_vllm_calls_them(device: str) -> None:
    """One call for chunks of prompts and decoding tokens; out is given, hints are ignored."""
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    step = make_step([20, 7, 32], seqlen_q=6, seqlen_new=0, page_size=8, dtype=dtype, device=device)
    counts = [6, 1, 2]
    q = torch.cat([step.q[b, :, :n].transpose(0, 1) for b, n in enumerate(counts)])
    out = torch.empty_like(q)
    k, v = (x.transpose(1, 2) for x in step.caches)
    lse = flash_attn_3.flash_attn_varlen_func(
        q=q, k=k, v=v, out=out, cu_seqlens_q=ends(*counts).to(device), max_seqlen_q=6,
        seqused_k=step.seqlens_k, max_seqlen_k=32, softmax_scale=0.3, causal=True,
        alibi_slopes=None, window_size=[-1, -1], block_table=step.page_table, softcap=0,
        scheduler_metadata=torch.empty(0), fa_version=3, q_descale=torch.ones(1), num_splits=0,
        s_aux=None, return_softmax_lse=True,
    )[1]  # fmt: skip
    begin = 0
    for b, n in enumerate(counts):
        own = Step(step.q[b : b + 1, :, :n], step.caches, None, [step.lengths[b]])
        own.table = [step.table[b]]  # type: ignore[index]
        rows = slice(begin, begin + n)
        result = out[rows].transpose(0, 1)[None], lse[None, :, rows]
        check_step(own, result, step.caches, causal=True, scale=0.3)
        begin += n
    packed = flash_attn_3.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=step.seqlens_k, page_table=step.page_table, softmax_scale=0.3,
        cu_seqlens_q=ends(*counts).to(device), max_seqlen_q=6, causal=True,
    )  # fmt: skip
    assert torch.equal(packed, out)


def test_flash_attn_2_packed_queries_over_pages() -> None:
    step = make_step([20, 7], seqlen_q=4, seqlen_new=0, page_size=8)
    q = step.q.transpose(1, 2).flatten(0, 1)
    k, v = (x.transpose(1, 2) for x in step.caches)
    out, lse, probs = flash_attn.flash_attn_varlen_func(
        q, k, v, ends(4, 4), ends(20, 7), 4, 20, causal=True, block_table=step.page_table,
        return_attn_probs=True,
    )  # fmt: skip
    assert probs is None
    result = out.unflatten(0, (2, 4)).transpose(1, 2), lse.unflatten(1, (2, 4)).transpose(0, 1)
    check_step(step, result, step.caches, causal=True)


def test_new_tokens_of_flash_attn_3_may_be_packed() -> None:
    step = make_step([20, 7], seqlen_q=4, page_size=8)
    function = flash_attn_3.flash_attn_with_kvcache
    padded, given = arguments(step, function), arguments(step, function)
    want = function(**padded, causal=True)
    given |= {name: given[name].flatten(0, 1) for name in ("q", "k", "v")}
    lengths = {"cu_seqlens_q": ends(4, 4), "cu_seqlens_k_new": ends(4, 4), "max_seqlen_q": 4}
    torch.testing.assert_close(function(**given, **lengths, causal=True), want.flatten(0, 1))
    assert torch.equal(given["k_cache"].nan_to_num(), padded["k_cache"].nan_to_num())


def test_seqused_k_cuts_sequences_short() -> None:
    """Packed keys and padded ones are cut; the rest is not read."""
    q, k, v = torch.randn(3, 12, 2, 16, dtype=torch.float64)
    used, cuts = torch.tensor([3, 5], dtype=INT32), (ends(5, 7), ends(5, 7))
    keys = [(0, 3), (5, 10)]
    for x in (k, v):
        x[3:5], x[10:] = torch.nan, torch.nan
    out = flash_attn_3.flash_attn_varlen_func(q, k, v, *cuts, 7, 7, seqused_k=used, causal=True)
    padded = [torch.full((2, 7, 2, 16), torch.nan, dtype=torch.float64) for _ in range(2)]
    for whole, x in zip(padded, (k, v), strict=True):
        whole[0, :5], whole[1] = x[:5], x[5:]
    same = flash_attn_3.flash_attn_varlen_func(
        q, *padded, cuts[0], None, 7, None, seqused_k=used, causal=True
    )
    for rows, (begin, end) in zip((slice(0, 5), slice(5, 12)), keys, strict=True):
        own = q[rows][None], k[begin:end][None], v[begin:end][None]
        want = flash_attn_3.flash_attn_func(*own, causal=True)[0]
        torch.testing.assert_close(out[rows], want)
        torch.testing.assert_close(same[rows], want)


def test_flash_attn_3_without_a_cache_is_flash_attn_2() -> None:
    q, k, v = torch.randn(3, 2, 9, 2, 16, dtype=torch.float64).unbind(0)
    q.requires_grad_()
    out, lse = flash_attn_3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    want = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])
    assert out.requires_grad
    assert torch.equal(flash_attn_3.flash_attn_func(q, k, v, causal=True), out)
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    cuts = (ends(9, 9), ends(9, 9), 9, 9)
    given = torch.empty_like(rows[0])
    packed = flash_attn_3.flash_attn_varlen_func(
        *(x.detach() for x in rows), *cuts, causal=True, out=given
    )
    assert packed is given
    torch.testing.assert_close(packed.unflatten(0, (2, 9)), out.detach())
    assert flash_attn_3.flash_attn_varlen_func(*rows, *cuts).requires_grad
    batched = flash_attn_3.flash_attn_varlen_func(*(x.detach() for x in (q, k, v)), causal=True)
    torch.testing.assert_close(batched, out.detach())


def by_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Return an out [batch, heads, seqlen, dim] as sinks make it, from one without and its lse."""
    return out * torch.sigmoid(lse - sinks[:, None])[..., None]


def test_s_aux_is_the_sinks_of_every_function() -> None:
    step = make_step([20, 7], seqlen_q=4, seqlen_new=0, page_size=8)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    given = arguments(step, flash_attn_3.flash_attn_with_kvcache) | {"causal": True}
    out, lse = flash_attn_3.flash_attn_with_kvcache(**given, return_softmax_lse=True)
    want = by_sinks(out.transpose(1, 2), lse, sinks).transpose(1, 2)
    for chosen in ({"page_table": step.page_table}, {"cache_leftpad": torch.zeros(2, dtype=INT32)}):
        have = flash_attn_3.flash_attn_with_kvcache(**given | chosen, s_aux=sinks)
        torch.testing.assert_close(have, want)
    rows = {"q": given["q"].flatten(0, 1), "k": given["k_cache"], "v": given["v_cache"]}
    lengths = {"cu_seqlens_q": ends(4, 4), "seqused_k": step.seqlens_k, "causal": True}
    for longest in (4, None):  # padded, and gathered
        have = flash_attn_3.flash_attn_varlen_func(
            **rows, **lengths, max_seqlen_q=longest, block_table=step.page_table, s_aux=sinks
        )
        torch.testing.assert_close(have, want.flatten(0, 1))
    q, k, v = torch.randn(3, 2, 9, 4, 16, dtype=torch.float64).unbind(0)
    out, lse = flash_attn_3.flash_attn_func(q, k, v, return_attn_probs=True)
    want = by_sinks(out.transpose(1, 2), lse, sinks).transpose(1, 2)
    torch.testing.assert_close(flash_attn_3.flash_attn_func(q, k, v, s_aux=sinks), want)
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    have = flash_attn_3.flash_attn_varlen_func(*packed, ends(9, 9), ends(9, 9), 9, 9, s_aux=sinks)
    torch.testing.assert_close(have, want.flatten(0, 1))


def test_scheduler_metadata_is_something_to_pass_on() -> None:
    lengths = torch.tensor([3, 4], dtype=INT32)
    made = flash_attn_3.get_scheduler_metadata(2, 1, 64, 8, 2, 64, lengths, page_size=16)
    assert made.dtype == INT32
    given = arguments(make_step([3, 17]), flash_attn_3.flash_attn_with_kvcache)
    flash_attn_3.flash_attn_with_kvcache(**given, scheduler_metadata=made)


# Facts of flash-attn 3: the order of the arguments, which positional calls rely on.
DESCALE = ["q_descale", "k_descale", "v_descale"]
TAIL = ["window_size", "attention_chunk", "softcap", "num_splits", "pack_gqa", "deterministic",
        "sm_margin", "return_attn_probs"]  # fmt: skip
ORDERS = {
    "flash_attn_func": ["q", "k", "v", "softmax_scale", "causal", "qv", *DESCALE, *TAIL],
    "flash_attn_varlen_func": [
        "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_q",
        "seqused_k", "softmax_scale", "causal", "qv", *DESCALE, *TAIL,
    ],
    "flash_attn_with_kvcache": [
        "q", "k_cache", "v_cache", "k", "v", "qv", "rotary_cos", "rotary_sin", "cache_seqlens",
        "cache_batch_idx", "cache_leftpad", "page_table", "cu_seqlens_q", "cu_seqlens_k_new",
        "max_seqlen_q", "rotary_seqlens", *DESCALE, "softmax_scale", "causal", "window_size",
        "attention_chunk", "softcap", "rotary_interleaved", "scheduler_metadata", "num_splits",
        "pack_gqa", "sm_margin", "return_softmax_lse",
    ],
    "get_scheduler_metadata": [
        "batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads_q", "num_heads_kv", "headdim",
        "cache_seqlens", "qkv_dtype", "headdim_v", "cu_seqlens_q", "cu_seqlens_k_new",
        "cache_leftpad", "page_size", "max_seqlen_k_new", "causal", "window_size",
        "attention_chunk", "has_softcap", "num_splits", "pack_gqa", "sm_margin",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", flash_attn_3.__all__)
def test_arguments_stand_in_flash_attns_order(name: str) -> None:
    signature = inspect.signature(getattr(flash_attn_3, name))
    positional = [p.name for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert positional == ORDERS[name]


CACHE_BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "lengths of int64": (
        {"cache_seqlens": torch.tensor([3, 4])}, TypeError, r"cache_seqlens.*int64.*seqlens\.int"
    ),
    "no lengths": ({"cache_seqlens": None}, ValueError, "cache_seqlens is missing"),
    "another dtype": ({"k": torch.ones(2, 1, 2, 16)}, TypeError, r"^k has dtype torch\.float32"),
    "another dtype of the cache": (
        {"k_cache": torch.ones(2, 32, 2, 16)}, TypeError, r"k_cache has dtype torch\.float32 but q"
    ),
    "heads first": (
        {"k": torch.ones(2, 2, 1, 16).double()}, ValueError, r"^k has shape \[2, 2, 1, 16\]; its"
    ),
    "a flat q": ({"q": torch.ones(2, 16)}, ValueError, r"q has shape \[2, 16\]; it must be"),
    "cos alone": ({"rotary_cos": COS}, ValueError, "rotary_sin is missing"),
    "rotations of nothing new": (
        {"k": None, "v": None, "rotary_cos": COS, "rotary_sin": SIN}, ValueError, "cos.*k and v"
    ),
    "scale": ({"softmax_scale": -1.0}, ValueError, r"softmax_scale=-1\.0 must be positive"),
    "a name of ours": ({"seqlens_k": 1}, TypeError, "no argument 'seqlens_k'.*cache_seqlens"),
    "dropout": ({"dropout_p": 0.1}, TypeError, "no argument 'dropout_p'.*leave it out"),
}  # fmt: skip


@pytest.mark.parametrize("name", CACHE_BAD)
@BOTH
def test_errors_name_the_callers_argument(function: Any, name: str) -> None:
    changes, kind, words = CACHE_BAD[name]
    given = arguments(make_step([3, 17]), function)
    with pytest.raises(kind, match=words):
        function(**given | changes)


def test_tables_are_called_what_the_caller_calls_them() -> None:
    for function, name in (
        (flash_attn.flash_attn_with_kvcache, "block_table"),
        (flash_attn_3.flash_attn_with_kvcache, "page_table"),
    ):
        given = arguments(make_step([3, 17], page_size=8), function)
        given[name] = given[name].long()
        with pytest.raises(TypeError, match=f"{name} has dtype torch.int64.*{name}.int"):
            function(**given)
