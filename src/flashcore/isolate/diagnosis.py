"""Turn the results of the stages into a verdict: which one is wrong first, and what speaks for
which cause."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashcore.kernels.registry import BY_NAME

if TYPE_CHECKING:
    from flashcore.isolate.alarms import Alarm
    from flashcore.isolate.isolation import StageResult

_FRAGMENT = 16
_WAIT = re.compile(
    r"^ *warp (\d+): .*?in (mbar_wait|\w*_sync|named_barrier_any) at ([^ ;]+:\d+)"
    r"(?:: (\w+\[\d+\]))?",
    re.MULTILINE,
)


def verdict(results: Sequence[StageResult], kernel: str) -> tuple[str | None, list[str]]:
    """Name the first wrong stage.

    Args:
        results: one a stage, in order.
        kernel: that they are of.

    Returns:
        Its name (or "setup", "schedule", "load" or "store", where an alarm came from there;
        "compile" where the kernel does not; None when all is right) and the reasons, a sentence
        each.
    """
    first = next((result for result in results if not result.ok), None)
    if first is None:
        return None, ["every stage agrees with its float64 model"]
    # A gate that does not compile says nothing, unless the kernel does not compile either.
    unbuilt = [r for r in results if r.status == "not compiled" and r.alarm is not None]
    ran = next((r for r in results if not r.ok and r not in unbuilt), None)
    if ran is None:
        return "compile", [r.alarm.summary for r in unbuilt if r.alarm is not None]
    first, name = ran, ran.stage
    reasons: list[str] = [
        f"gate {r.stage} alone does not compile, so it says nothing: {r.alarm.summary}"
        for r in unbuilt
        if r.alarm is not None
    ]
    if first.alarm is not None:
        name, place = _place_of(first.alarm, first.stage, results)
        reasons += [*place, first.alarm.summary]
        if first.alarm.kind == "deadlock":
            reasons += _who_waits(first.alarm.text)
    bad = first.first_bad_check()
    if bad is not None:
        reasons.append(f"{bad.name}: {bad.wrong} of {bad.total} values are wrong, {bad.pattern}")
    reasons += first.hints
    reasons += _comparisons(name, results)
    suspects = BY_NAME[kernel].suspects_of(name)
    if suspects is not None:
        reasons.append(f"look at: {suspects}")
    return name, reasons


def _who_waits(report: str) -> list[str]:
    """Return which warps of the block wait for what, from the simulator's list of warps."""
    waits: dict[str, list[str]] = {}
    for warp, function, place, barrier in _WAIT.findall(report):
        waits.setdefault(f"{barrier or function} at {place}", []).append(warp)
    return [
        f"warp {warps[0]} waits for {what}"
        if len(warps) == 1
        else f"warps {', '.join(warps)} wait for {what}"
        for what, warps in waits.items()
    ]


def _place_of(alarm: Alarm, stage: str, results: Sequence[StageResult]) -> tuple[str, list[str]]:
    """Return the stage, or the phase outside of them, that an alarm belongs to. Not a stage that is
    right by itself: what is wrong then only stands on a line of it."""
    phase = alarm.phase
    if phase is None or phase == stage:
        return stage, []
    right = {result.stage: result.title for result in results if result.status == "ok"}
    if phase in right:
        return stage, [
            f"the alarm came from a line of {right[phase]}, but gate {phase}, which runs that "
            f"alone, is right: what matters is what {stage} adds to it"
        ]
    return phase, [f"the alarm came from the {phase} phase while gate {stage} ran"]


def _comparisons(name: str, results: Sequence[StageResult]) -> list[str]:
    """Return what the other stages say about the wrong one."""
    status = {result.stage: result.status for result in results}
    if name == "tile":
        return _of_one_tile(results)
    if name != "pv" or status.get("qk") != "ok":
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


def _of_one_tile(results: Sequence[StageResult]) -> list[str]:
    """Return what speaks for the rescale of O, the normalisation or the lse."""
    checks = {check.name: check for r in results if r.stage == "tile" for check in r.checks}
    found = []
    if any(result.stage == "pv" and result.status == "ok" for result in results):
        found.append("the store is right: gate pv went through it")
    out, lse = checks.get("out"), checks.get("lse")
    if out is not None and lse is not None and lse.ok and not out.ok:
        found.append("the lse is right, and so are the maximum and the sum of every row")
        if out.first is not None and out.first.actual == 0.0:
            found.append(
                "the output is 0: it may have been rescaled behind P@V, for before the first key "
                "tile the factor is exp(-inf) = 0"
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
