"""Caches of float8_e4m3fn: right on every road, whatever the scales; what is refused, and how."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pages import make_cache
from parameters import thorough_but
from torch import Tensor

import flashcore
from flashcore.base import env
from flashcore.checks.accuracy import error_report
from flashcore.checks.paged_cases import Cache, PagedCase, paged_error_report
from flashcore.compat import flash_attn_3
from flashcore.errors import FallbackWarning
from flashcore.ops.paged import attention_paged
from flashcore.problem.scales import quantised

FLOAT8 = torch.float8_e4m3fn


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.SIM_ARCH.name, "90")


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return "torch", or "sim" with the architecture on which the kernel of that name runs."""
    if request.param == "torch":
        return "torch"
    monkeypatch.setenv(env.SIM_ARCH.name, {"sm90": "90", "wmma": "80"}[request.param])
    return "sim"


BACKENDS = ("torch", "sm90", "wmma")
everywhere = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
# One of the two kernels is thorough.
mostly_sm90, mostly_wmma = (
    pytest.mark.parametrize("backend", thorough_but(("torch", kernel), BACKENDS), indirect=True)
    for kernel in ("sm90", "wmma")
)


def attend(x: Cache, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    result = attention_paged(
        *x.arguments(), **x.scales(), **options, return_lse=True, backend=backend
    )
    return result[0], result[1]


# Scales of all, of each head, of each sequence and head: by the seed.
CASES: dict[str, dict[str, Any]] = {
    "one token": {"lengths": (70, 0, 33), "seqlen_q": 1, "num_heads_q": 6, "num_heads_kv": 2},
    "a chunk": {"lengths": (90, 20), "seqlen_q": 70, "causal": "lower_right", "seed": 1},
    "everything": {
        "lengths": (90, 17), "page_size": 8, "seqlen_q": 5, "num_heads_kv": 2, "seed": 2,
        "window": (40, 3), "softcap": 5.0, "dtype": "bfloat16", "head_dim": 96, "head_dim_v": 32,
    },
    "two strips of rows": {
        "lengths": (70,), "seqlen_q": 9, "num_heads_q": 4, "num_heads_kv": 2,
        "causal": "lower_right", "dtype": "bfloat16",
    },
    "few rows of a wide head_dim": {
        "lengths": (20, 133), "seqlen_q": 3, "num_heads_q": 4, "head_dim": 128, "head_dim_v": 64,
        "window": (90, 3), "softcap": 5.0, "dtype": "bfloat16",
    },
    "a wide head_dim": {"lengths": (40,), "head_dim": 192, "head_dim_v": 160, "dtype": "bfloat16"},
}  # fmt: skip


@pytest.mark.parametrize(
    "name", thorough_but(("one token", "two strips of rows", "everything"), CASES)
)
@everywhere
def test_the_error_is_that_of_the_same_values_in_16_bits(backend: str, name: str) -> None:
    """Scales are powers of two here, so what elements count is exact in the dtype of q, and the
    error rule compares with plain attention on those."""
    case = PagedCase(**{"page_size": 16, "cache_dtype": "float8_e4m3fn", **CASES[name]})
    dtype = getattr(torch, case.dtype)
    fields = {k: v for k, v in CASES[name].items() if k not in ("lengths", "page_size", "dtype")}
    x = make_cache(case.page_size, case.lengths, dtype=dtype, cache_dtype="float8_e4m3fn", **fields)
    out, lse = attend(x, backend, **case.options())
    report = paged_error_report(out, lse, case, x)
    assert report.ok, str(report)


@pytest.mark.parametrize("spread", thorough_but((1e-30, 1e30), (1e-30, 1.0, 1e30)))
@pytest.mark.usefixtures("on_hopper")
def test_queries_of_any_size_keep_their_products(spread: float) -> None:
    """The Hopper kernel multiplies Q by powers of two; heads that differ by 2^40 share a row tile,
    and one has an infinite element."""
    x = make_cache(16, (70,), dtype=torch.bfloat16, cache_dtype="float8_e4m3fn", num_heads_q=4)
    sizes = torch.tensor([1.0, 2.0**-40, 2.0**20, 0.0])[None, :, None, None]
    q = (x.q.float() * sizes).bfloat16() * spread
    q[0, 2, 0, 0] = math.inf
    scale = min(1e18, max(1e-18, 1 / spread))
    x = x._replace(q=q)
    out, lse = attend(x, "sim", scale=scale)
    want, want_lse = attend(x, "torch", scale=scale)
    torch.testing.assert_close(out.float(), want.float(), atol=2e-2, rtol=2e-2, equal_nan=True)
    torch.testing.assert_close(lse, want_lse, atol=1e-2, rtol=1e-2, equal_nan=True)


@mostly_wmma
def test_a_contiguous_cache_is_one_page_each(backend: str) -> None:
    """Larger pages have other tiles, and other bits."""
    x = make_cache(
        32, (32, 30, 7), num_heads_q=4, num_heads_kv=2, seqlen_q=2, cache_dtype="float8_e4m3fn",
        seed=2, max_pages=1,
    )  # fmt: skip
    rows = x.page_table[:, 0].long()
    k, v = (pages.view(torch.uint8)[rows].view(FLOAT8) for pages in (x.k_pages, x.v_pages))
    out = flashcore.attention(
        x.q, k, v, seqlens_k=x.seqlens_k, causal=True, backend=backend, **x.scales()
    )
    want, _ = attend(x, backend, causal=True)
    assert torch.equal(out, want)


@mostly_sm90
def test_a_mask_and_sinks_hold_on_a_contiguous_cache(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 2, 3, 64, generator=generator).half()
    k, v = torch.randn(2, 2, 1, 40, 64, generator=generator).to(FLOAT8)
    scales = {"k_scale": torch.tensor([[0.5], [2.0]]), "v_scale": torch.tensor(0.25)}
    options: dict[str, Any] = {
        "mask": torch.randn(2, 1, 3, 40, generator=generator) * 3,
        "sinks": torch.tensor([1.0, -2.0]),
        "seqlens_k": torch.tensor([40, 21], dtype=torch.int32),
    }
    out = flashcore.attention(q, k, v, **scales, **options, backend=backend)
    wide_k, wide_v = k.float() * scales["k_scale"][..., None, None], v.float() * 0.25
    want = flashcore.attention(q.float(), wide_k, wide_v, **options)
    torch.testing.assert_close(out.float(), want, atol=2e-3, rtol=2e-3)


def test_one_distinguished_key_is_found() -> None:
    """The key lies in 4096 others; at 131072 of them, on a GPU, see test_float8_gpu.py."""
    q, k, v, scales, want = needle(4096, 1234, "cpu")
    lengths = torch.tensor([4096], dtype=torch.int32)
    out = flashcore.attention(q, k, v, seqlens_k=lengths, **scales)
    torch.testing.assert_close(out, want, atol=0.02, rtol=0.02)


def needle(
    length: int, place: int, device: str, heads: int = 2, dim: int = 64
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], Tensor]:
    """Return q, k, v, scales of one sequence in which one key answers the query, and its value."""
    generator = torch.Generator(device).manual_seed(length)
    k = torch.randn(1, heads, length, dim, generator=generator, device=device)
    v = torch.randn(1, heads, length, dim, generator=generator, device=device)
    q = torch.randn(1, heads, 1, dim, generator=generator, device=device)
    q /= q.norm(dim=-1, keepdim=True)
    # The needle's score is 40 before the softmax, the others' are normal with deviation 1: so
    # exp(40) stands against a sum of about length * exp(1 / 2).
    k[:, :, place] = q[:, :, 0] * 40
    q *= dim**0.5
    scales = {"k_scale": k.abs().amax((2, 3)) / 448, "v_scale": v.abs().amax((2, 3)) / 448}
    k8 = quantised(k, scales["k_scale"][..., None, None], FLOAT8)
    v8 = quantised(v, scales["v_scale"][..., None, None], FLOAT8)
    want = v8[:, :, place : place + 1].float() * scales["v_scale"][..., None, None]
    return q.bfloat16(), k8, v8, scales, want.bfloat16()


def steps_of(backend: str, paged: bool, is_packed: bool, device: str = "cpu") -> None:
    """Append 17, 1 and 2 tokens, and compare each step with what the values in the cache say."""
    on_device: dict[str, Any] = {"device": device}
    random = on_device | {"generator": torch.Generator(device).manual_seed(5)}
    k_scale = torch.rand(2, 2, **random) * 0.02 + 0.005
    v_scale = torch.rand(2, **random) * 0.02 + 0.005
    pages = torch.tensor([[3, 1, 4], [0, 5, 2]], dtype=torch.int32, **on_device)
    table = pages if paged else None
    shape = (6, 16, 2, 32) if paged else (2, 48, 2, 32)
    k_cache, v_cache = (x.transpose(1, 2) for x in torch.zeros(2, *shape, **on_device).to(FLOAT8))
    seqlens_k = torch.zeros(2, dtype=torch.int32, **on_device)
    seen: list[tuple[Tensor, Tensor]] = []
    for tokens in (17, 1, 2):
        q = torch.randn(2, 4, tokens, 32, **random).bfloat16()
        k, v = torch.randn(2, 2, 2, tokens, 32, **random).bfloat16()
        given, packing = [q, k, v], {}
        if is_packed:
            given = [x.transpose(1, 2).flatten(0, 1) for x in given]
            ends = torch.tensor([0, tokens, 2 * tokens], dtype=torch.int32, **on_device)
            packing = {"cu_seqlens_q": ends, "max_seqlen_q": tokens}
        out = flashcore.attention_with_kvcache(
            given[0], k_cache, v_cache, *given[1:], seqlens_k=seqlens_k, page_table=table,
            k_scale=k_scale, v_scale=v_scale, backend=backend, **packing,  # type: ignore[arg-type]
        )  # fmt: skip
        seqlens_k += tokens
        scales = k_scale[..., None, None], v_scale[:, None, None]
        pairs = zip((k, v), scales, strict=True)
        of_k, of_v = (quantised(x, scale, FLOAT8).float() * scale for x, scale in pairs)
        seen.append((of_k, of_v))
        keys, values = (torch.cat([step[i] for step in seen], 2) for i in (0, 1))
        want = flashcore.attention(q.float(), keys, values, causal=True)
        if is_packed:
            want = want.transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(out.float(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("paged", thorough_but((True,), (False, True)))
@pytest.mark.parametrize("is_packed", [False, True])
@everywhere
def test_new_tokens_are_divided_by_the_scale(backend: str, is_packed: bool, paged: bool) -> None:
    if backend == "sim" and is_packed:
        pytest.skip("the same kernel as without packing")
    steps_of(backend, paged, is_packed)


def test_what_is_too_large_saturates() -> None:
    caches = torch.zeros(2, 1, 1, 8, 16).to(FLOAT8)
    x = torch.full((1, 1, 1, 16), 1e4)
    x[..., 1] = -1e4
    flashcore.attention_with_kvcache(
        x, *caches, x, x, seqlens_k=torch.zeros(1, dtype=torch.int32),
        k_scale=torch.tensor(2.0), v_scale=torch.tensor(0.0),
    )  # fmt: skip
    assert caches[0, 0, 0, 0, :2].float().tolist() == [448.0, -448.0]
    assert caches[1, 0, 0, 0].float().isfinite().all()


@mostly_wmma
def test_queries_of_different_numbers_are_packed_over_pages(backend: str) -> None:
    """Two rows belong to no sequence, and have no scale."""
    x = make_cache(16, (40, 9), seqlen_q=1, cache_dtype="float8_e4m3fn", seed=2)
    q = torch.randn(8, 2, 64, generator=torch.Generator().manual_seed(0)).half()
    ends = torch.tensor([0, 5, 6], dtype=torch.int32)
    out = flashcore.attention_with_kvcache(
        q, x.k_pages, x.v_pages, seqlens_k=x.seqlens_k, page_table=x.page_table, cu_seqlens_q=ends,
        max_seqlen_q=5, backend=backend, **x.scales(),
    )  # fmt: skip
    assert not out[6:].any()
    for b, rows in enumerate((slice(0, 5), slice(5, 6))):
        _, k, v = x.sequence(b)
        report = error_report(
            out[rows].transpose(0, 1)[None], q[rows].transpose(0, 1)[None], k, v, causal=True
        )
        assert report.ok, str(report)


def test_padding_on_the_left_takes_the_scales_of_sequences() -> None:
    x = make_cache(16, (40, 30), seqlen_q=1, cache_dtype="float8_e4m3fn", seed=2)
    q = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(0)).half()
    skipped = torch.tensor([3, 7], dtype=torch.int32)
    out = flashcore.attention_with_kvcache(
        q, x.k_pages, x.v_pages, seqlens_k=x.seqlens_k, page_table=x.page_table,
        cu_seqlens_q=torch.tensor([0, 4, 5], dtype=torch.int32), cache_leftpad=skipped,
        **x.scales(),
    )  # fmt: skip
    for b, rows in enumerate((slice(0, 4), slice(4, 5))):
        _, k, v = x.sequence(b)
        k, v = (tensor[:, :, int(skipped[b]) :] for tensor in (k, v))
        of_rows = (x[rows].transpose(0, 1)[None] for x in (out, q))
        report = error_report(*of_rows, k, v, causal=True)
        assert report.ok, str(report)


def test_flash_attn_3_calls_the_scales_descales() -> None:
    x = make_cache(16, (40, 9), seqlen_q=2, cache_dtype="float8_e4m3fn", seed=2)
    want, _ = attend(x, "torch", causal=True)
    pages = x.k_pages.transpose(1, 2), x.v_pages.transpose(1, 2)
    descales = {"k_descale": x.k_scale, "v_descale": x.v_scale}
    out = flash_attn_3.flash_attn_with_kvcache(
        x.q.transpose(1, 2), *pages, cache_seqlens=x.seqlens_k, page_table=x.page_table,
        causal=True, **descales,
    )  # fmt: skip
    assert torch.equal(out, want.transpose(1, 2))
    packed = flash_attn_3.flash_attn_varlen_func(
        x.q.transpose(1, 2).flatten(0, 1), *pages, max_seqlen_q=2, seqused_k=x.seqlens_k,
        cu_seqlens_q=torch.tensor([0, 2, 4], dtype=torch.int32), block_table=x.page_table,
        causal=True, **descales,
    )  # fmt: skip
    assert torch.equal(packed, out.flatten(0, 1))
    ones = flash_attn_3.flash_attn_with_kvcache(
        x.q.transpose(1, 2), *pages, cache_seqlens=x.seqlens_k, page_table=x.page_table
    )
    one = torch.ones(())
    want, _ = attend(x._replace(k_scale=one, v_scale=one), "torch")
    assert torch.equal(ones, want.transpose(1, 2))


def test_a_compiled_call_is_the_same() -> None:
    x = make_cache(16, (40, 9), seqlen_q=2, cache_dtype="float8_e4m3fn", seed=1)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(q: Tensor, k_scale: Tensor) -> Any:
        return attention_paged(
            q, *x.arguments()[1:], causal=True, k_scale=k_scale, v_scale=x.v_scale
        )

    assert x.k_scale is not None
    want, _ = attend(x, "torch", causal=True)
    assert torch.equal(call(x.q, x.k_scale), want)


ONE = torch.ones(())
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no scale": ({"k_scale": None}, ValueError, r"k_scale is missing.*torch\.ones"),
    "no scale of v": ({"v_scale": None}, ValueError, r"v_scale is missing"),
    "a number": ({"k_scale": 0.5}, TypeError, r"k_scale must be a torch\.Tensor.*torch\.tensor"),
    "another dtype": ({"v_scale": ONE.half()}, TypeError, r"v_scale has dtype.*v_scale\.float"),
    "another device": ({"k_scale": ONE.to("meta")}, ValueError, r"k_scale is on meta"),
    "a shape of nothing": (
        {"k_scale": torch.ones(3)}, ValueError, r"k_scale has shape \[3\].*\[2, 1\]",
    ),
    "a shape of the cache": (
        {"v_scale": torch.ones(2, 1, 1)}, ValueError, r"v_scale has shape \[2, 1, 1\]",
    ),
    "a cache of 16 bits": (
        {"k_cache": torch.zeros(2, 1, 32, 64).half(), "v_cache": torch.zeros(2, 1, 32, 64).half()},
        ValueError, "k_scale is given, but k_cache has dtype torch.float16",
    ),
    "one cache of 8 bits": (
        {"v_cache": torch.zeros(2, 1, 32, 64).half()}, TypeError, "k_cache has dtype.*v_cache has",
    ),
    "other 8 bits": (
        {"k_cache": torch.zeros(2, 1, 32, 64).to(torch.float8_e5m2)},
        NotImplementedError, "k_cache has dtype torch.float8_e5m2.*float8_e4m3fn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_the_message_names_argument_value_and_way_out(name: str) -> None:
    changed, kind, message = WRONG[name]
    caches = torch.zeros(2, 2, 1, 32, 64).to(FLOAT8)
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 1, 1, 64).half(), "k_cache": caches[0], "v_cache": caches[1],
        "seqlens_k": torch.tensor([3, 4], dtype=torch.int32), "k_scale": ONE, "v_scale": ONE,
    }  # fmt: skip
    with pytest.raises(kind, match=message):
        flashcore.attention_with_kvcache(**(arguments | changed))
    del arguments["k_cache"], arguments["v_cache"]
    changed = {name.removesuffix("_cache"): x for name, x in changed.items()}
    given = arguments | {"k": caches[0], "v": caches[1]} | changed
    if name != "other 8 bits":
        with pytest.raises(kind, match=message.replace("_cache", "")):
            flashcore.attention(**given)


def test_a_cache_of_8_bits_comes_with_lengths() -> None:
    q, (k, v) = torch.zeros(1, 1, 1, 64), torch.zeros(2, 1, 1, 8, 64).to(FLOAT8)
    with pytest.raises(TypeError, match=r"k has dtype torch.float8_e4m3fn.*seqlens_k, k_scale"):
        flashcore.attention(q, k, v)
    with pytest.raises(ValueError, match=r"without seqlens_k.*torch\.full"):
        flashcore.attention(q, k, v, k_scale=ONE, v_scale=ONE)


def test_there_is_no_gradient() -> None:
    q, (k, v) = torch.zeros(1, 1, 1, 64), torch.zeros(2, 1, 1, 8, 64).to(FLOAT8)
    lengths = torch.tensor([3], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"8 bits.*torch\.no_grad"):
        flashcore.attention(q.requires_grad_(), k, v, seqlens_k=lengths, k_scale=ONE, v_scale=ONE)


def test_autocast_leaves_a_cache_as_it_is() -> None:
    x = make_cache(16, (16, 9), seqlen_q=2, cache_dtype="float8_e4m3fn", dtype=torch.float32)
    want = attention_paged(*x._replace(q=x.q.bfloat16()).arguments(), **x.scales())
    rows = x.page_table[:, 0].long()
    k, v = (pages.view(torch.uint8)[rows].view(FLOAT8) for pages in (x.k_pages, x.v_pages))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flashcore.attention(x.q, k, v, seqlens_k=x.seqlens_k, **x.scales())
        stepped = flashcore.attention_with_kvcache(
            x.q, k, v, seqlens_k=x.seqlens_k, causal=False, **x.scales()
        )
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, want)  # type: ignore[arg-type]
    assert torch.equal(stepped, out)


def test_the_fallback_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without the Hopper kernel has the portable one, and so have pages that the Hopper
    kernel does not read; rows that neither reads fall back."""
    import dataclasses

    from flashcore.backends import dispatch
    from flashcore.ops.paged import paged_problem
    from flashcore.problem.options import Options

    x = make_cache(16, (40,), cache_dtype="float8_e4m3fn")
    problem = paged_problem(x.inputs(), Options.checked(False, None, None, None))
    monkeypatch.setattr(dispatch, "_warned", set())
    for arch, backend in ((80, "wmma"), (90, "sm90")):
        choice = dispatch.resolved(dataclasses.replace(problem, device="cuda", arch=arch), "auto")
        assert choice.backend == backend
    odd = dataclasses.replace(problem, device="cuda", arch=90, page_size=12)
    assert dispatch.resolved(odd, "auto").backend == "wmma"
    choice = dispatch.resolved(dataclasses.replace(odd, load_bytes=2), "auto")
    assert choice.backend == "torch"
    with pytest.warns(FallbackWarning, match=r'multiples of 4 bytes.*pass backend="torch"'):
        dispatch.warn_once(choice)
