"""Test trees of drafts in packed calls: single tokens, trees and chunks of a prompt in one, each as
if alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_steps import make_step
from pages import Cache, make_cache
from parameters import thorough_but
from torch import Tensor

import flashcore
from backends import GPU, SIM, WMMA, device_of
from flashcore.base import env
from flashcore.checks.accuracy import error_report
from flashcore.kernels import cutting
from flashcore.kernels.fwd_sm90.kernel import SM90
from flashcore.kernels.fwd_wmma import tiles as tiles_wmma
from flashcore.ops.paged import attention_paged
from flashcore.ops.paged_varlen import attention_paged_varlen, packed_pages_problem
from flashcore.problem.options import Options
from flashcore.selection.select import select_plan

SIM90 = pytest.param("sim90", id="sim90")
every_backend = pytest.mark.parametrize("backend", ["torch", SIM, SIM90, WMMA, GPU])

SIZE = 5  # of trees
# One token, a chunk of a prompt, no query, a whole tree, a part of one, one longer than a tree; and
# with fewer keys than queries, and with none.
COUNTS = (1, 70, 0, 5, 3, 6, 4, 2)
LENGTHS = (33, 81, 12, 67, 40, 16, 2, 0)
BEHIND = 2  # rows of no sequence


def tree(*shape: int, device: str = "cpu") -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6).to(device)


def make(
    backend: str,
    counts: tuple[int, ...] = COUNTS,
    lengths: tuple[int, ...] = LENGTHS,
    **fields: Any,
) -> tuple[Cache, Tensor, Tensor]:
    """Return a cache whose table has wild entries, packed queries, and where they end."""
    sizes: dict[str, Any] = {"num_heads_q": 4, "num_heads_kv": 2, "seed": 5} | fields
    cache = make_cache(16, lengths, seqlen_q=max(counts), device=device_of(backend), **sizes)
    rows = [x[:, :n].transpose(0, 1) for x, n in zip(cache.q, counts, strict=True)]
    behind = torch.full((BEHIND, *rows[0].shape[1:]), torch.nan).to(rows[0])
    ends = torch.tensor([0, *counts], device=cache.q.device).cumsum(0).int()
    return cache, torch.cat([*rows, behind]), ends


def asked(backend: str, patch: pytest.MonkeyPatch) -> str:
    patch.setenv(env.SIM_ARCH.name, "90" if backend == "sim90" else "80")
    return "sim" if backend == "sim90" else backend


def part(given: Tensor, b: int, n: int, batch: int) -> Tensor | None:
    """Return the tree of one sequence of n queries, [1, 4, n, n], made by hand; None for none."""
    size = SIZE if SIZE in given.shape[-2:] else given.shape[-1]
    return None if n > size else given.broadcast_to(batch, 4, size, size)[b : b + 1, :, :n, :n]


def check(
    x: Cache,
    q: Tensor,
    results: Any,
    given: Tensor,
    counts: tuple[int, ...] = COUNTS,
    **options: Any,
) -> None:
    """Hold each sequence to the oracle with a mask made by hand."""
    out, lse = results
    begin = 0
    for b, (n, keys) in enumerate(zip(counts, x.lengths, strict=True)):
        rows = slice(begin, begin + n)
        begin += n
        if n == 0:
            continue
        own, mask = part(given, b, n, len(counts)), None
        if own is not None:
            mask = torch.ones(1, 4, n, keys, dtype=torch.bool, device=q.device)
            seen = min(n, keys)
            mask[..., keys - seen :] = own[..., n - seen :]
        _, k, v = x.sequence(b)
        pair = out[rows].transpose(0, 1)[None], q[rows].transpose(0, 1)[None]
        report = error_report(*pair, k, v, lse=lse[None, :, rows], mask=mask, **options)
        assert report.ok, f"sequence {b} of {n} queries and {keys} keys: {report}"
    assert not out[begin:].any()
    assert (lse[:, begin:] == -torch.inf).all()


def attend(
    backend: str, x: Cache, q: Tensor, ends: Tensor, given: Tensor | None, **options: Any
) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        _, *of_keys = x.arguments()
        return attention_paged_varlen(
            q, *of_keys, ends, max(COUNTS), tree_mask=given, return_lse=True,
            backend=asked(backend, patch), **x.scales(), **options,
        )  # fmt: skip


B = len(COUNTS)
TREES = {
    "of all": tree(SIZE, SIZE),
    "of each sequence": tree(B, 1, SIZE, SIZE),
    "of each sequence and head": tree(B, 4, SIZE, SIZE),
    "of each head, transposed": tree(4, SIZE, SIZE).mT,
    "one row of all queries": tree(1, SIZE),
    "one column of all keys": tree(SIZE, 1),
    "of single tokens": tree(B, 1, 1, 1),
    "of the longest": tree(B, 1, 70, 70),
    "of nobody": tree(B, 1, 0, 0),
}
FEW = ("of each sequence and head", "of each sequence")


@every_backend
@pytest.mark.parametrize("name", thorough_but(FEW, TREES))
def test_each_sequence_uses_as_much_of_its_tree_as_it_has_queries(name: str, backend: str) -> None:
    made = make(backend)
    given = TREES[name].to(made[1].device)
    check(made[0], made[1], attend(backend, *made, given, causal=True), given, causal=True)


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "neither causal": ({}, {}),
    "upper left": ({}, {"causal": "upper_left"}),
    "window and softcap": ({}, {"window": (20, 0), "softcap": 5.0}),
    "invariant": ({}, {"causal": True, "batch_invariant": True}),
    "bfloat16, odd": ({"dtype": torch.bfloat16, "head_dim": 72, "head_dim_v": 40}, {}),
    "8 bits": ({"cache_dtype": "float8_e4m3fn"}, {"causal": True}),
}


@every_backend
@pytest.mark.parametrize("name", thorough_but(("window and softcap", "8 bits"), OPTIONS))
def test_options_hold_beside_trees(name: str, backend: str) -> None:
    fields, options = OPTIONS[name]
    made = make(backend, **fields)
    given = tree(B, 1, SIZE, SIZE, device=made[1].device.type)
    results = attend(backend, *made, given, **options)
    wanted = {name: x for name, x in options.items() if name != "batch_invariant"}
    check(made[0], made[1], results, given, **wanted)


@every_backend
def test_the_largest_score_is_of_what_a_tree_shows(backend: str) -> None:
    x, q, ends = make(backend)
    given = tree(B, 1, SIZE, SIZE, device=q.device.type)
    *_, largest = attend(backend, x, q, ends, given, causal=True, return_max_score=True)
    _, k_pages, v_pages, table, seqlens_k = x.arguments()
    begin = 0
    for b, n in enumerate(COUNTS):
        rows, own = slice(begin, begin + n), part(given, b, n, B)
        begin += n
        if n:
            one = slice(b, b + 1)
            *_, want = attention_paged(
                q[rows].transpose(0, 1)[None], k_pages, v_pages, table[one], seqlens_k[one],
                causal=True, return_max_score=True, tree_mask=own, backend="torch",
            )  # fmt: skip
            torch.testing.assert_close(largest[one], want, rtol=1e-2, atol=1e-2)
        else:
            assert (largest[b] == -torch.inf).all()


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["torch", "sim", "sim90"])
def test_sinks_join_where_a_tree_hides_all(backend: str) -> None:
    x, q, ends = make(backend)
    sinks, hides = torch.randn(4), torch.zeros(SIZE, SIZE, dtype=torch.bool)
    out, lse = attend(backend, x, q, ends, hides, causal=True, sinks=sinks)
    begin = 1 + 70 + 5 + 3 + 6  # of the sequence of 4 queries and 2 keys, which are all of its tree
    assert not out[begin : begin + 4].any()
    torch.testing.assert_close(lse[:, begin : begin + 4], sinks[:, None].expand(-1, 4))


CACHES: dict[str, dict[str, Any]] = {
    "pages": {"page_size": 8},
    "one piece": {},
    "padding on the left": {"page_size": 8},
}
NEW = (1, 9, 5, 0, 3)
BEFORE = [6, 3, 17, 11, 0]


@pytest.mark.parametrize("backend", ["torch", SIM, SIM90, GPU])
@pytest.mark.parametrize("name", thorough_but(("pages",), CACHES))
@pytest.mark.filterwarnings("ignore::flashcore.FallbackWarning")
def test_a_step_is_that_of_each_sequence_alone(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single token, a chunk, a tree, no query and a part of a tree: new tokens are appended and
    rotated. PyTorch pads where the bound is small."""
    device, longest = device_of(backend), max(NEW)
    step = make_step(
        BEFORE, seqlen_q=longest, dtype=torch.float16, device=device, **CACHES[name]
    )  # fmt: skip
    given = step.arguments()
    assert step.new is not None
    pairs = {"q": step.q, "k_new": step.new[0], "v_new": step.new[1]}
    packed = {
        key: torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(NEW)])
        for key, x in pairs.items()
    }
    trees = tree(len(NEW), 1, SIZE, SIZE, device=device)
    ends = torch.tensor([0, *NEW], device=device).cumsum(0).int()
    angle = torch.rand(64, 4, dtype=torch.float16, device=device)
    shared: dict[str, Any] = {
        "rotary_cos": angle, "rotary_sin": 1 - angle, "rotary_interleaved": False,
        "backend": asked(backend, monkeypatch), "return_lse": True,
    }  # fmt: skip
    leftpad: dict[str, Any] = {}
    if name == "padding on the left":
        leftpad = {"cache_leftpad": torch.tensor([2, 0, 5, 1, 0], device=device).int()}
    for bound in (None, longest):
        out, lse = flashcore.attention_with_kvcache(
            **(given | packed), **shared, **leftpad, cu_seqlens_q=ends, max_seqlen_q=bound,
            tree_mask=trees,
        )  # fmt: skip
        for b, n in enumerate(NEW):
            if n == 0:
                continue
            one, rows = slice(b, b + 1), slice(int(ends[b]), int(ends[b + 1]))
            alone = step.arguments()
            alone |= {key: x[one, :, :n] for key, x in pairs.items()}
            alone["seqlens_k"] = alone["seqlens_k"][one]
            if alone["page_table"] is None:
                alone["k_cache"], alone["v_cache"] = alone["k_cache"][one], alone["v_cache"][one]
            else:
                alone["page_table"] = alone["page_table"][one]
            own = {key: x[one] for key, x in leftpad.items()}
            want, want_lse = flashcore.attention_with_kvcache(
                **alone, **shared | {"backend": "torch"}, **own,
                tree_mask=trees[one, :, :n, :n] if n <= SIZE else None,
            )  # fmt: skip
            near: dict[str, Any] = {"rtol": 5e-3, "atol": 5e-3}
            torch.testing.assert_close(out[rows], want[0].transpose(0, 1), **near)
            torch.testing.assert_close(lse[:, rows], want_lse[0], **near)


def test_padding_on_the_left_of_a_cache_without_room_leaves_no_tree_to_read() -> None:
    q, cache = torch.zeros(3, 2, 16), torch.zeros(2, 2, 0, 16)
    ends, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 3], [0, 0]))
    given: dict[str, Any] = {"seqlens_k": lengths, "cu_seqlens_q": ends, "tree_mask": tree(2, 2)}
    for more in ({}, {"cache_leftpad": lengths}):
        assert not flashcore.attention_with_kvcache(q, cache, cache, **given, **more).any()


# Few queries, of which some sequences have the most keys.
FEW_COUNTS, MANY_KEYS = (1, 5, 3, 6, 0, 2), (33, 1100, 70, 300, 9, 1)


@pytest.mark.parametrize("backend", [SIM, SIM90, WMMA, GPU])
@pytest.mark.parametrize("name", thorough_but(FEW[1:], FEW))
def test_blocks_share_the_keys_of_a_sequence_with_a_tree(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device cuts keys (tile/stream_k.cuh); heads that share a tree share a row tile, else each
    of a group would read the cache for itself."""
    monkeypatch.setattr(cutting, "FEW_BYTES", 2**10)
    monkeypatch.setattr(tiles_wmma, "_CUT_BYTES", 2**10)
    x, q, ends = make(backend, FEW_COUNTS, MANY_KEYS)
    batch = len(FEW_COUNTS)
    given = tree(batch, 4 if "head" in name else 1, SIZE, SIZE, device=q.device.type)
    inputs = x.inputs()._replace(q=q, cu_seqlens_q=ends, max_seqlen_q=6, tree_mask=given)
    problem = packed_pages_problem(inputs, Options.checked(True, None, None, None))
    for arch in (80, 90):
        plan = select_plan(problem, arch)
        assert plan.stream_k
        assert (plan.folds_heads > 0) == ("head" not in name)
    monkeypatch.setenv(env.SIM_ARCH.name, "90" if backend == "sim90" else "80")
    _, *of_keys = x.arguments()
    results = attention_paged_varlen(
        q, *of_keys, ends, 6, tree_mask=given, return_lse=True, causal=True,
        backend="sim" if backend == "sim90" else backend,
    )  # fmt: skip
    check(x, q, results, given, FEW_COUNTS, causal=True)


def test_the_hopper_kernel_leaves_what_its_registers_do_not_hold_to_the_portable_one() -> None:
    fields = {"head_dim": 256, "head_dim_v": 256, "cache_dtype": "float8_e4m3fn"}
    x, q, ends = make("torch", **fields)
    inputs = x.inputs()._replace(q=q, cu_seqlens_q=ends, max_seqlen_q=70, tree_mask=tree(5, 5))
    for window, softcap in (((20, 0), 5.0), (None, 5.0), ((20, 0), None)):
        problem = packed_pages_problem(inputs, Options.checked(False, window, softcap, None))
        assert (SM90.obstacle(problem) is None) == (window is None or softcap is None)


def test_a_compiled_step_is_the_same() -> None:
    """PyTorch pads queries of which no sequence has more than 6, but not where 70 may be."""
    counts = (1, 6, 5, 2)
    x, q, ends = make("torch", counts, LENGTHS[:4])
    _, k, v, table, seqlens_k = x.arguments()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(q: Tensor, given: Tensor, longest: int) -> Any:
        return flashcore.attention_with_kvcache(
            q, k, v, seqlens_k=seqlens_k, page_table=table, cu_seqlens_q=ends,
            max_seqlen_q=longest, tree_mask=given, return_lse=True,
        )  # fmt: skip

    for given in (tree(4, 1, SIZE, SIZE), tree(1, SIZE)):
        for longest in (6, 70):
            check(x, q, call(q, given, longest), given, counts, causal=True)


def test_it_is_an_operator_that_compilers_know() -> None:
    x, q, ends = make("torch", dtype=torch.float64)
    _, k, v, *of_keys = x.arguments()
    pages = (torch.nan_to_num(x).clone() for x in (k, v))
    none_others = None, None, None, TREES["of each sequence"]
    torch.library.opcheck(
        torch.ops.flashcore.attention_paged_varlen_forward.default,
        (
            q, *pages, *of_keys, ends, 70, *none_others,
            *Options.checked(True, None, None, None), True, False, "auto",
        ),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_forward_mode_makes_a_mask_of_the_trees(name: str) -> None:
    x, q, ends = make("torch", dtype=torch.float32)
    _, *of_keys = x.arguments()
    k, v = map(torch.nan_to_num, of_keys[:2])
    q = torch.nan_to_num(q)

    def call(q: Tensor) -> Any:
        return attention_paged_varlen(
            q, k, v, *of_keys[2:], ends, max(COUNTS), causal=True, tree_mask=TREES[name]
        )

    out, _ = torch.func.jvp(call, (q,), (torch.ones_like(q),))
    torch.testing.assert_close(out, call(q))


def test_bad_input_is_named() -> None:
    x, q, ends = make("torch")
    _, *of_keys = x.arguments()
    wrong: list[tuple[Tensor, type[Exception], str]] = [
        (tree(5, 5).float(), TypeError, r"tree_mask has dtype.*tree_mask\.bool"),
        (tree(5, 4), ValueError, r"tree_mask has shape \[5, 4\].*\[8, 4, m, m\]"),
        (tree(B, 5, 5), ValueError, r"tree_mask has shape \[8, 5, 5\].*tree_mask\[:, None\]"),
        (tree(3, 1, 5, 5), ValueError, r"tree_mask has shape \[3, 1, 5, 5\]"),
        (tree(1, 1, 1, 5, 5), ValueError, "tree_mask has shape"),
        (tree(5, 5).to("meta"), ValueError, "tree_mask is on meta"),
    ]
    for given, kind, message in wrong:
        with pytest.raises(kind, match=message):
            attention_paged_varlen(q, *of_keys, ends, 70, tree_mask=given)
    with pytest.raises(NotImplementedError, match=r"with tree_mask.*torch\.no_grad"):
        attention_paged_varlen(q.requires_grad_(), *of_keys, ends, 70, tree_mask=tree(5, 5))


@pytest.mark.gpu
def test_a_graph_is_replayed_with_other_lengths_and_trees() -> None:
    x, q, ends = make("auto")
    given = tree(B, 1, SIZE, SIZE, device="cuda")
    attend("auto", x, q, ends, given, causal=True)
    graph, before = torch.cuda.CUDAGraph(), x.seqlens_k.clone()
    x.seqlens_k.fill_(1)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results = attend("auto", x, q, ends, given, causal=True)
    x.seqlens_k.copy_(before)
    given.logical_not_()
    graph.replay()
    check(x, q, results, given, causal=True)
