"""Test attention against the oracle: the cases that tell one meaning from another, on every
backend.

The kernel backends compile one program per combination of dtype, head_dim and options, about two
seconds each in the simulator; cases that only change lengths, heads or strides share one.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from parameters import thorough_but

import flashcore
from backends import check, check_case, device_of, every_backend
from flashcore.backends import tiled
from flashcore.backends.by_torch import sdpa_cpu
from flashcore.checks.accuracy import error_report
from flashcore.checks.cases import make_inputs
from flashcore.checks.reference import attention_oracle, visible_pairs
from flashcore.problem.case import Case

CASES = {
    # One program: fp16, head_dim 64, no options. Tiles are 64 x 64.
    "one tile": Case(seqlen_q=64, seqlen_k=64),
    "several tiles": Case(seqlen_q=192, seqlen_k=256),
    "primes": Case(seqlen_q=67, seqlen_k=131, tail=5),
    "single query": Case(seqlen_q=1, seqlen_k=97, tail=3),
    "single key": Case(seqlen_q=65, seqlen_k=1, tail=3),
    "one of each": Case(seqlen_q=1, seqlen_k=1, tail=3),
    "grouped heads": Case(batch=2, num_heads_q=6, num_heads_kv=2, seqlen_q=33, seqlen_k=70),
    "one kv head": Case(num_heads_q=3, num_heads_kv=1, seqlen_q=20, seqlen_k=66),
    "transposed layout": Case(batch=2, layout="bshd", seqlen_q=40, seqlen_k=81, tail=7),
    "sharp softmax": Case(seqlen_q=64, seqlen_k=192, spread=30.0),
    # fp16, head_dim 64, a bound on the right.
    "causal": Case(causal="lower_right", seqlen_q=130, seqlen_k=130),
    "causal, more keys": Case(causal="lower_right", seqlen_q=70, seqlen_k=200, tail=1),
    "causal, more queries": Case(causal="lower_right", seqlen_q=200, seqlen_k=70, tail=1),
    "upper left, more keys": Case(causal="upper_left", seqlen_q=70, seqlen_k=200),
    "upper left, more queries": Case(causal="upper_left", seqlen_q=200, seqlen_k=70),
    # Bounds on the left, and on both sides.
    "left window": Case(window=(70, -1), seqlen_q=150, seqlen_k=170),
    "window": Case(window=(10, 3), seqlen_q=150, seqlen_k=170),
    "causal window": Case(window=(65, 9), causal="lower_right", seqlen_q=150, seqlen_k=150),
    "upper left window": Case(window=(5, 9), causal="upper_left", seqlen_q=90, seqlen_k=150),
    "window of the diagonal": Case(window=(0, 0), seqlen_q=99, seqlen_k=140),
    "window, mostly empty rows": Case(window=(2, 2), seqlen_q=300, seqlen_k=20),
    # Softcap and masks.
    "softcap": Case(softcap=5.0, spread=4.0, seqlen_q=70, seqlen_k=70),
    "softcap and causal": Case(
        softcap=5.0, spread=4.0, causal="lower_right", seqlen_q=70, seqlen_k=90
    ),
    "bool mask": Case(mask="bool", seqlen_q=70, seqlen_k=90),
    "padding mask": Case(mask="padding", batch=3, seqlen_q=70, seqlen_k=90),
    "additive mask": Case(mask="additive", seqlen_q=70, seqlen_k=90),
    "everything": Case(
        mask="additive", softcap=3.0, causal="lower_right", window=(60, 0), num_heads_q=4,
        seqlen_q=70, seqlen_k=90, scale=0.3, layout="bshd", tail=2,
    ),
    # Other dtypes, head_dims and alignments.
    "bfloat16": Case(dtype="bfloat16", causal="lower_right", seqlen_q=70, seqlen_k=90),
    "head_dim 8": Case(head_dim=8, head_dim_v=8, seqlen_q=70, seqlen_k=90),
    "head_dims 40 and 72": Case(head_dim=40, head_dim_v=72, seqlen_q=70, seqlen_k=90),
    "head_dim 128": Case(head_dim=128, head_dim_v=128, seqlen_q=70, seqlen_k=90, tail=1),
    "head_dim 256": Case(head_dim=256, head_dim_v=256, seqlen_q=40, seqlen_k=90, tail=1),
    "8-byte rows": Case(head_dim=24, head_dim_v=24, seqlen_q=70, seqlen_k=90, offset=4, tail=1),
    "4-byte rows": Case(head_dim=24, head_dim_v=24, seqlen_q=70, seqlen_k=90, offset=2, tail=1),
    "2-byte rows": Case(head_dim=24, head_dim_v=24, seqlen_q=70, seqlen_k=90, offset=1, tail=1),
}  # fmt: skip
# What others come close to.
SELDOM = (
    "one tile", "one of each", "one kv head", "causal", "upper left, more keys", "left window",
    "window of the diagonal", "softcap", "padding mask", "head_dim 8", "8-byte rows", "4-byte rows",
)  # fmt: skip


@every_backend
@pytest.mark.parametrize("name", thorough_but(CASES.keys() - SELDOM, CASES))
def test_case(backend, name):
    check_case(backend, CASES[name])


@pytest.mark.parametrize("name", [name for name in CASES if "softcap" not in name])
def test_case_tile_by_tile(monkeypatch, name):
    """CPU tensors whose scores are not capped go to torch's fused kernel otherwise."""
    monkeypatch.setattr(sdpa_cpu, "means_the_same", lambda _: False)
    check_case("torch", CASES[name])


@pytest.fixture
def small_tiles(monkeypatch):
    """Return tiles of 5 x 7, so that short sequences cross many tile borders."""
    monkeypatch.setattr(tiled, "BLOCK_M_MIN", 3)
    monkeypatch.setattr(tiled, "BLOCK_M_MAX", 5)
    monkeypatch.setattr(tiled, "BLOCK_N_MAX", 7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    "lengths", thorough_but([(17, 31)], [(17, 31), (23, 1), (1, 1), (31, 17), (13, 13), (1, 23)])
)
def test_all_options_together_in_small_tiles(small_tiles, dtype, lengths):
    windows = (None, (3, 0), (-1, 2), (2, 4), (0, 0))
    causals = ("none", "lower_right", "upper_left")
    for causal, window, softcap, mask in itertools.product(
        causals, windows, (None, 2.0), ("none", "bool", "additive")
    ):
        case = Case(
            batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=lengths[0], seqlen_k=lengths[1],
            head_dim=16, head_dim_v=24, dtype=dtype, causal=causal, window=window,
            softcap=softcap, mask=mask, tail=2,
        )  # fmt: skip
        check_case("torch", case)


@every_backend
@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_empty(backend, shape, causal):
    batch, heads, seqlen_q, seqlen_k = shape
    device = device_of(backend)
    q = torch.randn(batch, heads, seqlen_q, 16, dtype=torch.float16, device=device)
    k = torch.randn(batch, heads, seqlen_k, 16, dtype=torch.float16, device=device)
    v = torch.randn(batch, heads, seqlen_k, 24, dtype=torch.float16, device=device)
    out, lse = flashcore.attention(q, k, v, causal=causal, return_lse=True, backend=backend)
    assert out.shape == (batch, heads, seqlen_q, 24)
    assert lse.shape == (batch, heads, seqlen_q)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


MASK_SHAPES = [(70,), (9, 1), (9, 70), (1, 1, 70), (4, 9, 70), (2, 1, 1, 70), (2, 4, 1, 1), ()]


@every_backend
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_mask_shapes_broadcast_as_in_torch(backend, dtype):
    inputs = make_inputs(Case(batch=2, num_heads_q=4, seqlen_q=9, seqlen_k=70), device_of(backend))
    generator = torch.Generator().manual_seed(1)
    for shape in MASK_SHAPES:
        mask = torch.randn(shape, generator=generator)
        mask = (mask > 0 if dtype == torch.bool else mask).to(inputs.q.device)
        check(backend, inputs.q, inputs.k, inputs.v, shape, mask=mask)


@every_backend
def test_mask_is_read_through_its_strides(backend):
    inputs = make_inputs(Case(batch=2, num_heads_q=4, seqlen_q=9, seqlen_k=70), device_of(backend))
    base = torch.randn(2, 70, 4, 19, generator=torch.Generator().manual_seed(1))
    mask = base.to(inputs.q.device)[..., 1::2].permute(0, 2, 3, 1)  # strides in no usual order
    assert mask.shape == (2, 4, 9, 70)
    check(backend, inputs.q, inputs.k, inputs.v, "permuted", mask=mask)
    check(backend, inputs.q, inputs.k, inputs.v, "expanded", mask=mask[:1, :1].expand(2, 4, -1, -1))


@every_backend
def test_expanded_tensors(backend):
    inputs = make_inputs(Case(batch=1, num_heads_q=1, num_heads_kv=1, tail=2), device_of(backend))
    q = inputs.q.expand(2, 4, -1, -1)
    k = inputs.k.expand(2, 2, -1, -1)
    v = inputs.v[:, :, :1].expand(2, 2, 128, -1)  # every key has the same value
    out, _ = check(backend, q, k, v)
    torch.testing.assert_close(out, inputs.v[:, :, :1].expand_as(out))


@every_backend
def test_mask_of_only_minus_infinity(backend):
    inputs = make_inputs(Case(seqlen_q=70, seqlen_k=90), device_of(backend))
    mask = torch.zeros(70, 90, device=inputs.q.device)
    mask[::3] = -math.inf
    out, lse = check(backend, inputs.q, inputs.k, inputs.v, mask=mask)
    assert (out[:, :, ::3] == 0).all()
    assert (lse[:, :, ::3] == -math.inf).all()


@every_backend
@pytest.mark.parametrize("size", [5.0, 100.0, 1e4])
def test_a_maximum_that_stays_weighs_all_tiles_alike(backend, size):
    """All scores are one large number, so the result is the mean of v. Whatever rescales the sum so
    far when the maximum did not move must be 1: an error of half a last place would weigh early and
    late tiles differently."""
    device = device_of(backend)
    q = torch.full((1, 1, 4, 16), 1.1, dtype=torch.float16, device=device)
    k = torch.full((1, 1, 2048, 16), 1.3, dtype=torch.float16, device=device)
    v = torch.zeros(1, 1, 2048, 16, dtype=torch.float16, device=device)
    v[:, :, :1024] = 1.0
    check(backend, q, k, v, size, scale=size / 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch_sdpa(dtype, causal):
    q, k, v = torch.randn(3, 2, 4, 75, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    out, lse = flashcore.attention(q, k, v, causal=causal, return_lse=True)
    assert torch.equal(out, want)
    assert torch.equal(flashcore.attention(q, k, v, causal=causal), want)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_equals_torch_sdpa_with_mask_and_grouped_heads():
    inputs = make_inputs(Case(num_heads_q=6, mask="bool", dtype="float32", seqlen_q=33))
    mask = inputs.mask.clone()
    mask[:, :, :, 0] = True  # torch leaves open what an empty row is
    want = torch.nn.functional.scaled_dot_product_attention(
        inputs.q, inputs.k, inputs.v, attn_mask=mask, scale=0.2, enable_gqa=True
    )
    got = flashcore.attention(inputs.q, inputs.k, inputs.v, mask=mask, scale=0.2)
    torch.testing.assert_close(got, want)


def test_alignments_are_what_the_documentation_draws():
    def rows(**options):
        pairs = visible_pairs(2, 4, **options).int().tolist()
        return ["".join(".x"[x] for x in row) for row in pairs]

    assert rows(causal="lower_right") == ["xxx.", "xxxx"]
    assert rows(causal="upper_left") == ["x...", "xx.."]
    assert rows(window=(1, 0)) == [".xx.", "..xx"]
    assert rows(causal="upper_left", window=(0, 5)) == ["x...", ".x.."]


def test_memory_is_linear_in_seqlen(monkeypatch):
    """No tile holds more than its share of scores, however long the sequences are."""
    seen = []
    real = tiled.Tiles.scores

    def spy(self, q_tile, k_tile, m, n):
        seen.append(q_tile.shape[:3].numel() * k_tile.shape[2])
        return real(self, q_tile, k_tile, m, n)

    monkeypatch.setattr(tiled.Tiles, "scores", spy)
    q, k, v = torch.randn(3, 1, 2, 6000, 8)
    flashcore.attention(q, k, v, window=(700, 0), softcap=5.0)
    assert max(seen) <= tiled.TILE_SCORES
    # The window leaves 700 of 6000 keys to each query: most tiles are never touched.
    assert sum(seen) < 0.35 * 2 * 6000 * 6000


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (700, 0)}])
@pytest.mark.parametrize("masked", [False, True])
def test_memory_is_linear_in_seqlen_on_the_cpu(monkeypatch, options, masked):
    """No mask is made that is larger than the caller's own, or than a block of rows."""
    seen = []
    real = sdpa_cpu._operator

    def spy(q, k, v, dropout, is_causal, *, attn_mask, scale):
        seen.append((attn_mask.numel() if attn_mask is not None else 0, q.shape[2] * k.shape[2]))
        return real(q, k, v, dropout, is_causal, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(sdpa_cpu, "_operator", spy)
    q = torch.randn(1, 4, 2000, 8)
    k, v = torch.randn(2, 1, 2, 3000, 8)
    mask = torch.ones(1, 1, 1, 3000, dtype=torch.bool) if masked else None
    flashcore.attention(q, k, v, mask=mask, **options)
    assert max(elements for elements, _ in seen) <= sdpa_cpu.BLOCK_M * 3000
    if "window" in options:  # 700 keys to each query, and a block's width
        assert sum(scores for _, scores in seen) < 0.5 * 2 * 2000 * 3000


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (40, 3)}])
def test_a_hidden_key_may_be_anything(bad, options):
    """Torch adds -inf to its score, which is NaN then."""
    inputs = make_inputs(Case(num_heads_q=4, num_heads_kv=2, dtype="float32", seqlen_q=70))
    seqlen_k = inputs.k.shape[2]
    mask = torch.ones(seqlen_k, dtype=torch.bool)
    mask[[3, 50, -1]] = False
    want = flashcore.attention(inputs.q, inputs.k, inputs.v, mask=mask, **options)
    k = inputs.k.clone()
    k[:, :, [3, 50, -1]] = bad
    out, lse = flashcore.attention(inputs.q, k, inputs.v, mask=mask, return_lse=True, **options)
    torch.testing.assert_close(out, want)
    assert not lse.isnan().any()


def test_the_error_rule_rejects_what_is_wrong():
    inputs = make_inputs(Case(seqlen_q=70, seqlen_k=90))
    q, k, v = inputs.q, inputs.k, inputs.v
    out, lse = flashcore.attention(q, k, v, return_lse=True)
    assert error_report(out, q, k, v, lse=lse).ok
    wrong, wrong_lse = attention_oracle(q, k[:, :, 1:], v[:, :, 1:])  # a lost key
    assert not error_report(wrong, q, k, v).ok
    assert not error_report(out, q, k, v, lse=wrong_lse).ok
    wrong = out.clone()
    wrong[0, 1, 69, 63] = math.nan
    assert not error_report(wrong, q, k, v).ok
    wrong_lse = lse.clone()
    wrong_lse[0, 0, 0] = -math.inf
    assert not error_report(out, q, k, v, lse=wrong_lse).ok
