"""Test what a warp does with matrices in its registers against models, in the simulator and on a
GPU alike; see test_sm90.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Runner = Callable[..., dict[str, Tensor]]


def test_operands_are_made_in_registers(run: Runner) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (32, 16), generator=generator).byte()
    tensors = {"rows": rows.view(torch.int32)}
    tensors |= {name: torch.empty(32, 4, dtype=torch.int32) for name in ("plain", "transposed")}
    tensors["mixed"] = torch.empty(32, 2, dtype=torch.int32)
    a, b = torch.randint(-8, 9, (2, 16, 16), generator=generator).float()
    tensors |= {"a": a, "b": b, "product": torch.empty(16, 16), "halves": torch.empty(2, 8, 16)}
    tensors["exchanged"] = torch.empty(32, dtype=torch.int32)
    names = "plain", "transposed", "mixed", "product", "halves", "exchanged"
    result = run("matrices", tensors, names, num_threads=32, arch_suffix="a")
    matrices = rows.view(torch.int16).view(4, 8, 8)
    for name, of_name in (("plain", matrices), ("transposed", matrices.transpose(1, 2))):
        # Lane 4 r + c has columns 2 c and 2 c + 1 of row r of each.
        want = of_name.reshape(4, 32, 2).transpose(0, 1).reshape(32, 8)
        assert torch.equal(result[name].view(torch.int16), want), name
    assert torch.equal(result["product"], 2 * a @ b)
    times = torch.tensor([1, 2])[:, None, None]  # the second half is added twice
    assert torch.equal(result["halves"], times * (a @ b).T.view(2, 8, 16))
    first_words = rows[:, :4].contiguous().view(torch.int16).view(8, 8)
    assert torch.equal(result["exchanged"].view(torch.int16).view(8, 8), first_words.T)
    bytes_of_lane = result["mixed"].view(torch.uint8)
    assert torch.equal(bytes_of_lane, rows[:, [0, 2, 1, 3, 7, 2, 5, 0]])
