"""Run the backward pass by fused kernels, on a Hopper GPU or in the simulator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from flashcore.backends.readable import copy_of_mask, readable, with_whole_rows
from flashcore.backends.torch_backward import laid_out_as
from flashcore.base.gradient_workspace import workspace_bytes
from flashcore.kernels.bwd_mask_sm90.plan import MaskPlan, select_mask_plan
from flashcore.kernels.bwd_sm90 import plan_one
from flashcore.kernels.bwd_sm90.plan import BwdPlans, BwdSm90Plan, select_plans
from flashcore.kernels.bwd_sm90.plan_one import OneKernelPlans
from flashcore.launch.types import Prepared
from flashcore.problem import Problem
from flashcore.problem.memory_layout import as_batch, as_rows, mask_spec
from flashcore.selection import tuned

Tensor = torch.Tensor
_FEW_TILES = 2 * 132  # two an SM of an H200
# The fields of a Problem that say how q, k and v lie in memory.
_LAYOUT = (
    "head_dim", "head_dim_v", "q_strides", "k_strides", "v_strides", "load_bytes", "strided",
    "misaligned",
)  # fmt: skip
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
    lengths: Mapping[str, Tensor] | None = None,
    dmask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v. Packed tensors are given as views, see `as_batch`; the
    shapes below then have batch 1 and all rows, and no batch dimension in that of lse.

    Args:
        problem: description of the forward; plan_bwd_sm90.obstacle finds none.
        q: [batch, num_heads_q, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        mask: boolean (True = attend) or additive, broadcast to the scores; or None.
        out: the forward's output, [batch, num_heads_q, seqlen_q, head_dim_v].
        lse: the forward's lse, [batch, num_heads_q, seqlen_q], float32.
        dout: gradient of out, or None for zero.
        dlse: gradient of lse, or None for zero.
        run: `run_on_gpu` or `run_in_simulator`.
        plans: by default what is selected for the problem. Those of one kernel take memory besides
            (base/gradient_workspace.py).
        lengths: what says where sequences end, int32: seqlens_k, [batch], where the problem says
            "keys"; cu_seqlens_q and cu_seqlens_k, [batch + 1], where it says "packed".
        dmask: where the gradient of the mask is written, see `run_for_mask`; None if nobody wants
            it.

    Returns:
        dq, dk, dv: shapes and dtypes of q, k and v, strides of `torch.empty_like`.
        Keys behind a sequence's last one, and rows behind the last sequence, have gradient 0.
    """
    if problem.is_empty:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    given = q, k, v
    q, k, v = (readable(x) for x in given)
    if problem.varlen == "keys":
        k, v = with_whole_rows(k), with_whole_rows(v)
    if any(x is not y for x, y in zip((q, k, v), given, strict=True)):
        copied = Problem.from_tensors(q, k, v)
        layout: dict[str, Any] = {name: getattr(copied, name) for name in _LAYOUT}
        problem = dataclasses.replace(problem, **layout)
    problem = of_any_longest(problem)
    copy = copy_of_mask(problem, forward=False)
    if mask is not None and copy is not None:
        mask = copy.of(mask)
        problem = dataclasses.replace(problem, mask=mask_spec(mask))
    is_packed = problem.varlen == "packed"
    tensors = _named(q, k, v, mask, lengths or {}, out, lse, dout, dlse, is_packed)
    plans = plans or plans_for(problem)
    launches, sums = _launches(problem, plans, q)
    tensors |= sums
    # Zeros are a launch more, which pays where both kernels' blocks find SMs at once.
    is_few = not q.is_cuda or sum(plan.num_pieces(problem) for plan in launches) <= _FEW_TILES
    if isinstance(plans, BwdPlans) and is_few and runs_beside(problem):
        tensors["delta_count"] = q.new_zeros(2, dtype=torch.int32)
    for plan in launches:
        run(problem, plan, tensors)
    if dmask is not None:
        run_for_mask(problem, tensors, dmask, run)
    dq, dk, dv = (
        laid_out_as(x, tensors[name]) for x, name in zip(given, ("dq", "dk", "dv"), strict=True)
    )
    return dq, dk, dv


def run_for_mask(
    problem: Problem,
    tensors: dict[str, Tensor],
    dmask: Tensor,
    run: Callable[[Problem, MaskPlan, dict[str, Tensor]], None],
    plan: MaskPlan | None = None,
) -> None:
    """Run the kernel of a mask's gradient.

    Args:
        problem: of the forward, as the kernel of dq has it.
        tensors: of the kernel of dq, by name, with the delta that it has written.
        dmask: contiguous, [batch or 1, num_heads_q or 1, seqlen_q or 1, seqlen_k], dtype of the
            mask; written.
        run: runs one kernel on named tensors.
        plan: by default what is selected for the problem.
    """
    batch, heads, rows, keys = dmask.shape
    plan = plan or select_mask_plan(problem, (batch, heads, rows, keys))
    read = {name: x for name, x in tensors.items() if name not in ("dq", "dk", "dv")}
    if plan.num_shares == 1:
        run(problem, plan, read | {"dmask": dmask})
        return
    shares = dmask.new_empty(plan.shares_shape(problem), dtype=torch.float32)
    run(problem, plan, read | {"dmask_shares": shares})
    dmask.copy_(shares.sum(0)[..., :keys])


def is_by_one_kernel(problem: Problem) -> bool:
    """Return whether one kernel computes dq, dk and dv: if it can, and there is enough to compute
    and memory to add up dq in."""
    return plan_one.obstacle(problem) is None and plan_one.pays(problem, workspace_bytes())


def why_in_order(problem: Problem) -> str | None:
    """Return why blocks of the one kernel add to dq in the order of the keys, which makes gradients
    deterministic; None where they may do so in any order."""
    if problem.deterministic:
        return "deterministic"
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic, as torch.use_deterministic_algorithms asks for it"
    if not plan_one.any_order_pays(problem):
        return "deterministic, which costs little or nothing here"
    return None


def runs_beside(problem: Problem) -> bool:
    """Return whether, of two kernels, that of dk and dv may run beside that of dq: an int32 counts
    the rows."""
    return problem.batch * problem.num_heads_q * problem.seqlen_q < 2**31


def plans_for(problem: Problem) -> BwdPlans | OneKernelPlans:
    """Return the plans of a problem that has no obstacle: with the tiles that `flashcore tune
    --backward` found on this GPU, else by rules."""
    problem = of_any_longest(problem)
    plans: BwdPlans | OneKernelPlans = select_plans(problem)
    if is_by_one_kernel(problem):
        plans = plan_one.select_one_kernel_plans(problem)
        if why_in_order(problem) is None:
            plans = plan_one.in_any_order(plans)
    measured: dict[str, Any] = {
        name: found.plan
        for name, plan in plans._asdict().items()
        if plan.is_persistent and (found := tuned.find(problem, plan)) is not None
    }
    return plans._replace(**measured) if measured else plans


def _launches(
    problem: Problem, plans: BwdPlans | OneKernelPlans, q: Tensor
) -> tuple[list[BwdSm90Plan], dict[str, Tensor]]:
    """Return the plans as they are launched, one behind the other, and by name the memory that
    blocks add up dq in, if they do."""
    if isinstance(plans, BwdPlans):
        return list(plans), {}
    launches, made = plan_one.launches(problem, plans, workspace_bytes())
    return launches, {x: q.new_empty(shape, dtype=dtype) for x, (shape, dtype) in made.items()}


def _named(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lengths: Mapping[str, Tensor],
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    is_packed: bool = False,
) -> dict[str, Tensor]:
    """Return the kernels' tensors by name, copied where they cannot be read as they are; those that
    are written are new, and hold anything."""
    out = readable(out)
    out = as_batch(as_rows(out).contiguous()) if is_packed else out.contiguous()
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "lse": lse.contiguous(),
        "dout": torch.zeros_like(out) if dout is None else readable(dout),
        "delta": torch.empty_like(lse, memory_format=torch.contiguous_format),
        "dq": torch.empty_like(q),
        "dk": torch.empty_like(k),
        "dv": torch.empty_like(v),
    }
    if mask is not None:
        tensors["mask"] = mask
    tensors |= lengths
    if dlse is not None:
        tensors["dlse"] = dlse.contiguous()
    return tensors


def of_any_longest(problem: Problem) -> Problem:
    """Return what the backward kernels see of a problem: of packed sequences nothing depends on the
    longest, so that a launch is prepared once for all."""
    if problem.varlen != "packed":
        return problem
    return dataclasses.replace(problem, seqlen_q=problem.total_q, seqlen_k=problem.total_k)


def prepare_on_gpu(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    lengths: Mapping[str, Tensor] | None = None,
) -> Prepared | None:
    """Return what computes the gradients of such tensors, whose addresses alone may differ; None
    where `fused_backward` has to copy some.

    Args:
        problem: description of the forward; its choice of backward is "sm90".
        q: as `attention` or `attention_varlen` takes it, like all the arguments that follow.
        k: see q.
        v: see q.
        mask: boolean or additive, without a gradient; or None.
        out: the forward's output.
        lse: the forward's lse.
        dout: gradient of out.
        lengths: as in `fused_backward`.

    Returns:
        What computes dq, dk and dv. The tensors' device must be the current one.
    """
    from flashcore.launch.backward_call import BackwardPass, kernel_of

    is_packed = problem.varlen == "packed"
    inputs = {"q": q, "k": k, "v": v}
    given = inputs | {"out": out, "lse": lse, "dout": dout}
    if is_packed:
        given = {name: x if x is lse else as_batch(x) for name, x in given.items()}
    if problem.is_empty or any(readable(given[name]) is not given[name] for name in inputs):
        return None
    if problem.varlen == "keys" and any(with_whole_rows(x) is not x for x in (k, v)):
        return None
    if copy_of_mask(problem, forward=False) is not None:
        return None
    problem = of_any_longest(problem)
    q, k, v, out, lse, dout = given.values()
    tensors = _named(q, k, v, mask, lengths or {}, out, lse, dout, None, is_packed)
    plans = plans_for(problem)
    launches, sums = _launches(problem, plans, q)
    tensors |= sums
    if any(_place(tensors[name]) != _place(x) for name, x in given.items()):
        return None
    # In this order, then the mask and lengths, and what is made.
    others = ({} if mask is None else {"mask": mask}) | dict(lengths or {})
    tensors = given | others | tensors
    new = {name: x for name, x in tensors.items() if name not in given and name not in others}
    for name, like in inputs.items():  # in the shape of the inputs
        if is_packed:
            new[f"d{name}"] = as_rows(new[f"d{name}"])
        if new[f"d{name}"].stride() != torch.empty_like(like, device="meta").stride():
            return None
    beside = isinstance(plans, BwdPlans) and runs_beside(problem)
    return BackwardPass([kernel_of(problem, plan, tensors, beside) for plan in launches], new)


def _place(x: Tensor) -> tuple[object, ...]:
    """Return where a tensor lies: what tells it from a copy of it."""
    return x.data_ptr(), x.shape, x.stride()


def run_on_gpu(problem: Problem, plan: BwdSm90Plan, tensors: dict[str, Tensor]) -> None:
    """Run a kernel on CUDA tensors, on the current stream, without waiting for it."""
    from flashcore.launch.backward_call import kernel_of

    addresses = tuple([x.data_ptr() for x in tensors.values()])
    kernel_of(problem, plan, tensors).launch(addresses)


def run_in_simulator(problem: Problem, plan: BwdSm90Plan, tensors: dict[str, Tensor]) -> None:
    """Run a kernel on CPU tensors, in the simulator."""
    from flashcore.base import env
    from flashcore.sim.run_bwd import simulate_backward

    simulate_backward(problem, plan, tensors, seed=env.sim_seed())
