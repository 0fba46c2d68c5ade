"""Test what a launch for sequences of different lengths is told, without a GPU: see standin.py."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import standin
import torch
from pages import make_cache

import flashcore
from flashcore.backends import dispatch, packed
from flashcore.checks.varlen_cases import VarlenCase, make_varlen_inputs
from flashcore.launch import counters, driver
from flashcore.ops import padded, varlen
from flashcore.ops.paged import attention_paged


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> standin.Machine:
    return standin.install(monkeypatch)


def test_packed_sequences_on_hopper(machine: standin.Machine) -> None:
    x = make_varlen_inputs(VarlenCase(lengths_q=(300, 5), lengths_k=(300, 5), layout="qkv"))
    out, lse = flashcore.attention_varlen(*x.arguments(), causal=True, return_lse=True)
    (launched,) = machine.driver.launches
    plan = dispatch.plan_of(packed.packed_problem(*x.arguments(), causal=True), 90, "attn_fwd_sm90")
    told = launched.params.attn
    tiles = (305 // plan.block_m + 3) * 2
    assert launched.grid == min(tiles, 132 * plan.min_blocks)
    assert (told.max_tiles, told.batch, told.total_q, told.total_k) == (tiles, 2, 305, 305)
    assert told.num_length_classes == 1 + (-(-305 // plan.block_n) - 1).bit_length()
    assert (told.cu_seqlens_q, told.cu_seqlens_k, told.tile_counter, told.out, told.lse) == tuple(
        t.data_ptr() for t in (x.cu_seqlens_q, x.cu_seqlens_k, machine.counters, out, lse)
    )
    # Maps start as many rows before their tensors as these have.
    rows = 305 * 6 * 64 * 2
    for name, tensor in (("q", x.q), ("k", x.k), ("v", x.v)):
        assert getattr(launched.params, f"{name}_map").base == tensor.data_ptr() - rows
    assert launched.params.o_map.base == out.data_ptr() - 305 * 2 * 64 * 2


def test_packed_sequences_on_the_portable_kernel(machine: standin.Machine) -> None:
    x = make_varlen_inputs(VarlenCase(lengths_q=(300, 5), lengths_k=(300, 5)))
    flashcore.attention_varlen(*x.arguments(), backend="wmma")
    (launched,) = machine.driver.launches
    assert launched.grid == (305 // 64 + 3) * 2
    assert launched.params.lower_right == 1
    assert not launched.params.tile_counter


def test_lengths_of_keys_on_hopper(machine: standin.Machine) -> None:
    q, k = torch.randn(3, 2, 10, 64).half(), torch.randn(3, 2, 40, 64).half()
    seqlens_k = torch.tensor([1, 2, 3], dtype=torch.int32)
    flashcore.attention(q, k, k, seqlens_k=seqlens_k, causal="upper_left")
    (launched,) = machine.driver.launches
    told = launched.params.attn
    assert (told.seqlens_k, told.lower_right) == (seqlens_k.data_ptr(), 0)
    assert told.k_rows_per_batch == told.v_rows_per_batch == 2 * 40
    assert launched.params.q_map.base == q.data_ptr()
    assert launched.params.k_map.base == k.data_ptr() - 40 * 128


def test_pages_on_hopper(machine: standin.Machine) -> None:
    """Boxes of K are those of pages; of V they may end anywhere, a map's rows before its tensor."""
    cache = make_cache(24, (50, 3, 70), seqlen_q=10)
    out = attention_paged(*cache.arguments())
    (launched,) = machine.driver.launches
    told = launched.params.attn
    assert told.page_table == cache.page_table.data_ptr()
    assert told.seqlens_k == cache.seqlens_k.data_ptr()
    num_pages, max_pages = len(cache.k_pages), cache.page_table.shape[1]
    assert told.page_table_stride == cache.page_table.stride(0)
    assert told.num_pages == num_pages
    assert (told.seqlen_k, told.v_rows_per_batch) == (24 * max_pages, 24)
    k, v = launched.params.k_map, launched.params.v_map
    assert (k.base, k.rows, k.box_rows, k.batches) == (cache.k_pages.data_ptr(), 24, 8, num_pages)
    assert (v.base, v.rows, v.box_rows) == (cache.v_pages.data_ptr() - 8 * 128, 8, 8)
    assert v.batches == num_pages * 24 + 1
    assert launched.params.o_map.base == out.data_ptr()


def test_pages_of_few_keys_go_to_the_portable_kernel(machine: standin.Machine) -> None:
    for page_size in (1, 4, 20):
        cache = make_cache(page_size, (50, 3, 70), seqlen_q=10)
        attention_paged(*cache.arguments())
        assert machine.driver.launches[-1].params.num_pages == len(cache.k_pages)


def test_batches_that_are_no_whole_rows_apart_go_to_the_portable_kernel(
    machine: standin.Machine,
) -> None:
    q = torch.randn(2, 1, 10, 64).half()
    k = torch.empty(2 * 40 * 64 + 8).half().as_strided((2, 1, 40, 64), (40 * 64 + 8, 64, 64, 1))
    lengths = torch.tensor([1, 2], dtype=torch.int32)
    flashcore.attention(q, k, k, seqlens_k=lengths)
    assert machine.driver.launches[0].threads == 128
    flashcore.attention(q, k, k, seqlens_k=lengths, backend="sm90")  # on copies
    copied = machine.driver.launches[1]
    assert copied.threads > 128
    assert copied.params.attn.k_rows_per_batch == 40
    assert copied.params.attn.k != k.data_ptr()


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return what the counters' torch says of the stream and the capture that it is part of (0 for
    none), the pools that were made, of 4 counters each, by address and bytes, and what was
    cleared."""
    now = SimpleNamespace(stream=1, capture=0, pools=[], cleared=[], status=0)

    def allocate_zeros(index: int, num_bytes: int) -> int:
        assert index == 0
        now.pools.append((4096 * (1 + len(now.pools)), num_bytes))
        address: int = now.pools[-1][0]
        return address

    cuda = SimpleNamespace(is_current_stream_capturing=lambda: now.capture > 0)
    raw = SimpleNamespace(_cuda_getCurrentRawStream=lambda index: now.stream)
    monkeypatch.setattr(counters, "torch", SimpleNamespace(cuda=cuda, _C=raw))
    monkeypatch.setattr(counters, "allocate_zeros", allocate_zeros)
    driver = SimpleNamespace(
        CUstream=int,
        cuStreamGetCaptureInfo=lambda stream: (now.status, 1, now.capture, None),
        cuMemsetD8Async=lambda *arguments: now.cleared.append(arguments),
    )
    monkeypatch.setattr(counters, "import_driver", lambda: driver)
    for name in ("_free", "_of_streams", "_of_captures"):
        monkeypatch.setattr(counters, name, {})
    monkeypatch.setattr(counters, "_COUNTERS", 4)
    return now


def test_launches_that_may_meet_share_no_counter(fake_cuda: SimpleNamespace) -> None:
    now = fake_cuda

    def address(**changes: Any) -> int:
        vars(now).update(changes)
        return counters.work_counters(torch.device("cuda", 0))

    first = address(capture=0)
    assert address() == first
    second = address(stream=2)
    assert address(stream=1) == first
    captured = {address(capture=2), address(capture=3)}
    assert address() in captured  # launches that follow each other in one graph
    assert len({first, second} | captured) == 4
    assert now.pools == [(4096, 16)]
    other = address(stream=2)  # the pool is used up: another one, though this is a capture
    assert now.pools == [(4096, 16), (8192, 16)]
    assert address(stream=1, capture=0) == first
    assert len({first, second, *captured, other, address(stream=3)}) == 6
    unknown = {address(capture=4, status=1), address()}  # each its own
    assert len({first, second, *captured, other, *unknown}) == 7


def test_counters_that_a_failed_pass_left_are_cleared(fake_cuda: SimpleNamespace) -> None:
    """They stay the stream's."""
    device = torch.device("cuda", 0)
    address = counters.work_counters(device, 3)
    counters.clear_counters(device, address, 3)
    assert fake_cuda.cleared == [(address, 0, 12, fake_cuda.stream)]
    assert counters.work_counters(device, 3) == address


def test_a_stream_that_asks_for_more_counters_gets_more(fake_cuda: SimpleNamespace) -> None:
    device = torch.device("cuda", 0)
    one = counters.work_counters(device)
    three = counters.work_counters(device, 3)  # four, of a new pool
    assert (one, three) == (4096, 8192)
    assert counters.work_counters(device) == three
    counters.work_counters(device, 100)  # more than a pool has
    assert fake_cuda.pools == [(4096, 16), (8192, 16), (12288, 512)]


def test_counters_are_memory_of_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeroed before anybody gets them, by a stream of their own, as a capture allows it; and the
    thread's mode is as it was afterwards, whatever happens."""
    done: list[Any] = []

    def function(name: str, *results: Any, status: int = 0) -> Any:
        return lambda *arguments: done.append((name, *arguments)) or (status, *results)

    fake = SimpleNamespace(
        CUstreamCaptureMode=SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2),
        CUstream_flags=SimpleNamespace(CU_STREAM_NON_BLOCKING=1),
        CUresult=int,
        cuThreadExchangeStreamCaptureMode=function("mode", 0),
        cuStreamCreate=function("stream", 77),
        cuMemAlloc=function("memory", 4096),
        cuMemsetD8Async=function("clear"),
        cuStreamSynchronize=function("wait"),
        cuStreamDestroy=function("destroy"),
    )
    monkeypatch.setattr(driver, "import_driver", lambda: fake)
    monkeypatch.setattr(driver, "bind_context", lambda index: done.append(("bind", index)))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    assert driver.allocate_zeros(3, 64) == 4096
    assert done == [
        ("bind", 3), ("mode", 2), ("stream", 1), ("memory", 64), ("clear", 4096, 0, 64, 77),
        ("wait", 77), ("destroy", 77), ("mode", 0),
    ]  # fmt: skip
    done.clear()
    fake.cuMemAlloc = function("memory", 0, status=2)
    with pytest.raises(flashcore.FlashCoreError, match=r"64 bytes for counters: cuMemAlloc.* 2"):
        driver.allocate_zeros(3, 64)
    assert done[-2:] == [("destroy", 77), ("mode", 0)]


def bases(params: Any) -> list[int]:
    return [getattr(params, f"{name}_map").base for name in ("q", "k", "v", "o")]


def test_packed_calls_are_prepared_once(machine: standin.Machine) -> None:
    """Again, and for other tensors of the same description: other addresses alone."""
    case = VarlenCase(lengths_q=(300, 5), lengths_k=(300, 5))
    first, second = make_varlen_inputs(case), make_varlen_inputs(case)
    for x in (first, second, first):
        out, lse = flashcore.attention_varlen(*x.arguments(), causal=True, return_lse=True)
        told = machine.driver.launches[-1].params
        assert (told.attn.q, told.attn.k, told.attn.v, told.attn.out, told.attn.lse) == tuple(
            t.data_ptr() for t in (x.q, x.k, x.v, out, lse)
        )
        assert (told.attn.cu_seqlens_q, told.attn.cu_seqlens_k) == (
            x.cu_seqlens_q.data_ptr(), x.cu_seqlens_k.data_ptr()
        )  # fmt: skip
        rows = 305 * 2 * 64 * 2
        assert bases(told) == [t.data_ptr() - rows for t in (x.q, x.k, x.v, out)]
    assert machine.driver.encodings <= 4
    assert len({launched.grid for launched in machine.driver.launches}) == 1


def test_calls_with_lengths_of_keys_are_prepared_once(machine: standin.Machine) -> None:
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        q, k = torch.randn(3, 2, 10, 64).half(), torch.randn(3, 2, 40, 64).half()
        seqlens_k = torch.tensor([1, 2, 3], dtype=torch.int32)
        out, lse = flashcore.attention(q, k, k, seqlens_k=seqlens_k, return_lse=True)
        told = machine.driver.launches[-1].params
        assert told.attn.seqlens_k == seqlens_k.data_ptr()
        assert (told.attn.out, told.attn.lse) == (out.data_ptr(), lse.data_ptr())
        shifted = k.data_ptr() - 40 * 128
        assert bases(told) == [q.data_ptr(), shifted, shifted, out.data_ptr()]
        assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
    assert machine.driver.encodings <= 4


def test_calls_with_pages_are_prepared_once(machine: standin.Machine) -> None:
    for seed in (0, 1, 0):
        cache = make_cache(16, (50, 3, 70), seed=seed)
        out = attention_paged(*cache.arguments())
        told = machine.driver.launches[-1].params
        assert told.attn.page_table == cache.page_table.data_ptr()
        assert told.attn.seqlens_k == cache.seqlens_k.data_ptr()
        k, v = cache.k_pages.data_ptr(), cache.v_pages.data_ptr() - 16 * 128
        assert bases(told) == [cache.q.data_ptr(), k, v, out.data_ptr()]
    assert machine.driver.encodings <= 4


def test_calls_that_nobody_watches_go_around_the_operators(
    machine: standin.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mode that watches gets the operators; autograd does without them."""
    x = make_varlen_inputs(VarlenCase(lengths_q=(30, 5), lengths_k=(30, 5)))
    q, n = torch.randn(3, 2, 10, 64).half(), torch.tensor([1, 2, 3], dtype=torch.int32)
    calls = [
        (varlen, lambda: flashcore.attention_varlen(*x.arguments())),
        (padded, lambda: flashcore.attention(q, q, q, seqlens_k=n)),
    ]
    for module, call in calls:
        seen = []
        operator = module.OPERATORS.attend
        monkeypatch.setattr(
            module.OPERATORS, "attend", lambda *a, op=operator, seen=seen: seen.append(1) or op(*a)
        )
        for _ in range(2):
            call()
        assert not seen
        with torch.overrides.BaseTorchFunctionMode():
            call()
        assert seen == [1]
        x.q.requires_grad_()
        q.requires_grad_()
        assert call().requires_grad
        with torch.no_grad():
            assert not call().requires_grad
        assert seen == [1]
        x.q.requires_grad_(False)
        q.requires_grad_(False)
    assert len(machine.driver.launches) == 10


def test_options_of_calls_with_lengths_are_told_apart(machine: standin.Machine) -> None:
    x = make_varlen_inputs(VarlenCase(lengths_q=(30, 5), lengths_k=(30, 5)))
    q, k, v, ends, key_ends, longest, _ = x.arguments()
    options: list[dict[str, Any]] = [
        {}, {"causal": True}, {"scale": 2.0}, {"softcap": 2.0}, {"window": (2, 1)},
        {"return_lse": True}, {"causal": True, "backend": "wmma"},
    ]  # fmt: skip
    told = []
    for chosen in (*options, *options):
        flashcore.attention_varlen(q, k, v, ends, key_ends, longest, longest, **chosen)
        params = machine.driver.launches[-1].params
        attn = getattr(params, "attn", params)
        told.append(
            (attn.softmax_scale, attn.softcap, attn.window_left, attn.window_right, type(params))
        )
    assert told[: len(options)] == told[len(options) :]
    assert len(set(told)) == len(options) - 1  # lse is computed in any case
    for wrong in ({"causal": 1}, {"return_lse": 0}, {"scale": True}, {"window": (True, 0)}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            flashcore.attention_varlen(q, k, v, ends, key_ends, longest, longest, **wrong)
    with pytest.raises(ValueError, match="backend="):
        flashcore.attention_varlen(q, k, v, ends, key_ends, longest, longest, backend="none")
