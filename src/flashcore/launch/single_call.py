"""Load kernels that are launched by themselves (one that appends to a cache, those that merge
results), and remember what was prepared for a description of tensors."""

from __future__ import annotations

import functools
from typing import TypeVar

import torch

from flashcore.base import forks
from flashcore.base.bounded import make_room
from flashcore.compile.codegen import generate_source
from flashcore.compile.jit import compile_source
from flashcore.kernels.append.params import AppendPlan
from flashcore.kernels.merge.params import MergePlan
from flashcore.launch.driver_launch import Launch

PREPARED_MAX = 1024  # descriptions that are remembered, of each kind of kernel
EARLY_MIN_ARCH = 90  # from which on there is programmatic dependent launch

_Prepared = TypeVar("_Prepared")
_lock = forks.lock()


@functools.lru_cache(maxsize=4096)
def load(plan: AppendPlan | MergePlan, arch: int, device_index: int, grid: int) -> Launch:
    """Compile a kernel, or find it compiled, and load it on a GPU.

    Args:
        plan: the variant.
        arch: of the GPU, 90 for sm_90.
        device_index: of the GPU.
        grid: how many blocks are launched.

    Raises:
        CompileError, BackendUnavailableError, FlashCoreError: see jit.compile_source, Launch.
    """
    source = generate_source(plan)  # type: ignore[arg-type]
    kernel = compile_source(source, arch, plan.kernel, "", f"{plan.describe()}, sm_{arch}")
    device = torch.device("cuda", device_index)
    return Launch(
        kernel,
        grid=grid,
        num_threads=plan.num_threads,
        smem_bytes=0,
        device=device,
        starts_early=plan.starts_early and arch >= EARLY_MIN_ARCH,
    )


def remember(prepared: dict[object, _Prepared], key: object, entry: _Prepared) -> None:
    """Keep what was prepared for a description of tensors; the oldest makes room for it."""
    with _lock:
        make_room(prepared, PREPARED_MAX)
        prepared[key] = entry
