"""attention_with_kvcache in torch.compile, in CUDA graphs, and without a wait for the device."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cache_steps import Step, make_step

import flashcore

pytestmark = pytest.mark.filterwarnings("ignore::flashcore.FallbackWarning")

COS = torch.rand(64, 4)
SHAPES: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "pages": {"page_size": 8},
    "heads third": {"page_size": 8, "heads_third": True},
}


def options(device: str) -> dict[str, Any]:
    cos = COS.to(device)
    return {"rotary_cos": cos, "rotary_sin": 1 - cos, "rotary_interleaved": False}


def packed(step: Step) -> dict[str, Any]:
    """Return the call with its queries and new tokens packed."""
    arguments = step.arguments()
    for name in ("q", "k_new", "v_new"):
        arguments[name] = arguments[name].transpose(1, 2).flatten(0, 1)
    batch, seqlen_q = step.q.shape[0], step.q.shape[2]
    ends = torch.arange(batch + 1, dtype=torch.int32, device=step.q.device) * seqlen_q
    return arguments | {"cu_seqlens_q": ends}


FEW = [("contiguous", False), ("heads third", True)]


@pytest.mark.parametrize(
    ("name", "is_packed"),
    [
        pytest.param(*x, marks=() if x in FEW else pytest.mark.thorough)
        for x in itertools.product(SHAPES, (False, True))
    ],
)
def test_compiled_code_changes_the_caches_too(name: str, is_packed: bool) -> None:
    step = make_step([3, 17, 0], seqlen_q=2, **SHAPES[name])
    call = packed if is_packed else Step.arguments
    eager, given = call(step), call(step)
    want = flashcore.attention_with_kvcache(**eager, **options("cpu"))
    compiled = torch.compile(
        lambda a: flashcore.attention_with_kvcache(**a, **options("cpu")),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    torch.testing.assert_close(compiled(given), want)
    for cache in ("k_cache", "v_cache"):
        assert torch.equal(given[cache].nan_to_num(), eager[cache].nan_to_num())


@pytest.mark.thorough
def test_the_operator_is_well_made() -> None:
    for shape in SHAPES.values():
        step = make_step([3, 17, 0], seqlen_q=2, **shape)
        step.caches = tuple(x.nan_to_num() for x in step.caches)  # type: ignore[assignment]
        given = step.arguments()
        names = ["k_cache", "v_cache", "q", "k_new", "v_new", "seqlens_k", "page_table"]
        arguments = (*(given[name] for name in names), None, None)
        op = torch.ops.flashcore.append_to_kvcache.default
        cos = COS.double()
        torch.library.opcheck(op, (*arguments, None, None, False, None, None, "", "auto"))
        torch.library.opcheck(op, (*arguments, cos, cos, True, None, None, "end", "auto"))


@pytest.mark.gpu
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_nothing_waits_for_the_device(name: str, is_packed: bool) -> None:
    step = make_step(
        [3, 17, 0], seqlen_q=2, dtype=torch.float16, device="cuda", head_dim=64, **SHAPES[name]
    )
    given = (packed if is_packed else Step.arguments)(step)
    by = options("cuda")
    flashcore.attention_with_kvcache(**given, **by)
    torch.cuda.set_sync_debug_mode("error")
    try:
        flashcore.attention_with_kvcache(**given, **by)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_a_graph_is_replayed_with_other_lengths_and_pages(name: str, is_packed: bool) -> None:
    fields: dict[str, Any] = {"seqlen_q": 2, "dtype": torch.float16, "device": "cuda"}
    fields |= {"head_dim": 64, **SHAPES[name]}
    call = packed if is_packed else Step.arguments
    given, by = call(make_step([3, 17, 0], **fields)), options("cuda")
    flashcore.attention_with_kvcache(**given, **by)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashcore.attention_with_kvcache(**given, **by)
    for lengths in ([30, 0, 9], [1, 2, 32]):
        other = call(make_step(lengths, seed=7, **fields))
        for key, value in other.items():
            if value is not None:
                given[key].copy_(value)
        graph.replay()
        want = flashcore.attention_with_kvcache(**other, **by)
        torch.testing.assert_close(out, want, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(given["k_cache"], other["k_cache"], equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["cache_leftpad"])
def test_a_copy_of_the_cache_is_announced_once(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashcore.serving import attend

    monkeypatch.setattr(attend, "_warned", set())
    step = make_step([3, 17], page_size=8, dtype=torch.float16, device="cuda", head_dim=64)
    given = step.arguments()
    if what == "packed queries":
        given = packed(step) | {"max_seqlen_q": 64}
    elif what == "a mask":
        given["mask"] = torch.ones(1, 32, dtype=torch.bool, device="cuda")
    else:
        given["cache_leftpad"] = torch.ones_like(given["seqlens_k"])
    words = f"attention_with_kvcache copies .*: with {what}"
    with pytest.warns(flashcore.FallbackWarning, match=words) as caught:
        flashcore.attention_with_kvcache(**given)
    assert caught[0].filename == __file__


@pytest.mark.gpu
def test_pages_are_read_in_place(recwarn: pytest.WarningsRecorder) -> None:
    step = make_step([3, 17], page_size=8, dtype=torch.float16, device="cuda", head_dim=64)
    flashcore.attention_with_kvcache(**step.arguments())
    flashcore.attention_with_kvcache(**packed(step), max_seqlen_q=1)
    assert not [w for w in recwarn if "copies" in str(w.message)]


@pytest.mark.gpu
def test_packed_tokens_are_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashcore.serving import attend, known_steps

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper kernel's")
    monkeypatch.setattr(attend, "_padded", None)
    monkeypatch.setattr(known_steps, "_known", {})
    step = make_step([3, 17], page_size=8, dtype=torch.float16, device="cuda", head_dim=64)
    given = packed(step) | {"max_seqlen_q": 1}
    del given["k_new"], given["v_new"]
    compiled = torch.compile(
        lambda a: flashcore.attention_with_kvcache(**a), fullgraph=True, backend="aot_eager"
    )
    results = [compiled(given), *(flashcore.attention_with_kvcache(**given) for _ in range(2))]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
