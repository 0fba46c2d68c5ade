"""Test tree masks of speculation, which kernels read as they are: of any strides, over caches of
any room, in both kernels and in PyTorch; see plants/test_sim_plants_trees.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pages import Cache, make_cache
from parameters import thorough_but
from torch import Tensor

import flashcore
from backends import GPU, SIM, WMMA, device_of
from flashcore.base import env
from flashcore.checks.accuracy import error_report
from flashcore.ops.paged import attention_paged, paged_problem
from flashcore.plain import trees
from flashcore.problem.folding import can_fold
from flashcore.problem.options import Options
from flashcore.selection.select import select_plan
from flashcore.serving import step as serving_step

SIM90 = pytest.param("sim90", id="sim90")
every_backend = pytest.mark.parametrize("backend", ["torch", SIM, SIM90, WMMA, GPU])
LENGTHS = (67, 0, 2, 130)


def asked(backend: str, patch: pytest.MonkeyPatch) -> str:
    patch.setenv(env.SIM_ARCH.name, "90" if backend == "sim90" else "80")
    return "sim" if backend == "sim90" else backend


def cache_of(backend: str, **fields: Any) -> Cache:
    sizes = {"seqlen_q": 5, "num_heads_q": 4, "num_heads_kv": 2, "tree": True, "seed": 5}
    return make_cache(16, LENGTHS, device=device_of(backend), **(sizes | fields))


def tree(*shape: int, device: str = "cpu") -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6).to(device)


def check(x: Cache, results: tuple[Tensor, Tensor], given: Tensor, **options: Any) -> None:
    """Hold the results of each sequence to the oracle with a mask made by hand."""
    batch, heads, seqlen_q, _ = x.q.shape
    whole = given.broadcast_to(batch, heads, seqlen_q, seqlen_q)
    for b, n in enumerate(x.lengths):
        mask = torch.ones(heads, seqlen_q, n, dtype=torch.bool, device=x.q.device)
        for column in range(seqlen_q):
            if (key := n - seqlen_q + column) >= 0:
                mask[:, :, key] = whole[b, :, :, column]
        own = slice(b, b + 1)
        out, lse = (result[own] for result in results)
        report = error_report(out, *x.sequence(b), lse=lse, mask=mask[None], **options)
        assert report.ok, f"sequence {b} of {n} keys: {report}"


STRIDED = {
    "of all": tree(5, 5),
    "of each sequence": tree(4, 1, 5, 5),
    "of each head": tree(4, 5, 5),
    "of each sequence and head": tree(4, 4, 5, 5),
    "transposed": tree(4, 1, 5, 5).mT,
    "every other row": tree(10, 5)[::2],
    "one row of all queries": tree(1, 5),
    "one column of all keys": tree(5, 1),
}
FEW = ("of each sequence and head", "every other row")


@every_backend
@pytest.mark.parametrize("name", thorough_but(FEW, STRIDED))
def test_a_tree_of_any_strides(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = cache_of(backend)
    given = STRIDED[name].to(x.q.device)
    options: dict[str, Any] = {"return_lse": True, "backend": asked(backend, monkeypatch)}
    check(x, attention_paged(*x.arguments(), tree_mask=given, **options), given)  # type: ignore[arg-type]


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "causal": ({}, {"causal": True}),
    "window and softcap": ({}, {"window": (20, 0), "softcap": 5.0}),
    "one query": ({"seqlen_q": 1}, {}),
    "more queries than a row tile folds": ({"seqlen_q": 33}, {}),
    "bfloat16": ({"dtype": torch.bfloat16, "head_dim": 72, "head_dim_v": 40}, {"causal": True}),
    "8 bits": ({"cache_dtype": "float8_e4m3fn"}, {}),
}


@every_backend  # each is another kernel to build
@pytest.mark.parametrize("name", thorough_but(("bfloat16", "8 bits"), OPTIONS))
def test_options_hold_beside_a_tree(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields, options = OPTIONS[name]
    x = cache_of(backend, **fields)
    assert x.tree_mask is not None
    more: dict[str, Any] = {"return_lse": True, "backend": asked(backend, monkeypatch)}
    results = attention_paged(
        *x.arguments(), tree_mask=x.tree_mask, **x.scales(), **options, **more
    )
    check(x, results, x.tree_mask, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "backend",
    ["torch", pytest.param("sim", marks=pytest.mark.thorough), SIM90, WMMA, GPU],
)
def test_a_step_over_a_contiguous_cache_makes_no_mask(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the memory nor the time of a mask over the cache's room is taken."""
    for module in (serving_step, trees):
        monkeypatch.delattr(module, "tree_over_keys")
    x = cache_of(backend)
    q = x.q
    k, v = torch.zeros(2, 4, 2, 160, 64, dtype=q.dtype, device=q.device)
    for b, n in enumerate(x.lengths):
        _, k[b, :, :n], v[b, :, :n] = x.sequence(b)
    results = flashcore.attention_with_kvcache(
        q, k, v, seqlens_k=x.seqlens_k, tree_mask=x.tree_mask, causal=False, return_lse=True,
        backend=asked(backend, monkeypatch),
    )  # fmt: skip
    assert x.tree_mask is not None
    check(x, results, x.tree_mask)


@pytest.mark.thorough
def test_a_tree_and_a_mask_of_one_shape_are_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache has room for as many keys as there are queries."""
    q, k, v = torch.randn(3, 1, 1, 8, 16, generator=torch.Generator().manual_seed(0)).half()
    given, lengths = tree(8, 8) | torch.eye(8, dtype=torch.bool), torch.tensor([5]).int()
    for backend in ("torch", "sim", "sim90"):
        arguments: dict[str, Any] = {"seqlens_k": lengths, "causal": False}
        arguments["backend"] = asked(backend, monkeypatch)
        as_tree = flashcore.attention_with_kvcache(q, k, v, tree_mask=given, **arguments)
        as_mask = flashcore.attention_with_kvcache(q, k, v, mask=given, **arguments)
        shifted = given.roll(-3, 1)  # the first three keys of the tree are not there
        want = flashcore.attention_with_kvcache(q, k, v, mask=shifted, **arguments)
        torch.testing.assert_close(as_tree, want)
        assert not torch.equal(as_tree, as_mask)


def test_heads_that_share_a_tree_share_a_row_tile() -> None:
    """Else each head of a group would read the cache for itself."""
    x = cache_of("torch")
    for name, given in STRIDED.items():
        inputs = x.inputs()._replace(tree_mask=given)
        problem = paged_problem(inputs, Options.checked(False, None, None, None))
        assert can_fold(problem) == ("head" not in name)
        assert (select_plan(problem, 90).folds_heads > 0) == can_fold(problem)


def test_a_compiled_step_is_the_same() -> None:
    x = cache_of("torch")

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(q: Tensor, given: Tensor) -> Any:
        return attention_paged(q, *x.arguments()[1:], tree_mask=given)

    assert x.tree_mask is not None
    want = attention_paged(*x.arguments(), tree_mask=x.tree_mask)
    assert torch.equal(call(x.q, x.tree_mask), want)  # type: ignore[arg-type]


def test_forward_mode_makes_a_mask_of_the_tree() -> None:
    x = cache_of("torch", dtype=torch.float32)

    def call(q: Tensor) -> Any:
        return attention_paged(q, *x.arguments()[1:], tree_mask=x.tree_mask)

    out, _ = torch.func.jvp(call, (x.q,), (torch.ones_like(x.q),))
    torch.testing.assert_close(out, call(x.q))


def test_bad_input_is_named() -> None:
    x = cache_of("torch")
    q, *others = x.arguments()
    mask = torch.ones(5, x.page_table.shape[1] * 16, dtype=torch.bool)
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"tree_mask": x.tree_mask, "mask": mask}, ValueError, "mask and tree_mask are both given"),
        ({"tree_mask": tree(5, 5).float()}, TypeError, r"tree_mask has dtype.*tree_mask\.bool"),
        ({"tree_mask": tree(4, 5)}, ValueError, r"tree_mask has shape \[4, 5\].*\[4, 4, 5, 5\]"),
        ({"tree_mask": tree(5, 5).to("meta")}, ValueError, "tree_mask is on meta"),
    ]
    for options, kind, message in wrong:
        with pytest.raises(kind, match=message):
            attention_paged(q, *others, **options)
    with pytest.raises(NotImplementedError, match=r"with tree_mask.*torch\.no_grad"):
        attention_paged(q.requires_grad_(), *others, tree_mask=x.tree_mask)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_graph_is_replayed_with_other_lengths_and_trees() -> None:
    x = cache_of("auto")
    given = tree(4, 1, 5, 5, device="cuda")
    attention_paged(*x.arguments(), tree_mask=given, return_lse=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = attention_paged(*x.arguments(), tree_mask=given, return_lse=True)
    lengths = (66, 0, 1, 97)
    x.seqlens_k.copy_(torch.tensor(lengths, dtype=torch.int32))
    given.logical_not_()
    graph.replay()
    check(x._replace(lengths=lengths), results, given)  # type: ignore[arg-type]
