"""Test forward mode, torch.func and derivatives of derivatives, on every way to attention."""

from __future__ import annotations

import warnings

import pytest
import torch
from op_inputs import compiled
from roads import OURS, ROADS, dense_inputs, lengths, packed_inputs, padded, varlen
from torch.autograd import forward_ad

import flashcore
from flashcore.ops.transforms import autograd

every_road = pytest.mark.parametrize("name", ROADS)
our_roads = pytest.mark.parametrize("name", OURS)
# One of each operator, with all options.
three_roads = pytest.mark.parametrize(
    "name", ["dense, options", "padded, options", "packed, options"]
)


def total(road):
    """Return a scalar whose derivatives do not vanish."""
    return lambda *x: road(*x).pow(3).sum()


@every_road
def test_tangents_are_those_of_numerical_differences(name):
    road, inputs = ROADS[name]
    assert torch.autograd.gradcheck(
        road,
        inputs(requires_grad=True),
        check_backward_ad=False,
        check_forward_ad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )


@our_roads
def test_second_derivatives_are_those_of_numerical_differences(name):
    road, inputs = ROADS[name]
    assert torch.autograd.gradgradcheck(
        road,
        inputs(requires_grad=True),
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        fast_mode=True,
    )


@pytest.mark.parametrize("road", [varlen, padded, flashcore.attention])
def test_lse_has_derivatives_too(road):
    inputs = packed_inputs if road is varlen else dense_inputs
    q, k, v = inputs()

    def function(q):
        out, lse = road(q, k, v, return_lse=True, causal=True)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    q.requires_grad_()
    assert torch.autograd.gradcheck(function, (q,), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (q,), check_fwd_over_rev=True, fast_mode=True)


@three_roads
def test_transforms_agree_in_every_order(name):
    """jvp, vjp, jacrev and jacfwd with each other, and the four Hessians."""
    road, inputs = ROADS[name]
    q, k, v = inputs()
    leaf = q.clone().requires_grad_()
    loss = total(lambda x: road(x, k, v))
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(q), gradient)
    torch.testing.assert_close(torch.func.jacfwd(loss)(q), gradient)
    torch.testing.assert_close(torch.func.jacrev(loss)(q), gradient)
    _, tangent = torch.func.jvp(loss, (q,), (k.new_ones(q.shape),))
    torch.testing.assert_close(tangent, gradient.sum())
    # Of a few entries of q: a Hessian has its square.
    few = q.select(-2, 0)[..., :1]

    def of_few(x):
        return loss(
            torch.cat(
                [torch.cat([x, q.select(-2, 0)[..., 1:]], -1).unsqueeze(-2), q[..., 1:, :]], -2
            )
        )

    of_leaf = few.clone().requires_grad_()
    want = torch.autograd.functional.hessian(of_few, of_leaf)
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        for inner in (torch.func.jacfwd, torch.func.jacrev):
            torch.testing.assert_close(outer(inner(of_few))(few), want)


@our_roads
def test_vmap_of_tangents_and_tangents_of_vmap(name):
    road, inputs = ROADS[name]
    q, k, v = inputs()
    samples = torch.stack([q, 2 * q, -q], 1)
    one = lambda x: torch.func.jvp(lambda x: road(x, k, v), (x,), (x,))[1]
    got = torch.func.vmap(one, in_dims=1)(samples)
    _, over = torch.func.jvp(
        torch.func.vmap(lambda x: road(x, k, v), in_dims=1), (samples,), (samples,)
    )
    for i in range(3):
        torch.testing.assert_close(got[i], one(samples[:, i]))
        torch.testing.assert_close(over[i], one(samples[:, i]))


@pytest.mark.parametrize("batched", [(0, None, None), (None, 1, None), (2, 0, 1), (None, None, 0)])
@pytest.mark.parametrize("name", ["packed, options", "padded, options"])
def test_per_sample_gradients_with_lengths(name, batched):
    """vmap of grad, over every choice of tensors, each in another place."""
    road, inputs = ROADS[name]
    tensors = inputs()
    stacked = [
        x if dim is None else torch.stack([x, 2 * x, -x], dim)
        for x, dim in zip(tensors, batched, strict=True)
    ]
    grad = torch.func.grad(total(road), argnums=(0, 1, 2))
    got = torch.func.vmap(grad, in_dims=batched)(*stacked)
    for i in range(3):
        one = [
            x if dim is None else x.select(dim, i) for x, dim in zip(stacked, batched, strict=True)
        ]
        torch.testing.assert_close(tuple(x[i] for x in got), grad(*one))


@pytest.mark.parametrize("transform", ["forward", "grad", "jvp"])
def test_each_sample_may_have_its_own_lengths(transform):
    q, k, v = packed_inputs()
    cu_q = torch.tensor([[0, 3, 6], [0, 1, 4]], dtype=torch.int32)
    cu_k = torch.tensor([[0, 4, 8], [0, 3, 5]], dtype=torch.int32)

    def function(cu_q, cu_k):
        call = lambda q: flashcore.attention_varlen(q, k, v, cu_q, cu_k, 3, 4, causal=True)
        if transform == "forward":
            return call(q)
        if transform == "grad":
            return torch.func.grad(total(call))(q)
        return torch.func.jvp(call, (q,), (q,))[1]

    got = torch.func.vmap(function)(cu_q, cu_k)
    for i in range(2):
        torch.testing.assert_close(got[i], function(cu_q[i], cu_k[i]))
    q, k, v = dense_inputs()
    seqlens_k = torch.tensor([[1, 7], [4, 0]], dtype=torch.int32)
    of_padded = lambda n: torch.func.grad(
        total(lambda q: flashcore.attention(q, k, v, seqlens_k=n, causal=True))
    )(q)
    got = torch.func.vmap(of_padded)(seqlens_k)
    for i in range(2):
        torch.testing.assert_close(got[i], of_padded(seqlens_k[i]))


@pytest.mark.thorough  # five seconds each
@pytest.mark.parametrize("name", ["packed", "dense", "padded"])
def test_compiled_code_has_tangents_and_hessians(name):
    """There the lengths of packed sequences cannot be read."""
    road, inputs = ROADS[name]
    q, k, v = inputs()

    def function(x):
        call = lambda x: road(x, k, v)
        gradient = torch.func.grad(total(call))
        second = torch.func.grad(lambda x: gradient(x).square().sum())(x)
        return torch.func.jvp(call, (x,), (x,))[1], torch.func.jvp(gradient, (x,), (x,))[1], second

    fast, _ = compiled(function)
    torch.testing.assert_close(fast(q), function(q))


def test_a_tangent_of_any_one_tensor_is_enough():
    for road, inputs in (ROADS["dense"], ROADS["padded"], ROADS["packed"]):
        for i in range(3):
            tensors = list(inputs())
            one = lambda x, i=i, t=tensors, road=road: road(*t[:i], x, *t[i + 1 :])
            _, want = torch.func.jvp(one, (tensors[i],), (tensors[i],))
            with forward_ad.dual_level():
                tensors[i] = forward_ad.make_dual(tensors[i], tensors[i].clone())
                _, tangent = forward_ad.unpack_dual(road(*tensors))
            torch.testing.assert_close(tangent, want)


def test_a_gradient_taken_of_duals_has_a_tangent():
    """The forward before the level, the backward in it."""
    for road, inputs in (ROADS["dense"], ROADS["padded, options"], ROADS["packed, options"]):
        q, k, v = inputs()
        leaf = q.clone().requires_grad_()
        out = road(leaf, k, v)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.ones_like(out), 2 * torch.ones_like(out))
            (gradient,) = torch.autograd.grad(out, leaf, dual)
            primal, tangent = forward_ad.unpack_dual(gradient)
        torch.testing.assert_close(tangent, 2 * primal)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tangents_in_other_dtypes_inside_of_autocast_too(dtype):
    for name in ("dense", "padded", "packed"):
        road, inputs = ROADS[name]
        tensors = inputs(dtype=dtype)
        exact = [x.double() for x in tensors]
        (want_out, want), (out, tangent) = (
            torch.func.jvp(road, tuple(x), tuple(x)) for x in (exact, tensors)
        )
        assert out.dtype == tangent.dtype == dtype
        tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype != torch.float32 else {}
        torch.testing.assert_close(
            out.double(), want_out, **(tolerance or {"atol": 1e-5, "rtol": 1e-5})
        )
        torch.testing.assert_close(
            tangent.double(), want, **(tolerance or {"atol": 1e-5, "rtol": 1e-5})
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, cast = torch.func.jvp(road, tensors, tensors)
        assert cast.dtype == torch.bfloat16
        torch.testing.assert_close(cast.double(), want, atol=5e-2, rtol=5e-2)


def test_what_lies_behind_the_lengths_has_no_part_in_derivatives():
    """NaN in the padding, and in rows of no sequence."""
    q, k, v = (x.clone() for x in dense_inputs())
    k[0, :, 5:], v[0, :, 5:], k[1, :, 2:], v[1, :, 2:] = (torch.nan,) * 4
    loss = total(lambda q: padded(q, k, v, causal=True))
    for function in (torch.func.jacfwd(loss), torch.func.hessian(loss)):
        assert function(q).isfinite().all()
    q, k, v = (x.clone() for x in packed_inputs())
    q[5:], k[7:], v[7:] = (torch.nan,) * 3
    loss = total(lambda q: varlen(q, k, v, causal=True))
    for function in (torch.func.jacfwd(loss), torch.func.hessian(loss)):
        assert function(q).isfinite().all()


def test_many_rows_are_computed_in_blocks():
    """The same with the scores of few rows held at once."""
    q, k, v = (torch.randn(1, 2, 100, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.randn(100, 100, dtype=torch.float64)
    call = lambda q: flashcore.attention(q, k, v, mask=mask, causal=True, window=(30, 0))
    want = torch.func.jvp(call, (q,), (q,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashcore.plain.attention.TILE_SCORES", 1)
        torch.testing.assert_close(torch.func.jvp(call, (q,), (q,)), want)


def test_wrong_calls_are_refused_in_forward_mode_as_elsewhere():
    q, k, v = dense_inputs()
    with pytest.raises(ValueError, match="v has seqlen 6 but k has 7"):
        torch.func.jvp(lambda q: flashcore.attention(q, k, v[:, :, 1:]), (q,), (q,))
    with pytest.raises(ValueError, match="k has batch 1 but q has 2"):
        torch.func.jvp(lambda q: flashcore.attention(q, k[:1], v[:1]), (q,), (q,))
    mask = torch.ones(3, 1, 1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask has shape"):
        torch.func.jvp(lambda q: flashcore.attention(q, k, v, mask=mask), (q,), (q,))
    with pytest.raises(ValueError, match="backend='gpu'"):
        torch.func.jvp(lambda q: flashcore.attention(q, k, v, backend="gpu"), (q,), (q,))
    with pytest.raises(ValueError, match="k has batch 1 but q has 2"):
        torch.func.jvp(lambda q: padded(q, k[:1], v[:1]), (q,), (q,))
    q, k, v = packed_inputs()
    with pytest.raises(ValueError, match="v has seqlen 7 but k has 8"):
        torch.func.jvp(lambda q: varlen(q, k, v[1:]), (q,), (q,))
    mask, tensors = torch.zeros(5, 7, dtype=torch.float64), dense_inputs()
    with pytest.raises(NotImplementedError, match=r"mask\.detach\(\)"):
        torch.func.grad(lambda m: padded(*tensors, mask=m).sum())(mask)


def test_one_warning_where_a_kernel_is_passed_over(monkeypatch):
    monkeypatch.setattr(autograd, "_warned_of_forward_mode", False)
    q, k, v = dense_inputs(dtype=torch.float16)
    call = lambda q, backend: torch.func.jvp(
        lambda q: flashcore.attention(q, k, v, backend=backend), (q,), (q,)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(q, "auto")  # no kernel serves a CPU tensor
        call(q, "torch")
    with pytest.warns(flashcore.FallbackWarning, match="forward mode") as caught:
        call(q, "sim")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(q, "sim")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ROADS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.filterwarnings("ignore::flashcore.FallbackWarning")
def test_derivatives_on_a_gpu(name, dtype):
    """jvp, grad and a Hessian product, beside those of float64 CPU tensors."""
    road, inputs = ROADS[name]
    results = []
    for tensors in (inputs(dtype=torch.float64), inputs(dtype=dtype, device="cuda")):
        q, k, v = tensors
        loss = lambda x, k=k, v=v: road(x, k, v).double().pow(3).sum()
        out, tangent = torch.func.jvp(lambda x, k=k, v=v: road(x, k, v), (q,), (q,))
        gradient = torch.func.jvp(torch.func.grad(loss), (q,), (q,))
        if name in OURS:
            leaf = q.clone().requires_grad_()
            (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
            (second,) = torch.autograd.grad(first.double().square().sum(), leaf)
            gradient = (*gradient, second)
        results.append([x.double().cpu() for x in (out, tangent, *gradient)])
    for got, want in zip(results[1], results[0], strict=True):
        # Terms cancel in some elements, and what each of them was rounded by is left.
        rounding = {} if dtype == torch.float64 else {"atol": 5e-2 * float(want.abs().max())}
        torch.testing.assert_close(got, want, **rounding, rtol=0 if rounding else None)


@pytest.mark.gpu
@pytest.mark.timeout(600)  # torch.compile, beside as many other tests as there are cores
def test_compiled_derivatives_on_a_gpu():
    for name in ("dense, options", "padded, options", "packed, options"):
        road, inputs = ROADS[name]
        q, k, v = inputs(device="cuda")
        function = lambda x, road=road, k=k, v=v: torch.func.jvp(
            torch.func.grad(total(lambda x: road(x, k, v))), (x,), (x,)
        )
        fast, _ = compiled(function, "inductor")
        torch.testing.assert_close(fast(q), function(q))


def test_lengths_of_this_file_have_a_row_behind_them():
    cu_q, cu_k = lengths("cpu")
    assert int(cu_q[-1]) + 1 == packed_inputs()[0].shape[0]
    assert int(cu_k[-1]) + 1 == packed_inputs()[1].shape[0]
