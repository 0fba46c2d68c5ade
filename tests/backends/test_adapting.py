"""Test tensors that the kernels cannot read as they lie: any head_dim, strides and expansion."""

from __future__ import annotations

import dataclasses
import io
import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_inputs import as_arguments, compiled, gradients
from parameters import thorough_but

import flashcore
import flashcore.sim
from backends import GPU, SIM, WMMA, check, device_of, every_backend, kernel_backends
from flashcore.backends import adapting
from flashcore.backends.adapting import adapt, kernel_for
from flashcore.base import env
from flashcore.checks.accuracy import error_report
from flashcore.ops import dense as ops
from flashcore.ops import padded, varlen
from flashcore.problem import Problem
from flashcore.problem.options import Wanted
from flashcore.sim import simulate

HALF = torch.float16
ARCHS = ["80", "90"]
hopper_backends = pytest.mark.parametrize("backend", [SIM, GPU])


@pytest.fixture(params=ARCHS)
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what the simulator runs."""
    monkeypatch.setenv(env.SIM_ARCH.name, request.param)
    return str(request.param)


def randn(*shape: int, device: str = "cpu", dtype: torch.dtype = HALF, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def strided(x: torch.Tensor) -> torch.Tensor:
    """Return the same values, a step of seqlen apart in the last dimension, NaN around them."""
    room = x.new_full((*x.shape[:2], x.shape[3] + 1, x.shape[2] + 1), torch.nan).mT
    room = room[:, :, : x.shape[2], : x.shape[3]]
    return room.copy_(x)


def qkv(
    head_dim: int, head_dim_v: int, backend: str = "sim", dtype: torch.dtype = HALF
) -> tuple[Any, Any, Any]:
    device = device_of(backend)
    return (
        randn(2, 4, 6, head_dim, device=device, dtype=dtype),
        randn(2, 2, 9, head_dim, device=device, dtype=dtype, seed=1),
        randn(2, 2, 9, head_dim_v, device=device, dtype=dtype, seed=2),
    )


def text_of(*tensors: torch.Tensor, **options: Any) -> str:
    return str(flashcore.explain(*tensors, file=io.StringIO(), **options))


DIMS = [(1, 1), (12, 16), (66, 13), (129, 255)]


@pytest.mark.parametrize("dims", thorough_but([(12, 16)], DIMS), ids=str)
@every_backend
def test_any_head_dim(backend: str, dims: tuple[int, int], arch: str) -> None:
    q, k, v = qkv(*dims, backend)
    out, _ = check(backend, q, k, v, dims, causal=True)
    assert out.is_contiguous()
    assert out.shape == (2, 4, 6, dims[1])
    mask = torch.rand(6, 9, device=q.device) > 0.3
    check(backend, q, k, v, dims, mask=mask, softcap=4.0, window=(4, 1))
    assert torch.equal(flashcore.attention(q, k, v, causal=True, backend=backend), out)


@pytest.mark.parametrize(
    ("dims", "names"),
    [
        pytest.param(
            dims, names, marks=() if (dims, names) == ((11, 5), "qkv") else pytest.mark.thorough
        )
        for dims, names in itertools.product([(16, 24), (11, 5)], ["q", "kv", "qkv"])
    ],
    ids=str,
)
@every_backend
def test_any_stride_of_the_last_dimension(
    backend: str, dims: tuple[int, int], names: str, arch: str
) -> None:
    tensors = dict(zip("qkv", qkv(*dims, backend), strict=True))
    given = {name: strided(x) if name in names else x for name, x in tensors.items()}
    out, _ = check(backend, *given.values(), names, window=(5, 0))
    assert torch.equal(out, flashcore.attention(*tensors.values(), window=(5, 0), backend=backend))
    spread = given["q"][..., :1].expand(-1, -1, -1, dims[0])  # a stride of 0
    check(backend, spread, given["k"], given["v"], names)


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (3, 0)}], ids=str)
@every_backend
def test_padded_batches(backend: str, options: dict[str, Any], arch: str) -> None:
    q, k, v = qkv(13, 5, backend)
    k[1, :, 4:], v[1, :, 4:] = torch.nan, torch.nan
    lengths = torch.tensor([9, 4], dtype=torch.int32, device=q.device)
    for tensors in ((q, k, v), (strided(q), k, strided(v))):
        out, lse = flashcore.attention(
            *tensors, seqlens_k=lengths, return_lse=True, backend=backend, **options
        )
        for b, n in enumerate((9, 4)):
            own = slice(b, b + 1)
            parts = q[own], k[own, :, :n], v[own, :, :n]
            assert error_report(out[own], *parts, lse=lse[own], **options).ok


@pytest.mark.parametrize("dims", thorough_but([(13, 5)], [(16, 24), (13, 5)]), ids=str)
@every_backend
def test_packed_sequences(backend: str, dims: tuple[int, int], arch: str) -> None:
    q, k, v = (x[0].transpose(0, 1) for x in qkv(*dims, backend))
    cuts_q, cuts_k = [0, 2, 6], [0, 5, 9]
    cu = [torch.tensor(cuts, dtype=torch.int32, device=q.device) for cuts in (cuts_q, cuts_k)]
    for tensors in ((q, k, v), (strided(q[None])[0], strided(k[None])[0], v)):
        out, lse = flashcore.attention_varlen(
            *tensors, *cu, 4, 5, causal=True, return_lse=True, backend=backend
        )
        assert out.is_contiguous()
        for b in range(2):
            rows, keys = slice(*cuts_q[b : b + 2]), slice(*cuts_k[b : b + 2])
            parts = [x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
            own = out[rows].transpose(0, 1)[None]
            assert error_report(own, *parts, lse=lse[None, :, rows], causal=True).ok


@every_backend
def test_packed_sequences_whose_heads_are_one(backend: str, arch: str) -> None:
    q, k, v = (x[0].transpose(0, 1) for x in qkv(16, 8, backend))
    k, v = (x[:, :1].expand(-1, 4, -1) for x in (k, v))
    cu_q, cu_k = (
        torch.tensor(ends, dtype=torch.int32, device=q.device) for ends in ([0, 6], [0, 9])
    )
    out = flashcore.attention_varlen(q, k, v, cu_q, cu_k, 6, 9, causal=True, backend=backend)
    parts = [x.transpose(0, 1)[None] for x in (q, k, v)]
    assert error_report(out.transpose(0, 1)[None], *parts, causal=True).ok


def test_gradients_are_those_of_the_callers_tensors() -> None:
    q, k, v = (strided(x[:1, :, -3:]) for x in qkv(3, 2, dtype=torch.float64))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(
        lambda *x: flashcore.attention(*x, causal=True, return_lse=True), (q, k, v)
    )


@kernel_backends
def test_gradients_of_a_kernels_result(backend: str, arch: str) -> None:
    tensors = [x.requires_grad_() for x in qkv(5, 3, backend)]
    ours = gradients(lambda *x: flashcore.attention(*x, backend=backend), *tensors)
    exact = gradients(flashcore.attention, *(x.detach().double().requires_grad_() for x in tensors))
    for own, want, x in zip(ours, exact, tensors, strict=True):
        assert own.shape == x.shape
        torch.testing.assert_close(own.double(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.thorough
@pytest.mark.parametrize("layout", ["odd", "strided", "wide"])
def test_opcheck(layout: str) -> None:
    dims = {"odd": (5, 3), "strided": (8, 16), "wide": (264, 520)}[layout]
    q, k, v = qkv(*dims, dtype=torch.float32)
    if layout == "strided":
        q, k, v = strided(q), strided(k), strided(v)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    options = as_arguments({"causal": True})
    lengths, cu = torch.tensor([9, 4]).int(), torch.tensor([0, 2, 6]).int()
    rows = [x.detach()[0].transpose(0, 1).requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.forward, (q, k, v, None, None, *options, *Wanted(True), "auto"))
    torch.library.opcheck(
        padded.OPERATORS.forward,
        (q, k, v, None, lengths, *[None] * 4, *options, *Wanted(True), "auto"),
    )
    arguments = (*rows, cu, cu, 6, 9, None, *options, *Wanted(True), "auto")
    torch.library.opcheck(varlen.OPERATORS.forward, arguments)


def test_compiled_and_mapped_calls_agree() -> None:
    def function(q: Any, k: Any, v: Any) -> Any:
        return flashcore.attention(q, k, v, causal=True)

    fast, counter = compiled(function, dynamic=True)
    for dims in ((5, 3), (13, 16), (24, 7)):
        q, k, v = (x.requires_grad_() for x in qkv(*dims, dtype=torch.float32))
        torch.testing.assert_close(fast(q, k, v), function(q, k, v))
        torch.testing.assert_close(gradients(fast, q, k, v), gradients(function, q, k, v))
        mapped = torch.vmap(function, (3, 0, 0))(q[None].movedim(0, 3), k[None], v[None])
        torch.testing.assert_close(mapped[0], function(q, k, v))
    assert counter.frame_count <= 2
    q, k, v = qkv(5, 3, dtype=torch.float32)
    fast, _ = compiled(function, dynamic=True)
    torch.testing.assert_close(fast(strided(q), k, strided(v)), function(q, k, v))


@pytest.mark.parametrize("head_dim", [257, 300, 512, 1000])
@pytest.mark.filterwarnings("error")
def test_the_cpu_has_no_widest_head_dim(head_dim: int) -> None:
    q, k, v = qkv(head_dim, head_dim)
    check("torch", q, k, v, causal=True)
    check("auto", q, k, v, causal=True)
    check("torch", q, k, v[..., :5], causal=True)
    assert "head_dim" not in text_of(q, k, v)
    lengths = torch.tensor([9, 9], dtype=torch.int32)
    padded_batch = flashcore.attention(q, k, v, seqlens_k=lengths)
    torch.testing.assert_close(padded_batch, flashcore.attention(q, k, v), atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [264, 512])
def test_a_gpu_falls_back_with_one_warning(head_dim: int) -> None:
    from flashcore.backends import dispatch

    dispatch._warned.clear()
    q, k, v = qkv(head_dim, 64, "auto")
    with pytest.warns(flashcore.FallbackWarning, match=f"no kernel serves head_dim {head_dim}"):
        check("auto", q, k, v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check("auto", q, k, v)


# Which of k and v are whole, the sizes of the expanded one, and the note of `explain`; None: none,
# as TMA reads the same rows again.
EXPANDED = {
    "heads of k and v": ("", (2, 1, 2), "k and v are expanded over their heads"),
    "batch of k and v": ("", (1, 2, 2), None),
    "batch and heads": ("", (1, 1, 2), "over their heads"),
    "batch of k": ("v", (1, 2, 2), None),
    "heads of k": ("v", (2, 1, 2), None),
    "keys": ("", (2, 2, 1), "v is copied: the Hopper kernel reads rows apart"),
    "everything": ("", (1, 1, 1), "k is copied"),
}


@pytest.mark.parametrize("name", EXPANDED)
@pytest.mark.parametrize("dims", thorough_but([(5, 3)], [(16, 8), (5, 3)]), ids=str)
@hopper_backends
def test_expanded_keys_on_the_hopper_kernel(
    monkeypatch: pytest.MonkeyPatch, backend: str, dims: tuple[int, int], name: str
) -> None:
    monkeypatch.setenv(env.SIM_ARCH.name, "90")
    monkeypatch.setattr(adapting, "copies_pay", lambda *_: True)
    whole, (batch, heads, keys), note = EXPANDED[name]
    q, k, v = qkv(*dims, backend)
    part = slice(batch), slice(heads), slice(9 if keys == 2 else 1)
    k = k[part].expand_as(k)
    if "v" not in whole:
        v = v[part].expand_as(v)
    options: dict[str, Any] = {"causal": "upper_left"} if dims == (5, 3) else {"window": (3, 1)}
    check(backend, q, k, v, name, **options)
    mask = torch.rand(2, 1, 6, 9, device=q.device) > 0.3
    check(backend, q, k, v, name, mask=mask)
    if backend == "sim":
        text = text_of(q, k, v, backend=backend)
        assert "attn_fwd_sm90" in text
        if dims == (16, 8):
            assert "copied" not in text if note is None else note in text


@hopper_backends
def test_expanded_keys_of_a_padded_batch(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv(env.SIM_ARCH.name, "90")
    q, k, v = qkv(8, 8, backend)  # rows of 16 bytes, the least stride
    k, v = (x[:1].expand(2, -1, -1, -1) for x in (k, v))
    lengths = torch.tensor([9, 4], dtype=torch.int32, device=q.device)
    out = flashcore.attention(q, k, v, seqlens_k=lengths, backend=backend, causal=True)
    for b, n in enumerate((9, 4)):
        own = slice(b, b + 1)
        parts = q[own], k[own, :, :n], v[own, :, :n]
        assert error_report(out[own], *parts, causal=True).ok


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(16, 8), (5, 3)], ids=str)
def test_a_graph_replays_copies_and_lengths(dims: tuple[int, int]) -> None:
    """Copies are made again from what the tensors hold at each replay."""
    q, k, v = qkv(*dims, "auto")
    spread_k, spread_v = (x[:1].expand_as(x) for x in (k, v))
    flashcore.attention(q, spread_k, spread_v, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashcore.attention(q, spread_k, spread_v, causal=True)
    for seed in (5, 6):
        q.copy_(randn(*q.shape, seed=seed))
        k.copy_(randn(*k.shape, seed=seed + 1))
        graph.replay()
        torch.cuda.synchronize()
        assert error_report(out, q, spread_k, spread_v, causal=True).ok


def on_hopper(*tensors: torch.Tensor, **options: Any) -> Problem:
    described = Problem.from_tensors(*tensors, **options)
    return dataclasses.replace(described, device="cuda", arch=90)


def test_a_copy_is_made_where_it_pays() -> None:
    few, many = (torch.empty(1, 8, length, 65, dtype=HALF)[..., 1:] for length in (4, 8192))
    k = torch.empty(1, 8, 8192, 64, dtype=HALF)
    assert kernel_for(on_hopper(few, k, k), 90) == "wmma"
    assert kernel_for(on_hopper(many, k, k), 90) == "sm90"
    assert kernel_for(on_hopper(many, k, k), 80) == "wmma"
    assert (
        flashcore.backends.dispatch.choose_backend(on_hopper(few, k, k), "sm90").backend == "sm90"
    )
    text = text_of(few, k, k, arch=90)
    assert "not by the Hopper kernel: TMA needs 16-byte aligned rows" in text
    assert "make it contiguous once" in text
    assert "q is copied: TMA needs 16-byte aligned rows" in text_of(many, k, k, arch=90)
    expanded = torch.empty(1, 1, 4, 64, dtype=HALF).expand(1, 8, -1, -1)
    assert kernel_for(on_hopper(expanded, k, k), 90) == "sm90"


def test_copies_keep_what_is_expanded() -> None:
    """A copy of what one head of k and v holds is one head, not num_heads_kv of them."""
    q = randn(2, 4, 6, 5)
    k, v = (randn(*sizes, 6, 5).expand(2, 4, 6, 5) for sizes in ((2, 1), (1, 4)))
    adapted = adapt(Problem.from_tensors(q, k, v), "wmma")
    assert {copy.name: copy.num_bytes for copy in adapted.copies} == {
        "q": 2 * 4 * 6 * 8 * 2,
        "k": 2 * 6 * 8 * 2,
        "v": 4 * 6 * 8 * 2,
    }
    _, own_k, own_v, _ = adapted.tensors(q, k, v, None)
    assert own_k.stride() == (48, 0, 8, 1)
    assert own_v.stride() == (0, 48, 8, 1)
    assert adapted.problem.k_strides == own_k.stride()[:3]
    assert adapted.problem.v_strides == own_v.stride()[:3]


def test_what_is_added_is_zero() -> None:
    """Whatever the memory of a copy held; in this mode torch fills it with NaN."""
    q, k, v = qkv(13, 5)
    adapted = adapt(Problem.from_tensors(q, k, strided(v)), "wmma")
    torch.use_deterministic_algorithms(True)
    try:
        copies = adapted.tensors(q, k, strided(v), None)[:3]
    finally:
        torch.use_deterministic_algorithms(False)
    for copy, x in zip(copies, (q, k, v), strict=True):
        assert torch.equal(copy, F.pad(x, (0, -x.shape[3] % 8)))


def test_explain_says_what_is_copied() -> None:
    q, k, v = qkv(13, 8)
    text = text_of(strided(q), k, v, backend="sim")
    assert (
        "q is copied: its last dimension is not contiguous, and it is padded with zeros from "
        "head_dim 13 to 16" in text
    )
    assert "k is copied: it is padded with zeros from head_dim 13 to 16" in text
    assert "v is copied" not in text
    assert "D13/8" in text
    assert "head_dim 16/8" in text
    assert "is copied" not in text_of(*qkv(16, 8), backend="sim")
    assert "v is copied: its last" in text_of(q, k, strided(v), backend="torch")


@pytest.mark.filterwarnings("error::flashcore.FallbackWarning")
@pytest.mark.parametrize("backend", [SIM, WMMA, GPU])
def test_the_drop_in_of_torch_too(backend: str) -> None:
    q, k, v = (x[:, :2] for x in qkv(11, 3, backend))
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    with flashcore.enable(backend=backend):
        for tensors in ((q, k, v), (strided(q), strided(k), v), (q[0], k[0], v[0])):
            out = F.scaled_dot_product_attention(*tensors)
            want = expected if out.dim() == 4 else expected[0]
            torch.testing.assert_close(out.float(), want, atol=2e-3, rtol=2e-3)


def test_ordinary_tensors_are_read_in_place(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    q, k, v = qkv(16, 8)
    seen: list[Any] = []
    monkeypatch.setattr(
        flashcore.sim,
        "simulate",
        lambda *args, **options: seen.extend(args[2:5]) or simulate(*args),
    )
    flashcore.attention(q, k, v, backend="sim")
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in (q, k, v)]
