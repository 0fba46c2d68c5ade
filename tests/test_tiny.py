"""Read and run this first: what flashcore does, in a few seconds, on any machine."""

from __future__ import annotations

import torch

import flashcore
from flashcore.checks.reference import attention_oracle


def random_qkv(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, *shape, generator=generator).to(dtype)
    return q, k, v


def test_attention_is_softmax_of_scores_times_values():
    q, k, v = random_qkv(1, 2, 5, 8, dtype=torch.float64)
    scores = q @ k.transpose(-1, -2) / 8**0.5
    torch.testing.assert_close(flashcore.attention(q, k, v), torch.softmax(scores, dim=-1) @ v)


def test_lse_is_the_logarithm_of_the_softmax_denominator():
    q, k, v = random_qkv(1, 2, 5, 8, dtype=torch.float64)
    _, lse = flashcore.attention(q, k, v, return_lse=True)
    scores = q @ k.transpose(-1, -2) / 8**0.5
    torch.testing.assert_close(lse, scores.exp().sum(dim=-1).log())


def test_same_as_torch_where_torch_means_the_same():
    q, k, v = random_qkv(2, 3, 37, 16, dtype=torch.float32)
    ours = flashcore.attention(q, k, v, causal="upper_left")
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, theirs)


def test_a_query_without_keys_gives_zero_not_nan():
    q, k, v = random_qkv(1, 1, 4, 8, dtype=torch.float32)
    # Causal, aligned at the end: with two keys for four queries, the first two queries see nothing.
    out, lse = flashcore.attention(q, k[:, :, :2], v[:, :, :2], causal=True, return_lse=True)
    assert (out[:, :, :2] == 0).all()
    assert (lse[:, :, :2] == -torch.inf).all()
    assert out.isfinite().all()
    assert lse[:, :, 2:].isfinite().all()


def test_gradients_arrive():
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 2, 5, 8, dtype=torch.float64))
    got = torch.autograd.grad(flashcore.attention(q, k, v, causal=True).square().sum(), (q, k, v))
    oracle, _ = attention_oracle(q, k, v, causal=True)
    want = torch.autograd.grad(oracle.square().sum(), (q, k, v))
    torch.testing.assert_close(got, want)


def test_the_gpu_kernel_runs_in_the_simulator():
    q, k, v = random_qkv(1, 1, 20, 16, dtype=torch.float16)
    out = flashcore.attention(q, k, v, causal=True, backend="sim")
    want, _ = attention_oracle(q, k, v, causal=True)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-3)
