"""`merge` and `attention_backward`: keys in two parts give what the whole gives."""

from __future__ import annotations

import math

import pytest
import torch
from gradient_rule import wrong_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import flashcore
from backends import GPU, SIM, device_of

NAMES = ("out_a", "lse_a", "out_b", "lse_b")


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def sides(empty: str = "", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return arguments of merge with rows that are empty on side "a", on "b", or on both."""
    lse_dtype = dtype if dtype == torch.float64 else torch.float32
    out_a, out_b = (randn(2, 3, 5, 4, dtype=dtype, seed=seed) for seed in (1, 2))
    lse_a, lse_b = (randn(2, 3, 5, dtype=lse_dtype, seed=seed) for seed in (3, 4))
    for side, out, lse in (("a", out_a, lse_a), ("b", out_b, lse_b)):
        if side in empty:
            lse[:, :, 2] = -math.inf
            out[:, :, 2] = 0.0
    return [out_a, lse_a, out_b, lse_b]


@settings(max_examples=15)
@given(
    split=st.integers(0, 12),
    seqlen_q=st.integers(1, 6),
    group=st.integers(1, 2),
    masked=st.booleans(),
    reverse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_keys_in_two_parts_give_the_whole(
    split: int, seqlen_q: int, group: int, masked: bool, reverse: bool, seed: int
) -> None:
    """out, lse, and the gradients of both through the merge; parts may be empty, rows too."""
    q = randn(2, 2 * group, seqlen_q, 8, seed=seed).requires_grad_()
    k = randn(2, 2, 12, 8, seed=seed + 1).requires_grad_()
    v = randn(2, 2, 12, 6, seed=seed + 2).requires_grad_()
    mask = None
    if masked:
        mask = randn(2, 1, seqlen_q, 12, seed=seed + 3) > 0.8
    whole = flashcore.attention(q, k, v, mask=mask, return_lse=True)
    parts = [
        flashcore.attention(
            q, k[:, :, s], v[:, :, s], mask=None if mask is None else mask[..., s], return_lse=True
        )
        for s in (slice(0, split), slice(split, 12))
    ]
    if reverse:
        parts.reverse()
    merged = flashcore.merge(*parts[0], *parts[1])
    cotangents = randn(*whole[0].shape, seed=seed + 4), randn(*whole[1].shape, seed=seed + 5)
    want = torch.autograd.grad(whole, (q, k, v), cotangents)
    have = torch.autograd.grad(merged, (q, k, v), cotangents)
    for x, y in zip((*merged, *have), (*whole, *want), strict=True):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("backend", [SIM, GPU])
def test_kernels_parts_merge_into_the_whole(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16, out in float32 between: within the rule of error of the whole."""
    from flashcore.checks.accuracy import error_report

    q, k, v = (
        randn(1, 2, 40, 16, dtype=torch.float16, seed=s).to(device_of(backend)) for s in (1, 2, 3)
    )
    a, b = (
        flashcore.attention(q, k[:, :, s], v[:, :, s], return_lse=True, backend=backend)
        for s in (slice(0, 17), slice(17, 40))
    )  # fmt: skip
    out, lse = flashcore.merge(*a, *b)
    assert out.dtype == torch.float16
    assert lse.dtype == torch.float32
    report = error_report(out, q, k, v, lse=lse)
    assert report.ok, str(report)


@pytest.mark.parametrize("empty", ["", "a", "b", "ab"])
def test_gradients_are_those_of_finite_differences(empty: str) -> None:
    tensors = sides(empty)
    row = torch.ones(5, dtype=torch.float64)
    if empty:
        row[2] = 0.0  # its lse is -inf, which finite differences do not reach

    def f(out_a: Tensor, out_b: Tensor, shift_a: Tensor, shift_b: Tensor) -> tuple[Tensor, ...]:
        lse_a, lse_b = tensors[1] + shift_a * row, tensors[3] + shift_b * row
        out, lse = flashcore.merge(out_a, lse_a, out_b, lse_b)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    shifts = [torch.zeros(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    outs = [tensors[i].requires_grad_() for i in (0, 2)]
    assert torch.autograd.gradcheck(f, (*outs, *shifts))
    if not empty:
        assert torch.autograd.gradgradcheck(f, (*outs, *shifts))


def test_a_row_that_is_empty_on_both_sides_is_empty() -> None:
    tensors = [x.requires_grad_() for x in sides("ab")]
    out, lse = flashcore.merge(*tensors)
    assert out[:, :, 2].eq(0.0).all()
    assert lse[:, :, 2].eq(-math.inf).all()
    nan = torch.full_like(out, math.nan), torch.full_like(lse, math.nan)
    gradients = torch.autograd.grad((out, lse), tensors, nan)
    for gradient in gradients:
        assert gradient[:, :, 2].eq(0.0).all(), "whatever arrives at an empty row stops there"


@pytest.mark.parametrize("empty", ["a", "b"])
def test_what_stands_in_an_empty_side_has_no_part(empty: str) -> None:
    clean, dirty = sides(empty), sides(empty)
    dirty[0 if empty == "a" else 2][:, :, 2] = math.nan
    for x, y in zip(flashcore.merge(*clean), flashcore.merge(*dirty), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    tensors = sides(dtype=dtype)
    out, lse = flashcore.merge(*tensors)
    assert (out.dtype, lse.dtype) == (dtype, tensors[1].dtype)
    exact, _ = flashcore.merge(*(x.double() for x in tensors))
    out, _ = flashcore.merge(*tensors, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, exact.float(), atol=1e-6, rtol=1e-6)
    mixed, _ = flashcore.merge(tensors[0].double(), *tensors[1:])
    assert mixed.dtype == torch.float64


def test_the_operator_is_sound() -> None:
    arguments = [x.requires_grad_() for x in sides()]
    transposed = [x.detach().transpose(1, 2).requires_grad_() for x in arguments]
    for tensors in (arguments, transposed):
        torch.library.opcheck(torch.ops.flashcore.merge.default, (*tensors, torch.float32))
        given = randn(*tensors[0].shape), None, *(x.detach() for x in tensors)
        backward = torch.ops.flashcore.merge_backward.default
        torch.library.opcheck(backward, (*given, torch.float64))


def test_gradients_are_one_operator_unless_they_are_recorded() -> None:
    tensors = [x.requires_grad_() for x in sides("ab")]
    with OpNames() as plain:
        once = torch.autograd.grad(flashcore.merge(*tensors)[0].sum(), tensors)
    with OpNames() as recorded:
        again = torch.autograd.grad(flashcore.merge(*tensors)[0].sum(), tensors, create_graph=True)
    assert "flashcore.merge_backward.default" in plain.names
    assert "flashcore.merge_backward.default" not in recorded.names
    for x, y in zip(once, again, strict=True):
        torch.testing.assert_close(x, y)


class OpNames(TorchDispatchMode):
    """OpNames lists the operators that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_gradients_of_a_batch_and_of_compiled_code() -> None:
    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        return torch.autograd.grad(flashcore.merge(*leaves)[0].square().sum(), leaves)

    def through(*tensors: Tensor) -> Tensor:
        return flashcore.merge(*tensors)[0].square().sum()

    tensors = sides()
    want = gradients(*tensors)
    for f in (
        torch.func.grad(through, argnums=(0, 1, 2, 3)),
        torch.vmap(torch.func.grad(through, argnums=(0, 1, 2, 3))),
    ):
        for x, y in zip(f(*tensors), want, strict=True):
            torch.testing.assert_close(x, y)
    leaves = [x.requires_grad_() for x in sides()]
    compiled = torch.compile(through, fullgraph=True, backend="aot_eager")
    for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves), want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(0, 0, 0), (2, 1, 2), (2, 0, 0), (1, 1, 2)])
@pytest.mark.parametrize("shape", [(2, 4, 100, 64), (3, 33, 128), (2, 3, 5, 40), (7, 5)])
def test_one_kernel_merges_on_a_gpu(shape: tuple[int, ...], dtypes: tuple[int, ...]) -> None:
    """It does what PyTorch in float64 does, with gradients, strides, and rows that are empty."""
    a, b, out_dtype = ((torch.float16, torch.bfloat16, torch.float32)[i] for i in dtypes)
    lse_a, lse_b = (4 * randn(*shape[:-1], seed=s).float() for s in (1, 2))
    lse_a.view(-1)[0], lse_b.view(-1)[:2] = -math.inf, -math.inf
    tensors = [randn(*shape, dtype=a, seed=3), lse_a, randn(*shape, dtype=b, seed=4), lse_b]
    exact = [x.double().requires_grad_() for x in tensors]
    leaves = [  # with strides of their own
        x.cuda().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in tensors
    ]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        have = flashcore.merge(*leaves, out_dtype=out_dtype)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    assert any("merge_results" in name for name in names), names
    want = flashcore.merge(*exact, out_dtype=torch.float64)
    bound = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 1e-5}
    torch.testing.assert_close(have[0].cpu().double(), want[0], rtol=bound[out_dtype], atol=1e-5)
    torch.testing.assert_close(have[1].cpu().double(), want[1], rtol=1e-6, atol=1e-6)
    cotangents = randn(*shape, dtype=out_dtype, seed=5), randn(*shape[:-1], seed=6).float()
    of_have = torch.autograd.grad(have, leaves, [x.cuda() for x in cotangents])
    of_want = torch.autograd.grad(want, exact, [x.double() for x in cotangents])
    for x, y in zip(of_have, of_want, strict=True):
        torch.testing.assert_close(x.cpu().double(), y, rtol=bound[x.dtype], atol=1e-4)


@pytest.mark.gpu
def test_merging_can_be_captured() -> None:
    tensors = [x.cuda().requires_grad_() for x in sides(dtype=torch.float16)]

    def step() -> tuple[Tensor, ...]:
        out, lse = flashcore.merge(*tensors)
        return out, lse, *torch.autograd.grad((out.sum(), lse.sum()), tensors)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for x, y in zip(captured, step(), strict=True):
        torch.testing.assert_close(x, y)


def test_vmap_and_compile() -> None:
    tensors = sides()
    want = flashcore.merge(*tensors)
    have = torch.vmap(flashcore.merge)(*tensors)
    shared = torch.vmap(flashcore.merge, in_dims=(0, 0, None, None))(
        *tensors[:2], tensors[2][0], tensors[3][0]
    )
    compiled = torch.compile(flashcore.merge, fullgraph=True, backend="aot_eager")(*tensors)
    for result in (have, compiled):
        _pytree.tree_map(torch.testing.assert_close, result, want)
    torch.testing.assert_close(shared[0][0], want[0][0])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"out_b": randn(2, 3, 4, 4)}, ValueError, "out_b has shape"),
        ({"lse_a": randn(3, 5)}, ValueError, "lse_a has shape"),
        ({"lse_b": randn(2, 3, 5).half()}, TypeError, "lse_b has dtype torch.float16"),
        ({"lse_b": randn(2, 3, 5).float()}, TypeError, "lse_b has dtype torch.float32"),
        ({"out_a": torch.zeros(2, 3, 5, 4, dtype=torch.int32)}, TypeError, "out_a has dtype"),
        ({"lse_b": torch.zeros(2, 3, 5, device="meta")}, ValueError, "lse_b is on meta"),
        ({"out_b": None}, TypeError, "out_b must be a torch.Tensor"),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype=torch.int8"),
        ({"out_dtype": "half"}, TypeError, "out_dtype='half'"),
    ],
)
def test_wrong_arguments_of_merge(change: dict, error: type[Exception], text: str) -> None:
    arguments = dict(zip(NAMES, sides(), strict=True)) | change
    with pytest.raises(error, match=text):
        flashcore.merge(**arguments)


def backward_inputs(dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    q, dout = (randn(1, 4, 40, 16, dtype=dtype, seed=s).to(device) for s in (1, 2))
    k, v = (randn(1, 2, 40, 16, dtype=dtype, seed=s).to(device) for s in (3, 4))
    return {"dout": dout, "q": q, "k": k, "v": v}


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (20, 0)}, {"softcap": 3.0}])
@pytest.mark.parametrize("through_delta", [False, True])
@pytest.mark.parametrize("backend", ["torch", GPU])
def test_gradients_from_given_results(backend: str, through_delta: bool, options: dict) -> None:
    x = backward_inputs(torch.float16, device_of(backend))
    q, k, v, dout = x["q"], x["k"], x["v"], x["dout"]
    dlse = randn(1, 4, 40, dtype=torch.float32, seed=5).to(q.device)
    out, lse = flashcore.attention(q, k, v, return_lse=True, backend=backend, **options)
    given: dict = {"out": out, "lse": lse, "dlse": dlse, "backend": backend}
    if through_delta:
        given |= {"out": None, "delta": (dout.float() * out.float()).sum(-1)}
    gradients = flashcore.attention_backward(**x, **given, **options)
    assert wrong_gradients(gradients, q, k, v, None, dout, dlse, options) == []


def test_the_fused_backward_takes_a_delta_in_the_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_SIM_ARCH", "90")
    x = backward_inputs(torch.float16)
    q, k, v, dout = x["q"], x["k"], x["v"], x["dout"]
    out, lse = flashcore.attention(q, k, v, return_lse=True)
    delta = (dout.float() * out.float()).sum(-1)
    gradients = flashcore.attention_backward(**x, out=None, lse=lse, delta=delta, backend="sim")
    assert wrong_gradients(gradients, q, k, v, None, dout, None, {}) == []


def test_given_results_in_compiled_code() -> None:
    x = backward_inputs(torch.float64)
    out, lse = flashcore.attention(x["q"], x["k"], x["v"], return_lse=True)

    def f(delta: Tensor) -> tuple[Tensor, ...]:
        return flashcore.attention_backward(**x, out=None, lse=lse, delta=delta, causal=True)

    delta = (x["dout"] * out).sum(-1)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(delta)
    _pytree.tree_map(torch.testing.assert_close, compiled, f(delta))


@pytest.mark.parametrize("backend", ["torch", GPU])
def test_a_rings_parts_add_up(backend: str) -> None:
    """Each part is given out and lse of all keys: dk and dv are whole, dq is a sum."""
    dtype = torch.float64 if backend == "torch" else torch.float16
    x = backward_inputs(dtype, device_of(backend))
    q, k, v, dout = x["q"], x["k"], x["v"], x["dout"]
    out, lse = flashcore.attention(q, k, v, return_lse=True)
    dq, dks, dvs = 0.0, [], []
    for part in (slice(0, 13), slice(13, 40)):
        share, dk, dv = flashcore.attention_backward(
            dout, q, k[:, :, part], v[:, :, part], out, lse, backend=backend
        )
        dq = dq + share.to(lse.dtype)
        dks.append(dk)
        dvs.append(dv)
    gradients = dq.to(dtype), torch.cat(dks, 2), torch.cat(dvs, 2)
    if dtype == torch.float16:
        assert wrong_gradients(gradients, q, k, v, None, dout, None, {}) == []
        return
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    want = torch.autograd.grad(flashcore.attention(*leaves), leaves, dout)
    for have, right in zip(gradients, want, strict=True):
        torch.testing.assert_close(have, right, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"out": None}, ValueError, "out and delta are both None"),
        ({"lse": randn(1, 4, 39)}, ValueError, "lse has shape"),
        ({"lse": randn(1, 4, 40).float()}, TypeError, "lse has dtype torch.float32"),
        ({"dout": randn(1, 4, 40, 8)}, ValueError, "dout has shape"),
        ({"delta": randn(40)}, ValueError, "delta has shape"),
        ({"dlse": randn(40)}, ValueError, "dlse has shape"),
        ({"out": torch.zeros(1, 4, 40, 16, device="meta")}, ValueError, "out is on meta"),
        ({"out": torch.zeros(1, 4, 40, 16, dtype=torch.int32)}, TypeError, "out has dtype"),
        ({"backend": "cuda"}, ValueError, "backend='cuda'"),
        ({"scale": -1.0}, ValueError, "scale"),
    ],
)
def test_wrong_arguments_of_attention_backward(
    change: dict, error: type[Exception], text: str
) -> None:
    x: dict = backward_inputs(torch.float64)
    out, lse = flashcore.attention(x["q"], x["k"], x["v"], return_lse=True)
    with pytest.raises(error, match=text):
        flashcore.attention_backward(**(x | {"out": out, "lse": lse} | change))
