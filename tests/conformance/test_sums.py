"""Test that blocks add floats to the same sums one after the other, in the simulator and on a GPU
alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SEEDS = range(4)

Runner = Callable[..., dict[str, Tensor]]


def test_blocks_add_in_the_order_of_their_numbers(run: Runner) -> None:
    """Floats of such different sizes that no other order gives the same bits."""
    blocks = 24
    generator = torch.Generator().manual_seed(0)
    addends = torch.randn(blocks, 256, generator=generator)
    addends *= 10.0 ** torch.randint(-3, 4, (blocks, 256), generator=generator)
    expected = addends[0].clone()
    for block in range(1, blocks):
        expected += addends[block]
    assert not torch.equal(expected, addends.flip(0).cumsum(0)[-1])
    for seed in SEEDS:
        result = run(
            "turns",
            {
                "addends": addends,
                "sums": torch.full((256,), torch.nan),
                "counters": torch.zeros(2, dtype=torch.int32),
            },
            (),
            num_threads=32,
            grid=blocks,
            counters=("counters",),
            sums=("sums",),
            smem_bytes=1024,
            constants={"FAULT": 0},
            arch_suffix="a",
            seed=seed,
        )
        assert torch.equal(result["sums"], expected)
        assert result["counters"].tolist() == [blocks, blocks]
