"""Test flash-attn's functions: its layouts and defaults, against formulas written out here."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

import flashcore
from flashcore.compat import flash_attn
from flashcore.dropins import alibi

B, SQ, SK, HQ, HK, D = 2, 5, 9, 4, 2, 16


def randn(*shape, seed=0, device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def inputs(**kwargs):
    return (
        randn(B, SQ, HQ, D, **kwargs),
        randn(B, SK, HK, D, seed=1, **kwargs),
        randn(B, SK, HK, D, seed=2, **kwargs),
    )


def by_formula(q, k, v, *, scale=D**-0.5, visible=None, softcap=0.0, bias=None):
    """Return (out, lse): [batch, seqlen_q, heads, dim] and [batch, heads, seqlen_q]."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v), scores.logsumexp(-1)


def distance():
    """Return how far key j lies behind query i, aligned at the lower right."""
    return torch.arange(SK - SQ, SK)[:, None] - torch.arange(SK)


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
CASES = {
    "plain": ({}, {}),
    "scale": ({"softmax_scale": 0.7}, {"scale": 0.7}),
    "causal": ({"causal": True}, {"visible": distance() >= 0}),
    "window": ({"window_size": (2, 1)}, {"visible": (distance() <= 2) & (distance() >= -1)}),
    "left window": ({"window_size": (3, -1)}, {"visible": distance() <= 3}),
    "causal window": (
        {"causal": True, "window_size": (2, 5)}, {"visible": (distance() <= 2) & (distance() >= 0)}
    ),
    "softcap": ({"softcap": 1.5}, {"softcap": 1.5}),
    "alibi": (
        {"alibi_slopes": SLOPES}, {"bias": -SLOPES[:, None, None].double() * distance().abs()}
    ),
    "alibi of each sequence": (
        {"alibi_slopes": torch.stack([SLOPES, 2 * SLOPES]), "causal": True},
        {
            "bias": -torch.stack([SLOPES, 2 * SLOPES])[..., None, None].double()
            * distance().abs(),
            "visible": distance() >= 0,
        },
    ),
    "deterministic": ({"deterministic": True}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_options_mean_what_flash_attn_says(name):
    options, formula = CASES[name]
    q, k, v = inputs()
    out, lse, probs = flash_attn.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    expected_out, expected_lse = by_formula(q, k, v, **formula)
    assert probs is None
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, **options), out)
    out.view(B, SQ, HQ * D)  # as callers do: flash-attn's output is contiguous


@pytest.mark.parametrize("name", CASES)
def test_packed_forms(name):
    options, _ = CASES[name]
    kv = randn(B, SQ, 2, HK, D)
    q = randn(B, SQ, HQ, D)
    expected = flash_attn.flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], **options)
    assert torch.equal(flash_attn.flash_attn_kvpacked_func(q, kv, **options), expected)
    qkv = randn(B, SQ, 3, HQ, D)
    expected = flash_attn.flash_attn_func(*qkv.unbind(2), **options)
    assert torch.equal(flash_attn.flash_attn_qkvpacked_func(qkv, **options), expected)


CUTS_Q, CUTS_K = (0, 3, 3, 5), (0, 4, 6, 9)  # three sequences, the second without queries


@pytest.mark.filterwarnings("ignore::flashcore.FallbackWarning")
@pytest.mark.parametrize("name", CASES)
def test_varlen_is_each_sequence_alone(name):
    options = dict(CASES[name][0])
    slopes = options.get("alibi_slopes")
    if slopes is not None and slopes.dim() == 2:
        slopes = options["alibi_slopes"] = torch.stack([SLOPES, 2 * SLOPES, 3 * SLOPES])
    q, k, v = (x[0] for x in inputs())
    lengths = (*(torch.tensor(x, dtype=torch.int32) for x in (CUTS_Q, CUTS_K)), 3, 4)
    out, lse, probs = flash_attn.flash_attn_varlen_func(
        q, k, v, *lengths, **options, return_attn_probs=True
    )
    assert probs is None
    for b in range(3):
        i, j = slice(*CUTS_Q[b : b + 2]), slice(*CUTS_K[b : b + 2])
        if slopes is not None and slopes.dim() == 2:
            options["alibi_slopes"] = slopes[b]
        alone, alone_lse, _ = flash_attn.flash_attn_func(
            q[None, i], k[None, j], v[None, j], **options, return_attn_probs=True
        )
        torch.testing.assert_close(out[i], alone[0])
        torch.testing.assert_close(lse[:, i], alone_lse[0])
    if slopes is not None:
        options["alibi_slopes"] = slopes
    kv = torch.stack([k, v], dim=1)
    packed = flash_attn.flash_attn_varlen_kvpacked_func(q, kv, *lengths, **options)
    assert torch.equal(packed, out)
    qkv = torch.stack([q, q + 1, q + 2], dim=1)
    packed = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, lengths[0], 3, **options)
    split = (lengths[0], lengths[0], 3, 3)
    expected = flash_attn.flash_attn_varlen_func(*qkv.unbind(1), *split, **options)
    assert torch.equal(packed, expected)


def test_alibi_of_packed_sequences(monkeypatch):
    """One warning; gradients; rows of no sequence; and slopes of a wrong shape."""
    monkeypatch.setattr(alibi, "_warned", set())
    q, k, v = (x[0].requires_grad_() for x in inputs())
    ends = torch.tensor([0, 3, 4], dtype=torch.int32)
    arguments = (q, k, v, ends, ends, 3, 3)
    with pytest.warns(flashcore.FallbackWarning, match="alibi_slopes with packed") as caught:
        out = flash_attn.flash_attn_varlen_func(*arguments, alibi_slopes=SLOPES, causal=True)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flash_attn.flash_attn_varlen_func(*arguments, alibi_slopes=SLOPES, causal=True)
    assert not out[4:].any()
    ours = torch.autograd.grad(out.square().sum(), (q, k, v))
    parts = [
        flash_attn.flash_attn_func(q[None, i], k[None, i], v[None, i], 0.0, None, True, (-1, -1),
                                   0.0, SLOPES)[0]
        for i in (slice(0, 3), slice(3, 4))
    ]  # fmt: skip
    alone = torch.autograd.grad(torch.cat(parts).square().sum(), (q, k, v))
    torch.testing.assert_close(ours, alone)
    with pytest.raises(ValueError, match=r"alibi_slopes has shape \[3, 4\].*\[2, 4\]"):
        flash_attn.flash_attn_varlen_func(*arguments, alibi_slopes=SLOPES.expand(3, 4))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::flashcore.FallbackWarning")
def test_alibi_of_packed_sequences_on_the_gpu():
    q, k, v = (x[0].cuda().half() for x in inputs())
    lengths = (*(torch.tensor(x, dtype=torch.int32).cuda() for x in (CUTS_Q, CUTS_K)), 3, 4)
    ours = flash_attn.flash_attn_varlen_func(q, k, v, *lengths, alibi_slopes=SLOPES.cuda())
    lengths = (*(x.cpu() for x in lengths[:2]), 3, 4)
    exact = flash_attn.flash_attn_varlen_func(
        *(x.double().cpu() for x in (q, k, v)), *lengths, alibi_slopes=SLOPES
    )
    torch.testing.assert_close(ours.double().cpu(), exact, atol=2e-3, rtol=2e-3)


def test_gradients_flow_to_a_packed_tensor():
    qkv = randn(B, SQ, 3, HQ, D).requires_grad_()
    flash_attn.flash_attn_qkvpacked_func(qkv, causal=True).square().sum().backward()
    gradient, qkv.grad = qkv.grad, None
    visible = torch.ones(SQ, SQ, dtype=torch.bool).tril()
    by_formula(*qkv.unbind(2), visible=visible)[0].square().sum().backward()
    torch.testing.assert_close(gradient, qkv.grad)


# Facts of flash-attn 2.8: the order of the arguments, which positional calls rely on.
TAIL = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes",
        "deterministic", "return_attn_probs"]  # fmt: skip
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
ORDERS = {
    "flash_attn_func": ["q", "k", "v", *TAIL],
    "flash_attn_qkvpacked_func": ["qkv", *TAIL],
    "flash_attn_kvpacked_func": ["q", "kv", *TAIL],
    "flash_attn_varlen_func": ["q", "k", "v", *LENGTHS, *TAIL, "block_table"],
    "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen", *TAIL],
    "flash_attn_varlen_kvpacked_func": ["q", "kv", *LENGTHS, *TAIL],
    "flash_attn_with_kvcache": [
        "q",
        "k_cache",
        "v_cache",
        "k",
        "v",
        "rotary_cos",
        "rotary_sin",
        "cache_seqlens",
        "cache_batch_idx",
        "cache_leftpad",
        "block_table",
        "softmax_scale",
        "causal",
        "window_size",
        "softcap",
        "rotary_interleaved",
        "alibi_slopes",
        "num_splits",
        "return_softmax_lse",
    ],
}


@pytest.mark.parametrize("name", flash_attn.__all__)
def test_arguments_stand_in_flash_attns_order(name):
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    ordered = [x.name for x in parameters if x.kind is not x.KEYWORD_ONLY]
    assert ordered == ORDERS[name]
    assert {x.name for x in parameters} - set(ordered) <= {"learnable_sink", "s_aux"}


def test_what_is_not_supported_raises_and_names_the_argument():
    q, k, v = inputs()
    with pytest.raises(NotImplementedError, match=r"dropout_p=0\.1.*pass 0\.0"):
        flash_attn.flash_attn_func(q, k, v, 0.1)
    cuts = torch.tensor([0, 5], dtype=torch.int32)
    varlen = (q[0], q[0], q[0], cuts, cuts, 5, 5)
    with pytest.raises(NotImplementedError, match="dropout_p"):
        flash_attn.flash_attn_varlen_func(*varlen, dropout_p=0.1)
    with pytest.raises(ValueError, match=r"alibi_slopes has shape \[3\].*\[4\]"):
        flash_attn.flash_attn_func(q, k, v, alibi_slopes=SLOPES[:3])
    with pytest.raises(ValueError, match=r"qkv has shape \[2, 5, 4, 16\].*3, num_heads"):
        flash_attn.flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match=r"kv has shape .*2, num_heads_kv"):
        flash_attn.flash_attn_kvpacked_func(q, randn(B, SK, 3, HK, D))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_the_gpu(name, dtype):
    options, formula = CASES[name]
    if "alibi_slopes" in options:
        options = {**options, "alibi_slopes": options["alibi_slopes"].cuda()}
    q, k, v = inputs(device="cuda", dtype=dtype)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    expected = by_formula(*(x.double().cpu() for x in (q, k, v)), **formula)
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double().cpu(), expected[0], atol=bound, rtol=bound)
    torch.testing.assert_close(lse.double().cpu(), expected[1], atol=1e-3, rtol=1e-3)
