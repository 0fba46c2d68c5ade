"""Test how max_score of `return_max_score` travels: gradients, torch.compile, vmap, forward mode,
other numbers of dimensions, wrong arguments. tests/backends/test_max_score.py tests its value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import flashcore
from flashcore.checks.reference import max_score_oracle


def tensors(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, n, 64, generator=generator).half() for n in (37, 150, 150))
    return q, k, v


@pytest.mark.parametrize("mask", [None, "additive"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_it_has_no_gradient_and_changes_no_other(return_lse: bool, mask: str | None) -> None:
    q, k, v = (x.float().requires_grad_() for x in tensors(0))
    bias = None if mask is None else torch.randn(37, 150, requires_grad=True)
    leaves = [x for x in (q, k, v, bias) if x is not None]
    found = []
    for asked in ({}, {"return_max_score": True}):
        results = flashcore.attention(q, k, v, mask=bias, return_lse=return_lse, **asked)
        results = results if isinstance(results, tuple) else (results,)
        if asked:
            *results, max_score = results
            assert not max_score.requires_grad
        found.append(torch.autograd.grad(sum(x.square().sum() for x in results), leaves))
    for plain, beside in zip(*found, strict=True):
        torch.testing.assert_close(beside, plain)


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_nor_where_lengths_differ(kind: str) -> None:
    q, k, v = (x.float() for x in tensors(0))
    if kind == "packed":
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    q.requires_grad_()
    if kind == "packed":
        cu_q, cu_k = (torch.tensor([0, *x], dtype=torch.int32) for x in ((20, 37), (80, 150)))
        results = flashcore.attention_varlen(q, k, v, cu_q, cu_k, 20, 80, return_max_score=True)
    else:
        lengths = torch.tensor([140], dtype=torch.int32)
        results = flashcore.attention(q, k, v, seqlens_k=lengths, return_max_score=True)
    out, max_score = results
    assert out.requires_grad
    assert not max_score.requires_grad
    out.sum().backward()
    assert q.grad is not None


def test_the_simulators_kernel_is_recorded_too() -> None:
    q, k, v = tensors(0)
    q.requires_grad_()
    out, max_score = flashcore.attention(q, k, v, return_max_score=True, backend="sim")
    out.float().sum().backward()
    assert q.grad is not None
    want = max_score_oracle(q.detach(), k).float()
    torch.testing.assert_close(max_score, want, rtol=1e-4, atol=1e-4)


def test_compiled_code_returns_it() -> None:
    q, k, v = (x.float() for x in tensors(0))
    compiled = torch.compile(flashcore.attention, fullgraph=True, backend="aot_eager")
    for options in ({}, {"return_lse": True}, {"seqlens_k": torch.tensor([99], dtype=torch.int32)}):
        want = flashcore.attention(q, k, v, return_max_score=True, **options)
        have = compiled(q, k, v, return_max_score=True, **options)
        assert len(have) == len(want)
        for x, y in zip(have, want, strict=True):
            torch.testing.assert_close(x, y)
    leaf = q.clone().requires_grad_()
    out, max_score = compiled(leaf, k, v, return_max_score=True)
    out.sum().backward()
    assert leaf.grad is not None
    assert not max_score.requires_grad


def test_vmap_and_forward_mode() -> None:
    q, k, v = (torch.randn(3, 2, 2, n, 16) for n in (9, 20, 20))

    def largest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashcore.attention(q, k, v, return_max_score=True)[1]

    want = torch.stack([largest(*x) for x in zip(q, k, v, strict=True)])
    torch.testing.assert_close(torch.vmap(largest)(q, k, v), want)
    torch.testing.assert_close(
        torch.vmap(largest, in_dims=(0, None, None))(q, k[0], v[0])[0], want[0]
    )
    have, tangent = torch.func.jvp(largest, (q[0], k[0], v[0]), (q[0], k[0], v[0]))
    torch.testing.assert_close(have, want[0])
    assert not tangent.any()


def test_vmap_and_forward_mode_of_packed_sequences() -> None:
    q, k, v = (torch.randn(3, n, 2, 16) for n in (9, 20, 20))
    cu_q = torch.tensor([0, 4, 4, 8], dtype=torch.int32)
    cu_k = torch.tensor([0, 5, 9, 19], dtype=torch.int32)

    def largest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashcore.attention_varlen(q, k, v, cu_q, cu_k, 4, 10, return_max_score=True)[1]

    want = torch.stack([largest(*x) for x in zip(q, k, v, strict=True)])
    assert (want[:, 1] == -math.inf).all()
    torch.testing.assert_close(torch.vmap(largest)(q, k, v), want)
    have, tangent = torch.func.jvp(largest, (q[0], k[0], v[0]), (q[0], k[0], v[0]))
    torch.testing.assert_close(have, want[0])
    assert not tangent.any()

    def of_lengths(cu_q: Tensor) -> Tensor:  # which nobody can read: all rows are one call
        return torch.func.jvp(
            lambda q: flashcore.attention_varlen(
                q, k[0], v[0], cu_q, cu_k, 4, 10, return_max_score=True
            )[1],
            (q[0],),
            (q[0],),
        )[0]

    torch.testing.assert_close(torch.vmap(of_lengths)(cu_q[None])[0], want[0])


def test_other_numbers_of_dimensions() -> None:
    q, k = torch.randn(2, 3, 4, 9, 16), torch.randn(2, 3, 2, 20, 16)
    want = max_score_oracle(q.flatten(0, 1), k.flatten(0, 1)).unflatten(0, (2, 3)).float()
    for have, expected in (
        (flashcore.attention(q, k, k, return_max_score=True)[1], want),
        (flashcore.attention(q[0, 0], k[0, 0], k[0, 0], return_max_score=True)[1], want[0, 0]),
        (
            flashcore.attention(q[0, 0, 0], k[0, 0, 0], k[0, 0, 0], return_max_score=True)[1],
            want[0, 0, 0],
        ),
    ):
        torch.testing.assert_close(have, expected)


def test_meta_tensors_and_wrong_arguments() -> None:
    q = torch.empty(2, 3, 5, 8, device="meta")
    assert flashcore.attention(q, q, q, return_max_score=True)[1].shape == (2, 3)
    q, k, v = tensors(0)
    lengths = torch.tensor([5], dtype=torch.int32)
    for wrong in (1, "yes", None):
        for more in ({}, {"seqlens_k": lengths}):
            with pytest.raises(TypeError, match="return_max_score must be True or False"):
                flashcore.attention(q, k, v, return_max_score=wrong, **more)  # type: ignore[call-overload]
        # Nor is it taken for a valid call that was met before.
        flashcore.attention(q, k, v, return_max_score=True)
    with pytest.raises(TypeError, match=r"return_max_logit.*return_max_score"):
        flashcore.attention(q, k, v, return_max_logit=True)  # type: ignore[call-overload]


def test_explain_and_prepare_take_it(capsys: pytest.CaptureFixture[str]) -> None:
    q, k, v = tensors(0)
    explained = flashcore.explain(q, k, v, return_max_score=True)
    assert explained.plan is not None
    assert explained.plan.returns_max_score
    assert "max_score" in capsys.readouterr().out
    plan = flashcore.prepare(q, k, v, return_max_score=True, backend="sim")
    assert plan is not None
    assert plan.returns_max_score


def test_a_large_sink_hides_it_from_nobody() -> None:
    q, k, v = (torch.randn(2, 2, n, 16) for n in (9, 20, 20))
    sinks = torch.tensor([300.0, -torch.inf])

    def largest(q: Tensor) -> Tensor:
        return flashcore.attention(q, k, v, sinks=sinks, return_max_score=True)[1]

    want = max_score_oracle(q, k).float()
    torch.testing.assert_close(largest(q), want)
    torch.testing.assert_close(torch.func.jvp(largest, (q,), (q,))[0], want)
    torch.testing.assert_close(torch.compile(largest, backend="eager")(q), want)
