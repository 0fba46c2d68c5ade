"""The backward pass by fused kernels, on a Hopper GPU or in the simulator."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flashcore.backends.torch_backward import laid_out_as
from flashcore.kernels.bwd_sm90.plan import BwdPlans, BwdSm90Plan, select_plans
from flashcore.kernels.bwd_sm90.plan_one import OneKernelPlans, sums_shape
from flashcore.problem import Problem
from flashcore.problem.memory_layout import load_bytes, strides_of
from flashcore.problem.options import Options

Tensor = torch.Tensor
_PACKET = 8  # elements of 16 bytes
# Runs one kernel on named tensors.
Run = Callable[[Problem, BwdSm90Plan, dict[str, Tensor]], None]


def fused_backward(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    run: Run,
    plans: BwdPlans | OneKernelPlans | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    Args:
        problem: description of the forward; plan_bwd_sm90.obstacle finds none.
        q: [batch, num_heads_q, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        mask: as in `attention`, or None.
        out: the forward's output, [batch, num_heads_q, seqlen_q, head_dim_v].
        lse: the forward's lse, [batch, num_heads_q, seqlen_q], float32.
        dout: gradient of out, or None for zero.
        dlse: gradient of lse, or None for zero.
        run: `run_on_gpu` or `run_in_simulator`.
        plans: by default what is selected for the problem. Those of one kernel take float32
            memory as large as q besides, and dq may differ in its last bits from run to run.

    Returns:
        dq, dk, dv: shapes and dtypes of q, k and v, strides of `torch.empty_like`.
    """
    if problem.is_empty:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    given = q, k, v
    q, k, v = (_readable(x) for x in given)
    if any(x is not y for x, y in zip((q, k, v), given, strict=True)):
        problem = Options.of(problem).problem(q, k, v, mask, return_lse=True)
    out = _readable(out).contiguous()
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "lse": lse.contiguous(),
        "dout": torch.zeros_like(out) if dout is None else _readable(dout),
        "delta": torch.empty_like(lse, memory_format=torch.contiguous_format),
        "dq": torch.empty_like(q),
        "dk": torch.empty_like(k),
        "dv": torch.empty_like(v),
    }
    if mask is not None:
        tensors["mask"] = mask
    if dlse is not None:
        tensors["dlse"] = dlse.contiguous()
    if isinstance(plans, OneKernelPlans):
        tensors["dq_sums"] = q.new_empty(sums_shape(problem), dtype=torch.float32)
    for plan in plans or select_plans(problem):
        run(problem, plan, tensors)
    dq, dk, dv = (
        laid_out_as(x, tensors[name]) for x, name in zip(given, ("dq", "dk", "dv"), strict=True)
    )
    return dq, dk, dv


def _readable(x: Tensor) -> Tensor:
    """x if TMA can read it, or a copy: rows that are contiguous, of whole 16 bytes, at multiples of
    16 bytes, nothing expanded. Columns of zeros behind it add nothing."""
    x = x.resolve_neg()
    if x.shape[3] % _PACKET:
        return torch.nn.functional.pad(x, (0, -x.shape[3] % _PACKET))
    strides = strides_of(x)
    is_expanded = any(
        stride == 0 and size > 1 for stride, size in zip(strides, x.shape[:3], strict=True)
    )
    if x.stride(3) != 1 or is_expanded or load_bytes(x) < 16 or max(strides) >= 2**31:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def run_on_gpu(problem: Problem, plan: BwdSm90Plan, tensors: dict[str, Tensor]) -> None:
    """Runs a kernel on CUDA tensors, on the current stream, without waiting for it."""
    from flashcore.kernels.bwd_sm90.params import build_params_bwd_sm90, grid_size
    from flashcore.launch.counters import work_counters
    from flashcore.launch.descriptors import aligned
    from flashcore.launch.driver_launch import Argument
    from flashcore.launch.kernel_call import _launch, _num_sms

    device = tensors["q"].device
    assert device.index is not None
    grid = grid_size(problem, plan, _num_sms(device.index))
    counter = work_counters(device) if plan.draws_tiles else None
    params = build_params_bwd_sm90(problem, plan, tensors, grid, tile_counter=counter)
    _launch(plan, grid, device.index)(Argument(*aligned(bytes(params))))


def run_in_simulator(problem: Problem, plan: BwdSm90Plan, tensors: dict[str, Tensor]) -> None:
    """Likewise on CPU tensors, in the simulator."""
    from flashcore.base import env
    from flashcore.sim.run_bwd import simulate_backward

    simulate_backward(problem, plan, tensors, seed=env.sim_seed())
