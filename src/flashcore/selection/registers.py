"""Count the registers that a plan leaves a thread."""

from __future__ import annotations

from flashcore.kernels.fwd_wmma.plan import Plan


def spare_registers(plan: Plan) -> int:
    """Return the registers that a thread has beside its accumulators, the consumers' where warps
    have roles: P V of one key tile is under way there while the scores of the next are computed."""
    accumulators = (plan.block_n + -(-plan.head_dim_v // 16) * 16) // 2
    if plan.role_registers:
        return plan.role_registers[0] - accumulators - plan.block_n // 4
    return plan.max_registers - accumulators
