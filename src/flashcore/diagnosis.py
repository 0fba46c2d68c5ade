"""From the results of the stages to a verdict: which one is wrong first, and what speaks for which
cause."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashcore.stages import suspects_of

if TYPE_CHECKING:
    from flashcore.gates import StageResult

_FRAGMENT = 16


def verdict(results: Sequence[StageResult], kernel: str) -> tuple[str | None, list[str]]:
    """Name the first wrong stage.

    Args:
        results: one a stage, in order.
        kernel: that they are of.

    Returns:
        Its name (or "setup", "load" or "store", where an alarm came from there; None when all is
        right) and the reasons, a sentence each.
    """
    first = next((result for result in results if not result.ok), None)
    if first is None:
        return None, ["every stage agrees with its float64 model"]
    name = first.stage
    reasons = []
    if first.alarm is not None:
        if first.alarm.phase is not None and first.alarm.phase != first.stage:
            name = first.alarm.phase
            reasons.append(f"the alarm came from the {name} phase while gate {first.stage} ran")
        reasons.append(first.alarm.summary)
    bad = first.first_bad_check()
    if bad is not None:
        reasons.append(f"{bad.name}: {bad.wrong} of {bad.total} values are wrong, {bad.pattern}")
    reasons += first.hints
    reasons += _comparisons(name, results)
    suspects = suspects_of(kernel, name)
    if suspects is not None:
        reasons.append(f"look at: {suspects}")
    return name, reasons


def _comparisons(name: str, results: Sequence[StageResult]) -> list[str]:
    """What the other stages say about the wrong one."""
    status = {result.stage: result.status for result in results}
    if name != "pv":
        return []
    found = ["S = Q@K^T and the softmax before it are right"]
    rows = next(
        (c for r in results if r.stage == "pv" for c in r.checks if c.name.startswith("rows")), None
    )
    if rows is not None and rows.ok:
        found.append(
            "with P = 1/S all rows are identical: each is wrong in the same way, so no two warps "
            "disturb each other"
        )
    elif rows is not None:
        found.append(
            "with P = 1/S the rows differ: some rows, warps or elements are handled unlike others"
        )
    if status.get("pv_serial") == "ok":
        found.append(
            "the same product computed by warp 0 alone (pv_serial) is right: the fault is in how "
            "accumulate_output shares it among warps and keys"
        )
    return found


def key_split_hints(out: Tensor, p: Tensor, v: Tensor) -> list[str]:
    """Find keys that are counted twice or not at all in out = P V with a uniform P.

    The output is fitted by the sum over groups of 16 keys, each with a factor: 1 is right, 0 a gap,
    2 an overlap. The fit is taken only when it explains the output and its factors are whole.

    Args:
        out: [batch, num_heads_q, seqlen_q, head_dim_v] that the kernel wrote.
        p: [batch, num_heads_q, seqlen_q, seqlen_k], all rows equal.
        v: [batch, num_heads_q, seqlen_k, head_dim_v] float64, heads repeated for GQA.
    """
    seqlen_k = v.shape[2]
    groups = -(-seqlen_k // _FRAGMENT)
    weighted = p[:, :, :1].double().cpu().mT * v
    parts = torch.stack([part.sum(2) for part in weighted.split(_FRAGMENT, dim=2)], dim=-1)
    equations, wanted = parts.reshape(-1, groups), out[:, :, 0].double().cpu().reshape(-1, 1)
    if equations.shape[0] < groups or not bool(wanted.isfinite().all()):
        return []
    factors = torch.linalg.lstsq(equations, wanted).solution
    residual = (equations @ factors - wanted).norm() / wanted.norm().clamp_min(1e-30)
    whole = factors.round()
    if float(residual) > 0.02 or float((factors - whole).abs().max()) > 0.1:
        return []
    hints = []
    for count in sorted({int(x) for x in whole.flatten().tolist()} - {1}):
        members = [i for i, x in enumerate(whole.flatten().tolist()) if int(x) == count]
        spans = [f"{i * _FRAGMENT}-{min((i + 1) * _FRAGMENT, seqlen_k) - 1}" for i in members[:6]]
        times = {0: "not at all", 2: "twice"}.get(count, f"{count} times")
        more = ", ..." if len(members) > 6 else ""
        hints.append(f"keys {', '.join(spans)}{more} are counted {times}")
    return hints
