"""Test primitives that compute, against models, in the simulator and on a GPU alike."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashcore.compile.codegen import KERNELS_DIR
from flashcore.problem.scales import SMALLEST_SCALE, quantised

DTYPES = ("float16", "bfloat16")

Runner = Callable[..., dict[str, Tensor]]


def bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Assert that tensors are equal bit by bit, sign of zero included; a NaN equals any NaN."""
    same = (bits(actual) == bits(expected)) | (actual.isnan() & expected.isnan())
    wrong = (~same).nonzero().flatten()
    assert not wrong.numel(), [
        (int(i), actual[i].item(), expected[i].item()) for i in wrong[:5].tolist()
    ]


def all_values(dtype: torch.dtype) -> Tensor:
    """Return all 65536 values of a 2-byte type, NaNs and subnormals among them."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def rounding_cases(dtype: torch.dtype) -> Tensor:
    """Return float32 values where rounding is decided: each value of the type, the midpoint to the
    next (a tie), the float32 neighbours of the midpoint, and values beyond the type's range."""
    values = all_values(dtype).float()
    values = values[values.isfinite()].sort().values
    middle = (values[:-1].double() + values[1:].double()).mul(0.5).float()
    up, down = torch.full_like(middle, math.inf), torch.full_like(middle, -math.inf)
    largest = torch.finfo(dtype).max
    beyond = torch.tensor(
        [math.inf, -math.inf, math.nan, -math.nan, 3.4e38, -3.4e38, 1e-45, -1e-45]
    )
    half_step = torch.tensor([largest]) * (1 + torch.finfo(dtype).eps / 4)  # ties to infinity
    nans = torch.tensor([0x7F800001, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    cases = torch.cat(
        [
            values,
            middle,
            middle.nextafter(up),
            middle.nextafter(down),
            beyond,
            half_step,
            -half_step,
            half_step.nextafter(torch.tensor([0.0])),
            nans,
        ]
    )
    return cases[: len(cases) // 2 * 2]  # pairs, for pack2


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions_round_to_nearest_even(run: Runner, dtype: str) -> None:
    torch_dtype = getattr(torch, dtype)
    wide = rounding_cases(torch_dtype)
    count = len(wide)
    narrow = all_values(torch_dtype).repeat(-(-count // 65536))[:count].contiguous()
    tensors = {
        "narrow": narrow,
        "wide": wide,
        "widened": torch.empty(count),
        "narrowed": torch.empty(count, dtype=torch_dtype),
        "packed": torch.empty(count, dtype=torch.int32),
    }
    result = run(
        "convert",
        tensors,
        ("widened", "narrowed", "packed"),
        grid=-(-count // 128),
        num_threads=128,
        scalars={"count": count},
        constants={"Element": dtype},
    )
    expected = wide.to(torch_dtype)
    assert_same_bits(result["widened"], narrow.float())
    assert_same_bits(result["narrowed"], expected)
    assert set(bits(result["narrowed"])[wide.isnan()].tolist()) == {0x7FFF}
    halves = result["packed"].view(torch_dtype).view(-1, 2)
    assert_same_bits(halves[:, 0].contiguous(), expected)
    assert_same_bits(halves[:, 1].contiguous(), expected.view(-1, 2).flip(1).flatten())


@pytest.mark.parametrize("kernel", ["float8", "float8_by_integers"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_float8_is_widened_exactly(run: Runner, dtype: str, kernel: str) -> None:
    """All 256 bytes, NaNs and subnormals among them, at each of the four places in a register; by
    the conversion of the hardware, and as the portable kernel does it where there is none."""
    is_old = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9)
    if is_old and kernel == "float8":
        pytest.skip("needs the conversions of sm_89")
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    elements = torch.stack([values.roll(37 * place) for place in range(4)], 1).contiguous()
    words = elements.view(torch.int32).flatten()
    count = len(words)
    tensors = {"words": words, "pairs": torch.empty(2 * count, dtype=torch.int32)}
    result = run(
        kernel,
        tensors,
        ("pairs",),
        grid=-(-count // 128),
        num_threads=128,
        scalars={"count": count},
        constants={
            "Element": dtype, "LOAD_BYTES": 16, "NUM_WARPS": 4, "WIDENS_BY_INTEGERS": True,
        },
    )  # fmt: skip
    torch_dtype = getattr(torch, dtype)
    expected = elements.view(torch.float8_e4m3fn).float().flatten()
    assert_same_bits(result["pairs"].view(torch_dtype), expected.to(torch_dtype))
    assert int(expected.isnan().sum()) == 8


def test_floats_are_quantised_as_pytorch_does(run: Runner) -> None:
    """Every float of 16 bits, their neighbours of 32, and every tie between two elements."""
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    x = torch.cat([halves.view(torch.float16).float(), halves.view(torch.bfloat16).float()])
    elements = torch.arange(127, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    ties = (elements[1:].float() + elements[:-1].float()) / 2
    x = torch.cat([x, ties, -ties])
    bits_of_x = x.view(torch.int32)
    x = torch.cat([x, (bits_of_x + 1).view(torch.float32), (bits_of_x - 1).view(torch.float32)])
    special = torch.tensor([0.0, -1.0, 1e-38, 1e-30, 1e30, 0.37, math.inf, math.nan, 1.0, 1.0])
    scale = torch.ones_like(x)
    scale[::3] = special.repeat(-(-len(x) // 30))[: len(scale[::3])]
    count = len(x)
    tensors = {"x": x, "scale": scale}
    tensors |= dict.fromkeys(("element", "narrowed"), torch.zeros(count).to(torch.float8_e4m3fn))
    result = run(
        "quantised",
        tensors,
        ("element", "narrowed"),
        grid=-(-count // 128),
        num_threads=128,
        scalars={"count": count},
    )
    is_old = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9)
    want = quantised(x, scale, torch.float8_e4m3fn)
    is_nan = want.float().isnan()
    for have in (result["element"], *([] if is_old else [result["narrowed"]])):
        assert torch.equal(have.float().isnan(), is_nan)
        assert torch.equal(have.view(torch.uint8)[~is_nan], want.view(torch.uint8)[~is_nan])
    text = (KERNELS_DIR / "append" / "quantise.cuh").read_text(encoding="utf-8")
    assert f"SMALLEST_DIVISOR = {SMALLEST_SCALE}f;" in text


def multiply(run: Runner, dtype: str, a: Tensor, b: Tensor, c: Tensor) -> dict[str, Tensor]:
    torch_dtype = getattr(torch, dtype)
    names = ("by_row", "by_col", "chained")
    tensors = {"a": a.to(torch_dtype), "b": b.to(torch_dtype), "c": c}
    tensors |= {name: torch.empty(16, 16) for name in names}
    tensors["map"] = torch.empty(32, 8, 2, dtype=torch.int32)
    return run("fragments", tensors, (*names, "map"), num_threads=32, constants={"Element": dtype})


@pytest.mark.parametrize("dtype", DTYPES)
def test_fragments_multiply_integers_exactly(run: Runner, dtype: str) -> None:
    """Small integers are exact in every step, so one element in a wrong place or lost shows."""
    generator = torch.Generator().manual_seed(1)
    a, b, c = (torch.randint(-4, 5, (16, 16), generator=generator).float() for _ in range(3))
    b = b.clamp(-1, 1)
    result = multiply(run, dtype, a, b, c)
    assert torch.equal(result["by_row"], a @ b + c)
    assert torch.equal(result["by_col"], a @ b + c)
    assert torch.equal(result["chained"], (a @ b + c) @ b)
    # PTX ISA, mma.m16n8k16: rows r and r + 8 of lane 4 r + c; two halves of 8 columns.
    documented = [
        [[lane // 4 + i // 2 % 2 * 8, lane % 4 * 2 + i % 2 + i // 4 * 8] for i in range(8)]
        for lane in range(32)
    ]
    assert result["map"].tolist() == documented


@pytest.mark.parametrize("dtype", DTYPES)
def test_fragments_accumulate_in_float32(run: Runner, dtype: str) -> None:
    torch_dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(2)
    a, b, c = (torch.randn(16, 16, generator=generator) for _ in range(3))
    a, b = a.to(torch_dtype), b.to(torch_dtype)
    result = multiply(run, dtype, a, b, c)
    exact = a.double() @ b.double() + c.double()
    # 17 terms, each rounded (or, on tensor cores, truncated) at 2^-23 of the largest partial sum.
    bound = (a.double().abs() @ b.double().abs() + c.double().abs()) * 17 * 2.0**-23
    assert bool(((result["by_row"].double() - exact).abs() <= bound).all())
    assert torch.equal(result["by_row"], result["by_col"])


def test_functions(run: Runner) -> None:
    generator = torch.Generator().manual_seed(3)
    spread = torch.randn(2000, generator=generator) * 2.0 ** torch.randint(
        -20, 8, (2000,), generator=generator
    )
    tiny = torch.tensor([1e-40, -1e-40, 1e-45])  # subnormal: taken as zero
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 127.5, -149.0])
    x = torch.cat([spread, special, special, tiny])
    y = torch.cat([spread.flip(0), special, special.flip(0), tiny])
    count = len(x)
    names = ("exp2", "log2", "rcp", "fma", "maximum", "bounds", "neg_inf")
    tensors = {"x": x, "y": y} | {name: torch.empty(count) for name in names}
    tensors["bounds"] = torch.empty(count, 3, dtype=torch.int32)
    result = run(
        "functions",
        tensors,
        names,
        num_threads=128,
        grid=-(-count // 128),
        scalars={"count": count},
    )
    flushed = flush(x).double()
    # PTX ISA: ex2.approx 2^-22 relative, rcp.approx 1 ulp, lg2.approx 2^-22 absolute in [0.5, 2]
    # and relative elsewhere. Twice that leaves room for the rounding of the result.
    assert_close(result["exp2"], flush(flushed.exp2().float()), relative=2.0**-21)
    assert_close(result["log2"], flushed.log2().float(), relative=2.0**-21, absolute=2.0**-21)
    assert_close(result["rcp"], flush(flushed.reciprocal().float()), relative=2.0**-22)
    exact = x.double() * y.double() + x.double()  # exact up to 2^-53: rounding twice is harmless
    assert_close(result["fma"], exact.float(), relative=2.0**-23)
    assert_same_bits(result["maximum"].abs(), torch.fmax(x, y).abs())
    number = torch.arange(count)
    assert torch.equal(result["bounds"][:, 0].long(), number.clamp(max=40))
    assert torch.equal(result["bounds"][:, 1].long(), number.clamp(min=40))
    assert torch.equal(result["bounds"][:, 2].long(), number)
    assert bool((result["neg_inf"] == -math.inf).all())


def flush(x: Tensor) -> Tensor:
    """Flush subnormals to zero, as .ftz does."""
    return torch.where(x.abs() < torch.finfo(torch.float32).tiny, x * 0.0, x)


def assert_close(
    actual: Tensor, expected: Tensor, *, relative: float, absolute: float = 0.0
) -> None:
    finite = expected.isfinite()
    assert_same_bits(actual[~finite], expected[~finite])
    error = (actual[finite].double() - expected[finite].double()).abs()
    allowed = expected[finite].double().abs() * relative + absolute
    assert bool((error <= allowed).all()), float((error - allowed).max())
