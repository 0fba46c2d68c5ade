"""Test packed queries over a paged cache, read in place: every sequence is as if alone, whatever
lies in the pages and entries that are not its own."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from pages import Cache, check_packed, make_cache
from parameters import thorough_but

import flashcore
from backends import GPU, SIM, WMMA, device_of
from flashcore.checks.accuracy import error_report
from flashcore.checks.paged_cases import draw_paged_case, make_paged_inputs
from flashcore.ops.paged_varlen import attention_paged_varlen

SIM90 = pytest.param("sim90", id="sim90")
every_backend = pytest.mark.parametrize("backend", ["torch", SIM, SIM90, WMMA, GPU])

# One token, a chunk of a prompt, none, a few drafts, a sequence without keys.
COUNTS = (1, 70, 0, 5, 3)
LENGTHS = (33, 81, 12, 40, 0)
TOLD = (33, 10**9, 12, 40, -7)  # of which the table's reach and 0 are made
MAX_PAGES = {1: 81, 8: 11, 16: 6, 24: 4, 64: 2}
BEHIND = 2  # rows of no sequence
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "upper-left": {"causal": "upper_left"},
    "window-softcap": {"window": (20, 4), "softcap": 5.0},
}


def make(page_size: int, backend: str, **fixed: Any) -> tuple[Cache, torch.Tensor, torch.Tensor]:
    """Return a cache, packed queries, and where they end."""
    reach = MAX_PAGES[page_size] * page_size
    lengths = tuple(reach if n == 10**9 else m for n, m in zip(TOLD, LENGTHS, strict=True))
    cache = make_cache(
        page_size, lengths, told=TOLD, max_pages=MAX_PAGES[page_size], seqlen_q=max(COUNTS),
        device=device_of(backend), **fixed,
    )  # fmt: skip
    rows = [x[:, :n].transpose(0, 1) for x, n in zip(cache.q, COUNTS, strict=True)]
    behind = torch.full((BEHIND, *rows[0].shape[1:]), torch.nan).to(rows[0])
    ends = torch.tensor([0, *COUNTS], dtype=torch.int32, device=cache.q.device).cumsum(0)
    return cache, torch.cat([*rows, behind]), ends.int()


def attend(
    backend: str, cache: Cache, q: torch.Tensor, ends: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        if backend == "sim90":
            backend = "sim"
            patch.setenv("FLASHCORE_SIM_ARCH", "90")
        _, *of_keys = cache.arguments()
        result = attention_paged_varlen(
            q, *of_keys, ends, max(COUNTS), return_lse=True, backend=backend, **options
        )
    assert isinstance(result, tuple)
    return result


def check(backend: str, cache: Cache, q: torch.Tensor, ends: torch.Tensor, **options: Any) -> None:
    """Hold every sequence to the error rule, by the oracle for it alone."""
    out, lse = attend(backend, cache, q, ends, **options)
    assert out.isfinite().all()
    check_packed(cache, COUNTS, q, out, lse, **options)
    begin = sum(COUNTS)
    assert not out[begin:].any()
    unseen = options.get("sinks", torch.tensor(-torch.inf)).to(lse)
    assert torch.equal(lse[:, begin:], unseen.expand(BEHIND, -1).t() if unseen.dim() else
                       torch.full_like(lse[:, begin:], -torch.inf))  # fmt: skip


@pytest.mark.parametrize("page_size", thorough_but((1, 24), MAX_PAGES))
@every_backend
def test_every_sequence_is_as_if_alone(backend: str, page_size: int) -> None:
    check(backend, *make(page_size, backend), causal=True)


@pytest.mark.parametrize("name", thorough_but(("upper-left", "window-softcap"), OPTIONS))
@every_backend
def test_options(backend: str, name: str) -> None:
    check(backend, *make(16, backend, dtype=torch.bfloat16, seed=1), **OPTIONS[name])


@pytest.mark.parametrize("heads", [(1, 1), (10, 2)])
@every_backend
def test_both_layouts_of_pages_and_groups_of_heads(backend: str, heads: tuple[int, int]) -> None:
    num_heads_q, num_heads_kv = heads
    for heads_first in (False, True):
        made = make(
            8, backend, num_heads_q=num_heads_q, num_heads_kv=num_heads_kv, head_dim=40,
            head_dim_v=72, heads_first=heads_first,
        )  # fmt: skip
        check(backend, *made, causal=True)


@every_backend
def test_sinks(backend: str) -> None:
    """A sequence without keys has the sink alone, and so has a row of no sequence."""
    made = make(16, backend, num_heads_q=4, num_heads_kv=2)
    check(backend, *made, causal=True, sinks=torch.randn(4, device=made[1].device))


@every_backend
def test_the_longest_is_no_more_than_a_hint(backend: str) -> None:
    cache, q, ends = make(16, backend)
    _, *of_keys = cache.arguments()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHCORE_SIM_ARCH", "90" if backend == "sim90" else "80")
        asked = "sim" if backend == "sim90" else backend
        out = attention_paged_varlen(q, *of_keys, ends, 1, causal=True, backend=asked)
        again = attention_paged_varlen(
            q, *of_keys, ends, torch.tensor(999), causal=True, backend=asked
        )
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(out, again, rtol=1e-2, atol=1e-2)


def test_gradients_go_to_the_pages() -> None:
    """The same as through a copy of each sequence's tokens, which autograd knows."""
    cache, q, ends = make(16, "torch", dtype=torch.float64, num_heads_q=2, num_heads_kv=1)
    q, total = q[:-BEHIND], int(ends[-1])
    k, v = (torch.nan_to_num(x).clone() for x in (cache.k_pages, cache.v_pages))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    table, told = cache.page_table, cache.seqlens_k
    out = attention_paged_varlen(*leaves, table, told, ends, total, causal=True)
    assert isinstance(out, torch.Tensor)
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    have = torch.autograd.grad((out * weights).sum(), leaves)
    parts, begin = [], 0
    for b, (n, m) in enumerate(zip(COUNTS, cache.lengths, strict=True)):
        if n and m:
            entries = table[b, : -(-m // 16)].long()
            own = (x[entries].transpose(1, 2).flatten(0, 1)[:m].transpose(0, 1)[None]
                   for x in leaves[1:])  # fmt: skip
            rows = leaves[0][begin : begin + n].transpose(0, 1)[None]
            part = flashcore.attention(rows, *own, causal=True)[0].transpose(0, 1)
            parts.append((part * weights[begin : begin + n]).sum())
        begin += n
    want = torch.autograd.grad(torch.stack(parts).sum(), leaves)
    for x, y in zip(have, want, strict=True):
        torch.testing.assert_close(x, y)


def test_it_is_an_operator_that_compilers_and_transforms_know() -> None:
    cache, q, ends = make(16, "torch", dtype=torch.float64, num_heads_q=2, num_heads_kv=1)
    k, v = (torch.nan_to_num(x).clone() for x in (cache.k_pages, cache.v_pages))
    arguments = (
        q, k, v, cache.page_table, cache.seqlens_k, ends, 70, None, None, None, None,
    )  # fmt: skip
    options = flashcore.problem.options.Options.checked(True, None, None, None)
    torch.library.opcheck(
        torch.ops.flashcore.attention_paged_varlen_forward.default,
        (*arguments, *options, True, False, "auto"),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("backend", [WMMA, GPU])
def test_nothing_waits_for_the_lengths_and_a_graph_takes_others(backend: str) -> None:
    """Captured with some lengths, replayed with others in the same memory."""
    cache, q, ends = make(16, backend)
    _, k, v, table, told = cache.arguments()
    attend(backend, cache, q, ends, causal=True)
    graph, before = torch.cuda.CUDAGraph(), told.clone()
    told.fill_(1)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = attention_paged_varlen(
            q, k, v, table, told, ends, max(COUNTS), causal=True, backend=backend
        )
    told.copy_(before)
    graph.replay()
    want, _ = attend(backend, cache, q, ends, causal=True)
    assert torch.equal(out, want)


@every_backend
def test_with_kvcache_reads_pages_in_place(backend: str) -> None:
    """A copy of the pages would give a warning."""
    import warnings

    cache, q, ends = make(16, backend)
    _, k, v, table, told = cache.arguments()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setenv("FLASHCORE_SIM_ARCH", "90" if backend == "sim90" else "80")
        out = flashcore.attention_with_kvcache(
            q, k, v, seqlens_k=told, page_table=table, cu_seqlens_q=ends,
            max_seqlen_q=max(COUNTS), backend="sim" if backend == "sim90" else backend,
        )  # fmt: skip
    want, _ = attend(backend, cache, q, ends, causal=True)
    assert torch.equal(out, want)


def bad_call(**changes: Any) -> None:
    x = torch.zeros
    given: dict[str, Any] = {
        "q": x(5, 2, 16), "k_pages": x(4, 1, 8, 16), "v_pages": x(4, 1, 8, 16),
        "page_table": x(2, 2).int(), "seqlens_k": x(2).int(),
        "cu_seqlens_q": torch.tensor([0, 2, 5], dtype=torch.int32), "max_seqlen_q": 3,
    }  # fmt: skip
    attention_paged_varlen(**given | changes)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "padded queries": ({"q": torch.zeros(2, 2, 3, 16)}, ValueError, r"q has 4 dim.*\[total_q"),
    "a table in int64": (
        {"page_table": torch.zeros(2, 2).long()}, TypeError, r"page_table.*int64.*\.int\(\)"
    ),
    "a table of another batch": (
        {"page_table": torch.zeros(3, 2).int()}, ValueError, "page_table has 3 rows.*batch 2"
    ),
    "lengths in int64": ({"seqlens_k": torch.zeros(2).long()}, TypeError, "seqlens_k.*int64"),
    "lengths of another batch": (
        {"seqlens_k": torch.zeros(3).int()}, ValueError, "seqlens_k has 3 entries.*batch 2"
    ),
    "ends in int64": (
        {"cu_seqlens_q": torch.tensor([0, 2, 5])}, TypeError, r"cu_seqlens_q.*int64.*\.int\(\)"
    ),
    "no ends": (
        {"cu_seqlens_q": torch.zeros(0).int()}, ValueError, r"cu_seqlens_q is empty.*n \+ 1"
    ),
    "a cache of another dtype": (
        {"k_pages": torch.zeros(4, 1, 8, 16).half()}, TypeError, "k has dtype torch.float16"
    ),
    "a negative bound": ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q=-1"),
    "sinks of other heads": ({"sinks": torch.zeros(3)}, ValueError, "sinks has shape"),
    "a backend that there is not": ({"backend": "gpu"}, ValueError, "backend='gpu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_the_message_names_argument_value_and_way_out(name: str) -> None:
    bad_call()
    changes, kind, words = BAD[name]
    with pytest.raises(kind, match=words):
        bad_call(**changes)


DTYPES = "float16", "bfloat16"
RANDOM_OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"causal": True}, {"causal": True, "window": (33, 0)}, {"softcap": 5.0},
)  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("arch", ["80", "90"])
def test_random_batches_raise_no_alarm(
    arch: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn lengths, pages, heads and numbers of queries, under a schedule of its own each; what a
    kernel's text depends on has 8 values, as building one takes nine tenths of a run."""
    monkeypatch.setenv("FLASHCORE_SIM_ARCH", arch)
    monkeypatch.setenv("FLASHCORE_SIM_SEED", str(seed))
    rng = random.Random(seed)
    page_size, dtype = (8, 16, 24, 256, 32, 64, 128, 1)[seed % 8], DTYPES[seed // 4 % 2]
    case = draw_paged_case(seed, seqlen_q=70, page_size=page_size, dtype=dtype)
    cache = make_paged_inputs(case)
    counts = [rng.choice((0, 1, 1, 2, 5, 17, 64, 70)) for _ in case.lengths]
    rows = [x[:, :n].transpose(0, 1) for x, n in zip(cache.q, counts, strict=True)]
    q, ends = torch.cat(rows), torch.tensor([0, *counts]).cumsum(0).int()
    options = RANDOM_OPTIONS[seed % 4]
    _, *of_keys = cache.arguments()
    result = attention_paged_varlen(
        q, *of_keys, ends, max(1, *counts), return_lse=True, backend="sim", **options
    )
    assert isinstance(result, tuple)
    for b, (begin, n) in enumerate(zip(ends.tolist(), counts, strict=False)):
        if n:
            of_b = slice(begin, begin + n)
            own = result[0][of_b].transpose(0, 1)[None], q[of_b].transpose(0, 1)[None]
            _, k, v = cache.sequence(b)
            report = error_report(*own, k, v, lse=result[1][None, :, of_b], **options)
            assert report.ok, f"sequence {b}: {report}"
