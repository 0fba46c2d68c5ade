"""Provide a driver that records launches instead of making them, so that the launch path runs
without a GPU on CPU tensors that call themselves CUDA ones."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch

from flashcore.backends import dispatch, gradients, torch_backward
from flashcore.kernels.append.params import AppendParams
from flashcore.kernels.bwd_sm90.params import AttnBwdSm90Params
from flashcore.kernels.fwd_sm90 import params as params_sm90
from flashcore.kernels.fwd_wmma.params import AttnParams
from flashcore.launch import (
    append_call,
    backward_call,
    descriptors,
    driver,
    driver_launch,
    launcher,
    scratch,
    single_call,
)
from flashcore.launch import kernel_call as launch
from flashcore.launch.driver import LaunchConfig
from flashcore.ops import calls
from flashcore.problem import Problem
from flashcore.serving import append, known_steps

SUCCESS = 0


class StandInDriver:
    """Provide the functions of the driver that a call needs, as functions of C."""

    def __init__(self) -> None:
        self.launches: list[SimpleNamespace] = []
        self.encodings = 0
        self.replacements = 0
        self.statuses: list[int] = []  # of the next launches; then success
        self.encode_statuses: list[int] = []  # of the next descriptors, likewise
        self.params_types: list[type[ctypes.Structure]] = []  # a kernel's handle is 1 + an index
        self.on_launch = lambda: None
        self.on_params = lambda params: None
        self.capturing = False
        pointer, number = ctypes.c_void_p, ctypes.c_int
        encoded = (pointer, number, number, *[pointer] * 5, *[number] * 4)
        self.functions = {
            "cuLaunchKernelEx": ctypes.CFUNCTYPE(number, *[pointer] * 4)(self._launch),
            "cuTensorMapEncodeTiled": ctypes.CFUNCTYPE(number, *encoded)(self._encode),
            "cuTensorMapReplaceAddress": ctypes.CFUNCTYPE(number, pointer, pointer)(self._replace),
            "cuStreamIsCapturing": ctypes.CFUNCTYPE(number, pointer, pointer)(self._is_capturing),
        }

    def entry_point(self, name):
        """Stand for driver.entry_point."""
        return ctypes.CFUNCTYPE(ctypes.c_int)(self.address_of(name))

    def address_of(self, name):
        """Return where the function is."""
        return ctypes.cast(self.functions[name], ctypes.c_void_p).value

    def _encode(self, descriptor, dtype, rank, base, *rest):
        assert descriptor % descriptors.ALIGNMENT == 0
        self.encodings += 1
        ctypes.c_uint64.from_address(descriptor).value = base or 0
        return self.encode_statuses.pop() if self.encode_statuses else SUCCESS

    def _replace(self, descriptor, base):
        assert descriptor % descriptors.ALIGNMENT == 0
        self.replacements += 1
        status = self.encode_statuses.pop() if self.encode_statuses else SUCCESS
        if status == SUCCESS:
            ctypes.c_uint64.from_address(descriptor).value = base
        return status

    def _is_capturing(self, stream, captured):
        ctypes.c_int.from_address(captured).value = int(self.capturing)
        return SUCCESS

    def _launch(self, configuration, handle, pointers, extra):
        self.on_launch()
        configuration = LaunchConfig.from_address(configuration)
        kind = self.params_types[handle - 1]
        address = ctypes.c_void_p.from_address(pointers).value
        status = self.statuses.pop() if self.statuses else SUCCESS
        params = kind.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(kind)))
        self.on_params(params)
        self.launches.append(
            SimpleNamespace(
                grid=configuration.grid[0],
                threads=configuration.block[0],
                stream=configuration.stream,
                starts_early=bool(configuration.num_attributes)
                and configuration.attributes[0].programmatic_stream_serialization_allowed == 1,
                params=params,
                status=status,
            )
        )
        return status


@dataclasses.dataclass
class Machine:
    """Hold what the stand-in pretends: the current device and its stream, whose counters are the
    same for all launches."""

    driver: StandInDriver
    counters: torch.Tensor = dataclasses.field(
        default_factory=lambda: torch.zeros(4096, dtype=torch.int32)
    )
    cleared: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # address, counters
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
        kinds = {
            "attn_fwd_sm90": params_sm90.AttnSm90Params,
            "attn_fwd_wmma": AttnParams,
            "append_kvcache": AppendParams,
        }
        kind = kinds.get(kernel.name, AttnBwdSm90Params)
        machine.driver.params_types.append(kind)
        return len(machine.driver.params_types), None

    real = Problem.from_tensors.__func__

    def from_tensors(cls, q, k, v, **options):
        problem = real(cls, q, k, v, **options)
        return dataclasses.replace(problem, device="cuda", arch=arch)

    monkeypatch.setattr(Problem, "from_tensors", classmethod(from_tensors))
    # A stand-in computes nothing, and torch's operators know that these are CPU tensors.
    monkeypatch.setattr(gradients, "obstacle_to_sm90", lambda *arguments: "a stand-in")
    monkeypatch.setattr(torch_backward, "obstacle_to_fused", lambda *arguments: "a stand-in")
    monkeypatch.setattr(driver, "import_driver", lambda: SimpleNamespace(CUresult=int))
    monkeypatch.setattr(driver, "entry_address", machine.driver.address_of)
    monkeypatch.setattr(driver_launch, "entry_point", machine.driver.entry_point)
    monkeypatch.setattr(descriptors, "entry_point", machine.driver.entry_point)
    monkeypatch.setattr(driver_launch, "_load", load)
    monkeypatch.setattr(driver_launch, "bind_context", lambda device_index=None: None)
    monkeypatch.setattr(driver_launch, "allowed_during_a_capture", contextlib.nullcontext)
    monkeypatch.setattr(launch, "_num_sms", lambda index: 132)
    monkeypatch.setattr(launch, "verify_element_map", lambda *args: None)
    monkeypatch.setattr(launch, "_compile", lambda plan: SimpleNamespace(name=plan.kernel))
    for module in (launch, launcher, backward_call, scratch):
        monkeypatch.setattr(
            module, "work_counters", lambda device, count=1: machine.counters.data_ptr()
        )

    def clear_counters(device: torch.device, address: int, count: int) -> None:
        machine.cleared.append((address, count))

    for module in (launcher, backward_call):
        monkeypatch.setattr(module, "clear_counters", clear_counters)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: machine.driver.capturing)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: machine.device)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: machine.device, raising=False)
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: machine.stream, raising=False
    )
    monkeypatch.setattr(append, "arch_of_device", lambda index: arch)
    monkeypatch.setattr(
        single_call, "compile_source", lambda source, arch, name, *_: SimpleNamespace(name=name)
    )
    load_alone = functools.lru_cache(single_call.load.__wrapped__)
    monkeypatch.setattr(
        append_call,
        "load",
        lambda plan, arch, _, grid: load_alone(plan, arch, machine.device, grid),
    )
    monkeypatch.setattr(append_call, "_prepared", {})
    monkeypatch.setattr(known_steps, "_known", {})
    monkeypatch.setattr(calls, "_calls", {})
    monkeypatch.setattr(calls, "_growing", {})
    monkeypatch.setattr(launch, "_arguments", {})
    monkeypatch.setattr(descriptors, "_kinds", {})
    # These caches hold the stand-in's own things: nobody is to find them afterwards.
    for module, name in (
        (launch, "_launch"),
        (backward_call, "_kernel"),
        (dispatch, "plan_of"),
        (dispatch, "kernel_call"),
    ):
        function = getattr(module, name).__wrapped__
        monkeypatch.setattr(module, name, functools.lru_cache(function))
    return machine
