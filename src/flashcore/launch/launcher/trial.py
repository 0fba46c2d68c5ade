"""Make a call and its backward pass by a launcher just built, with a driver that does nothing.

Run by build.py in a process of its own: `python -m flashcore.launch.launcher.trial FILE`. A library
that was built against another C++ library than torch's may load, and end the process later.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import torch

from flashcore.errors import FlashCoreError
from flashcore.launch.launcher import Entry
from flashcore.launch.launcher.build import import_library
from flashcore.launch.types import KernelEntry, PassEntry
from flashcore.problem.options import Options

_SHAPE = (1, 2, 16, 64)
_ATTN_OFFSET = 576  # behind four descriptors of 128 bytes, which begin at 64
_ARGUMENT_BYTES = 1024


class _Driver:
    """Record addresses in arguments of launches; `replaced` counts descriptors."""

    def __init__(self) -> None:
        pointer = ctypes.c_void_p
        self.launches: list[tuple[int | None, ...]] = []
        self.replaced = 0
        self.functions = (
            ctypes.CFUNCTYPE(ctypes.c_int, *[pointer] * 4)(self._launch),
            ctypes.CFUNCTYPE(ctypes.c_int, *[pointer] * 2)(self._replace),
            ctypes.CFUNCTYPE(ctypes.c_int, *[pointer] * 2)(self._is_capturing),
        )

    def addresses(self) -> list[int | None]:
        return [ctypes.cast(function, ctypes.c_void_p).value for function in self.functions]

    def _launch(self, config: int, handle: int, arguments: int, extra: int) -> int:
        argument = ctypes.c_void_p.from_address(arguments).value
        assert argument is not None
        pointers = (ctypes.c_void_p * 6).from_address(argument + _ATTN_OFFSET)
        self.launches.append(tuple(pointers))
        return 0

    def _replace(self, descriptor: int, address: int) -> int:
        self.replaced += 1
        return 0

    def _is_capturing(self, stream: int, captured: int) -> int:
        ctypes.c_int.from_address(captured).value = 0
        return 0


def _entry(*asked: object) -> Entry:
    return Entry(
        kernel=1,
        device_index=0,
        grid=1,
        num_threads=128,
        smem_bytes=0,
        starts_early=True,
        argument=bytes(_ARGUMENT_BYTES),
        attn_offset=_ATTN_OFFSET,
        map_offsets=(64, 192, 320, 448),
        out_shape=_SHAPE,
        computes_lse=True,
        options=Options.checked(True, None, None, 0.125),
        found=object(),
        num_counters=0,
        num_shares=0,
        num_floats=0,
        scratch_offsets=(0, 0, 0),
    )


def _pass_entry(*given: object) -> PassEntry:
    """Return a pass whose one kernel gets the addresses of q, k, v, out, lse and dq."""
    tensors = enumerate((0, 1, 2, 3, 4, 6))
    pointers = tuple((_ATTN_OFFSET + 8 * place, tensor) for place, tensor in tensors)
    kernel = KernelEntry(2, 1, 128, 0, False, bytes(_ARGUMENT_BYTES), pointers, ((64, 0, 0),), ())
    made = (_SHAPE, torch.empty(_SHAPE).stride(), 0)
    return PassEntry(0, (kernel,), (made,) * 3, (0, 1, 2), 0)


def trouble_of(module: Any) -> str:
    """Return what is wrong with a launcher's module; empty if nothing is."""
    driver = _Driver()
    launch, replace, is_capturing = driver.addresses()
    module.configure(
        launch, replace, lambda: 0, lambda device: 0, lambda device, count: 0,
        lambda device, address, count: None, is_capturing, _entry, ("auto",), 16, _pass_entry,
        lambda *given: None, lambda: 0,
    )  # fmt: skip
    leaves = [torch.zeros(_SHAPE, dtype=torch.float16, requires_grad=True) for _ in range(3)]
    options = None, True, None, None, None, None, True, "auto", True, None
    for asked in ((*leaves, *options), (*(x.detach() for x in leaves), *options)):
        result = module.attend(*asked)
        if result is None or [tuple(x.shape) for x in result] != [_SHAPE, _SHAPE[:3]]:
            return "a call returns something else than out and lse"
        addresses = [x.data_ptr() for x in (*asked[:3], *result)]
        if list(driver.launches[-1][:3]) + list(driver.launches[-1][4:]) != addresses:
            return "a launch gets other addresses than its tensors'"
        if result[0].requires_grad:
            result[0].backward(torch.zeros(_SHAPE, dtype=torch.float16))
            if [None if x.grad is None else tuple(x.grad.shape) for x in leaves] != [_SHAPE] * 3:
                return "a backward pass does not return dq, dk and dv"
            if list(driver.launches[-1][:5]) != addresses:
                return "a backward pass gets other addresses than its tensors'"
    if len(driver.launches) != 3 or driver.replaced != 9:
        return f"{len(driver.launches)} launches with {driver.replaced} descriptors, not 3 with 9"
    return ""


def main(path: str) -> str:
    """Return what is wrong with the library in a file; empty if nothing is."""
    try:
        return trouble_of(import_library(Path(path)))
    except (FlashCoreError, ImportError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) or 0)
