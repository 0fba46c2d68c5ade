"""Laws that hold whatever the numbers are, on shapes, strides and masks that hypothesis draws.

The kernel backends draw from a short list of options, because each combination is one more program
to compile; lengths, strides and values vary freely. Results are compared under the error rule of
checks/accuracy.py: a law fails where its result would be a wrong answer to the original question.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import flashcore
from backends import check, check_case, device_of, every_backend
from flashcore.checks.accuracy import error_report
from flashcore.checks.cases import Case, make_inputs
from flashcore.checks.reference import attention_oracle

few = settings(max_examples=15)
seeds = st.integers(0, 2**32 - 1)

KERNEL_OPTIONS = (
    {},
    {"causal": "lower_right"},
    {"causal": "upper_left"},
    {"window": (9, 30)},
    {"mask": "bool"},
    {"mask": "padding"},
    {"mask": "additive"},
)


@st.composite
def plain_cases(draw, backend, min_seqlen=1, max_seqlen=150):
    """Draw shapes and values without options. Kernels: one program."""
    dtype = "float16" if backend != "torch" else draw(st.sampled_from(("float16", "float64")))
    heads_kv = draw(st.integers(1, 2))
    return Case(
        batch=draw(st.integers(1, 2)),
        num_heads_q=heads_kv * draw(st.integers(1, 3)),
        num_heads_kv=heads_kv,
        seqlen_q=draw(st.integers(min_seqlen, max_seqlen)),
        seqlen_k=draw(st.integers(min_seqlen, max_seqlen)),
        head_dim=16,
        head_dim_v=64,  # enough outputs for their mean error to mean something
        dtype=dtype,
        layout=draw(st.sampled_from(("bhsd", "bshd"))),
        spread=draw(st.sampled_from((1.0, 8.0))),
        seed=draw(seeds),
    )


@st.composite
def any_cases(draw, backend):
    """Draw everything that a Case can say."""
    case = draw(plain_cases(backend, min_seqlen=0))
    case = dataclasses.replace(case, tail=draw(st.integers(0, 3)))
    if backend != "torch":
        options = draw(st.sampled_from(KERNEL_OPTIONS))
        offset = draw(st.sampled_from((0, 8) if options else (0, 1, 2, 4)))
        return dataclasses.replace(case, offset=offset, **options)
    side = st.integers(-1, 40)
    positive = st.floats(0.05, 20.0)
    return dataclasses.replace(
        case,
        offset=draw(st.integers(0, 9)),
        head_dim=8 * draw(st.integers(1, 5)),
        head_dim_v=8 * draw(st.integers(1, 5)),
        dtype=draw(st.sampled_from(("float16", "bfloat16", "float32", "float64"))),
        causal=draw(st.sampled_from(("none", "lower_right", "upper_left"))),
        window=draw(st.none() | st.tuples(side, side)),
        softcap=draw(st.none() | positive),
        scale=draw(st.none() | positive),
        mask=draw(st.sampled_from(("none", "bool", "padding", "additive"))),
    )


def assert_rule(out, q, k, v, lse=None, **options):
    report = error_report(out, q, k, v, lse=lse, **options)
    assert report.ok, str(report)


@every_backend
@settings(max_examples=40)
@given(data=st.data())
def test_equals_the_oracle(backend, data):
    check_case(backend, data.draw(any_cases(backend)))


@every_backend
@few
@given(data=st.data())
def test_order_of_keys_does_not_matter(backend, data):
    case = data.draw(plain_cases(backend))
    inputs = make_inputs(case, device_of(backend))
    q, k, v = inputs.q, inputs.k, inputs.v
    order = torch.randperm(case.seqlen_k, generator=torch.Generator().manual_seed(case.seed))
    order = order.to(k.device)
    out, lse = flashcore.attention(
        q, k[:, :, order], v[:, :, order], return_lse=True, backend=backend
    )
    assert_rule(out, q, k, v, lse)


@every_backend
@few
@given(data=st.data(), shift=st.floats(-50, 50))
def test_a_constant_added_to_a_rows_scores_only_moves_lse(backend, data, shift):
    case = data.draw(plain_cases(backend))
    inputs = make_inputs(case, device_of(backend))
    q, k, v = inputs.q, inputs.k, inputs.v
    wide = torch.float64 if case.dtype == "float64" else torch.float32
    shifts = torch.linspace(shift, -shift, case.seqlen_q, dtype=wide, device=q.device)
    out, lse = flashcore.attention(q, k, v, mask=shifts[:, None], return_lse=True, backend=backend)
    assert_rule(out, q, k, v, lse - shifts)


@every_backend
@few
@given(data=st.data())
def test_keys_split_in_two_and_merged_by_lse(backend, data):
    case = data.draw(plain_cases(backend))
    inputs = make_inputs(case, device_of(backend))
    q, k, v = inputs.q, inputs.k, inputs.v
    cut = data.draw(st.integers(0, case.seqlen_k), label="cut")
    parts = [
        flashcore.attention(q, k[:, :, part], v[:, :, part], return_lse=True, backend=backend)
        for part in (slice(0, cut), slice(cut, None))
    ]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * torch.exp(part_lse - lse)[..., None] for out, part_lse in parts)
    assert_rule(merged, q, k, v, lse)


@every_backend
@few
@given(data=st.data(), exponent=st.integers(-3, 3))
def test_scaling_v_scales_the_output(backend, data, exponent):
    inputs = make_inputs(data.draw(plain_cases(backend)), device_of(backend))
    q, k, v = inputs.q, inputs.k, inputs.v
    v = v * (v.abs() > 2.0**-10)  # or float16 has fewer bits for the scaled ones
    factor = 2.0**exponent  # exact in every dtype, but where the result is subnormal
    out = flashcore.attention(q, k, v, backend=backend)
    scaled = flashcore.attention(q, k, v * factor, backend=backend)
    torch.testing.assert_close(scaled, out * factor, rtol=0, atol=1e-6)


@every_backend
@few
@given(data=st.data(), size=st.sampled_from((1e2, 1e3, 1e4)))
def test_large_scores_do_not_overflow(backend, data, size):
    case = data.draw(plain_cases(backend, max_seqlen=70))
    inputs = make_inputs(case, device_of(backend))
    q, k, v = inputs.q, inputs.k, inputs.v
    largest = (q.double() @ k.double().repeat_interleave(
        case.num_heads_q // case.num_heads_kv, dim=1).mT).abs().max() / 4.0  # fmt: skip
    assume(largest > 0.5)
    q = (q * (size / largest)).to(q.dtype)
    out, lse = flashcore.attention(q, k, v, return_lse=True, backend=backend)
    assert lse.isfinite().all()
    # In float32 a score of 1e4 is known to 1e-3, also where it is what large terms cancel to; hence
    # so are lse and a weight.
    want, want_lse = attention_oracle(q, k, v)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=max(1e-5, 2e-7 * size))
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-2)
    # A key that outweighs all others by so much is the only one.
    mask = torch.full((case.seqlen_k,), -size, device=q.device)
    mask[-1] = size
    alone = flashcore.attention(q * 0, k, v, mask=mask, backend=backend)
    group_size = case.num_heads_q // case.num_heads_kv
    want = v[:, :, -1:].repeat_interleave(group_size, dim=1).expand_as(alone)
    torch.testing.assert_close(alone, want, rtol=1e-3, atol=1e-6)


@every_backend
@few
@given(data=st.data(), garbage=st.sampled_from((math.nan, math.inf, -math.inf)))
def test_memory_past_a_sequences_end_never_leaks(backend, data, garbage):
    """The same numbers, with zeros and with garbage before, after and between them. (Where they lie
    decides which kernel adds them up, and in which order.)"""
    case = data.draw(plain_cases(backend))
    inputs = make_inputs(case, device_of(backend))

    def amid(fill, x):
        batch, heads, seqlen, head_dim = x.shape
        big = x.new_full((batch + 1, heads + 1, seqlen + 5, head_dim + 8), fill)
        view = big[:batch, :heads, 2 : 2 + seqlen, :head_dim]
        return view.copy_(x)

    want, got = (
        flashcore.attention(
            *(amid(fill, x) for x in (inputs.q, inputs.k, inputs.v)),
            return_lse=True,
            backend=backend,
        )
        for fill in (0.0, garbage)
    )
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@every_backend
@few
@given(data=st.data())
def test_strides_do_not_matter(backend, data):
    """Any order of dimensions in memory, gaps, and one row or head seen many times."""
    case = data.draw(plain_cases(backend))
    inputs = make_inputs(case, device_of(backend))

    def restride(name, x):
        kind = data.draw(st.sampled_from(("permuted", "gaps", "one row", "one head")), label=name)
        if kind == "one row":
            return x[:, :, :1].expand_as(x)
        if kind == "one head":
            return x[:, :1].expand_as(x)
        if kind == "gaps":
            wide = x.new_full((*x.shape[:2], 2 * x.shape[2], x.shape[3]), math.nan)
            return wide[:, :, ::2].copy_(x)
        order = data.draw(st.permutations((0, 1, 2)), label="order")
        back = [order.index(d) for d in range(3)]
        return x.permute(*order, 3).contiguous().permute(*back, 3)

    q, k, v = (restride(name, getattr(inputs, name)) for name in "qkv")
    got, _ = check(backend, q, k, v)
    want = flashcore.attention(q.contiguous(), k.contiguous(), v.contiguous(), backend=backend)
    if backend not in ("torch", "auto"):  # "auto" may take another kernel for other strides
        assert torch.equal(got, want)
