"""Hold a benchmark's results against float64: outputs on some rows, gradients of some heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashcore.bench.workloads import Workload
from flashcore.checks.reference import attention_oracle

# The oracle stores scores in float64, so long sequences are checked on their first and last rows.
_CHECKED_ROWS = 256
# Of gradients all rows count, so many scores at a time.
_SCORES_AT_A_TIME = 2**24


class Slices:
    """Hold the float64 output of the first and last query rows of the first and last head of batch
    0."""

    def __init__(
        self, workload: Workload, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> None:
        heads_q, heads_kv, length = workload.num_heads, workload.heads_kv, workload.seqlen
        self.heads = sorted({0, heads_q - 1})
        heads_of_k = [head // (heads_q // heads_kv) for head in self.heads]
        count = min(_CHECKED_ROWS, length)
        self.rows = torch.tensor(sorted({*range(count), *range(length - count, length)}))
        self.rows = self.rows.to(q.device)
        self.expected = attention_oracle(
            q[:1, self.heads][:, :, self.rows],
            k[:1, heads_of_k],
            v[:1, heads_of_k],
            softcap=workload.softcap,
            mask=_bias_of(workload, mask, self.heads, self.rows),
        )[0]

    def errors(self, out: Tensor) -> dict[str, float]:
        """Return largest and mean absolute error of an output."""
        error = (out[:1, self.heads][:, :, self.rows].double() - self.expected).abs()
        return {"max_error": float(error.max()), "mean_error": float(error.mean())}


class Gradients:
    """Hold the float64 gradients of batch 0 of the first and the last head of k and v, and of the
    heads of q that they serve."""

    def __init__(
        self, workload: Workload, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dout: Tensor
    ) -> None:
        group = workload.num_heads // workload.heads_kv
        self.heads_kv = sorted({0, workload.heads_kv - 1})
        self.heads_q = [head * group + i for head in self.heads_kv for i in range(group)]
        some_k, some_v = (x[:1, self.heads_kv].detach().double() for x in (k, v))
        dq, dk, dv = [], torch.zeros_like(some_k), torch.zeros_like(some_v)
        step = max(1, _SCORES_AT_A_TIME // (len(self.heads_q) * max(1, workload.keys)))
        for rows in torch.arange(workload.seqlen, device=q.device).split(step):
            leaves = [
                x.detach().requires_grad_()
                for x in (q[:1, self.heads_q][:, :, rows].double(), some_k, some_v)
            ]
            bias = _bias_of(workload, mask, self.heads_q, rows)
            with torch.enable_grad():
                out = attention_oracle(*leaves, softcap=workload.softcap, mask=bias)[0]
            cotangent = dout[:1, self.heads_q][:, :, rows].double()
            of_rows = torch.autograd.grad(out, leaves, cotangent)
            dq.append(of_rows[0])
            dk += of_rows[1]
            dv += of_rows[2]
        self.expected = torch.cat(dq, dim=2), dk, dv

    def errors(self, gradients: Sequence[Tensor]) -> dict[str, float]:
        """Return the largest absolute error of dq, dk and dv, and the largest of their means."""
        heads = self.heads_q, self.heads_kv, self.heads_kv
        found = [
            (x[:1, own].double() - want).abs()
            for x, own, want in zip(gradients, heads, self.expected, strict=True)
        ]
        return {
            "max_error": max(float(x.max()) for x in found),
            "mean_error": max(float(x.mean()) for x in found),
        }


def _bias_of(workload: Workload, mask: Tensor | None, heads: Sequence[int], rows: Tensor) -> Tensor:
    """Return mask tensor, causality and window as one additive mask of some heads' rows of batch
    0."""
    keys = torch.arange(workload.keys, device=rows.device)
    ahead = keys[None, :] - (rows[:, None] + workload.keys - workload.seqlen)
    left, right = (-1, -1) if workload.window is None else workload.window
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if workload.causal or right >= 0:
        hidden |= ahead > (0 if workload.causal else right)
    if left >= 0:
        hidden |= ahead < -left
    if workload.lengths is not None:
        numbers = torch.arange(len(workload.lengths), device=keys.device)
        lengths = torch.tensor(workload.lengths, device=keys.device)
        sequence = numbers.repeat_interleave(lengths)
        hidden |= sequence[None, :] != sequence[rows][:, None]
    bias = torch.zeros(ahead.shape, dtype=torch.float64, device=ahead.device)[None, None]
    if mask is not None:
        shape = (1, workload.num_heads, workload.seqlen, workload.keys)
        part = mask[:1].expand(shape)[:, heads][:, :, rows]
        if mask.dtype == torch.bool:
            hidden = hidden | ~part
        else:
            bias = part.double()
    return bias.masked_fill(hidden, -torch.inf)
