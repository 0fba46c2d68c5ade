"""Test attention_varlen: packed sequences against the float64 oracle, sequence by sequence."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from parameters import thorough_but

import flashcore
import flashcore.backends.packed
from backends import GPU, SIM, SIM90, WMMA, device_of, on_sim90
from flashcore.backends.packed import as_batch
from flashcore.checks.varlen_cases import (
    VarlenCase,
    VarlenInputs,
    draw_varlen_case,
    make_varlen_inputs,
    varlen_error_report,
)
from flashcore.problem import Problem
from flashcore.problem.options import Wanted
from flashcore.sim import SimulationError

# The portable kernel, the Hopper kernel, and what serves by default.
every_backend = pytest.mark.parametrize("backend", ["torch", SIM, SIM90, WMMA, GPU])
kernel_backends = pytest.mark.parametrize("backend", [SIM, SIM90, WMMA, GPU])

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lower-right": {"causal": "lower_right", "dtype": "bfloat16"},
    "upper-left": {"causal": "upper_left", "head_dim": 40, "head_dim_v": 72},
    "window-softcap": {"window": (9, 4), "softcap": 5.0, "head_dim": 32, "head_dim_v": 32},
}


def attend(backend: str, x: VarlenInputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention_varlen with lse; "sim90" simulates the Hopper kernel."""
    with pytest.MonkeyPatch.context() as patch:
        backend = on_sim90(backend, patch)
        return flashcore.attention_varlen(
            *x.arguments(), return_lse=True, backend=backend, **options
        )


def check_case(backend: str, case: VarlenCase) -> tuple[torch.Tensor, torch.Tensor]:
    x = make_varlen_inputs(case, device_of(backend))
    out, lse = attend(backend, x, **case.options())
    assert out.shape == (x.q.shape[0], case.num_heads_q, case.head_dim_v)
    assert lse.shape == (case.num_heads_q, x.q.shape[0])
    report = varlen_error_report(out, lse, case, x)
    assert report is None or report.ok, f"{backend} {case.describe()}: {report}"
    return out, lse


@pytest.mark.parametrize("name", thorough_but(("window-softcap",), OPTIONS))
@every_backend
def test_random_lengths_agree_with_the_oracle(backend: str, name: str) -> None:
    for seed in range(10):
        check_case(backend, draw_varlen_case(seed, **OPTIONS[name]))


@every_backend
def test_what_lies_in_a_neighbour_does_not_leak(backend: str) -> None:
    """Not a NaN, not an infinity, and not one bit."""
    lengths = (37, 5, 64)
    case = VarlenCase(lengths_q=lengths, lengths_k=lengths, causal="lower_right", seed=3)
    before, lse_before = check_case(backend, case)
    x = make_varlen_inputs(case, device_of(backend))
    for tensor, value in ((x.q, torch.inf), (x.k, torch.nan), (x.v, torch.inf)):
        tensor[37:42] = value
    out, lse = attend(backend, x, causal=True)
    for rows in (slice(0, 37), slice(42, None)):
        assert torch.equal(out[rows], before[rows])
        assert torch.equal(lse[:, rows], lse_before[:, rows])


@every_backend
@pytest.mark.parametrize(
    "lengths", [(), (0,), (0, 0, 0), (1,), (0, 70, 0)], ids=lambda lengths: str(list(lengths))
)
def test_empty_batches_and_sequences(backend: str, lengths: tuple[int, ...]) -> None:
    for tail in (0, 3):
        out, lse = check_case(backend, VarlenCase(lengths_q=lengths, lengths_k=lengths, tail=tail))
        behind = sum(lengths)
        assert not out[behind:].any()
        assert (lse[:, behind:] == -torch.inf).all()


@every_backend
def test_queries_without_keys_and_keys_without_queries(backend: str) -> None:
    out, lse = check_case(backend, VarlenCase(lengths_q=(20, 0, 3), lengths_k=(0, 20, 3)))
    assert not out[:20].any()
    assert (lse[:, :20] == -torch.inf).all()


@every_backend
def test_the_longest_lengths_are_a_hint(backend: str) -> None:
    case = VarlenCase(lengths_q=(90, 7), lengths_k=(90, 7), causal="lower_right")
    x = make_varlen_inputs(case, device_of(backend))
    right, _ = attend(backend, x, causal=True)
    for longest in (0, 1, 10**6):
        wrong = dataclasses.replace(x, max_seqlen_q=longest, max_seqlen_k=longest)
        found, _ = attend(backend, wrong, causal=True)  # maybe with other tiles
        torch.testing.assert_close(found, right, atol=1e-3, rtol=1e-2)


MALFORMED = {
    "past the end": [0, 40, 2**31 - 1],
    "negative": [-(2**31), 40, 60],
    "falling": [0, 60, 20],
    "rising and falling": [50, 10, 60, 0, 60],
}


@kernel_backends
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_lengths_touch_nothing_outside(backend: str, name: str) -> None:
    """The simulator knows every access; on a GPU this is for compute-sanitizer."""
    x = make_varlen_inputs(VarlenCase(lengths_q=(60,), lengths_k=(60,)), device_of(backend))
    cu_seqlens = torch.tensor(MALFORMED[name], dtype=torch.int32, device=x.q.device)
    with contextlib.suppress(RowsOfTwoSequences):
        try:
            malformed = dataclasses.replace(x, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
            attend(backend, malformed, causal=True)
        except SimulationError as error:
            if error.kind in ("double-write", "unwritten-output"):
                raise RowsOfTwoSequences from error
            raise


class RowsOfTwoSequences(Exception):
    """Stand for rows of two sequences, or of none: what falling lengths may give."""


def test_torch_clamps_alike() -> None:
    x = make_varlen_inputs(VarlenCase(lengths_q=(40, 20), lengths_k=(40, 20)))
    right = flashcore.attention_varlen(*x.arguments())
    beyond = torch.tensor([-5, 40, 2**31 - 1], dtype=torch.int32)
    out = flashcore.attention_varlen(x.q, x.k, x.v, beyond, beyond, 40, 40)
    assert torch.equal(out, right)


def loop(x: VarlenInputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the same by `attention`, a call a sequence."""
    outs, lses = [], []
    begins = zip(x.cu_seqlens_q.tolist(), x.cu_seqlens_k.tolist(), strict=True)
    (begin_q, begin_k), *ends = begins
    for end_q, end_k in ends:
        own = (as_batch(t) for t in (x.q[begin_q:end_q], x.k[begin_k:end_k], x.v[begin_k:end_k]))
        out, lse = flashcore.attention(*own, return_lse=True, backend="torch", **options)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
        begin_q, begin_k = end_q, end_k
    return torch.cat(outs), torch.cat(lses, dim=1)


@pytest.mark.parametrize("name", ["plain", "lower-right", "window-softcap"])
def test_gradients_are_those_of_the_single_calls(name: str) -> None:
    options = {key: value for key, value in OPTIONS[name].items() if key != "dtype"}
    case = VarlenCase(
        lengths_q=(9, 0, 20, 3),
        lengths_k=(12, 4, 20, 0),
        dtype="float64",
        num_heads_kv=1,
        **options,
    )
    x = make_varlen_inputs(case)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    dout = torch.randn(32, 2, case.head_dim_v, dtype=torch.float64)
    dlse = torch.randn(2, 32, dtype=torch.float64)
    found, wanted = (
        torch.autograd.grad(
            [out, lse.masked_fill(lse == -torch.inf, 0.0)], leaves, [dout, dlse], retain_graph=True
        )
        for out, lse in (
            flashcore.attention_varlen(*x.arguments(), return_lse=True, **case.options()),
            loop(x, **case.options()),
        )
    )
    for have, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(have, want)


def test_a_gradient_through_a_kernel_and_a_packed_tensor() -> None:
    case = VarlenCase(lengths_q=(40, 70), lengths_k=(40, 70), causal="lower_right")
    qkv = torch.randn(110, 3, 2, 64, dtype=torch.float16).requires_grad_()
    x = make_varlen_inputs(case)
    gradients = []
    for backend in ("sim", "torch"):
        q, k, v = qkv.unbind(1)
        out = flashcore.attention_varlen(
            q, k, v, x.cu_seqlens_q, x.cu_seqlens_k, 70, 70, causal=True, backend=backend
        )
        gradients += torch.autograd.grad(out.square().sum(), qkv)
    torch.testing.assert_close(*gradients, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", thorough_but(("window-softcap",), OPTIONS))
def test_the_operators_are_well_made(name: str) -> None:
    case = draw_varlen_case(1, **OPTIONS[name])
    x = make_varlen_inputs(dataclasses.replace(case, dtype="float32", tail=0))
    for tensor in (x.q, x.k, x.v):
        tensor.requires_grad_()
    options = case.options()
    left, right = options["window"] or (-1, -1)
    scalars = case.causal, left, right, options["softcap"] or 0.0, None, False, True
    arguments = (*x.arguments(), None, *scalars)
    forward = torch.ops.flashcore.attention_varlen_forward.default
    torch.library.opcheck(forward, (*arguments, *Wanted(True), "torch"))
    out, lse, _ = forward(*arguments, *Wanted(True), "torch")
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    torch.library.opcheck(
        torch.ops.flashcore.attention_varlen_backward.default,
        (
            torch.ones_like(out),
            None,
            *detached[:8],
            out.detach(),
            lse.detach(),
            *detached[8:],
            False,
            "torch",
        ),
    )


def test_one_graph_serves_every_total() -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def call(x: VarlenInputs) -> torch.Tensor:
        return flashcore.attention_varlen(*x.arguments(), causal=True)

    for lengths in ((9, 20), (30, 2), (17, 40)):
        x = make_varlen_inputs(VarlenCase(lengths_q=lengths, lengths_k=lengths))
        assert torch.equal(call(x), flashcore.attention_varlen(*x.arguments(), causal=True))
    assert graphs == 1


def test_windows_that_hide_nothing_in_any_sequence_are_dropped() -> None:
    def band(lengths: tuple[int, int], **options: Any) -> tuple[int, int]:
        q, k = (torch.empty(n, 1, 8) for n in lengths)
        cu_seqlens = torch.zeros(2, dtype=torch.int32)
        problem = flashcore.backends.packed.packed_problem(
            q, k, k, cu_seqlens, cu_seqlens, 9, 9, **options
        )
        return problem.window_left, problem.window_right

    assert band((5, 9), window=(8, 4)) == (-1, -1)
    assert band((5, 9), window=(7, 3)) == (7, 3)
    assert band((5, 9), window=(4, 8), causal="upper_left") == (-1, 0)
    assert band((5, 9), window=(3, 8), causal="upper_left") == (3, 0)
    assert band((1, 9), causal=True) == (-1, -1)


X = make_varlen_inputs(VarlenCase(lengths_q=(4, 6), lengths_k=(4, 6)))
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "four dimensions": ({"q": as_batch(X.q)}, ValueError, r"q has 4 dim.*flashcore\.attention"),
    "a list": ({"k": [1.0]}, TypeError, "k must be a torch.Tensor"),
    "long lengths": (
        {"cu_seqlens_q": X.cu_seqlens_q.long()},
        TypeError,
        r"cu_seqlens_q has dtype torch.int64.*cu_seqlens_q\.int\(\)",
    ),
    "lengths on the host": ({"cu_seqlens_k": [0, 4, 10]}, TypeError, "cu_seqlens_k must be a"),
    "lengths in a matrix": (
        {"cu_seqlens_k": X.cu_seqlens_k[None]}, ValueError, "cu_seqlens_k has shape"
    ),
    "strided lengths": (
        {"cu_seqlens_q": torch.zeros(6, dtype=torch.int32)[::2]},
        ValueError,
        r"cu_seqlens_q\.contiguous\(\)",
    ),
    "no entry": (
        {"cu_seqlens_q": X.cu_seqlens_q[:0], "cu_seqlens_k": X.cu_seqlens_k[:0]},
        ValueError,
        "cu_seqlens_q is empty",
    ),
    "two batches": (
        {"cu_seqlens_k": X.cu_seqlens_k[:2]}, ValueError, "cu_seqlens_k has 2 entries but .* 3"
    ),
    "another device": (
        {"cu_seqlens_q": torch.zeros(3, dtype=torch.int32, device="meta")},
        ValueError,
        "cu_seqlens_q is on meta but q is on cpu",
    ),
    "heads": ({"q": torch.randn(10, 3, 64).half()}, ValueError, "q has 3 heads and k has 2"),
    "totals of k and v": ({"v": X.v[:9]}, ValueError, "v has seqlen 9 but k has 10"),
    "longest": ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q=-1"),
    "longest as a float": ({"max_seqlen_k": 6.0}, TypeError, r"max_seqlen_k.*6\.0 \(float\)"),
    "causal": ({"causal": "left"}, ValueError, "causal='left'"),
    "scale": ({"scale": 0.0}, ValueError, "scale=0.0"),
    "window": ({"window": 3}, TypeError, "window must be"),
    "return_lse": ({"return_lse": 1}, TypeError, "return_lse"),
    "backend": ({"backend": "gpu"}, ValueError, "backend='gpu'"),
    "no backend": ({"backend": None}, TypeError, "backend must be"),
    "GPU kernel": ({"backend": "wmma"}, flashcore.BackendUnavailableError, "GPU|cuda"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_the_message_names_argument_value_and_way_out(name: str) -> None:
    changes, kind, words = BAD[name]
    arguments = {field.name: getattr(X, field.name) for field in dataclasses.fields(X)} | changes
    with pytest.raises(kind, match=words):
        flashcore.attention_varlen(**arguments)


def test_a_problem_of_packed_sequences_describes_itself() -> None:
    problem: Problem = flashcore.backends.packed.packed_problem(*X.arguments(), causal=True)
    assert problem.describe() == "B2 H2 S6 D64 float16, packed 10/10 rows, causal lower_right"
    assert problem.of_sequence(4, 6).diag_offset == 2
