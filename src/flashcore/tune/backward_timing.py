"""Time and check configurations of the backward kernels: each kernel alone, in a pass of which the
others are as chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flashcore.backends.backward_sm90 import fused_backward, run_on_gpu
from flashcore.bench.workloads import Workload
from flashcore.kernels.bwd_sm90 import plan_one
from flashcore.kernels.bwd_sm90.plan import BwdPlans, BwdSm90Plan, select_plans
from flashcore.kernels.bwd_sm90.plan_one import OneKernelPlans
from flashcore.kernels.fwd_wmma.plan import traits
from flashcore.problem import Problem

Launch = tuple[Problem, BwdSm90Plan, dict[str, Any]]


class BackwardInputs:
    """Hold a workload's tensors on a device, and what a backward pass of them is given.

    Args:
        workload: what is timed.
        device: "cuda", or "cpu" for a pass that nobody runs.
    """

    def __init__(self, workload: Workload, device: str = "cuda") -> None:
        import torch

        from flashcore import attention

        self.workload = workload
        self.q, self.k, self.v = workload.tensors(device)
        self.mask = workload.mask_tensor(device)
        self.options: dict[str, Any] = {
            "causal": workload.causal,
            "window": workload.window,
            "softcap": workload.softcap,
            "mask": self.mask,
        }
        self.problem = Problem.from_tensors(self.q, self.k, self.v, return_lse=True, **self.options)
        self.out, self.lse = attention(self.q, self.k, self.v, return_lse=True, **self.options)
        generator = torch.Generator(device).manual_seed(2)
        self.dout = torch.randn(self.out.shape, generator=generator, device=device).to(self.q.dtype)

    def rules(self, like: BwdSm90Plan) -> BwdSm90Plan:
        """Return what the rules say in place of a plan."""
        if like.also_dq:
            return plan_one.select_one_kernel_plans(self.problem).main
        return next(plan for plan in select_plans(self.problem) if plan.kernel == like.kernel)

    def fits(self, plan: BwdSm90Plan) -> bool:
        """Return whether a plan's code is made for these options, see `timing`."""
        fields = traits(self.problem) | {"folds_heads": 0}
        return all(getattr(plan, name) == value for name, value in fields.items())

    def plans_with(self, plan: BwdSm90Plan) -> BwdPlans | OneKernelPlans:
        """Return the plans of a pass with this one in its place."""
        if plan.also_dq:
            return plan_one.select_one_kernel_plans(self.problem)._replace(main=plan)
        plans = select_plans(self.problem)
        return plans._replace(dq=plan) if plan.is_dq else plans._replace(dkdv=plan)

    def run(self, plan: BwdSm90Plan) -> list[Any]:
        """Return dq, dk and dv of a pass with a plan."""
        return [*self._pass(self.plans_with(plan), run_on_gpu)]

    def timed_call(self, plan: BwdSm90Plan) -> Callable[[], Any]:
        """Return what launches the plan's kernel; those before it in a pass have run. The kernel
        that computes dq, dk and dv is launched with those before and behind it: it counts on what
        they leave."""
        launches: list[Launch] = []
        self._pass(self.plans_with(plan), lambda *launch: launches.append(launch))
        for launch in launches:
            launch[2].pop("delta_count", None)  # none runs beside another
            run_on_gpu(*launch)
        timed = [launch for launch in launches if plan.also_dq or launch[1] == plan]

        def call() -> None:
            for launch in timed:
                run_on_gpu(*launch)

        return call

    def wrong(self, plan: BwdSm90Plan) -> str | None:
        """Return what is wrong with a plan's gradients beside float64, or None."""
        from flashcore.checks.gradient_accuracy import gradient_reports, worst

        gradients = self.run(plan)
        given = self.q, self.k, self.v, self.dout, None
        report = worst(list(gradient_reports(gradients, *given, out=self.out, **self.options)))
        return None if report is None or report.ok else f"wrong result: {report}"

    def _pass(self, plans: BwdPlans | OneKernelPlans, run: Any) -> tuple[Any, Any, Any]:
        return fused_backward(
            self.problem, self.q, self.k, self.v, self.mask, self.out, self.lse, self.dout, None,
            run, plans,
        )  # fmt: skip
