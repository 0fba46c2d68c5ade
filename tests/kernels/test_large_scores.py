"""Test scores as large as float32 holds: the error rule holds as for others, in both kernels and in
PyTorch. Large maxima are subtracted exactly (tile/softmax.cuh, subtract_large_max)."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from parameters import thorough_but
from plant_checks import check_text, undocumented
from torch import Tensor

from backends import GPU, WMMA, check, device_of
from flashcore.checks.accuracy import error_report
from flashcore.kernels.fwd_sm90.plan import KERNEL as KERNEL_SM90
from flashcore.kernels.fwd_wmma.plan import KERNEL
from flashcore.problem import Problem
from flashcore.problem.exactness import LARGE_SOFTCAP
from flashcore.selection.select import select_plan
from flashcore.sim import Plant, simulate
from flashcore.sim.plants.numerics import PLANTS_LARGE_SCORES, PLANTS_OLD_LARGE_MAX_SM90

KERNELS = (KERNEL, KERNEL_SM90)
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"causal": "lower_right"}, {"window": (20, 5)})
# |q| = |k|. The product of scale and the largest score, in log2 units, is rounded by up to 2^-13 at
# 90, 2^-6 at 1000 and 64 at 3e4; what follows only bfloat16 holds.
SIZES = {
    "float16": (90.0, 300.0, 1000.0, 9000.0, 3e4),
    "bfloat16": (90.0, 1000.0, 3e4, 1e9, 1e18),
}
SIZED = [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes]
FEW = [
    ("float16", 90.0),
    ("float16", 1000.0),
    ("float16", 3e4),
    ("bfloat16", 3e4),
    ("bfloat16", 1e18),
]


def inputs(
    dtype: str, size: float, head_dim: int = 64, seqlen_k: int = 150, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of 70 queries, whose rows are as long as `size`; some keys are alike."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, 2, 70, head_dim), (1, 1, seqlen_k, head_dim), (1, 1, seqlen_k, head_dim))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    k[:, :, 40:44] = k[:, :, 39:40]
    k[:, :, 100:110] = k[:, :, 30:40]  # in another key tile
    q, k = (x / x.norm(dim=-1, keepdim=True) * size for x in (q, k))
    q, k, v = (x.to(getattr(torch, dtype)) for x in (q, k, v))
    return q, k, v


def simulated(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plant: Plant | None = None,
    tile: dict[str, Any] | None = None,
    **options: Any,
) -> bool:
    """Return whether the error rule holds."""
    mask = options.get("mask")
    problem = Problem.from_tensors(q, k, v, return_lse=True, **options)
    arch = 90 if kernel == KERNEL_SM90 else 80
    plan = select_plan(problem, arch, kernel=kernel)
    plan = dataclasses.replace(plan, **(tile or {}))
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = torch.empty(q.shape[:3])
    simulate(problem, plan, q, k, v, mask, out, lse, seed=0, plant=plant)
    return error_report(out, q, k, v, lse=lse, **options).ok


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [pytest.param(*x, marks=() if x in FEW else pytest.mark.thorough) for x in SIZED],
)
def test_however_large_scores_are(
    dtype: str, size: float, options: dict[str, Any], kernel: str
) -> None:
    assert simulated(kernel, *inputs(dtype, size), **options)


SM90_TILES: dict[str, dict[str, Any]] = {
    "old maximum": {"block_m": 64, "block_n": 32, "key_slices": 1, "num_stages": 2},
    "shared keys": {"block_m": 64, "block_n": 32, "key_slices": 2, "num_stages": 4},
    "split keys": {
        "block_m": 64,
        "block_n": 32,
        "key_slices": 1,
        "num_stages": 2,
        "num_splits": 3,
    },
    "eager": {
        "block_m": 64,
        "block_n": 32,
        "key_slices": 1,
        "num_stages": 2,
        "lazy_rescale": False,
    },
}


@pytest.mark.parametrize("tile", SM90_TILES)
@pytest.mark.parametrize("size", thorough_but([3e4], [300.0, 3e4]))
def test_on_every_road_of_the_hopper_kernel(size: float, tile: str) -> None:
    assert simulated(KERNEL_SM90, *inputs("float16", size), tile=SM90_TILES[tile])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("head_dim", [8, 256])
def test_scores_that_are_all_alike(head_dim: int, sign: int, kernel: str) -> None:
    """The first report had these: |score| of 1e9 gave 0, and lse -inf."""
    q = torch.full((1, 1, 3, head_dim), 1e4, dtype=torch.float16)
    assert simulated(kernel, q, sign * q, torch.ones_like(q))


def lowest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("softcap", thorough_but([20.0], [None, 20.0]))
@pytest.mark.parametrize(
    ("dtype", "low"),
    [
        (torch.float32, -1e9),
        pytest.param(torch.float32, -1e38, marks=pytest.mark.thorough),
        pytest.param(torch.float32, lowest(torch.float32), marks=pytest.mark.thorough),
        (torch.bfloat16, lowest(torch.bfloat16)),
    ],
    ids=str,
)
def test_masks_of_large_numbers(
    dtype: torch.dtype, low: float, softcap: float | None, kernel: str
) -> None:
    """Padding on the left, rows that are masked everywhere, and a key that outweighs all."""
    q, k, v = inputs("bfloat16", 8.0)
    mask = torch.zeros(1, 1, 70, 150, dtype=dtype)
    mask[..., :33] = low
    mask[:, :, :7] = low
    mask[:, :, 30, 100] = -low
    assert simulated(kernel, q, k, v, mask=mask, softcap=softcap, causal=True)
    out, lse = check("torch", q, k, v, mask=mask, softcap=softcap, causal=True)
    assert out[:, :, 0].abs().min() > 0, "masked by finite numbers is not hidden"
    assert lse.isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("softcap", [LARGE_SOFTCAP - 1, LARGE_SOFTCAP, 1e6, 1e18])
@pytest.mark.parametrize("size", [8.0, 9000.0])
def test_softcaps_from_small_to_large(size: float, softcap: float, kernel: str) -> None:
    assert simulated(kernel, *inputs("float16", size), softcap=softcap)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("size", "scale"), [(8.0, 1e18), (3e4, 1e-9), (8.0, 1e-18)])
def test_scales_from_small_to_large(size: float, scale: float, kernel: str) -> None:
    assert simulated(kernel, *inputs("float16", size), scale=scale)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        *itertools.product(KERNELS, PLANTS_LARGE_SCORES),
        *itertools.product((KERNEL_SM90,), PLANTS_OLD_LARGE_MAX_SM90),
    ],
)
def test_a_planted_bug_is_caught(kernel: str, name: str) -> None:
    plant = (PLANTS_LARGE_SCORES | PLANTS_OLD_LARGE_MAX_SM90)[name]
    tile = SM90_TILES["old maximum"] if kernel == KERNEL_SM90 else {}
    q, k, v = inputs("bfloat16", 1e9)
    if name == "large-max-left":  # no row sees a larger score in a later key tile
        q, k = torch.full_like(q, 1001.0), torch.full_like(k, 1002.0)
    values = q, k, v
    assert simulated(kernel, *values, tile=tile)
    assert not simulated(kernel, *values, plant=plant, tile=tile)


@pytest.mark.parametrize("name", [*PLANTS_LARGE_SCORES, *PLANTS_OLD_LARGE_MAX_SM90])
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, (PLANTS_LARGE_SCORES | PLANTS_OLD_LARGE_MAX_SM90)[name])


def test_the_documentation_lists_every_plant() -> None:
    assert undocumented((*PLANTS_LARGE_SCORES, *PLANTS_OLD_LARGE_MAX_SM90)) == []


# PyTorch takes every head_dim in the same way; kernels have tiles for each.
@pytest.mark.parametrize(
    ("backend", "head_dim"),
    [
        ("torch", 64),
        *(
            pytest.param(
                *backend.values, head_dim, marks=backend.marks, id=f"{backend.id}-{head_dim}"
            )
            for backend, head_dim in itertools.product((WMMA, GPU), (8, 64, 128, 256))
        ),
    ],
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "size"), SIZED)
def test_on_every_backend(
    dtype: str, size: float, head_dim: int, options: dict[str, Any], backend: str
) -> None:
    q, k, v = (x.to(device_of(backend)) for x in inputs(dtype, size, head_dim, seqlen_k=600))
    check(backend, q, k, v, **options)


@pytest.mark.parametrize("backend", [WMMA, GPU])
@pytest.mark.parametrize("softcap", [None, 20.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_lowest_numbers_on_a_gpu(
    head_dim: int, dtype: torch.dtype, softcap: float | None, backend: str
) -> None:
    q, k, v = (x.cuda() for x in inputs("bfloat16", 8.0, head_dim, seqlen_k=600))
    mask = torch.zeros(1, 1, 70, 600, dtype=dtype, device="cuda")
    mask[..., :133] = lowest(dtype)
    mask[:, :, :7] = lowest(dtype)
    check(backend, q, k, v, mask=mask, softcap=softcap)
