"""Test attention_with_kvcache against Python loops and the float64 oracle, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_steps import Step, check_step, keys_of, make_step, written
from hypothesis import given, settings
from hypothesis import strategies as st

import flashcore
from backends import GPU, SIM, device_of
from flashcore.serving import attend

pytestmark = pytest.mark.filterwarnings("ignore::flashcore.FallbackWarning")

every_backend = pytest.mark.parametrize("backend", ["torch", SIM, GPU])


def run(step: Step, **options: Any) -> tuple[tuple[torch.Tensor, torch.Tensor], Any]:
    """Return (out, lse), and the caches afterwards."""
    arguments = step.arguments() | options
    result = flashcore.attention_with_kvcache(**arguments, return_lse=True)
    return result, (arguments["k_cache"], arguments["v_cache"])


def packed(step: Step, counts: list[int]) -> dict[str, Any]:
    """Return the arguments of a call that packs the first counts[b] queries and new tokens."""
    arguments = step.arguments()
    ends = torch.tensor([0, *counts]).cumsum(0).int().to(step.q.device)
    for name in ("q", "k_new", "v_new"):
        if name in arguments:
            x = arguments[name]
            rows = [x[b, :, :n].transpose(0, 1) for b, n in enumerate(counts)]
            arguments[name] = torch.cat(rows)
    return arguments | {"cu_seqlens_q": ends}


KINDS: dict[str, dict[str, Any]] = {
    "one token": {},
    "a few": {"seqlen_q": 3},
    "a prompt": {"seqlen_q": 20},
    "no new ones": {"seqlen_q": 2, "seqlen_new": 0},
    "more new ones than queries": {"seqlen_q": 1, "seqlen_new": 4},
    "fewer new ones than queries": {"seqlen_q": 4, "seqlen_new": 2},
    "pages of one": {"seqlen_q": 2, "page_size": 1},
    "pages of 8": {"seqlen_q": 3, "page_size": 8},
    "pages of 16, heads third": {"page_size": 16, "heads_third": True},
    "heads third, another dim of v": {"heads_third": True, "head_dim_v": 24},
    "one head": {"num_heads_q": 5, "num_heads_kv": 1, "page_size": 32},
}
LENGTHS = [0, 11, 30, 32, -4, 2**31 - 1]


@pytest.mark.parametrize("kind", KINDS)
@every_backend
def test_tokens_are_appended_and_seen(backend: str, kind: str) -> None:
    dtype = torch.float64 if backend == "torch" else torch.float16
    lengths = LENGTHS if backend != "sim" else LENGTHS[1:4]
    step = make_step(lengths, dtype=dtype, device=device_of(backend), **KINDS[kind])
    result, caches = run(step, backend=backend)
    check_step(step, result, caches, causal=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "not causal": {"causal": False},
    "window": {"window": (5, 0)},
    "softcap, scale": {"softcap": 2.0, "scale": 0.3},
    "both sides": {"causal": False, "window": (4, 1)},
}


@pytest.mark.parametrize("page_size", [None, 8])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_mean_what_they_mean_in_attention(name: str, page_size: int | None) -> None:
    step = make_step([3, 17, 0], seqlen_q=3, page_size=page_size)
    result, caches = run(step, **OPTIONS[name])
    check_step(step, result, caches, **({"causal": True} | OPTIONS[name]))


@pytest.mark.parametrize("page_size", [None, 8])
def test_a_mask_is_over_the_places_of_a_sequence(page_size: int | None) -> None:
    step = make_step([3, 17, 0], seqlen_q=3, page_size=page_size)
    bias = torch.randn(3, 4, 3, 32, dtype=torch.float64)
    result, caches = run(step, mask=bias)
    masks = [bias[b : b + 1, ..., :n] for b, n in enumerate([6, 20, 3])]
    check_step(step, result, caches, causal=True, masks=masks)


TREE = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("other", [None, "bool", "float"])
@pytest.mark.parametrize("page_size", [None, 8])
def test_a_tree_of_drafts_sees_its_ancestors_and_the_prefix(
    page_size: int | None, other: str | None
) -> None:
    step = make_step([0, 9, 28], seqlen_q=4, page_size=page_size)
    mask, bias = None, torch.zeros(3, 1, 4, 32, dtype=torch.float64)
    if other == "bool":
        mask = torch.rand(3, 1, 4, 32) < 0.8
        bias = bias.masked_fill(~mask, -torch.inf)
    elif other == "float":
        mask = bias = torch.randn(3, 1, 4, 32, dtype=torch.float64)
    result, caches = run(step, tree_mask=TREE, mask=mask)
    masks = []
    for b, n in enumerate([0, 9, 28]):
        own = bias[b, :, :, : n + 4].clone()
        own[:, :, n:] = own[:, :, n:].masked_fill(~TREE, -torch.inf)
        masks.append(own)
    check_step(step, result, caches, masks=masks)


@pytest.mark.parametrize("page_size", [None, 8])
@pytest.mark.parametrize(
    ("counts", "longest"), [([1, 4, 20, 0], None), ([3, 4, 2, 3], 4), ([1, 1, 0, 1], 1)]
)
def test_packed_queries_are_as_if_alone(
    counts: list[int], longest: int | None, page_size: int | None
) -> None:
    """With a bound that is near, they are padded, so that pages are read in place."""
    step = make_step([3, 17, 0, 31], seqlen_q=20, page_size=page_size)
    arguments = packed(step, counts) | {"max_seqlen_q": longest}
    arguments["q"] = torch.cat([arguments["q"], step.q[0, :, :2].transpose(0, 1)])  # of no sequence
    out, lse = flashcore.attention_with_kvcache(**arguments, return_lse=True)
    assert not out[sum(counts) :].any()
    assert (lse[:, sum(counts) :] == -torch.inf).all()
    begin = 0
    for b, count in enumerate(counts):
        own = make_step([0], seqlen_q=1)
        own.q, own.new = step.q[b : b + 1, :, :count], None
        own.caches, own.table = step.caches, step.table
        rows = slice(begin, begin + count)
        if page_size is None:
            own.caches = tuple(x[b : b + 1] for x in step.caches)  # type: ignore[assignment]
        else:
            own.table = [step.table[b]]  # type: ignore[index]
        own.lengths = [step.lengths[b]]
        own.new = tuple(x[b : b + 1, :, :count] for x in step.new)  # type: ignore[assignment,union-attr]
        if count == 0:
            continue
        want, want_lse = flashcore.attention_with_kvcache(**own.arguments(), return_lse=True)
        torch.testing.assert_close(out[rows].transpose(0, 1)[None], want)
        torch.testing.assert_close(lse[:, rows][None], want_lse)
        begin += count


def test_new_tokens_may_be_packed_otherwise_than_queries() -> None:
    """A prompt's keys may be wanted, and of its queries the last alone."""
    step = make_step([3, 17], seqlen_q=6, page_size=8)
    arguments = packed(step, [6, 2])
    queries = torch.tensor([0, 1, 2], dtype=torch.int32)
    q = arguments["q"][[5, 7]]
    last = flashcore.attention_with_kvcache(
        **arguments | {"q": q, "cu_seqlens_q": queries, "cu_seqlens_new": arguments["cu_seqlens_q"]}
    )
    arguments = packed(step, [6, 2])
    torch.testing.assert_close(last, flashcore.attention_with_kvcache(**arguments)[[5, 7]])


def test_rows_of_the_cache_may_be_chosen_and_padded_on_the_left() -> None:
    step = make_step([5, 12, 9], seqlen_q=2)
    order, pad = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([4, 0], dtype=torch.int32)
    chosen = Step(step.q[:2], step.caches, tuple(x[:2] for x in step.new), [9, 5])  # type: ignore[union-attr,arg-type]
    arguments = chosen.arguments()
    arguments["k_cache"][2, :, :4] = torch.nan
    arguments["v_cache"][2, :, :4] = torch.nan
    out = flashcore.attention_with_kvcache(**arguments, cache_batch_idx=order, cache_leftpad=pad)
    for b, row, begin, end in ((0, 2, 4, 11), (1, 0, 0, 7)):
        k, v = (arguments[name][row, :, begin:end][None] for name in ("k_cache", "v_cache"))
        assert torch.equal(k[0, :, -2:], chosen.new[0][b])  # type: ignore[index]
        want = flashcore.attention(chosen.q[b : b + 1], k, v, causal=True)
        torch.testing.assert_close(out[b : b + 1], want)


def test_results_go_where_the_caller_wants_them() -> None:
    step = make_step([3, 17], seqlen_q=2)
    want, want_lse = run(step)[0]
    out, lse = torch.full_like(want, 9.0).transpose(1, 2).contiguous(), torch.empty_like(want_lse)
    given = out.transpose(1, 2)
    returned = flashcore.attention_with_kvcache(**step.arguments(), out=given, lse=lse)
    assert returned is given
    assert torch.equal(given, want)
    assert torch.equal(lse, want_lse)


@pytest.mark.parametrize("page_size", [None, 8])
def test_sinks_join_the_softmax(page_size: int | None) -> None:
    step = make_step([3, 17, 0], seqlen_q=3, page_size=page_size)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    (out, lse), _ = run(step)
    (have, have_lse), _ = run(step, sinks=sinks)
    share = torch.sigmoid(lse - sinks[:, None])
    torch.testing.assert_close(have, out * share[..., None])
    torch.testing.assert_close(have_lse, torch.logaddexp(lse, sinks[:, None].double()))
    arguments = packed(step, [3, 1, 2])
    arguments["q"] = torch.cat([arguments["q"], arguments["q"][:1]])  # of no sequence
    results = [
        flashcore.attention_with_kvcache(
            **arguments, sinks=sinks, max_seqlen_q=longest, return_lse=True
        )
        for longest in (3, None)  # padded, and gathered
    ]
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)
    assert torch.equal(results[0][1][:, 6], sinks.double())


steps = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(-2, 40), min_size=1, max_size=4),
        "seqlen_q": st.integers(1, 5),
        "seqlen_new": st.integers(0, 5),
        "page_size": st.sampled_from([1, 2, 8, 32]),
        "heads_third": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


@settings(max_examples=40)
@given(steps)
def test_pages_change_nothing(drawn: dict[str, Any]) -> None:
    """The contiguous cache of the same tokens gives the same bits; so do pages in another order."""
    step = make_step(**drawn)
    (out, lse), caches = run(step)
    whole, lengths = written(step)
    dense = []
    for before in step.caches:
        rows = torch.full((len(lengths), before.shape[1], 32, before.shape[3]), torch.nan)
        rows = rows.to(before.dtype)
        for b, n in enumerate(step.lengths):
            n = min(max(n, 0), 32)
            rows[b, :, :n] = keys_of(step, before, b, n)[0]
        dense.append(rows)
    contiguous = Step(step.q, (dense[0], dense[1]), step.new, step.lengths)
    (same, same_lse), _ = run(contiguous)
    assert torch.equal(out, same)
    assert torch.equal(lse, same_lse)
    order = torch.randperm(step.caches[0].shape[0])
    moved = order.argsort().tolist()
    table = [[moved[p] if 0 <= p < len(moved) else p for p in row] for row in step.table or []]
    permuted = Step(
        step.q,
        tuple(x[order] for x in step.caches),
        step.new,
        step.lengths,
        table,  # type: ignore[arg-type]
    )
    (same, same_lse), after = run(permuted)
    assert torch.equal(out, same)
    assert torch.equal(lse, same_lse)
    for have, want in zip(after, caches, strict=True):
        assert torch.equal(have.nan_to_num(nan=7.0), want[order].nan_to_num(nan=7.0))
    # A step appended is the cache written before.
    ahead = Step(step.q, whole, None, lengths, step.table)
    (same, same_lse), _ = run(ahead)
    assert torch.equal(out, same)
    assert torch.equal(lse, same_lse)


def test_pages_may_be_shared() -> None:
    step = make_step([16, 16], seqlen_q=2, page_size=8)
    assert step.table is not None
    step.table[1][:2] = step.table[0][:2]
    result, caches = run(step)
    check_step(step, result, caches, causal=True)


@pytest.mark.parametrize("seqlen_new", [1, 5])
def test_a_table_that_is_wrong_everywhere_touches_nothing(seqlen_new: int) -> None:
    step = make_step([4, 30], seqlen_q=seqlen_new, page_size=8)
    step.table = [[-1, 2**31 - 1, -(2**31), 99]] * 2
    _, caches = run(step)
    for have, want in zip(caches, step.caches, strict=True):
        assert torch.equal(have.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))


@pytest.mark.parametrize("page_size", [None, 8])
@pytest.mark.parametrize("empty", ["batch", "queries", "new tokens", "capacity", "heads", "packed"])
def test_nothing_to_do(empty: str, page_size: int | None) -> None:
    fields: dict[str, Any] = {"seqlen_q": 2, "page_size": page_size}
    lengths = [] if empty == "batch" else [3, 5]
    if empty == "heads":
        fields |= {"num_heads_q": 0, "num_heads_kv": 0}
    step = make_step(lengths, **fields)
    arguments = step.arguments()
    if empty == "batch" and page_size is not None:
        arguments["page_table"] = torch.zeros(0, 4, dtype=torch.int32)
    if empty in ("queries", "packed"):
        arguments["q"] = step.q[:, :, :0]
    if empty == "new tokens":
        arguments |= {name: arguments[name][:, :, :0] for name in ("k_new", "v_new")}
    if empty == "capacity":
        for name in ("k_cache", "v_cache"):
            arguments[name] = arguments[name][:, :, :0]
    if empty == "packed":
        ends = torch.zeros(1, dtype=torch.int32)
        names = ("q", "k_new", "v_new")
        arguments |= {name: arguments[name][0].transpose(0, 1)[:0] for name in names}
        arguments |= {"cu_seqlens_q": ends, "seqlens_k": ends[:0]}
        if page_size is None:
            arguments |= {n: arguments[n][:0] for n in ("k_cache", "v_cache")}
        else:
            arguments["page_table"] = arguments["page_table"][:0]
    out, lse = flashcore.attention_with_kvcache(**arguments, return_lse=True)
    assert out.shape == arguments["q"].shape
    if empty == "capacity":
        assert not out.any()
        assert (lse == -torch.inf).all()


def test_a_decoder_under_autocast_keeps_its_cache() -> None:
    step = make_step([3, 17], seqlen_q=2, dtype=torch.bfloat16)
    want, _ = run(step)[0]
    step.q = step.q.float()
    step.new = tuple(x.float() for x in step.new)  # type: ignore[union-attr,assignment]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        have, _ = run(step)[0]
    assert torch.equal(have, want)


@pytest.mark.parametrize("is_packed", [False, True])
def test_lengths_are_handed_on_as_they_are(
    is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels that read pages clamp lengths themselves, so that a step has no launch for it."""
    step = make_step([-4, 17, 2**31 - 1], seqlen_q=3, page_size=8)
    step.new = None
    arguments = packed(step, [3, 3, 3]) if is_packed else step.arguments()
    clamped = arguments | {"seqlens_k": torch.tensor([0, 17, 32], dtype=torch.int32)}
    want = flashcore.attention_with_kvcache(**clamped)
    monkeypatch.delattr(attend, "lengths_of_keys")
    assert torch.equal(flashcore.attention_with_kvcache(**arguments), want)
