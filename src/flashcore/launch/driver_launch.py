"""Load a compiled kernel on a device, and launch it on the current stream by the driver."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from flashcore.compile.compiler import CompiledKernel
from flashcore.launch.driver import (
    INVALID_CONTEXT,
    PROGRAMMATIC_STREAM_SERIALIZATION,
    LaunchAttribute,
    LaunchConfig,
    allowed_during_a_capture,
    bind_context,
    check,
    entry_point,
    import_driver,
    pointer,
)


@functools.lru_cache(maxsize=4096)
def _load(kernel: CompiledKernel, device_index: int, smem_bytes: int) -> tuple[int, Any]:
    """Load a kernel; return its handle, allowed `smem_bytes` of dynamic shared memory on the
    device, and its library, which must live as long."""
    from cuda.core import ObjectCode

    driver = import_driver()
    library = (
        ObjectCode.from_cubin(kernel.code)
        if kernel.code_type == "cubin"
        else ObjectCode.from_ptx(kernel.code)
    )
    handle = library.get_kernel(kernel.name).handle
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuKernelSetAttribute(attribute, smem_bytes, handle, device_index)
    check(int(status), f"asking for {smem_bytes} bytes of shared memory")
    status, _ = driver.cuKernelGetFunction(handle)  # loads it now, not in the first launch
    check(int(status), f"loading {kernel.name}")
    return int(handle), library


class Argument:
    """An Argument is a kernel's one argument as cuLaunchKernelEx takes it. A launch copies it:
    launches in flight do not need it, and threads may share one that nobody changes.

    Args:
        memory: what holds the kernel's struct; kept.
        address: where in it the struct begins, by default at its own beginning.
    """

    __slots__ = ("address", "memory", "offset", "pointers")

    def __init__(self, memory: Any, address: int | None = None) -> None:
        self.memory, begin = memory, ctypes.addressof(memory)
        self.address = begin if address is None else address
        self.offset = self.address - begin
        self.pointers = ctypes.byref(ctypes.c_void_p(self.address))


STREAMS_MAX = 64  # whose launches one kernel keeps prepared


class Launch:
    """A launch is a kernel on a device, ready to be launched.

    Args:
        kernel: compiled for the device's architecture.
        grid: blocks.
        num_threads: threads a block.
        smem_bytes: dynamic shared memory a block.
        device: a CUDA device.
        starts_early: whether blocks may start while the kernels before this one still run
            (programmatic dependent launch); the kernel must wait for those itself.
    """

    def __init__(
        self,
        kernel: CompiledKernel,
        *,
        grid: int,
        num_threads: int,
        smem_bytes: int,
        device: torch.device,
        starts_early: bool = False,
    ) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device_index, self._name = index, kernel.name
        with torch.cuda.device(index), allowed_during_a_capture():
            bind_context(index)  # autograd's threads may come here before torch used theirs
            handle, self._library = _load(kernel, index, smem_bytes)
        self.handle, self._handle = handle, pointer(handle)
        self._shape = (grid, num_threads, smem_bytes)
        self._starts_early = starts_early
        self._configurations: dict[int, Any] = {}  # by stream; threads share them unchanged
        self._cu_launch_kernel = entry_point("cuLaunchKernelEx")
        self._current_stream = torch._C._cuda_getCurrentRawStream

    def __call__(self, argument: Argument) -> None:
        """Launch on the device's current stream.

        Raises:
            FlashCoreError: the driver refuses; the message holds its status.
        """
        if torch._C._cuda_getDevice() == self._device_index:
            self.enqueue(argument)
        else:
            with torch.cuda.device(self._device_index):
                self.enqueue(argument)

    def enqueue(self, argument: Argument) -> None:
        """Enqueue a launch where the device is the current one."""
        stream = self._current_stream(self._device_index)
        configuration = self._configurations.get(stream) or self._configure(stream)
        status = self._cu_launch_kernel(configuration, self._handle, argument.pointers, None)
        if status:
            self._retry(status, argument)

    def _configure(self, stream: int) -> Any:
        """Return what a launch on the stream is told beside the argument."""
        grid, num_threads, smem_bytes = self._shape
        configuration = LaunchConfig((grid, 1, 1), (num_threads, 1, 1), smem_bytes, stream)
        if self._starts_early:
            attribute = LaunchAttribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
            configuration.attributes = ctypes.pointer(attribute)
            configuration.num_attributes = 1
        if len(self._configurations) >= STREAMS_MAX:
            self._configurations.clear()
        reference = self._configurations[stream] = ctypes.byref(configuration)
        return reference

    def _retry(self, status: int, argument: Argument) -> None:
        if status == INVALID_CONTEXT:
            bind_context(self._device_index)
            stream = self._current_stream(self._device_index)
            configuration = self._configure(stream)
            status = self._cu_launch_kernel(configuration, self._handle, argument.pointers, None)
        check(status, f"launching {self._name}")


def launch_raw(
    kernel: CompiledKernel,
    *,
    grid: int,
    num_threads: int,
    smem_bytes: int,
    params: ctypes.Structure,
    device: torch.device,
    starts_early: bool = False,
) -> None:
    """Launch a kernel once on the device's current stream. See `Launch`."""
    launch = Launch(
        kernel,
        grid=grid,
        num_threads=num_threads,
        smem_bytes=smem_bytes,
        device=device,
        starts_early=starts_early,
    )
    launch(Argument(params))
