"""`batch_invariant=True` gives a sequence the same bits whatever is beside it: neighbours, order,
batch size, and how much room a cache has."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

import flashcore
from flashcore.checks.accuracy import error_report
from flashcore.kernels import stream_k
from flashcore.ops.paged import attention_paged
from flashcore.problem import Problem
from flashcore.selection.select import select_plan

PAGE = 16
HEADS, HEADS_KV, DIM = 4, 2, 32
LENGTHS = (300, 0, 33, 1, 128)


def sequences(
    lengths: tuple[int, ...], queries: int, *, dim: int = DIM, seed: int = 0, device: str = "cpu"
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return q [heads, queries, dim], k and v [heads_kv, length, dim] of each sequence."""
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(
            (torch.randn(h, n, dim, generator=generator) * 2).half().to(device)
            for h, n in ((HEADS, queries), (HEADS_KV, length), (HEADS_KV, length))
        )  # type: ignore[misc]
        for length in lengths
    ]


def padded(given: list[Any], room: int, backend: str, **options: Any) -> list[Any]:
    """Return (out, lse) of each sequence, of a padded batch with NaN behind their keys."""
    q = torch.stack([q for q, _, _ in given])
    k, v = (
        torch.stack([torch.nn.functional.pad(x[i], (0, 0, 0, room - x[i].shape[1]), value=torch.nan)
                     for x in given])
        for i in (1, 2)
    )  # fmt: skip
    lengths = torch.tensor([x[1].shape[1] for x in given], dtype=torch.int32, device=q.device)
    out, lse = flashcore.attention(
        q, k, v, seqlens_k=lengths, batch_invariant=True, return_lse=True, backend=backend,
        **options,
    )  # fmt: skip
    return list(zip(out, lse, strict=True))


def paged(given: list[Any], spare: int, backend: str, **options: Any) -> list[Any]:
    """Return (out, lse) of each sequence, of a cache in pages, in an order of no meaning."""
    q = torch.stack([q for q, _, _ in given])
    counts = [-(-x[1].shape[1] // PAGE) for x in given]
    columns = max(counts) + spare
    order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(columns))
    table = torch.full((len(given), columns), -1, dtype=torch.int32)
    pages = q.new_full((2, sum(counts) + 1, HEADS_KV, PAGE, q.shape[3]), torch.nan)
    at = 0
    for b, (_, k, v) in enumerate(given):
        for j in range(counts[b]):
            table[b, j] = order[at]
            for kind, x in enumerate((k, v)):
                part = x[:, j * PAGE : (j + 1) * PAGE]
                pages[kind, order[at], :, : part.shape[1]] = part
            at += 1
    lengths = torch.tensor([x[1].shape[1] for x in given], dtype=torch.int32, device=q.device)
    out, lse = attention_paged(
        q, pages[0], pages[1], table.to(q.device), lengths, batch_invariant=True, return_lse=True,
        backend=backend, **options,
    )  # fmt: skip
    return list(zip(out, lse, strict=True))


def packed(given: list[Any], backend: str, **options: Any) -> list[Any]:
    """Return (out, lse) of each sequence, of packed ones."""
    q, k, v = (torch.cat([x[i] for x in given], 1).transpose(0, 1) for i in range(3))
    ends = [
        torch.tensor([0, *(x[i].shape[1] for x in given)]).cumsum(0).int().to(q.device)
        for i in (0, 1)
    ]
    longest = [max(x[i].shape[1] for x in given) for i in (0, 1)]
    out, lse = flashcore.attention_varlen(
        q, k, v, *ends, *longest, batch_invariant=True, return_lse=True, backend=backend, **options
    )
    rows = ends[0].tolist()
    return [(out[a:b].transpose(0, 1), lse[:, a:b]) for a, b in itertools.pairwise(rows)]


def dense(given: Any, backend: str, **options: Any) -> Any:
    q, k, v = (x.unsqueeze(0) for x in given)
    out, lse = flashcore.attention(
        q, k, v, batch_invariant=True, return_lse=True, backend=backend, **options
    )
    return out[0], lse[0]


def same(one: Any, other: Any) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def check_every_neighbour(backend: str, queries: int, device: str = "cpu", **options: Any) -> None:
    """Compare each sequence alone with itself among others, in any order, room and layout."""
    lengths = LENGTHS if device == "cpu" else (5000, 0, 33, 1, 1280, 17, 4096, 2048)
    given = sequences(lengths, queries, dim=DIM if device == "cpu" else 128, device=device)
    longest = max(lengths)
    together = padded(given, longest, backend, **options)
    wider = padded(given[::-1], longest + 77, backend, **options)[::-1]
    in_pages = paged(given, 0, backend, **options)
    for b, length in enumerate(lengths):
        q, k, v = given[b]
        if length:
            sequence = (x.unsqueeze(0) for x in (q, k, v))
            report = error_report(
                together[b][0][None], *sequence, lse=together[b][1][None], **options
            )
            assert report.ok, f"sequence {b}: {report}"
            assert same(together[b], dense(given[b], backend, **options))
        assert same(together[b], wider[b])
        assert same(together[b], in_pages[b])
    some = [b for b, length in enumerate(lengths) if length]
    for b in some[:2]:
        assert same(together[b], padded([given[b]], lengths[b], backend, **options)[0])
        assert same(together[b], paged([given[b]] * 2, 3, backend, **options)[1])
    many = padded(given * 3, longest, backend, **options)
    assert all(same(x, together[i % len(given)]) for i, x in enumerate(many))


def check_packed(backend: str, device: str = "cpu", **options: Any) -> None:
    """Compare packed sequences of different numbers of queries with themselves alone."""
    lengths = (70, 0, 200, 33) if device == "cpu" else (700, 0, 5000, 33, 2048)
    dim = DIM if device == "cpu" else 128
    given = [
        sequences((n,), queries, dim=dim, seed=i, device=device)[0]
        for i, (n, queries) in enumerate(zip(lengths, (1, 3, 40, 1, 300), strict=False))
    ]
    together = packed(given, backend, **options)
    turned = packed(given[::-1], backend, **options)[::-1]
    for b in range(len(given)):
        assert same(together[b], turned[b])
        assert same(together[b], packed([given[b], given[0]], backend, **options)[0])


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut keys every two key tiles, so that small calls have several pieces."""
    monkeypatch.setattr(stream_k, "piece_tiles", lambda plan: 2)
    monkeypatch.setenv("FLASHCORE_SIM_ARCH", "90")


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize(
    ("queries", "options"),
    [
        pytest.param(1, {}, marks=pytest.mark.thorough),  # two seconds each
        (3, {"causal": True, "softcap": 4.0}),
    ],
)
def test_a_sequence_alone_decides_its_bits(queries: int, options: dict[str, Any]) -> None:
    check_every_neighbour("sim", queries, **options)


@pytest.mark.thorough
@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize(
    ("queries", "options"),
    [(2, {"window": (40, 0), "causal": True}), (40, {"causal": True})],
)
def test_with_windows_and_many_queries_too(queries: int, options: dict[str, Any]) -> None:
    check_every_neighbour("sim", queries, **options)


@pytest.mark.usefixtures("short_pieces")
def test_packed_sequences_decide_their_bits() -> None:
    check_packed("sim", causal=True)


@pytest.mark.thorough
@pytest.mark.parametrize("queries", [1, 40])
def test_the_portable_kernel_does_so(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_SIM_ARCH", "80")
    check_every_neighbour("sim", queries, causal=True)
    check_packed("sim", causal=True)


def test_pytorch_does_so() -> None:
    """It computes one sequence after the other."""
    given = sequences((60, 60, 60), 5)
    q, k, v = (torch.stack([x[i] for x in given]) for i in range(3))
    together = flashcore.attention(q, k, v, batch_invariant=True, return_lse=True)
    for b in range(3):
        assert same((together[0][b], together[1][b]), dense(given[b], "auto"))


def problem_of(batch: int, queries: int, room: int, varlen: str = "keys") -> Problem:
    q = torch.empty(1, 32, queries, 128).half()
    k = torch.empty(1, 8, 64, 128).half()
    problem = Problem.from_tensors(q, k, k, batch_invariant=True)
    return dataclasses.replace(problem, batch=batch, seqlen_k=room, varlen=varlen)


@pytest.mark.parametrize("queries", [1, 8, 32, 33, 500])
def test_tiles_do_not_depend_on_the_batch(queries: int) -> None:
    found = {
        (plan.block_n, plan.stream_k, plan.key_slices, plan.num_splits)  # type: ignore[attr-defined]
        for batch in (1, 7, 300)
        for room in (64, 1000, 100_000)
        for varlen in ("none", "keys")
        for plan in (select_plan(problem_of(batch, queries, room, varlen), 90),)
    }
    assert found == {(64, queries <= 32, 1, 1)}
    assert not any(
        select_plan(problem_of(2, queries, 100), 90).constants()[name]
        for name in ("LAZY_RESCALE", "TANH_BY_POLYNOMIAL")
    )


@pytest.mark.parametrize("arch", [75, 80, 86, 90])
def test_every_head_dim_has_a_tile_on_every_gpu(arch: int) -> None:
    for head_dim in (8, 64, 128, 192, 200, 224, 256):
        for rows in (1, 100):
            q, k = (torch.empty(2, 2, n, head_dim, dtype=torch.float16) for n in (rows, 3000))
            problem = Problem.from_tensors(q, k, k, batch_invariant=True)
            assert select_plan(problem, arch, kernel="attn_fwd_wmma").head_dim == head_dim


def test_a_wrong_flag_is_named() -> None:
    q = torch.randn(1, 2, 3, 16)
    with pytest.raises(TypeError, match="batch_invariant"):
        flashcore.attention(q, q, q, batch_invariant=1)  # type: ignore[call-overload]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("queries", "options"),
    [(1, {}), (4, {"causal": True}), (1, {"window": (1000, 0)}), (300, {"causal": True})],
)
def test_on_a_gpu(queries: int, options: dict[str, Any]) -> None:
    check_every_neighbour("auto", queries, "cuda", **options)


@pytest.mark.gpu
def test_packed_on_a_gpu() -> None:
    check_packed("auto", "cuda", causal=True)
