"""Test the fused backward of sequences of different lengths on a Hopper GPU, through
`attention_varlen` and `attention(seqlens_k=...)` and autograd."""

from __future__ import annotations

import math
import random

import pytest
import torch
from packed_gradients import PackedCase, make_packed, wrong_packed_gradients
from torch import Tensor

import flashcore
from flashcore.backends.gradients import choose_backward

pytestmark = pytest.mark.gpu

# Nothing, one, around tiles of 64 to 192 rows, primes, and many tiles.
LENGTHS = (0, 0, 1, 2, 63, 64, 65, 97, 127, 128, 129, 191, 193, 509, 1021)


@pytest.fixture(autouse=True)
def _only_on_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def check(case: PackedCase) -> None:
    x = make_packed(case, "cuda")
    assert choose_backward(x.problem, through_lse=case.through_lse).code == "sm90"
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
    longest = max(case.lengths_q), max(case.lengths_k)
    out, lse = flashcore.attention_varlen(
        *leaves, x.cu_seqlens_q, x.cu_seqlens_k, *longest, return_lse=True, **case.options()
    )
    results, cotangents = [out], [x.dout]
    if x.dlse is not None:
        results, cotangents = [out, lse], [x.dout, x.dlse]
    gradients = torch.autograd.grad(results, leaves, cotangents)
    wrong = wrong_packed_gradients(case, x._replace(out=out.detach()), gradients)
    assert not wrong, f"{case}: {wrong}"


OPTIONS = {
    "full": {},
    "lower-right": {"causal": True},
    "upper-left": {"causal": "upper_left"},
    "window": {"window": (100, 40)},
    "causal-window": {"causal": True, "window": (200, 0)},
    "softcap": {"softcap": 5.0},
    "causal-softcap": {"causal": "upper_left", "softcap": 5.0},
}


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_wild_lengths(name: str, head_dim: int) -> None:
    for seed in range(6):
        rng = random.Random(seed)
        batch = rng.choice((1, 3, 8, 40))
        check(
            PackedCase(
                lengths_q=(33, *(rng.choice(LENGTHS) for _ in range(batch))),
                lengths_k=(70, *(rng.choice(LENGTHS) for _ in range(batch))),
                tails=(rng.choice((0, 70)), rng.choice((0, 300))),
                group=rng.choice((1, 4)),
                head_dim=head_dim,
                dtype=rng.choice(("float16", "bfloat16")),
                through_lse=seed % 2 == 1,
                seed=seed,
                **OPTIONS[name],
            )
        )


@pytest.mark.parametrize("dims", [(8, 8), (40, 72), (20, 20), (128, 64), (192, 128)])
def test_other_head_dims_and_slices(dims: tuple[int, int]) -> None:
    lengths = (300, 0, 65, 1)
    check(
        PackedCase(
            lengths_q=lengths, lengths_k=lengths, head_dim=dims[0], head_dim_v=dims[1], causal=True
        )
    )
    if dims[0] == dims[1]:
        check(PackedCase(lengths_q=lengths, lengths_k=lengths, head_dim=dims[0], layout="qkv"))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_many_tiles_a_block(head_dim: int) -> None:
    """More tiles than blocks: the counter is drawn from, and put back, by both kernels."""
    lengths = (3000, 17, 1200, 0, 2500, 640)
    case = PackedCase(
        lengths_q=lengths, lengths_k=lengths, num_heads_kv=4, group=2, head_dim=head_dim,
        causal=True, seed=1,
    )  # fmt: skip
    for _ in range(2):
        check(case)


def packed_call(lengths: tuple[int, ...]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return q, k and v of 2048 rows with gradients, dout, and cu_seqlens of these lengths."""
    torch.manual_seed(0)
    leaves = [
        torch.randn(2048, 4, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    ]
    return leaves, torch.randn_like(leaves[0]), cu_seqlens(lengths)


def cu_seqlens(lengths: tuple[int, ...]) -> Tensor:
    ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.cuda()


def packed_step(leaves: list[Tensor], dout: Tensor, cu: Tensor) -> tuple[Tensor, ...]:
    out = flashcore.attention_varlen(*leaves, cu, cu, 2048, 2048, causal=True)
    return torch.autograd.grad(out, leaves, dout)


def padded_step(leaves: list[Tensor], dout: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    out = flashcore.attention(*leaves, seqlens_k=lengths, causal=True)
    return torch.autograd.grad(out, leaves, dout)


def padded_call(lengths: tuple[int, ...]) -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    shape = len(lengths), 4, 700, 128
    leaves = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)
    ]
    return leaves, torch.randn_like(leaves[0]), torch.tensor(lengths, dtype=torch.int32).cuda()


CALLS = {"packed": (packed_call, packed_step), "padded": (padded_call, padded_step)}
BEFORE, AFTER = (300, 0, 1100, 64), (1, 777, 65, 1000)


@pytest.mark.parametrize("name", CALLS)
def test_a_graph_of_forward_and_backward_replays_with_other_lengths(name: str) -> None:
    call, step = CALLS[name]
    leaves, dout, lengths = call(BEFORE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(leaves, dout, lengths)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(leaves, dout, lengths)
    for changed in (AFTER, BEFORE, (0, 0, 0, 5)):
        lengths.copy_(call(changed)[2])
        graph.replay()
        want = step(leaves, dout, lengths)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_the_host_waits_for_nothing(name: str) -> None:
    call, step = CALLS[name]
    arguments = call(BEFORE)
    step(*arguments)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", CALLS)
def test_bit_by_bit_the_same(name: str) -> None:
    call, step = CALLS[name]
    arguments = call(AFTER)
    first = step(*arguments)
    for _ in range(30):
        assert all(torch.equal(a, b) for a, b in zip(step(*arguments), first, strict=True))


def test_compiled_code_has_no_break_and_the_same_gradients() -> None:
    leaves, dout, cu = packed_call(BEFORE)

    def function(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return flashcore.attention_varlen(q, k, v, cu, cu, 2048, 2048, causal=True) * 2.0

    compiled = torch.compile(function, fullgraph=True)
    found = torch.autograd.grad(compiled(*leaves, cu), leaves, dout)
    want = torch.autograd.grad(function(*leaves, cu), leaves, dout)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


def test_padded_keys_behind_the_last_one_get_nothing() -> None:
    """NaN lies there, in k and in v; and the rest is as each sequence alone."""
    leaves, dout, lengths = padded_call(AFTER)
    numbers = [min(n, 700) for n in AFTER]
    with torch.no_grad():
        for b, n in enumerate(numbers):
            leaves[1][b, :, n:], leaves[2][b, :, n:] = math.nan, math.nan
    dq, dk, dv = padded_step(leaves, dout, lengths)
    for b, n in enumerate(numbers):
        assert not dk[b, :, n:].any()
        assert not dv[b, :, n:].any()
        one = slice(b, b + 1)
        own = [leaves[0][one], leaves[1][one, :, :n], leaves[2][one, :, :n]]
        own = [x.detach().requires_grad_() for x in own]
        out = flashcore.attention(*own, causal=True)
        want = torch.autograd.grad(out, own, dout[one])
        for a, c in zip((dq[one], dk[one, :, :n], dv[one, :, :n]), want, strict=True):
            torch.testing.assert_close(a, c, atol=2e-2, rtol=2e-2)
