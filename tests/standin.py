"""A driver that records launches instead of making them, so that the launch path runs without a
GPU on CPU tensors that call themselves CUDA ones."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch

from flashcore import calls, dispatch, driver_launch, launch, params_sm90
from flashcore.params import AttnParams
from flashcore.problem import Problem

SUCCESS, INVALID_CONTEXT = 0, 201


class Encoded:
    def __init__(self, base: int) -> None:
        self.memory = (ctypes.c_uint64 * 16)(base)

    def getPtr(self) -> int:
        return ctypes.addressof(self.memory)


class Enumeration:
    def __getattr__(self, name: str) -> str:
        return name


class StandInDriver:
    """The functions of cuda.bindings.driver that a launch needs."""

    CUtensorMapDataType = CUtensorMapSwizzle = CUtensorMapInterleave = Enumeration()
    CUtensorMapL2promotion = CUtensorMapFloatOOBfill = Enumeration()
    CUlaunchAttributeID = Enumeration()
    CUresult = SimpleNamespace(CUDA_ERROR_INVALID_CONTEXT=INVALID_CONTEXT)
    CUlaunchConfig = SimpleNamespace
    cuuint64_t = cuuint32_t = CUstream = int

    def __init__(self) -> None:
        self.launches: list[SimpleNamespace] = []
        self.encodings = 0
        self.statuses: list[int] = []  # of the next launches; then success
        self.encode_statuses: list[int] = []  # of the next descriptors, likewise

    def cuTensorMapEncodeTiled(self, dtype, rank, base, *rest):
        self.encodings += 1
        return self.encode_statuses.pop() if self.encode_statuses else SUCCESS, Encoded(base)

    @staticmethod
    def CUlaunchAttribute() -> SimpleNamespace:
        return SimpleNamespace(value=SimpleNamespace())

    def cuLaunchKernelEx(self, configuration, handle, pointers, extra):
        (address,) = (ctypes.c_void_p * 1).from_address(pointers)
        params = handle.params_type.from_buffer_copy(
            ctypes.string_at(address, ctypes.sizeof(handle.params_type))
        )
        status = self.statuses.pop() if self.statuses else SUCCESS
        self.launches.append(
            SimpleNamespace(
                grid=configuration.gridDimX,
                threads=configuration.blockDimX,
                stream=configuration.hStream,
                starts_early=bool(getattr(configuration, "numAttrs", 0)),
                params=params,
                status=status,
            )
        )
        return (status,)


@dataclasses.dataclass
class Machine:
    """What the stand-in pretends: the current device and its stream."""

    driver: StandInDriver
    device: int = 0
    stream: int = 7


def install(monkeypatch: pytest.MonkeyPatch, arch: int = 90) -> Machine:
    """Make CPU tensors count as tensors of a GPU of an architecture, served by the stand-in."""
    machine = Machine(StandInDriver())

    @contextlib.contextmanager
    def device(index):
        before, machine.device = machine.device, index
        yield
        machine.device = before

    def load(kernel, device_index, smem_bytes):
        sm90 = kernel.name == "attn_fwd_sm90"
        kind = params_sm90.AttnSm90Params if sm90 else AttnParams
        return SimpleNamespace(params_type=kind), None

    real = Problem.from_tensors.__func__

    def from_tensors(cls, q, k, v, **options):
        problem = real(cls, q, k, v, **options)
        return dataclasses.replace(problem, device="cuda", arch=arch)

    monkeypatch.setattr(Problem, "from_tensors", classmethod(from_tensors))
    monkeypatch.setattr(driver_launch, "import_driver", lambda: machine.driver)
    monkeypatch.setattr(params_sm90, "import_driver", lambda: machine.driver)
    monkeypatch.setattr(driver_launch, "_load", load)
    monkeypatch.setattr(launch, "_num_sms", lambda index: 132)
    monkeypatch.setattr(launch, "verify_element_map", lambda *args: None)
    monkeypatch.setattr(launch, "_compile", lambda plan: SimpleNamespace(name=plan.kernel))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: machine.device)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: machine.device, raising=False)
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: machine.stream, raising=False
    )
    monkeypatch.setattr(calls, "_calls", {})
    monkeypatch.setattr(launch, "_arguments", {})
    # What these hold is the stand-in's own: nobody is to find it afterwards.
    for module, name in ((params_sm90, "_encoding"), (launch, "_launch"), (dispatch, "_plan")):
        function = getattr(module, name).__wrapped__
        monkeypatch.setattr(module, name, functools.lru_cache(function))
    return machine
