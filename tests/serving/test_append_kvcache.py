"""Run the kernel that appends to a cache in the simulator, and compare it with PyTorch. Its planted
bugs are in tests/plants/test_sim_plants_append.py."""

from __future__ import annotations

import ctypes

import pytest
import torch
from append_calls import CASES, check, close, make_call
from torch import Tensor

import flashcore.serving.append as serving
from flashcore.compile.codegen import KERNELS_DIR
from flashcore.kernels.append import params
from flashcore.kernels.append.params import AppendParams

FILE = "append/append_kvcache.cuh"


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_does_what_pytorch_does(name: str) -> None:
    check(make_call(CASES[name]))


def test_the_arguments_mirror_says_what_the_kernel_s_struct_says() -> None:
    text = (KERNELS_DIR / FILE).read_text(encoding="utf-8")
    body = text.partition("struct AppendParams {")[2].partition("};")[0]
    lines = " ".join(line.split("//")[0] for line in body.splitlines())
    names = []
    for declaration in lines.split(";"):
        kind = declaration.replace("const Element", "").replace("const RotaryElement", "")
        kind = kind.replace("const int32_t", "").replace("<Element>", "").replace("<int32_t>", "")
        names += [word.split()[-1] for word in kind.split(",") if word.strip()]
    assert names == [name for name, *_ in AppendParams._fields_]
    assert f"APPEND_WARPS = {params.WARPS};" in text
    assert ctypes.sizeof(AppendParams) == 15 * 8 + 6 * 32 + 2 * 8 + 16 * 4


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_does_the_same_on_a_gpu(name: str) -> None:
    call = make_call(CASES[name])
    given = [x.cuda() if isinstance(x, Tensor) else x for x in call.arguments]
    rotated, lengths = serving._append_on_gpu(*given)
    want_rotated, want_lengths = serving._append(*call.arguments)
    assert torch.equal(lengths.cpu(), want_lengths)
    if call.tensors.q is not None:
        close(rotated.cpu(), want_rotated)
    for have, want in zip(given[:2], call.arguments[:2], strict=True):
        torch.testing.assert_close(have.cpu(), want, rtol=2.0**-7, atol=1e-6, equal_nan=True)
