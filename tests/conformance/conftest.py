"""Run the small kernels of this folder in the simulator and on a GPU, by one fixture."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensor_maps import Map, encode_map, make_map
from torch import Tensor

from flashcore.compile.codegen import flatten
from flashcore.kernels.tensor_map import TensorMap
from flashcore.sim import SimTensor, simulate_source

FOLDER = Path(__file__).parent

Runner = Callable[..., dict[str, Tensor]]


def params_type(
    name: str, maps: dict[str, Map], tensors: dict[str, Tensor], scalars: dict[str, int]
) -> type:
    fields: list[tuple[str, type]] = [(field, TensorMap) for field in maps]
    fields += [(field, ctypes.c_void_p) for field in tensors]
    fields += [(field, ctypes.c_int32) for field in scalars]
    if maps:
        used = 128 * len(maps) + 8 * len(tensors) + 4 * len(scalars)
        fields.append(("padding", ctypes.c_uint8 * (-used % 64)))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


@pytest.fixture(params=["sim", pytest.param("gpu", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Runner:
    """Run a kernel of tests/conformance on CPU tensors and return what it wrote.

    The parameter struct holds `maps`, then pointers to `tensors`, then `scalars`; a tensor that a
    map names has no pointer if its own name starts with "_". The kernel writes
    `outputs`; other threads read those in `shared`, too; atomics change those in `counters`, and
    bulk_add those in `sums`.
    `arch_suffix` "a" is for kernels of Hopper. `starts_early` asks for programmatic dependent
    launch.
    """

    def run(
        kernel: str,
        tensors: dict[str, Tensor],
        outputs: tuple[str, ...],
        *,
        num_threads: int,
        counters: tuple[str, ...] = (),
        shared: tuple[str, ...] = (),
        sums: tuple[str, ...] = (),
        grid: int = 1,
        smem_bytes: int = 8192,
        scalars: dict[str, int] | None = None,
        constants: dict[str, object] | None = None,
        maps: dict[str, Map] | None = None,
        arch_suffix: str = "",
        starts_early: bool = False,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        scalars, maps = scalars or {}, maps or {}
        pointed = {n: t for n, t in tensors.items() if not n.startswith("_")}
        struct = params_type(kernel, maps, pointed, scalars)
        path = FOLDER / f"{kernel}.cuh"
        name = "".join(word.capitalize() for word in kernel.split("_")) + "Params"
        if request.param == "sim":
            source = flatten(path, "host", constants=constants, params=name)
            fields = {n: [n] if n in pointed else [] for n in tensors}
            for map_name, spec in maps.items():
                fields[spec.tensor].append(f"{map_name}.base")
            items = [
                SimTensor(
                    n,
                    t,
                    tuple(fields[n]),
                    writable=n in outputs,
                    counter=n in counters,
                    shared=n in shared,
                    sums=n in sums,
                )
                for n, t in tensors.items()
            ]
            # The simulator adds the tensor's simulated address.
            encoded = {n: make_map(spec, tensors[spec.tensor], base=0) for n, spec in maps.items()}
            simulate_source(
                source,
                struct(**encoded, **scalars),
                items,
                grid=grid,
                num_threads=num_threads,
                smem_bytes=smem_bytes,
                seed=seed,
                starts_early=starts_early,
            )
            return {n: tensors[n] for n in outputs + counters + sums}
        from flashcore.compile.jit import compile_source
        from flashcore.launch.driver_launch import launch_raw

        device = torch.device("cuda")
        major, minor = torch.cuda.get_device_capability()
        if arch_suffix and (major, minor) != (9, 0):
            pytest.skip(f"needs an sm_90 GPU, this one is sm_{major}{minor}")
        on_gpu = {n: t.to(device) for n, t in tensors.items()}
        pointers = {n: on_gpu[n].data_ptr() for n in pointed}
        encoded = {n: encode_map(spec, on_gpu[spec.tensor]) for n, spec in maps.items()}
        source = flatten(path, "ptx", constants=constants)
        launch_raw(
            compile_source(source, 10 * major + minor, kernel, arch_suffix),
            grid=grid,
            num_threads=num_threads,
            smem_bytes=smem_bytes,
            params=struct(**encoded, **pointers, **scalars),
            device=device,
            starts_early=starts_early,
        )
        torch.cuda.synchronize()
        return {n: on_gpu[n].cpu() for n in outputs + counters + sums}

    return run
