"""Test gradients: against finite differences in float64, and of every backend against the
oracle's."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from parameters import thorough_but

import flashcore
from backends import device_of, every_backend
from flashcore.backends import tiled
from flashcore.checks.accuracy import torch_math_attention
from flashcore.checks.reference import attention_oracle


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Return tiles of 3 x 4, so that short sequences cross tile borders."""
    monkeypatch.setattr(tiled, "BLOCK_M_MIN", 1)
    monkeypatch.setattr(tiled, "BLOCK_M_MAX", 3)
    monkeypatch.setattr(tiled, "BLOCK_N_MAX", 4)


def leaves(*shapes, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator).to(dtype=dtype, device=device).requires_grad_()
        for shape in shapes
    ]


def qkv(seqlen_q=5, seqlen_k=7, heads=2, heads_kv=1, head_dim_v=16, batch=1, **kind):
    return leaves(
        (batch, heads, seqlen_q, 8),
        (batch, heads_kv, seqlen_k, 8),
        (batch, heads_kv, seqlen_k, head_dim_v),
        **kind,
    )


OPTIONS = [
    dict(zip(("causal", "window", "softcap", "scale"), values, strict=True))
    for values in itertools.product(
        (False, "lower_right", "upper_left"), (None, (1, 2)), (None, 0.7), (None, 0.6)
    )
]
# Every value of an option with others beside it; a second each.
FEW_OPTIONS = [
    (False, None, None, None),
    ("lower_right", None, 0.7, 0.6),
    ("upper_left", (1, 2), 0.7, 0.6),
]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            options,
            id="-".join(map(str, options.values())),
            marks=() if tuple(options.values()) in FEW_OPTIONS else pytest.mark.thorough,
        )
        for options in OPTIONS
    ],
)
def test_gradcheck_of_options(options):
    assert torch.autograd.gradcheck(
        lambda q, k, v: flashcore.attention(q, k, v, return_lse=True, **options), qkv(5, 6)
    )


@pytest.mark.parametrize(
    "lengths", thorough_but([(1, 9), (8, 5)], [(1, 1), (1, 9), (9, 1), (3, 4), (8, 5)])
)
@pytest.mark.parametrize("return_lse", [False, True])
def test_gradcheck_of_lengths(lengths, return_lse):
    """Upper left, so that no row is empty: at lse = -inf finite differences are NaN."""
    assert torch.autograd.gradcheck(
        lambda q, k, v: flashcore.attention(q, k, v, causal="upper_left", return_lse=return_lse),
        qkv(*lengths, batch=2, head_dim_v=8),
    )


MASK_SHAPES = [(1, 2, 5, 7), (5, 7), (7,), (5, 1), (2, 1, 1), (1, 1, 1, 1), ()]


@pytest.mark.parametrize("shape", thorough_but([(5, 1)], MASK_SHAPES), ids=str)
def test_gradcheck_of_additive_mask(shape):
    def function(q, k, v, mask):
        return flashcore.attention(q, k, v, mask=mask, softcap=2.0, causal=True, return_lse=True)

    assert torch.autograd.gradcheck(function, qkv() + leaves(shape, seed=1))


@pytest.mark.thorough
def test_gradcheck_of_expanded_inputs():
    """One storage seen as several batches, heads and rows: gradients add up in it."""

    def function(q, k, v, mask):
        return flashcore.attention(
            q.expand(2, 4, 5, 8),
            k.expand(2, 2, 7, 8),
            v.expand(2, 2, 7, 16),
            mask=mask.expand(2, 4, 5, 7),
        )

    shapes = ((1, 1, 5, 8), (1, 2, 1, 8), (2, 1, 1, 16), (5, 1))
    assert torch.autograd.gradcheck(function, leaves(*shapes))


def test_gradcheck_of_transposed_layout():
    def function(q, k, v):
        return flashcore.attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)

    assert torch.autograd.gradcheck(function, leaves((2, 5, 2, 8), (2, 7, 2, 8), (2, 7, 2, 8)))


@every_backend
def test_gradients_of_half_precision(backend):
    """Right to twice what the dtype costs torch's autograd through the plain computation."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 33, 64), (2, 2, 40, 64), (2, 2, 40, 64), (33, 40))
    values = [torch.randn(shape, generator=generator).half() for shape in shapes]
    weights = torch.randn(2, 4, 33, 64, generator=generator).half()

    def gradients(function, device, dtype):
        q, k, v, mask = (x.to(device, dtype).requires_grad_() for x in values)
        out = function(q, k, v, mask=mask, causal=True)
        loss = (out * weights.to(device, dtype)).sum()
        return [x.double().cpu() for x in torch.autograd.grad(loss, (q, k, v, mask))]

    def ours(q, k, v, **options):
        return flashcore.attention(q, k, v, backend=backend, **options)

    def oracle(q, k, v, **options):
        return attention_oracle(q, k, v, **options)[0]

    got = gradients(ours, device_of(backend), torch.float16)
    want = gradients(oracle, "cpu", torch.float64)
    plain = gradients(torch_math_attention, "cpu", torch.float16)
    for name, ours_, true, torchs in zip(
        ("dq", "dk", "dv", "dmask"), got, want, plain, strict=True
    ):
        limit = 2 * (torchs - true).abs().max() + 1e-5
        assert (ours_ - true).abs().max() <= limit, name


@every_backend
@pytest.mark.parametrize("incoming", [1.0, math.nan])
def test_empty_rows_have_zero_gradients(backend, incoming):
    """Even where NaN arrives, as it does from exp(lse - lse) of an empty row."""
    device = device_of(backend)
    q, k, v = leaves(*[(1, 2, s, 64) for s in (40, 30, 30)], dtype=torch.float16, device=device)
    out, lse = flashcore.attention(q, k, v, causal=True, return_lse=True, backend=backend)
    assert (lse[:, :, :10] == -math.inf).all()
    dout, dlse = torch.ones_like(out), torch.ones_like(lse)
    dout[:, :, :10] = incoming
    dlse[:, :, :10] = incoming
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    assert (dq[:, :, :10] == 0).all()
    for gradient in (dq, dk, dv):
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


@every_backend
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend_to(backend, lengths):
    q, k, v = qkv(*lengths, dtype=torch.float16, device=device_of(backend))
    out, lse = flashcore.attention(q, k, v, return_lse=True, backend=backend)
    assert out.requires_grad
    gradients = torch.autograd.grad((out.sum(), lse.sum()), (q, k, v), retain_graph=True)
    recorded = torch.autograd.grad((out.sum(), lse.sum()), (q, k, v), create_graph=True)
    for gradient, x in zip(gradients + recorded, (q, k, v) * 2, strict=True):
        assert gradient.shape == x.shape
        assert (gradient == 0).all()


def test_merging_two_halves_by_lse_has_the_gradient_of_the_whole():
    q, k, v = qkv(5, 8)

    def merged():
        parts = [
            flashcore.attention(q, k[:, :, part], v[:, :, part], return_lse=True)
            for part in (slice(0, 3), slice(3, 8))
        ]
        lse = torch.logaddexp(parts[0][1], parts[1][1])
        return sum(out * torch.exp(part_lse - lse)[..., None] for out, part_lse in parts)

    weights = leaves((1, 2, 5, 16), seed=3)[0].detach()
    got = torch.autograd.grad((merged() * weights).sum(), (q, k, v))
    want = torch.autograd.grad((flashcore.attention(q, k, v) * weights).sum(), (q, k, v))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("wanted", range(4))
def test_only_what_requires_grad_gets_one(wanted):
    tensors = qkv() + leaves((5, 7), seed=1)
    for i, x in enumerate(tensors):
        x.requires_grad_(i == wanted)
    q, k, v, mask = tensors
    flashcore.attention(q, k, v, mask=mask).sum().backward()
    assert [x.grad is not None for x in tensors] == [i == wanted for i in range(4)]


def test_only_lse_used():
    q, k, v = qkv()
    _, lse = flashcore.attention(q, k, v, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    want_q, want_k = torch.autograd.grad(attention_oracle(q, k, v)[1].sum(), (q, k))
    torch.testing.assert_close((dq, dk), (want_q, want_k))
    assert (dv == 0).all()


def test_no_graph_without_need():
    q, k, v = qkv()
    with torch.no_grad():
        assert not flashcore.attention(q, k, v).requires_grad
    detached = (x.detach() for x in (q, k, v))
    assert flashcore.attention(*detached).grad_fn is None


@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "window": (2, 0), "softcap": 0.7}], ids=str
)
def test_second_derivatives(options):
    def function(q, k, v, mask):
        return flashcore.attention(q, k, v, mask=mask, return_lse=True, **options)

    assert torch.autograd.gradgradcheck(
        function, qkv(3, 4) + leaves((3, 4), seed=1), fast_mode=True
    )


def test_gradient_penalty_of_self_attention():
    """One tensor in three places, an empty row, and a loss on the gradient itself."""
    (x,) = leaves((1, 1, 4, 8))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1] = False

    def penalty(function):
        (dx,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    got = penalty(lambda x: flashcore.attention(x, x, x, mask=mask))
    want = penalty(lambda x: attention_oracle(x, x, x, mask=mask)[0])
    torch.testing.assert_close(got, want)


def test_inputs_changed_before_backward_are_noticed():
    q, k, v = qkv()
    out = flashcore.attention(q, k, v)
    with torch.no_grad():
        k.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_autocast_does_not_round_the_scores():
    """It rounds q, k and v; inside, all stays as it is without autocast."""
    q, k, v = (x.detach().requires_grad_() for x in qkv(dtype=torch.bfloat16))
    want = torch.autograd.grad(flashcore.attention(q, k, v, softcap=2.0).sum(), (q, k, v))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flashcore.attention(q, k, v, softcap=2.0)
        got = torch.autograd.grad(out.sum(), (q, k, v))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
