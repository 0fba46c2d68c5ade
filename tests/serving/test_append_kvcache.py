"""Run the kernel that appends to a cache in the simulator, and compare it with PyTorch. Its planted
bugs are in tests/plants/test_sim_plants_append.py."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import pytest
import torch
from append_calls import CASES, assert_same, bits_of, by_pytorch, check, make_call
from torch import Tensor
from torch.autograd import DeviceType

import flashcore
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
        kind = re.sub("<[^>]*>", "", declaration)
        names += [word.split()[-1] for word in kind.split(",") if word.strip()]
    assert names == [name for name, *_ in AppendParams._fields_]
    assert f"APPEND_WARPS = {params.WARPS};" in text
    assert f"QUERY_HEADS = {params.QUERY_HEADS};" in text
    assert f"RUN = {params.RUN};" in text
    # 19 numbers of 4 bytes, and what is left of 8.
    assert ctypes.sizeof(AppendParams) == 17 * 8 + 6 * 32 + 6 * 8 + 20 * 4


def gpu_step(seed: int) -> dict[str, Any]:
    """Return the arguments of a step with rotary embedding, but for its cache."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    angle = torch.rand(256, 64, device="cuda", generator=generator)
    return {
        "q": normal(64, 8, 8, 128),
        "k_new": normal(64, 2, 8, 128),
        "v_new": normal(64, 2, 8, 128),
        "seqlens_k": torch.randint(
            0, 240, (64,), device="cuda", generator=generator, dtype=torch.int32
        ),
        "rotary_cos": angle.cos(),
        "rotary_sin": angle.sin(),
    }


@pytest.mark.gpu
def test_a_step_is_two_launches_and_reads_what_it_appended() -> None:
    """Attention starts early, also in a CUDA graph; it must wait for the queries and the cache."""
    inputs = gpu_step(0)
    caches = [torch.zeros(64, 2, 256, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

    def step(backend: str = "auto") -> Tensor:
        return flashcore.attention_with_kvcache(
            k_cache=caches[0],
            v_cache=caches[1],
            rotary_interleaved=False,
            backend=backend,
            **inputs,
        )

    step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    on_gpu = [e for e in profile.key_averages() if e.device_type == DeviceType.CUDA]
    assert sum(e.count for e in on_gpu) == 2, [(e.key, e.count) for e in on_gpu]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        have = step()
    for seed in range(1, 20):
        for name, x in gpu_step(seed).items():
            inputs[name].copy_(x)
        graph.replay()
        found = have.clone()
        appended = [x.clone() for x in caches]
        want = step("torch")  # it writes the same bits again
        assert all(torch.equal(x, y) for x, y in zip(caches, appended, strict=True))
        torch.testing.assert_close(found, want, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_does_the_same_on_a_gpu(name: str) -> None:
    """Bit by bit, both where it writes and where it must not."""
    call = make_call(CASES[name])
    on_gpu = [x.cuda() if isinstance(x, Tensor) else x for x in call.arguments]
    before = [bits_of(x).clone() for x in on_gpu[:2]]
    rotated, lengths = serving._append_on_gpu(*on_gpu)
    want_rotated, want_lengths, caches, is_new = by_pytorch(call)
    assert torch.equal(lengths.cpu(), want_lengths)
    if call.tensors.q is not None:
        assert_same(rotated.cpu(), want_rotated)
    for have, want, old, new in zip(on_gpu[:2], caches, before, is_new, strict=True):
        assert_same(have.cpu()[new], want[new])
        assert torch.equal(bits_of(have.cpu())[~new], old.cpu()[~new])
