"""FlopCounterMode counts our operators as it counts torch's."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from roads import LENGTHS, dense_inputs, lengths, packed_inputs, padded, varlen
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import flashcore
from flashcore.compat.flash_attn import flash_attn_func, flash_attn_varlen_func

DENSE = {
    "dense": flashcore.attention,
    "causal": lambda *x: flashcore.attention(*x, causal=True),
    "padded": padded,
    "compat": lambda *x: flash_attn_func(*(t.transpose(1, 2) for t in x)),
}
PACKED = {
    "packed": varlen,
    "compat": lambda q, k, v: flash_attn_varlen_func(q, k, v, *lengths(q.device), 3, 4),
}


def counted(road, *tensors):
    """Return (forward, both)."""
    counter = FlopCounterMode(display=False)
    with counter:
        out = road(*tensors)
        forward = counter.get_total_flops()
        if out.requires_grad:
            out.sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_dense_and_padded_calls_count_as_torch_counts_sdpa(name, requires_grad, device):
    """Grouped heads, another head_dim of v, causal or not."""
    q, k, v = (x.requires_grad_(requires_grad) for x in dense_inputs(torch.float16, device))
    many = [x.repeat_interleave(2, 1).shape for x in (k, v)]  # older torch knows equal heads only
    forward = sdpa_flop_count(q.shape, *many)
    shape_of_out = (*q.shape[:3], v.shape[3])
    backward = sdpa_backward_flop_count(shape_of_out, q.shape, *many) if requires_grad else 0
    assert counted(DENSE[name], q, k, v) == (forward, forward + backward)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_count_one_by_one(name, requires_grad, device):
    q, k, v = (x.requires_grad_(requires_grad) for x in packed_inputs(torch.float16, device))
    scores = 4 * sum(n * m for n, m in LENGTHS)
    forward = 2 * scores * (8 + 16)
    backward = 2 * scores * (3 * 8 + 2 * 16) if requires_grad else 0
    assert counted(PACKED[name], q, k, v) == (forward, forward + backward)


def test_packed_sequences_without_values_count_as_the_longest():
    q, k, v = packed_inputs(torch.float16, "meta")
    cu = torch.zeros(4, dtype=torch.int32, device="meta")
    forward, _ = counted(lambda *x: flashcore.attention_varlen(*x, cu, cu, 3, 4), q, k, v)
    assert forward == 2 * 4 * 3 * (3 * 4) * (8 + 16)


def test_a_backward_pass_alone_counts():
    q, k, v = dense_inputs(torch.float32, requires_grad=True)
    out = flashcore.attention(q, k, v)
    assert (
        counted(lambda g: torch.autograd.grad(out, q, g)[0], torch.ones_like(out))
        == (2 * 2 * 4 * 5 * 7 * (3 * 8 + 2 * 16),) * 2
    )


@pytest.mark.thorough  # seven seconds
def test_a_counter_that_is_older_than_our_formulas():
    """Counters copy what is known when they are made, and flashcore's names load when used."""
    ways = {
        "before flashcore": ["counter = FlopCounterMode(display=False)", "import flashcore"],
        "in the block": ["import flashcore", "counter = FlopCounterMode(display=False)"],
        "before the first call": [
            "counter = FlopCounterMode(display=False)",
            "import flashcore",
            "flashcore.attention(x, x, x)",
        ],
    }
    # A process for each way; torch is imported once, before they part.
    program = f"""
import os
import torch
from torch.utils.flop_counter import FlopCounterMode

torch.set_num_threads(1)
x = torch.randn(1, 1, 4, 8)
for made, lines in {ways!r}.items():
    if os.fork() == 0:
        exec("\\n".join(lines))
        with counter:
            flashcore.attention(x, x, x)
        print(made, counter.get_total_flops(), sep=": ", flush=True)
        os._exit(0)
    os.wait()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    flops = 2 * 4 * 4 * (8 + 8)
    assert done.stdout.splitlines() == [f"{made}: {flops}" for made in ways], done.stderr
