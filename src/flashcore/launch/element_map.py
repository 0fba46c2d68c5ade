"""Look up on the GPU itself the order of elements in a fragment of the portable kernel."""

from __future__ import annotations

import ctypes
import functools

import torch

from flashcore.compile.jit import compile_probe
from flashcore.errors import FlashCoreError
from flashcore.launch.driver_launch import launch_raw


@functools.cache
def verify_element_map(device_index: int, arch: int, dtype: str) -> None:
    """Check on the GPU, once a process, that fragments lie where the kernels think they do.

    Raises:
        FlashCoreError: they do not; the GPU's wmma is not the documented one.
    """

    class ProbeParams(ctypes.Structure):
        _fields_ = [("mismatches", ctypes.c_void_p)]

    device = torch.device("cuda", device_index)
    mismatches = torch.full((32,), torch.nan, device=device)
    launch_raw(
        compile_probe(dtype, arch),
        grid=1,
        num_threads=32,
        smem_bytes=48 * 24 * 2,
        params=ProbeParams(mismatches.data_ptr()),
        device=device,
    )
    found = mismatches.tolist()
    if any(count != 0 for count in found):
        raise FlashCoreError(
            f"{torch.cuda.get_device_name(device)} holds {dtype} fragments in an unknown order "
            f"(mismatches by lane: {found}); use backend='torch', and please report this"
        )
