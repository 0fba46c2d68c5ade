"""Test Hopper's primitives (prims_sm90.cuh) against models, in the simulator and on a GPU alike."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensor_maps import Map
from torch import Tensor

from flashcore.compile.codegen import flatten
from flashcore.errors import CompileError

FOLDER = Path(__file__).parent
DTYPES = ("float16", "bfloat16")
SEEDS = range(4)

Runner = Callable[..., dict[str, Tensor]]

# Columns of a product and bytes of a swizzled row.
PRODUCTS = [(16, 64), (48, 128), (64, 128), (96, 64), (128, 128), (208, 64), (240, 128), (256, 128)]
COLUMNS = [(16, 64), (64, 128), (96, 64), (128, 128)]


def in_turns(shapes: list[tuple[int, int]]) -> list[Any]:
    """Return every shape with both dtypes: in `make test` with one of them, in turns."""
    return [
        pytest.param(dtype, *shape, marks=() if (i + j) % 2 else pytest.mark.thorough)
        for (i, shape), (j, dtype) in itertools.product(enumerate(shapes), enumerate(DTYPES))
    ]


@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        *(("tma_boxes", {"ROW_BYTES": size}) for size in (64, 128)),
        ("tma_chunks", {}),
        ("mbarriers", {}),
        ("warpgroups", {}),
        ("dependents", {}),
        ("matrices", {}),
        *((name, {"Element": dtype}) for name in ("stmatrix", "pairs") for dtype in DTYPES),
        *(
            ("products", {"Element": dtype, "ROW_BYTES": row_bytes, "FRAGS": cols // 16})
            for dtype, (cols, row_bytes) in itertools.product(DTYPES, PRODUCTS)
        ),
        *(
            ("columns", {"Element": dtype, "ROW_BYTES": row_bytes, "FRAGS": cols // 16})
            for dtype, (cols, row_bytes) in itertools.product(DTYPES, COLUMNS)
        ),
    ],
)
@pytest.mark.thorough  # the gate compiles kernels that are written with them
def test_the_same_text_compiles_for_a_gpu(kernel: str, constants: dict[str, object]) -> None:
    pytest.importorskip("cuda.core")
    from flashcore.compile.jit import compile_source

    source = flatten(FOLDER / f"{kernel}.cuh", "ptx", constants=constants)
    assert compile_source(source, 90, kernel, "a").code_bytes > 0


def test_a_product_that_the_hardware_lacks_does_not_compile() -> None:
    """It once compiled to nothing."""
    pytest.importorskip("cuda.core")
    from flashcore.compile.jit import compile_source

    constants = {"Element": "float16", "ROW_BYTES": 64, "FRAGS": 17}
    source = flatten(FOLDER / "products.cuh", "ptx", constants=constants)
    with pytest.raises(CompileError, match="N is 16, 32"):
        compile_source(source, 90, "products", "a")


def padded_box(
    x: Tensor, col: int, row: int, head: int, batch: int, shape: tuple[int, int]
) -> Tensor:
    """Return the box of a tensor [batch, heads, rows, cols], zeros outside."""
    box = torch.zeros(shape, dtype=x.dtype)
    if not (0 <= head < x.shape[1] and 0 <= batch < x.shape[0]):
        return box
    for r, c in itertools.product(range(shape[0]), range(shape[1])):
        if 0 <= row + r < x.shape[2] and 0 <= col + c < x.shape[3]:
            box[r, c] = x[batch, head, row + r, col + c]
    return box


def swizzled(box: Tensor, row_bytes: int) -> Tensor:
    """Lay a tile out as TMA does: units of 8 elements are permuted by row, in a pattern of 8
    rows."""
    laid_out = torch.empty_like(box)
    for row, unit in itertools.product(range(box.shape[0]), range(row_bytes // 16)):
        place = unit ^ (row % 8 if row_bytes == 128 else row // 2 % 4)
        laid_out[row, place * 8 : place * 8 + 8] = box[row, unit * 8 : unit * 8 + 8]
    return laid_out


@pytest.mark.parametrize("row_bytes", [64, 128])
def test_boxes_are_swizzled_padded_and_clipped(run: Runner, row_bytes: int) -> None:
    cols = row_bytes // 2
    x = torch.arange(2 * 3 * 21 * 72).reshape(2, 3, 21, 72).to(torch.int16)
    inside = itertools.product(range(0, 72, cols), (0, 16), range(3), range(2))
    boxes = [(*place, 1) for place in inside]
    boxes += [
        (0, -5, 0, 0, 0),
        (-8, 3, 1, 1, 0),
        (8, 40, 0, 0, 0),
        (0, 0, 3, 0, 0),
        (0, 0, 0, 2, 0),
    ]
    boxes += [(16, 3, 1, 0, 0), (-8, -2, 2, 1, 0)]
    tensors = {
        "_in": x,
        "_out": torch.empty_like(x),
        "boxes": torch.tensor(boxes, dtype=torch.int32),
        "raw": torch.empty(len(boxes), 16, cols, dtype=torch.int16),
    }
    expected = [padded_box(x, *box[:4], shape=(16, cols)) for box in boxes]
    for seed in SEEDS:
        result = run(
            "tma_boxes",
            tensors,
            ("_out", "raw"),
            num_threads=64,
            smem_bytes=64 * cols + 16,
            scalars={"num_boxes": len(boxes)},
            constants={"ROW_BYTES": row_bytes},
            maps={"in": Map("_in", 16, cols), "out": Map("_out", 16, cols)},
            arch_suffix="a",
            seed=seed,
        )
        for box, raw, plain in zip(boxes, result["raw"], expected, strict=True):
            assert torch.equal(raw, swizzled(plain, row_bytes)), box
        assert torch.equal(result["_out"], x)


def test_a_box_has_all_chunks_of_columns(run: Runner) -> None:
    """TMA fills rows, chunks, batches and heads that there are not with zeros."""
    x = torch.arange(3 * 2 * 21 * 192).reshape(3, 2, 21, 192).to(torch.int16)
    boxes = [(0, 0, 0, 0), (13, 0, 1, 1), (16, 0, 0, 1), (8, 1, 1, 0)]  # row, chunk, head, batch
    boxes += [(0, 0, 1, 2), (21, 0, 0, 0), (0, 0, 2, 0)]
    tensors = {
        "_in": x,
        "boxes": torch.tensor(boxes, dtype=torch.int32),
        "raw": torch.empty(len(boxes), 2, 3, 8, 64, dtype=torch.int16),
    }
    for seed in SEEDS:
        result = run(
            "tma_chunks",
            tensors,
            ("raw",),
            num_threads=64,
            smem_bytes=2 * 2 * (2 * 3 * 8 * 64) + 16,
            scalars={"num_boxes": len(boxes)},
            maps={"in": Map("_in", 8, 64, box_batches=2)},
            arch_suffix="a",
            seed=seed,
        )
        for (row, chunk, head, batch), raw in zip(boxes, result["raw"], strict=True):
            for b, c in itertools.product(range(2), range(3)):
                plain = torch.zeros(8, 64, dtype=torch.int16)
                if batch + b < 3:
                    plain = padded_box(x, (chunk + c) * 64, row, head, batch + b, shape=(8, 64))
                assert torch.equal(raw[b, c], swizzled(plain, 128)), (row, chunk, head, batch)


def test_ragged_boxes_end_with_their_sequence(run: Runner) -> None:
    """Rows of a neighbour are neither read nor written, whatever the length."""
    cols, heads, total = 32, 2, 40
    x = torch.arange(1, 1 + heads * total * cols).reshape(1, total, heads, cols).transpose(1, 2)
    x = x.to(torch.int16)
    sequences = [(0, 7), (7, 0), (7, 1), (8, 21), (29, 11)]  # first row, length
    wanted, boxes = [], []
    for (begin, length), head in itertools.product(sequences, range(heads)):
        for row in range(0, length, 16):  # no box starts behind the last row
            boxes.append((0, total - length + row, head, begin + length, 1))
            own = x[:, :, begin : begin + length]
            wanted.append(padded_box(own, 0, row, head, 0, shape=(16, cols)))
    tensors = {
        "_in": x,
        "_out": torch.empty_like(x),
        "boxes": torch.tensor(boxes, dtype=torch.int32),
        "raw": torch.empty(len(boxes), 16, cols, dtype=torch.int16),
    }
    for seed in SEEDS:
        result = run(
            "tma_boxes",
            tensors,
            ("_out", "raw"),
            num_threads=64,
            smem_bytes=64 * cols + 16,
            scalars={"num_boxes": len(boxes)},
            constants={"ROW_BYTES": 64},
            maps={"in": Map("_in", 16, cols, ragged=True), "out": Map("_out", 16, cols, True)},
            arch_suffix="a",
            seed=seed,
        )
        for box, raw, plain in zip(boxes, result["raw"], wanted, strict=True):
            assert torch.equal(raw, swizzled(plain, 64)), box
        assert torch.equal(result["_out"], x)


def test_phases_of_mbarriers_hand_values_over(run: Runner) -> None:
    lane = torch.arange(32, dtype=torch.int32)
    for seed in SEEDS:
        result = run(
            "mbarriers",
            {"seen": torch.empty(9, 3, 32, dtype=torch.int32)},
            ("seen",),
            num_threads=128,
            arch_suffix="a",
            seed=seed,
        )
        for round, reader in itertools.product(range(9), range(3)):
            assert torch.equal(result["seen"][round, reader], round * 100 + (lane ^ (reader + 1)))


def test_warpgroups_meet_at_named_barriers(run: Runner) -> None:
    tensors = {
        "seen": torch.empty(6, 128, dtype=torch.int32),
        "elected": torch.empty(8, 32, dtype=torch.int32),
        "votes": torch.empty(2, 128, dtype=torch.int32),
    }
    mirrored = torch.arange(127, -1, -1, dtype=torch.int32)
    for seed in SEEDS:
        result = run(
            "warpgroups",
            tensors,
            ("seen", "elected", "votes"),
            num_threads=256,
            arch_suffix="a",
            seed=seed,
        )
        assert torch.equal(result["seen"], torch.arange(6)[:, None].int() * 1000 + mirrored)
        assert [sorted(warp.tolist()) for warp in result["elected"]] == [[0] * 31 + [2]] * 8
        assert result["votes"].unique(dim=1).tolist() == [[0b010101], [0b101010]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_stmatrix_stores_fragments(run: Runner, dtype: str) -> None:
    out = torch.empty(4, 16, 16, dtype=getattr(torch, dtype))
    result = run(
        "stmatrix",
        {"out": out},
        ("out",),
        num_threads=128,
        constants={"Element": dtype},
        arch_suffix="a",
    )
    assert torch.equal(result["out"], torch.arange(256.0).reshape(16, 16).to(out).expand(4, 16, 16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_pairs_are_rounded_once(run: Runner, dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
    a[:4], b[:6] = 0.0, torch.inf  # 0 * inf is NaN
    tensors = {"a": a.view(torch.int32), "b": b.view(torch.int32)}
    tensors["product"] = torch.empty(128, dtype=torch.int32)
    options = {"num_threads": 128, "constants": {"Element": dtype}, "arch_suffix": "a"}
    found = run("pairs", tensors, ("product",), **options)["product"].view(a.dtype)
    torch.testing.assert_close(found, a * b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "cols", "row_bytes"), in_turns(PRODUCTS))
def test_products_of_a_warpgroup(run: Runner, dtype: str, cols: int, row_bytes: int) -> None:
    """Small integers are exact in every step, so one element in a wrong place or lost shows."""
    generator = torch.Generator().manual_seed(cols)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator).to(getattr(torch, dtype))

    a, b, bt = integers(64, 64), integers(cols, 64), integers(64, cols)
    c = integers(64, cols).float()
    tensors = {
        "_a": a[None, None],
        "_b": b[None, None],
        "_bt": bt[None, None],
        "a": a.clone(),
        "c": c,
        "by_smem": torch.empty(64, cols),
        "by_registers": torch.empty(64, cols),
        "by_both": torch.empty(64, cols),
    }
    chunk = row_bytes // 2
    for seed in SEEDS:
        result = run(
            "products",
            tensors,
            ("by_smem", "by_registers", "by_both"),
            num_threads=128,
            smem_bytes=2 * 64 * (64 + cols + -(-cols // chunk) * chunk) + 8,
            constants={"Element": dtype, "ROW_BYTES": row_bytes, "FRAGS": cols // 16},
            maps={
                "a_map": Map("_a", 64, chunk),
                "b_map": Map("_b", cols, chunk),
                "bt_map": Map("_bt", 64, chunk),
            },
            arch_suffix="a",
            seed=seed,
        )
        assert torch.equal(result["by_smem"], a.float() @ b.float().T + c)
        assert torch.equal(result["by_registers"], a.float() @ bt.float())
        assert torch.equal(result["by_both"], result["by_smem"])


@pytest.mark.parametrize(("dtype", "cols", "row_bytes"), in_turns(COLUMNS))
def test_blocks_add_up_products_of_columns(
    run: Runner, dtype: str, cols: int, row_bytes: int
) -> None:
    """A^T B of every block, added to what was there."""
    generator = torch.Generator().manual_seed(cols)
    a = torch.randint(-8, 9, (64, 64), generator=generator).to(getattr(torch, dtype))
    b = torch.randint(-8, 9, (64, cols), generator=generator).to(getattr(torch, dtype))
    frags, grid, before = cols // 16, 3, 5.0
    chunk = row_bytes // 2
    for seed in SEEDS:
        result = run(
            "columns",
            {
                "_a": a[None, None],
                "_b": b[None, None],
                "sums": torch.full((4, frags, 2, 32, 4), before),
                "counters": torch.zeros(4, 2).int(),
            },
            (),
            num_threads=128,
            grid=grid, counters=("counters",), sums=("sums",),
            smem_bytes=2 * 64 * (64 + -(-cols // chunk) * chunk) + 4 * 64 * cols + 8,
            constants={"Element": dtype, "ROW_BYTES": row_bytes, "FRAGS": frags},
            maps={"a_map": Map("_a", 64, 64), "b_map": Map("_b", 64, chunk)},
            arch_suffix="a",
            seed=seed,
        )  # fmt: skip
        product = torch.empty(64, cols)
        for warp, frag, half, lane, i in itertools.product(
            range(4), range(frags), range(2), range(32), range(4)
        ):
            row = warp * 16 + lane // 4 + i // 2 * 8
            col = frag * 16 + half * 8 + lane % 4 * 2 + i % 2
            product[row, col] = result["sums"][warp, frag, half, lane, i]
        assert torch.equal(product, grid * (a.float().T @ b.float()) + before)


def test_a_kernel_that_starts_early_waits_for_what_it_reads(run: Runner) -> None:
    tensors = {"before": torch.randn(3, 64), "after": torch.empty(3, 64)}
    options = {"num_threads": 64, "grid": 3, "arch_suffix": "a"}
    for starts_early in (False, True):
        result = run("dependents", tensors, ("after",), starts_early=starts_early, **options)
        assert torch.equal(result["after"], tensors["before"] + 1.0)


@pytest.mark.gpu
def test_a_chain_of_kernels_that_start_early_runs_in_order() -> None:
    """Every one may start as soon as the one before it has; without its wait it would read what
    that one has not written yet."""
    from flashcore.compile.jit import compile_source
    from flashcore.launch.driver_launch import Argument, Launch

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs an sm_90 GPU")

    class DependentsParams(ctypes.Structure):
        _fields_ = (("before", ctypes.c_void_p), ("after", ctypes.c_void_p))

    device, blocks, length = torch.device("cuda"), 8 * 132, 400
    buffers = [torch.full((blocks, 64), -1e6, device=device) for _ in range(2)]
    buffers[0].zero_()
    kernel = compile_source(flatten(FOLDER / "dependents.cuh", "ptx"), 90, "dependents", "a")
    launch = Launch(
        kernel, grid=blocks, num_threads=64, smem_bytes=0, device=device, starts_early=True
    )
    for step in range(length):
        before, after = buffers[step % 2], buffers[1 - step % 2]
        launch(Argument(DependentsParams(before.data_ptr(), after.data_ptr())))
    assert torch.equal(buffers[length % 2], torch.full_like(buffers[0], float(length)))
    assert torch.equal(buffers[1 - length % 2], torch.full_like(buffers[0], float(length - 1)))
