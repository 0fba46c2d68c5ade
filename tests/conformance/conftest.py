"""Runs the small kernels of this folder in the simulator and on a GPU, by one fixture."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashcore.codegen import flatten
from flashcore.sim import SimTensor, simulate_source

FOLDER = Path(__file__).parent

Runner = Callable[..., dict[str, Tensor]]


def params_type(name: str, tensors: dict[str, Tensor], scalars: dict[str, int]) -> type:
    fields = [(field, ctypes.c_void_p) for field in tensors]
    fields += [(field, ctypes.c_int32) for field in scalars]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


@pytest.fixture(params=["sim", pytest.param("gpu", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Runner:
    """Runs a kernel of tests/conformance on CPU tensors and returns what it wrote.

    `tensors` are the parameter struct's pointers in order; those whose name is in `outputs` are
    written by the kernel.
    """

    def run(
        kernel: str,
        tensors: dict[str, Tensor],
        outputs: tuple[str, ...],
        *,
        num_threads: int,
        grid: int = 1,
        smem_bytes: int = 8192,
        scalars: dict[str, int] | None = None,
        constants: dict[str, object] | None = None,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        scalars = scalars or {}
        struct = params_type(kernel, tensors, scalars)
        path = FOLDER / f"{kernel}.cuh"
        name = "".join(word.capitalize() for word in kernel.split("_")) + "Params"
        if request.param == "sim":
            source = flatten(path, "host", constants=constants, params=name)
            items = [SimTensor(n, t, n, writable=n in outputs) for n, t in tensors.items()]
            simulate_source(
                source,
                struct(**scalars),
                items,
                grid=grid,
                num_threads=num_threads,
                smem_bytes=smem_bytes,
                seed=seed,
            )
            return {n: tensors[n] for n in outputs}
        from flashcore.jit import compile_source
        from flashcore.launch import launch_raw

        device = torch.device("cuda")
        major, minor = torch.cuda.get_device_capability()
        on_gpu = {n: t.to(device) for n, t in tensors.items()}
        pointers = {n: t.data_ptr() for n, t in on_gpu.items()}
        launch_raw(
            compile_source(flatten(path, "ptx", constants=constants), 10 * major + minor, kernel),
            grid=grid,
            num_threads=num_threads,
            smem_bytes=smem_bytes,
            params=struct(**pointers, **scalars),
            device=device,
        )
        torch.cuda.synchronize()
        return {n: on_gpu[n].cpu() for n in outputs}

    return run
