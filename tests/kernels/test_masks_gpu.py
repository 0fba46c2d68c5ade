"""Test mask tensors on a GPU where calls are large enough for tiles that small ones never have."""

from __future__ import annotations

import pytest
import torch

import flashcore
from flashcore.checks.accuracy import error_report
from flashcore.problem import Problem
from flashcore.selection.select import select_plan

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("head_dim", "dtype", "tile"),
    [
        (64, torch.bool, (192, 128)),
        (64, torch.bfloat16, (192, 128)),
        (64, torch.float32, (192, 128)),
        (128, torch.float32, (192, 64)),
    ],
    ids=str,
)
def test_large_tiles(head_dim: int, dtype: torch.dtype, tile: tuple[int, int]) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    generator = torch.Generator("cuda").manual_seed(head_dim)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", generator=generator)

    # Neither length is a multiple of a tile's; rows of the mask are aligned to 16 bytes.
    q = normal(3, 16, 1500, head_dim).bfloat16()
    k, v = (normal(3, 16, 1616, head_dim).bfloat16() for _ in range(2))
    mask = normal(1, 16, 1500, 1616)
    mask[:, :, 700:702] = -torch.inf  # rows that see nothing
    mask = mask > -1.0 if dtype == torch.bool else mask.to(dtype)
    plan = select_plan(Problem.from_tensors(q, k, v, mask=mask, return_lse=True))
    assert (plan.block_m, plan.block_n) == tile
    out, lse = flashcore.attention(q, k, v, mask=mask, return_lse=True)
    report = error_report(out, q, k, v, lse=lse, mask=mask)
    assert report.ok, report
