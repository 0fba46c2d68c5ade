"""Test sinks: a logit of each head that joins the softmax and has no value, on every road."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from parameters import thorough_but
from roads import HEADS_Q, SEQLENS_K, dense_inputs, lengths
from sinks_by_formula import ROADS, SINKS, by_formula, expected

import flashcore
from backends import device_of, every_backend
from flashcore.checks.accuracy import error_report
from flashcore.checks.cases import make_inputs
from flashcore.checks.reference import attention_oracle, max_score_oracle
from flashcore.checks.varlen_cases import VarlenCase, make_varlen_inputs, varlen_error_report
from flashcore.ops import dense as dense_ops
from flashcore.ops import padded as padded_ops
from flashcore.ops import varlen as varlen_ops
from flashcore.ops.paged import attention_paged
from flashcore.problem.case import Case
from flashcore.problem.options import Wanted

Tensor = torch.Tensor

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window, softcap, scale": {"window": (2, 1), "softcap": 1.5, "scale": 0.7},
    "some rows see nothing": {"causal": True, "window": (0, -1)},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ROADS)
def test_results_and_gradients_are_those_of_one_more_key(name: str, options: str) -> None:
    road, inputs = ROADS[name]
    leaves = [*inputs(requires_grad=True), SINKS.clone().requires_grad_()]
    have = road(*leaves[:3], sinks=leaves[3], return_lse=True, **OPTIONS[options])
    want = expected(name, *leaves, **OPTIONS[options])
    for x, y in zip(have, want, strict=True):
        torch.testing.assert_close(x, y)
    for weights in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):  # through out, lse, and both
        of_both = [
            torch.autograd.grad(
                weights[0] * out.sin().sum() + weights[1] * lse.cos().sum(), leaves,
                retain_graph=True, materialize_grads=True,
            )
            for out, lse in (have, want)
        ]  # fmt: skip
        for x, y in zip(*of_both, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("options", ["causal", "window, softcap, scale", "some rows see nothing"])
@pytest.mark.parametrize("name", ROADS)
def test_derivatives_of_every_kind_are_those_of_differences(name: str, options: str) -> None:
    road, inputs = ROADS[name]
    leaves = [*inputs(requires_grad=True), SINKS.clone().requires_grad_()]

    def function(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Any:
        return road(q, k, v, sinks=sinks, return_lse=True, **OPTIONS[options])

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_an_additive_mask_has_its_gradient_beside_sinks() -> None:
    leaves = [*dense_inputs(requires_grad=True), SINKS.clone().requires_grad_()]
    mask = torch.randn(4, 5, 7, dtype=torch.float64, requires_grad=True)

    def function(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor) -> Any:
        return flashcore.attention(q, k, v, sinks=sinks, mask=mask, return_lse=True)

    assert torch.autograd.gradcheck(function, [*leaves, mask], fast_mode=True)
    assert torch.autograd.gradgradcheck(function, [*leaves, mask], fast_mode=True)


CASES = {
    "few rows": Case(seqlen_q=9, seqlen_k=75, num_heads_q=4, num_heads_kv=2, sinks=True),
    "causal": Case(seqlen_q=70, seqlen_k=50, causal="lower_right", sinks=True, seed=1),
    "window, softcap": Case(
        seqlen_q=60, seqlen_k=90, window=(9, 4), softcap=5.0, dtype="bfloat16", sinks=True
    ),
    "bool mask": Case(seqlen_q=40, seqlen_k=50, mask="bool", sinks=True, layout="bshd"),
    "additive mask": Case(
        seqlen_q=40, seqlen_k=50, mask="additive", head_dim=40, head_dim_v=72, sinks=True
    ),
    "odd head_dim": Case(seqlen_q=20, seqlen_k=30, head_dim=20, head_dim_v=12, sinks=True),
    "large scores": Case(seqlen_q=40, seqlen_k=50, spread=60.0, sinks=True),
}


def run_case(backend: str, monkeypatch: pytest.MonkeyPatch, x: Any, **options: Any) -> Any:
    if backend == "sim90":
        monkeypatch.setenv("FLASHCORE_SIM_ARCH", "90")
        backend = "sim"
    result: Any = flashcore.attention(
        x.q, x.k, x.v, mask=x.mask, return_lse=True, backend=backend, **options
    )
    return result


with_sim90 = pytest.mark.parametrize("backend", ["torch", "sim", "sim90"])


@pytest.mark.parametrize(
    "name", thorough_but(("few rows", "window, softcap", "additive mask"), CASES)
)
@with_sim90
def test_the_error_rule_holds(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    x = make_inputs(case)
    out, lse = run_case(backend, monkeypatch, x, sinks=x.sinks, **case.options())
    report = error_report(out, x.q, x.k, x.v, lse=lse, mask=x.mask, sinks=x.sinks, **case.options())
    assert report.ok, report


@every_backend
@pytest.mark.parametrize("options", [{}, {"causal": "lower_right", "dtype": "bfloat16"}])
def test_packed_sequences_by_the_error_rule(backend: str, options: dict[str, Any]) -> None:
    """Sequences without keys or queries are among them, and rows of no sequence."""
    case = VarlenCase(
        lengths_q=(60, 0, 7, 1), lengths_k=(40, 3, 0, 17), num_heads_q=4, num_heads_kv=2, tail=5,
        sinks=True, **options,
    )  # fmt: skip
    x = make_varlen_inputs(case, device_of(backend))
    out, lse = flashcore.attention_varlen(
        *x.arguments(), sinks=x.sinks, return_lse=True, backend=backend, **case.options()
    )
    report = varlen_error_report(out, lse, case, x)
    assert report is not None
    assert report.ok, report
    assert x.sinks is not None
    assert torch.equal(lse[:, 60:67], x.sinks[:, None].expand(4, 7))
    assert not out[60:67].any()


@with_sim90
@pytest.mark.parametrize("value", [-math.inf, -1e4, 1e4, 88.0, -88.0, 0.0])
def test_sinks_far_from_the_scores(
    backend: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-inf is no sink; a large one takes all of the weight, and lse is the sink."""
    x = make_inputs(Case(seqlen_q=20, seqlen_k=40, mask="bool"))
    sinks = torch.full((2,), value)
    out, lse = run_case(backend, monkeypatch, x, sinks=sinks)
    report = error_report(out, x.q, x.k, x.v, lse=lse, mask=x.mask, sinks=sinks)
    assert report.ok, report
    if value == -math.inf:
        without = run_case(backend, monkeypatch, x)
        torch.testing.assert_close(out, without[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(lse, without[1], rtol=1e-4, atol=1e-4)


def test_a_sink_of_minus_infinity_has_no_gradient_and_changes_no_other() -> None:
    mask = torch.rand(2, 1, 5, 7) < 0.6
    mask[:, :, 0] = False
    q, k, v = dense_inputs(requires_grad=True)
    none = torch.full((HEADS_Q,), -math.inf, dtype=torch.float64, requires_grad=True)
    out = flashcore.attention(q, k, v, mask=mask, sinks=none)
    *have, of_sinks = torch.autograd.grad(out.sin().sum(), (q, k, v, none))
    want = torch.autograd.grad(flashcore.attention(q, k, v, mask=mask).sin().sum(), (q, k, v))
    assert not of_sinks.any()
    for x, y in zip(have, want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", ROADS)
def test_without_keys_the_sink_is_all_there_is(name: str) -> None:
    q, k, v = ROADS[name][1]()
    empty = torch.zeros(3, dtype=torch.int32)
    if name == "packed":
        out, lse = flashcore.attention_varlen(
            q, k[:0], v[:0], empty, empty, 3, 0, sinks=SINKS, return_lse=True
        )
    else:
        options = {"seqlens_k": empty[:2]} if name == "padded" else {}
        k, v = (x if name == "padded" else x[:, :, :0] for x in (k, v))
        out, lse = flashcore.attention(q, k, v, sinks=SINKS, return_lse=True, **options)
    assert not out.any()
    assert torch.equal(lse.movedim(-2, -1), SINKS.expand_as(lse.movedim(-2, -1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROADS)
def test_sinks_of_either_dtype(name: str, dtype: torch.dtype) -> None:
    """They are computed with in float32, and their gradient has their dtype."""
    road, inputs = ROADS[name]
    q, k, v = inputs(torch.bfloat16)
    sinks = SINKS.to(dtype).requires_grad_()
    out = road(q, k, v, sinks=sinks)
    assert torch.equal(out, road(q, k, v, sinks=SINKS.float()))
    out.float().sum().backward()
    assert sinks.grad is not None
    assert sinks.grad.dtype == dtype
    strided = torch.stack([SINKS, SINKS], dim=1)[:, 0].to(dtype)
    assert torch.equal(out, road(q, k, v, sinks=strided))


@pytest.mark.parametrize("name", thorough_but(("packed",), ROADS))
def test_the_simulators_backward_counts_the_sink(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused kernels for Hopper, where rows without keys have a finite lse."""
    monkeypatch.setenv("FLASHCORE_SIM_ARCH", "90")
    road, inputs = ROADS[name]
    options = {"causal": True, "window": (1, 0)}
    low = [*inputs(torch.float16, requires_grad=True), SINKS.float().requires_grad_()]
    high = [x.detach().double().requires_grad_() for x in low]
    have = road(*low[:3], sinks=low[3], return_lse=True, backend="sim", **options)
    want = expected(name, *high, **options)
    gradients = [
        torch.autograd.grad(out.double().sin().sum() + lse.double().cos().sum(), leaves)
        for (out, lse), leaves in ((have, low), (want, high))
    ]
    for x, y in zip(*gradients, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x.double(), y, atol=4e-3, rtol=4e-3)


def operators_of(name: str) -> tuple[Any, tuple[Any, ...], dict[str, tuple[Any, ...]]]:
    """Return a road's operators, what the forward takes, and what the backward takes where the
    gradient of one result arrives."""
    module = {"dense": dense_ops, "padded": padded_ops, "packed": varlen_ops}[name]
    tensors: list[Any] = list(ROADS[name][1](torch.float32, requires_grad=True))
    if name == "packed":
        tensors += [*lengths("cpu"), 3, 4]
    else:
        tensors += [None] if name == "dense" else [None, torch.tensor(SEQLENS_K).int()]
    tensors.append(SINKS.float().requires_grad_())
    tensors += [None] * 3 if name == "padded" else []  # scales, a tree
    options = ("lower_right", -1, -1, 0.0, None, False, True)
    asked = (*tensors, *options, *Wanted(True), "torch")
    out, lse, _ = (x.detach() for x in module.OPERATORS.forward(*asked))
    needs = (False, True) if name == "dense" else (True,)
    arriving = {"out": (torch.ones_like(out), None), "lse": (None, torch.ones_like(lse))}
    backward = {
        of: (*gradients, *tensors, out, lse, *options, *needs, "torch")
        for of, gradients in arriving.items()
    }
    return module.OPERATORS, asked, backward


@pytest.mark.parametrize("name", ROADS)
def test_the_operators_are_well_made(name: str) -> None:
    operators, asked, backward = operators_of(name)
    torch.library.opcheck(operators.forward, asked)
    for arguments in backward.values():
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operators.backward, arguments, test_utils=checks)


@pytest.mark.thorough  # five seconds each: every road, and each result by one of them at least
@pytest.mark.parametrize(("name", "of"), zip(ROADS, ("out", "lse", "out"), strict=True))
def test_the_backward_can_be_traced(name: str, of: str) -> None:
    operators, _, backward = operators_of(name)
    torch.library.opcheck(operators.backward, backward[of], test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", ROADS)
def test_compiled_code_has_one_graph_and_the_same_results(name: str) -> None:
    road, inputs = ROADS[name]

    def function(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        result: Tensor = road(q, k, v, sinks=sinks, causal=True)
        return result.square()

    leaves = [*inputs(torch.float32, requires_grad=True), SINKS.float().requires_grad_()]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    have, want = compiled(*leaves), function(*leaves)
    torch.testing.assert_close(have, want)
    for x, y in zip(
        torch.autograd.grad(have.sum(), leaves),
        torch.autograd.grad(want.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("maps_sinks", [False, True])
@pytest.mark.parametrize("name", ROADS)
def test_vmap_is_sample_by_sample(name: str, maps_sinks: bool) -> None:
    road, inputs = ROADS[name]
    q, k, v = (torch.stack([x, x.flip(0), -x]) for x in inputs())
    sinks = torch.stack([SINKS, SINKS.flip(0), -SINKS]) if maps_sinks else SINKS
    dims = (0, 0, 0, 0 if maps_sinks else None)

    def function(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Any:
        return road(q, k, v, sinks=sinks, return_lse=True)

    def loss(*x: Tensor) -> Tensor:
        out, lse = function(*x)
        result: Tensor = out.sin().sum() + lse.cos().sum()
        return result

    samples = [(q[i], k[i], v[i], sinks[i] if maps_sinks else sinks) for i in range(3)]
    for mapped in (function, torch.func.grad(loss, argnums=(0, 1, 2, 3))):
        have = torch.func.vmap(mapped, in_dims=dims)(q, k, v, sinks)
        want = [torch.stack(x) for x in zip(*(mapped(*x) for x in samples), strict=True)]
        for x, y in zip(have, want, strict=True):
            torch.testing.assert_close(x, y)


@with_sim90
def test_max_score_is_that_of_the_keys(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sink is no score of a key, however large."""
    x = make_inputs(Case(seqlen_q=20, seqlen_k=40, num_heads_q=4, num_heads_kv=2, mask="bool"))
    sinks = torch.tensor([-20.0, 0.0, 20.0, 1e4])
    found = run_case(backend, monkeypatch, x, sinks=sinks, return_max_score=True)
    want = max_score_oracle(x.q, x.k, mask=x.mask)
    torch.testing.assert_close(found[-1].double(), want, rtol=1e-4, atol=1e-4)
    report = error_report(found[0], x.q, x.k, x.v, lse=found[1], mask=x.mask, sinks=sinks)
    assert report.ok, report


@with_sim90
def test_a_cache_in_pages_is_that_of_its_keys(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "sim90":
        monkeypatch.setenv("FLASHCORE_SIM_ARCH", "90")
    x = make_inputs(
        Case(batch=2, seqlen_q=3, seqlen_k=32, num_heads_q=4, num_heads_kv=2, sinks=True)
    )
    assert x.sinks is not None
    table = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
    k, v = (torch.empty(4, 2, 16, 64).half() for _ in range(2))
    for pages, of_sequences in ((k, x.k), (v, x.v)):
        for b in range(2):
            pages[table[b].long()] = of_sequences[b].unflatten(1, (2, 16)).transpose(0, 1)
    lengths = torch.tensor([29, 0], dtype=torch.int32)
    options: Any = {"causal": True, "backend": backend.removesuffix("90"), "return_lse": True}
    found = attention_paged(x.q, k, v, table, lengths, sinks=x.sinks, **options)
    want = flashcore.attention(x.q, x.k, x.v, seqlens_k=lengths, sinks=x.sinks, **options)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    leaves = [t.detach().float().requires_grad_() for t in (x.q, x.sinks)]
    of_pages, of_keys = (
        torch.autograd.grad(result.sin().sum(), leaves)
        for result in (
            attention_paged(leaves[0], k.float(), v.float(), table, lengths, sinks=leaves[1]),
            flashcore.attention(
                leaves[0], x.k.float(), x.v.float(), seqlens_k=lengths, sinks=leaves[1]
            ),
        )
    )
    for one, other in zip(of_pages, of_keys, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_leaves_float32_sinks_as_they_are() -> None:
    q, k, v = dense_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = flashcore.attention(q, k, v, sinks=SINKS.float())
        packed = flashcore.attention(q, k, v, sinks=SINKS.half())
    assert out.dtype == packed.dtype == torch.bfloat16
    q, k, v = (x.bfloat16() for x in (q, k, v))
    assert torch.equal(out, flashcore.attention(q, k, v, sinks=SINKS.float()))
    assert torch.equal(packed, flashcore.attention(q, k, v, sinks=SINKS.bfloat16()))


@pytest.mark.parametrize("lead", [(), (3, 2)])
def test_other_numbers_of_dimensions(lead: tuple[int, ...]) -> None:
    q, k, v = dense_inputs()
    q, k, v = (x[0].expand(*lead, *x.shape[1:]) for x in (q, k, v))
    out, lse = flashcore.attention(q, k, v, sinks=SINKS, return_lse=True)
    want = by_formula(*(x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)), SINKS)
    torch.testing.assert_close(out, want[0].reshape(out.shape))
    torch.testing.assert_close(lse, want[1].reshape(lse.shape))


def test_the_oracle_has_the_formula() -> None:
    q, k, v = dense_inputs()
    for x, y in zip(
        attention_oracle(q, k, v, causal=True, sinks=SINKS),
        by_formula(q, k, v, SINKS, causal=True),
        strict=True,
    ):
        torch.testing.assert_close(x, y)
