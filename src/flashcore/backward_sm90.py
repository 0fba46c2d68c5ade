"""The backward pass by fused kernels, on a Hopper GPU or in the simulator."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flashcore.plan_bwd_sm90 import BwdPlans, BwdSm90Plan, select_plans
from flashcore.problem import Problem

Tensor = torch.Tensor
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
    plans: BwdPlans | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    Args:
        problem: description of the forward, with no obstacle (plan_bwd_sm90.py).
        q: [batch, num_heads_q, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        mask: as in `attention`, or None.
        out: the forward's output, [batch, num_heads_q, seqlen_q, head_dim_v].
        lse: the forward's lse, [batch, num_heads_q, seqlen_q], float32.
        dout: gradient of out, or None for zero.
        dlse: gradient of lse, or None for zero.
        run: `run_on_gpu`, or what runs a kernel in the simulator.
        plans: by default what is selected for the problem.

    Returns:
        dq, dk, dv: shapes, dtypes and strides of q, k, v where those are dense.
    """
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if problem.is_empty:
        return dq.zero_(), dk.zero_(), dv.zero_()
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "out": _aligned(out.contiguous()),
        "lse": lse.contiguous(),
        "dout": torch.zeros_like(out) if dout is None else _readable(dout),
        "delta": torch.empty_like(lse, memory_format=torch.contiguous_format),
        "dq": dq,
        "dk": dk,
        "dv": dv,
    }
    if mask is not None:
        tensors["mask"] = mask
    if dlse is not None:
        tensors["dlse"] = dlse.contiguous()
    for plan in plans or select_plans(problem):
        run(problem, plan, tensors)
    return dq, dk, dv


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _readable(dout: Tensor) -> Tensor:
    """dout as TMA reads it: rows contiguous and at multiples of 16 bytes, nothing expanded."""
    from flashcore.memory_layout import load_bytes, strides_of

    legal = dout.stride(3) == 1 and load_bytes(dout) == 16
    legal = legal and not any(
        stride == 0 and size > 1 for stride, size in zip(dout.stride(), dout.shape, strict=True)
    )
    return (
        dout
        if legal and max(strides_of(dout)) < 2**31
        else dout.clone(memory_format=torch.contiguous_format)
    )


def run_on_gpu(problem: Problem, plan: BwdSm90Plan, tensors: dict[str, Tensor]) -> None:
    """Runs a kernel on CUDA tensors, on the current stream, without waiting for it."""
    from flashcore.counters import work_counters
    from flashcore.descriptors import aligned
    from flashcore.driver_launch import Argument
    from flashcore.launch import _launch, _num_sms
    from flashcore.params_bwd_sm90 import build_params_bwd_sm90, grid_size

    device = tensors["q"].device
    assert device.index is not None
    grid = grid_size(problem, plan, _num_sms(device.index))
    if plan.draws_tiles:
        tensors = tensors | {"tile_counter": work_counters(device)}
    params = build_params_bwd_sm90(problem, plan, tensors, grid)
    _launch(plan, grid, device.index)(Argument(*aligned(bytes(params))))
