"""Run a kernel in the simulator on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashcore.base import forks
from flashcore.compile.codegen import generate_source
from flashcore.kernels.registry import forward_of
from flashcore.sim import replay_command
from flashcore.sim.abi import AgentStruct, LaunchStruct, ReportStruct, TensorStruct
from flashcore.sim.barrier_names import name_barriers
from flashcore.sim.build import load_kernel
from flashcore.sim.report import Agent, SimReport, SimulationError
from flashcore.sim.tensors import Placed, SimTensor

if TYPE_CHECKING:
    from flashcore.compile.plant import Plant
    from flashcore.kernels.fwd_wmma.plan import Plan
    from flashcore.problem import Problem

FIRST_ARCH_WITH_CP_ASYNC = 80
NO_CP_ASYNC = "#define FC_HOST_NO_CP_ASYNC"
# Blocks of a kernel whose blocks stride over the work: few, so that each takes several pieces.
PERSISTENT_BLOCKS = 3
# The runtime of a loaded kernel has one state, so a kernel runs once at a time.
_lock = forks.lock()


def _agent(struct: AgentStruct) -> Agent:
    lane = None if struct.lane < 0 else struct.lane
    return Agent(struct.block, struct.warp, lane, struct.file.decode(), struct.line)


def _raise_alarm(report: ReportStruct, placed: Sequence[Placed], seed: int) -> None:
    coordinates = None
    message = report.message.decode()
    if report.tensor >= 0:
        tensor = placed[report.tensor]
        coordinates = tensor.coordinates(report.element)
        message += f"; {tensor.item.name} has shape {tuple(tensor.item.tensor.shape)}"
    raise SimulationError(
        kind=report.kind.decode(),
        message=message,
        array=report.array.decode(),
        element=report.element,
        coordinates=coordinates,
        agent=_agent(report.agent),
        other=_agent(report.other) if report.has_other else None,
        details=report.details.decode(),
        seed=seed,
    )


def simulate_source(
    source: str,
    params: ctypes.Structure,
    tensors: Sequence[SimTensor],
    *,
    grid: int,
    num_threads: int,
    smem_bytes: int,
    seed: int = 0,
    starts_early: bool = False,
) -> SimReport:
    """Run one launch of a kernel, thread by thread.

    Args:
        source: flattened for the host, see codegen.flatten.
        params: the kernel's argument; its pointer fields are set here, in a copy.
        tensors: every tensor that the kernel may touch; the writable ones are filled.
        grid: thread blocks.
        num_threads: of a block, a multiple of 32 up to 1024.
        smem_bytes: dynamic shared memory of a block.
        seed: of the scheduler; the same seed and inputs give the same run.
        starts_early: whether kernels before this one may still run, so that every thread must wait
            for them before it touches a tensor.

    Returns:
        Statistics.

    Raises:
        SimulationError: the kernel did something that it must not do.
        BackendUnavailableError: there is no C++ compiler.
        CompileError: the source does not compile.
        ValueError: a wrong launch configuration.
    """
    if num_threads % 32 or not 32 <= num_threads <= 1024:
        raise ValueError(f"num_threads={num_threads} is not a multiple of 32 between 32 and 1024")
    start = time.perf_counter()
    library = load_kernel(source)
    built = time.perf_counter()
    own_params = type(params).from_buffer_copy(params)
    placed = [Placed(item, index) for index, item in enumerate(tensors)]
    for tensor in placed:
        fields = tensor.item.pointer_field
        for field in (fields,) if isinstance(fields, str) else fields:
            *path, name = field.split(".")
            owner = functools.reduce(getattr, path, own_params)
            # A tensor map may start at a distance from its tensor (kernels/fwd_sm90/params.py).
            setattr(owner, name, ((getattr(owner, name) or 0) + tensor.address) % 2**64)
    library.fc_sim_params_bytes.restype = ctypes.c_ulonglong
    if library.fc_sim_params_bytes() != ctypes.sizeof(own_params):
        raise ValueError(
            f"{type(params).__name__} has {ctypes.sizeof(own_params)} bytes, the kernel's "
            f"parameter struct has {library.fc_sim_params_bytes()}"
        )
    structs = (TensorStruct * len(placed))(*(tensor.struct for tensor in placed))
    launch = LaunchStruct(
        params=ctypes.addressof(own_params),
        grid=grid,
        num_threads=num_threads,
        smem_bytes=smem_bytes,
        num_tensors=len(placed),
        tensors=structs,
        seed=seed & (2**64 - 1),
        starts_early=starts_early,
    )
    report = ReportStruct()
    with _lock:
        library.fc_sim_run(ctypes.byref(launch), ctypes.byref(report))
    if report.kind:
        _raise_alarm(report, placed, seed)
    for tensor in placed:
        if tensor.item.writable:
            _finish_output(tensor, seed)
        if tensor.item.counter or tensor.item.sums:
            tensor.copy_back()
    return SimReport(
        seed=seed,
        blocks=grid,
        threads=num_threads,
        switches=report.switches,
        smem_accesses=report.smem_accesses,
        gmem_accesses=report.gmem_accesses,
        async_copies=report.async_copies,
        barriers=report.barriers,
        warp_ops=report.warp_ops,
        build_s=built - start,
        run_s=time.perf_counter() - built,
    )


def _raise_if_left(counters: Tensor, seed: int) -> None:
    """Raise SimulationError unless a launch left its counters at 0."""
    left = counters.nonzero().flatten().tolist()
    if left:
        raise SimulationError(
            kind="counter-left",
            message=f"a counter is {counters[left[0]].item()} at the kernel's end, and the "
            "next launch counts on 0",
            array="tile_counter",
            element=left[0],
            seed=seed,
        )


def _finish_output(tensor: Placed, seed: int) -> None:
    item = tensor.item
    missing = tensor.first_unwritten() if item.complete else None
    if missing is not None:
        raise SimulationError(
            kind="unwritten-output",
            message=f"no thread wrote this element of {item.name}, of shape "
            f"{tuple(item.tensor.shape)}",
            array=item.name,
            element=missing,
            coordinates=tensor.coordinates(missing),
            seed=seed,
        )
    tensor.copy_back()


def simulate(
    problem: Problem,
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    gate_buffers: dict[str, Tensor] | None = None,
    lengths: dict[str, Tensor] | None = None,
    *,
    max_score: Tensor | None = None,
    seed: int = 0,
    plant: Plant | None = None,
) -> SimReport:
    """Run a plan's kernel in the simulator. Same arguments as launch.run_kernel, on CPU tensors.

    Args:
        problem: validated description of q, k, v and mask.
        plan: tiles, and gate if any.
        q: [batch, num_heads_q, seqlen_q, head_dim], float16 or bfloat16.
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        mask: as the problem describes it, or None.
        out: [batch, num_heads_q, seqlen_q, head_dim_v], contiguous; written.
        lse: [batch, num_heads_q, seqlen_q], float32, contiguous; written unless None.
        gate_buffers: by name gate_scores, gate_row_max, gate_row_sum, for a plan with a gate.
        lengths: as in launch.run_kernel, `sinks` among them.
        max_score: as in launch.run_kernel.
        seed: of the scheduler.
        plant: bug to plant, for testing the checks.

    Returns:
        Statistics of the run.

    Raises:
        SimulationError: the kernel did something that it must not do; the message ends with the
            command that replays the run.
        BackendUnavailableError: there is no C++ compiler.
    """
    kernel = forward_of(plan)
    pointer_fields = kernel.pointer_fields
    grid = kernel.num_blocks(problem, plan, PERSISTENT_BLOCKS)
    # The simulator writes the addresses itself.
    params = kernel.build_params(problem, plan, dict.fromkeys(("q", "k", "v", "out")), grid)
    named = {"q": q, "k": k, "v": v} | ({} if mask is None else {"mask": mask})
    tensors = [SimTensor(name, t, pointer_fields(name)) for name, t in named.items()]
    for name, t in (lengths or {}).items():
        tensors.append(SimTensor(name, t, pointer_fields(name)))
    shapes = kernel.scratch_shapes(problem, plan)
    counters = torch.zeros(shapes.pop("tile_counter", 0), dtype=torch.int32)
    for name, shape in shapes.items():
        shares, field = torch.empty(shape), pointer_fields(name)
        tensors.append(SimTensor(name, shares, field, writable=True, complete=False, shared=True))
    if counters.numel():
        field = pointer_fields("tile_counter")
        tensors.append(SimTensor("tile_counter", counters, field, counter=True))
    if max_score is not None:
        field = pointer_fields("max_score")
        tensors.append(SimTensor("max_score", max_score, field, counter=True))
    tensors.append(SimTensor("out", out, pointer_fields("out"), writable=True))
    if lse is not None:
        tensors.append(SimTensor("lse", lse, pointer_fields("lse"), writable=True))
    for name, buffer in (gate_buffers or {}).items():
        is_input = plan.gate == "pv" and name == "gate_scores"
        field = pointer_fields(name)
        tensors.append(SimTensor(name, buffer, field, writable=not is_input, complete=False))
    inputs = {item.name: item.tensor for item in tensors if not (item.writable or item.counter)}
    return simulate_plan(
        plan, params, tensors, counters, grid, seed, plant,
        lambda: replay_command.replay_command(problem, plan, inputs, seed=seed, plant=plant),
    )  # fmt: skip


def simulate_plan(
    plan: Plan,
    params: ctypes.Structure,
    tensors: Sequence[SimTensor],
    counters: Tensor,
    grid: int,
    seed: int,
    plant: Plant | None,
    replay: Callable[[], str],
) -> SimReport:
    """Run a plan's kernel, of the forward or backward, in the simulator.

    Args:
        plan: of the kernel.
        params: its parameter struct; the simulator writes the addresses.
        tensors: all that it points to.
        counters: int32, those of `tensors` that a launch must leave at 0.
        grid: how many blocks run.
        seed: of the scheduler.
        plant: bug to plant, or None.
        replay: returns the command that replays the run.

    Raises:
        SimulationError: the kernel did something that it must not do; the error names barriers, and
            the command.
    """
    source = generate_source(plan, "host", plant)
    if plan.arch < FIRST_ARCH_WITH_CP_ASYNC:
        source = f"{NO_CP_ASYNC}\n{source}"
    try:
        report = simulate_source(
            source,
            params,
            tensors,
            grid=grid,
            num_threads=plan.num_threads,
            smem_bytes=plan.smem_bytes + (plant.extra_smem_bytes if plant else 0),
            seed=seed,
            starts_early=plan.starts_early,
        )
        _raise_if_left(counters, seed)
        return report
    except SimulationError as error:
        name_barriers(error, plan)
        error.replay = replay()
        raise
