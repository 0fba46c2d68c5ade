"""Run the kernels that merge two results, and their gradients, in the simulator, and compare them
with PyTorch in float64."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
from parameters import thorough_but
from torch import Tensor

from flashcore.compile.codegen import KERNELS_DIR, generate_source
from flashcore.compile.jit import compile_source
from flashcore.compile.plant import Plant
from flashcore.kernels.merge.params import (
    MergeBackwardParams,
    MergeBackwardTensors,
    MergeParams,
    MergePlan,
    MergeTensors,
    as_rows,
    build_params,
    grid_size,
    make_plan,
    pointer_field,
)
from flashcore.launch import merge_call as merging
from flashcore.plain.merging import merge_backward_plain, merge_plain
from flashcore.problem.validation import DTYPES
from flashcore.sim.plants.merge import PLANTS_MERGE, PLANTS_MERGE_BACKWARD
from flashcore.sim.report import SimulationError
from flashcore.sim.run import simulate_source
from flashcore.sim.tensors import SimTensor

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
ROUNDING = {HALF: 2.0**-10, BRAIN: 2.0**-7, SINGLE: 2.0**-21}
# shape, dtypes of out_a, out_b and out, and what is unusual.
CASES: dict[str, dict[str, Any]] = {
    "one packet a row": {"shape": (2, 3, 9, 8)},
    "several lanes a row": {"shape": (3, 3, 5, 72), "dtypes": (BRAIN, BRAIN, BRAIN)},
    "longer than a warp's": {"shape": (2, 3, 264), "dtypes": (HALF, HALF, SINGLE)},
    "float32 beside bfloat16": {"shape": (2, 5, 3, 40), "dtypes": (SINGLE, BRAIN, SINGLE)},
    "float32 is rounded": {"shape": (4, 3, 16), "dtypes": (SINGLE, HALF, HALF)},
    "odd columns": {"shape": (3, 4, 7)},
    "many odd columns": {"shape": (2, 2, 70), "dtypes": (BRAIN, HALF, SINGLE)},
    "one dimension": {"shape": (5,)},
    "five dimensions": {"shape": (2, 2, 2, 3, 16)},
    "heads third": {"shape": (2, 5, 3, 16), "transposed": True},
    "a column apart": {"shape": (2, 3, 5, 16), "offset": 1},
    "more blocks than one": {"shape": (3, 50, 64)},
}


def sides(case: dict[str, Any], seed: int = 0) -> list[Tensor]:
    """Return out_a, lse_a, out_b, lse_b, dout and dlse, with rows that are empty on either side and
    on both, where NaN stands and arrives."""
    shape, (a, b, out) = case["shape"], case.get("dtypes", (HALF, HALF, HALF))
    generator = torch.Generator().manual_seed(seed)

    def randn(*sizes: int, dtype: torch.dtype = SINGLE) -> Tensor:
        offset = case.get("offset", 0)
        if case.get("transposed"):
            sizes = sizes[0], sizes[2], sizes[1], *sizes[3:]
        x = torch.randn(*sizes[:-1], sizes[-1] + offset, generator=generator).to(dtype)
        x = x[..., offset:]
        return x.transpose(1, 2) if case.get("transposed") else x

    rows = shape[:-1]
    lse_a, lse_b = (4 * torch.randn(rows, generator=generator) for _ in range(2))
    flat = lse_a.view(-1), lse_b.view(-1)
    if flat[0].numel() > 4:
        flat[0][[0, 3]], flat[1][[0, 2]] = -math.inf, -math.inf
        flat[0][1] = flat[1][1]
    dlse = torch.randn(rows, generator=generator)
    tensors = [randn(*shape, dtype=a), lse_a, randn(*shape, dtype=b), lse_b]
    tensors += [randn(*shape, dtype=out), dlse]
    empty_a, empty_b = lse_a == -math.inf, lse_b == -math.inf
    tensors[0].masked_fill_(empty_a[..., None], math.nan)
    tensors[2].masked_fill_(empty_b[..., None], math.nan)
    for x, has_columns in ((tensors[4], True), (dlse, False)):
        both = empty_a & empty_b
        x.masked_fill_(both[..., None] if has_columns else both, math.nan)
    return tensors


def simulate(
    tensors: MergeTensors | MergeBackwardTensors, dtype_out: str, plant: Plant | None, seed: int
) -> None:
    is_backward = isinstance(tensors, MergeBackwardTensors)
    plan = make_plan(f"merge_results{'_backward' * is_backward}", tensors, dtype_out)
    argument = build_params(tensors)
    written = tensors._fields[6:] if is_backward else ("out", "lse")
    simulate_source(
        generate_source(plan, "host", plant),  # type: ignore[arg-type]
        argument,
        [
            SimTensor(name, x, pointer_field(name), writable=name in written)
            for name, x in tensors._asdict().items()
            if x is not None
        ],
        grid=grid_size(argument, plan),
        num_threads=plan.num_threads,
        smem_bytes=0,
        seed=seed,
    )


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the GPU's road run in the simulator, with a bug of a seed's."""

    def use(plant: Plant | None = None, seed: int = 0) -> None:
        def launch(tensors: Any, dtype_out: torch.dtype) -> bool:
            is_backward = isinstance(tensors, MergeBackwardTensors)
            own = plant
            if plant is not None and "rows" not in plant.file:
                own = plant if ("backward" in plant.file) == is_backward else None
            simulate(tensors, DTYPES[dtype_out], own, seed)
            return True

        monkeypatch.setattr(merging, "launched", launch)
        monkeypatch.setattr(merging, "arch_of_device", lambda index: 90)
        monkeypatch.setattr(Tensor, "is_cuda", True)

    use()
    return use


def merge(*arguments: Any) -> tuple[Tensor, Tensor]:
    found = merging.merge_on_gpu(*arguments)
    assert found is not None
    return found


def merge_backward(*arguments: Any) -> tuple[Tensor, ...]:
    found = merging.merge_backward_on_gpu(*arguments)
    assert found is not None
    return found


def check(case: dict[str, Any], arrives: str = "both") -> None:
    """Compare out, lse and all gradients with those of PyTorch in float64."""
    out_a, lse_a, out_b, lse_b, dout, dlse = sides(case)
    dtype = dout.dtype
    given = out_a, lse_a, out_b, lse_b
    out, lse = merge(*given, dtype)
    exact = [x.double() for x in given]
    want = merge_plain(*exact, torch.float64)
    for x, y, bound in ((out, want[0], ROUNDING[dtype]), (lse, want[1], ROUNDING[SINGLE])):
        assert x.is_contiguous()
        torch.testing.assert_close(x.double(), y, rtol=bound, atol=1e-6)
    of_out = None if arrives == "lse" else dout
    of_lse = None if arrives == "out" else dlse
    have = merge_backward(of_out, of_lse, *given, dtype)
    zeros = torch.zeros_like(dout), torch.zeros_like(dlse)
    wide = [
        y.double() if x is None else x.double()
        for x, y in zip((of_out, of_lse), zeros, strict=True)
    ]
    right = merge_backward_plain(*wide, *exact)
    sum_bound = 1e-5 * case["shape"][-1] ** 0.5
    for x, y, like in zip(have, right, given, strict=True):
        assert x.dtype == like.dtype
        if y is None:
            y = torch.zeros_like(x, dtype=torch.float64)
        atol = sum_bound if x.dim() == lse.dim() else 1e-6
        torch.testing.assert_close(x.double(), y, rtol=ROUNDING[like.dtype], atol=atol)


FEW = (
    "several lanes a row", "longer than a warp's", "float32 is rounded", "many odd columns",
    "heads third", "a column apart",
)  # fmt: skip


@pytest.mark.parametrize("case", thorough_but([CASES[x] for x in FEW], CASES.values()), ids=CASES)
def test_the_kernels_agree_with_pytorch(case: dict[str, Any], simulated: Any) -> None:
    check(case)


@pytest.mark.parametrize("arrives", ["out", "lse"])
def test_gradients_may_arrive_through_one_alone(arrives: str, simulated: Any) -> None:
    check(CASES["several lanes a row"], arrives)


def test_nan_in_a_side_or_its_lse_spreads_over_its_row_alone(simulated: Any) -> None:
    given = sides(CASES["one packet a row"])[:4]
    given[0][1, 0, 4, 3] = math.nan
    given[3][1, 1, 2] = math.nan
    out, lse = merge(*given, torch.float32)
    where = out.isnan().nonzero().tolist()
    assert where == [[1, 0, 4, 3], *([1, 1, 2, i] for i in range(8))]
    assert lse.isnan().nonzero().tolist() == [[1, 1, 2]]


PLANTS = PLANTS_MERGE | PLANTS_MERGE_BACKWARD
FEW_PLANTS = [PLANTS[x] for x in ("merge-row-past-the-end", "merge-leaves-before-the-sum")]


@pytest.mark.parametrize("plant", thorough_but(FEW_PLANTS, PLANTS.values()), ids=PLANTS)
def test_planted_bugs_are_found_on_every_seed(plant: Plant, simulated: Any) -> None:
    text = (KERNELS_DIR / plant.file).read_text(encoding="utf-8")
    assert text.count(plant.find) == 1
    case = CASES["several lanes a row"]
    for seed in range(20):
        simulated(plant, seed)
        found = ""
        try:
            check(case)
        except SimulationError as error:
            found = error.kind
        except AssertionError:
            found = "wrong-result"
        assert found == plant.caught_by


@pytest.mark.parametrize(
    ("kernel", "struct"),
    [("merge_results", MergeParams), ("merge_results_backward", MergeBackwardParams)],
)
@pytest.mark.parametrize("arch", [75, 90])
def test_the_kernels_compile_for_gpus(
    kernel: str, struct: type[ctypes.Structure], arch: int
) -> None:
    """They do not spill; the simulator compares the size of the argument with its mirror's."""
    plan = MergePlan(kernel, "float32", "float16", "float32", 8, 16)
    assert plan.params_struct == struct.__name__
    found = compile_source(generate_source(plan), arch, kernel, "", plan.describe())  # type: ignore[arg-type]
    assert found.spill_bytes == 0


def test_rows_are_views_where_they_can_be() -> None:
    x = torch.empty(2, 3, 4, 5, 16)
    assert as_rows(x, True).shape == (6, 4, 5, 16)
    assert as_rows(x, True).data_ptr() == x.data_ptr()
    apart = torch.empty(4, 16, 3).mT
    assert as_rows(apart, True).stride(-1) == 1
    assert as_rows(torch.empty(7), False).shape == (1, 1, 7)
