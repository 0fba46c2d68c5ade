"""Test what must not matter to a step of a decoder: which pages hold its tokens, and whether it
brings its keys or finds them in the cache."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cache_steps import Step, keys_of, make_step, written
from hypothesis import given, settings
from hypothesis import strategies as st

import flashcore
from backends import GPU, SIM, device_of
from flashcore.checks.accuracy import error_report

SIM90 = pytest.param("sim90", id="sim90")
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=4)
FEW = settings(max_examples=25, deadline=None)


def run(backend: str, arguments: dict[str, Any], **options: Any) -> tuple[torch.Tensor, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHCORE_SIM_ARCH", "90" if backend == "sim90" else "80")
        asked = "sim" if backend == "sim90" else backend
        return flashcore.attention_with_kvcache(
            **arguments, return_lse=True, backend=asked, **options
        )


def packed(arguments: dict[str, Any], counts: list[int]) -> dict[str, Any]:
    """Return the call that packs the first counts[b] queries and new tokens of each sequence."""
    found, ends = dict(arguments), torch.tensor([0, *counts]).cumsum(0).int()
    for name in ("q", "k_new", "v_new"):
        if name in found:
            rows = [x[:, :n].transpose(0, 1) for x, n in zip(found[name], counts, strict=True)]
            found[name] = torch.cat(rows)
    ends = ends.to(found["q"].device)
    return found | {"cu_seqlens_q": ends, "max_seqlen_q": max(1, *counts)}


def moved(step: Step, seed: int) -> Step:
    """Return the same step with its pages in another order."""
    assert step.table is not None
    num_pages = step.caches[0].shape[0]
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed))
    place = torch.argsort(order).tolist()
    table = [[place[x] if 0 <= x < num_pages else x for x in row] for row in step.table]
    k, v = (x[order.to(x.device)] for x in step.caches)
    return Step(step.q, (k, v), step.new, step.lengths, table)


def before(step: Step) -> tuple[dict[str, Any], list[int]]:
    """Return the call whose cache holds already what the step brings; and its lengths."""
    (k, v), lengths = written(step)
    found = step.arguments() | {"k_cache": k, "v_cache": v}
    del found["k_new"], found["v_new"]
    told = torch.tensor(lengths, dtype=torch.int32, device=step.q.device)
    return found | {"seqlens_k": told}, lengths


def same(have: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    for x, y in zip(have, want, strict=True):
        assert torch.equal(x, y)


@FEW
@given(LENGTHS, st.integers(1, 5), st.sampled_from([1, 4, 8, 16]), st.integers(0, 99))
def test_permuted_pages_change_nothing(
    lengths: list[int], seqlen_q: int, page_size: int, seed: int
) -> None:
    step = make_step(lengths, seqlen_q=seqlen_q, page_size=page_size)
    same(run("torch", moved(step, seed).arguments()), run("torch", step.arguments()))


@FEW
@given(LENGTHS, st.integers(1, 5), st.sampled_from([None, 1, 8]), st.booleans())
def test_a_step_appended_equals_the_cache_written_before(
    lengths: list[int], seqlen_q: int, page_size: int | None, packs: bool
) -> None:
    step = make_step(lengths, seqlen_q=seqlen_q, page_size=page_size)
    given, found = step.arguments(), before(step)[0]
    if packs:
        counts = [(b * 7 + n) % (seqlen_q + 1) for b, n in enumerate(lengths)]
        given = packed(given, counts)
        new = packed(step.arguments(), counts)
        # Rows that are not packed are not appended.
        ends = new["cu_seqlens_q"].tolist()
        k, v = step.arguments()["k_cache"], step.arguments()["v_cache"]
        flashcore.attention_with_kvcache(**new | {"k_cache": k, "v_cache": v})
        room = k.shape[2] * (1 if page_size is None else given["page_table"].shape[1])
        told = [min(room, n + ends[b + 1] - ends[b]) for b, n in enumerate(lengths)]
        found = packed(found, counts) | {"k_cache": k, "v_cache": v}
        found["seqlens_k"] = torch.tensor(told, dtype=torch.int32)
    same(run("torch", given), run("torch", found))


@pytest.mark.parametrize("counts", [None, [1, 20, 0]], ids=["padded", "packed"])
@pytest.mark.parametrize("backend", [SIM, SIM90, GPU])
def test_both_hold_in_the_kernels_bit_by_bit(backend: str, counts: list[int] | None) -> None:
    step = make_step(
        [9, 30, 1], seqlen_q=20 if counts else 2, page_size=8, dtype=torch.float16,
        device=device_of(backend),
    )  # fmt: skip

    def call(arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        return run(backend, arguments if counts is None else packed(arguments, counts))

    want = call(step.arguments())
    same(call(moved(step, 3).arguments()), want)
    found, _ = before(step)
    if counts is not None:
        after = [min(n + m, 32) for n, m in zip(step.lengths, counts, strict=True)]
        found["seqlens_k"] = torch.tensor(after, dtype=torch.int32, device=step.q.device)
    same(call(found), want)


def test_a_shared_prefix_merged_is_the_whole() -> None:
    """A prefix of two pages that all sequences name is merged as docs/serving.md shows."""
    step = make_step([30, 17, 19], seqlen_q=2, seqlen_new=0, page_size=8)
    given = step.arguments()
    table = given["page_table"].clone()
    table[:, :2] = table[0, :2]
    given |= {"page_table": table}
    want = run("torch", given)
    q = given["q"].transpose(0, 1).flatten(1, 2)[None]
    shared, lse = run(
        "torch",
        given | {"q": q, "page_table": table[:1, :2], "seqlens_k": torch.tensor([16]).int()},
        causal=False,
    )
    rest = run("torch", given | {"page_table": table[:, 2:], "seqlens_k": given["seqlens_k"] - 16})
    batch, _, seqlen_q, _ = given["q"].shape
    shared = shared[0].unflatten(1, (batch, seqlen_q)).transpose(0, 1)
    lse = lse[0].unflatten(1, (batch, seqlen_q)).transpose(0, 1)
    for have, x in zip(flashcore.merge(shared, lse, *rest), want, strict=True):
        torch.testing.assert_close(have, x)


TREE = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("backend", [SIM, SIM90, GPU])
def test_a_tree_over_pages_is_read_in_place(backend: str) -> None:
    """A tree counts as if each branch were a sequence of its own; no copy, hence no warning."""
    step = make_step(
        [0, 9, 28], seqlen_q=4, page_size=8, dtype=torch.float16, device=device_of(backend)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = step.arguments() | {"tree_mask": TREE.to(step.q.device)}
        out, lse = run(backend, given, causal=False)
    (k, v), lengths = written(step)
    for b, n in enumerate(lengths):
        mask = torch.ones(4, n, dtype=torch.bool)
        mask[:, n - 4 :] = TREE
        own = slice(b, b + 1)
        keys = (keys_of(step, x, b, n) for x in (k, v))
        report = error_report(
            out[own], step.q[own], *keys, lse=lse[own], mask=mask.to(step.q.device)
        )
        assert report.ok, f"sequence {b}: {report}"
