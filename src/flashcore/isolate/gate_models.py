"""Model in float64 what every debug gate of the kernel must produce, with error bounds.

The models are written without tiles, fragments or online sums, straight from the definition

    S = Q K^T      s = softcap(scale * S) + mask      P = exp(s - m)      O = P V / sum(P)

so that they share no mistake with the kernel. Every value comes with the largest error that
rounding alone can explain; whatever differs by more is a bug. The bounds follow Higham, "Accuracy
and Stability of Numerical Algorithms", section 3.1: a sum of n products in a format with unit
roundoff u is off by at most n * u * sum(|a||b|), here with a factor of two, as tensor cores
truncate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flashcore.checks.accuracy import ErrorReport
    from flashcore.kernels.fwd_wmma.plan import Plan
    from flashcore.problem import Problem

U32 = 2.0**-24  # unit roundoff of float32
UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST_STEP = {"float16": 2.0**-24, "bfloat16": 2.0**-133}  # spacing of the subnormals
# exp2_approx, rcp_approx and the tanh made from them: a few units in the last place of float32.
APPROX = 2.0**-20


@dataclass(frozen=True, slots=True)
class Expected:
    """Expected holds one output of a gate.

    `value` and `tolerance` are float64 of one shape, -inf included. Where `optional` is True the
    kernel may skip the element (the tile holds no visible key).
    """

    name: str
    value: Tensor
    tolerance: Tensor
    optional: Tensor | None = None


class GateModel:
    """Compute the attention of one problem in float64, with every intermediate that a gate can
    show.

    Args:
        problem: what is asked.
        plan: only BLOCK_M, BLOCK_N and the order of the key tiles matter.
        q, k, v: [batch, num_heads, seqlen, head_dim], any device.
        mask: as in flashcore.attention, or None.
        sinks: as in flashcore.attention, or None.
    """

    def __init__(
        self,
        problem: Problem,
        plan: Plan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        sinks: Tensor | None = None,
    ) -> None:
        self.problem, self.plan = problem, plan
        self.sinks = None if sinks is None else sinks.double().cpu()
        group = problem.num_heads_q // max(1, problem.num_heads_kv)
        self.q = q.double().cpu()
        self.k = k.double().cpu().repeat_interleave(group, dim=1)
        self.v = v.double().cpu().repeat_interleave(group, dim=1)
        self.rows = torch.arange(problem.seqlen_q)[:, None]
        self.keys = torch.arange(problem.seqlen_k)[None, :]
        self.in_window = self._in_window()
        self.raw = self.q @ self.k.mT
        self.raw_tolerance = (
            2 * (problem.head_dim + 16) * U32 * (self.q.abs() @ self.k.abs().mT) + 1e-9
        )
        self.scores, self.score_tolerance = self._scores(mask)

    def _in_window(self) -> Tensor:
        """Return [seqlen_q, seqlen_k]: True where window and causality let the query see the
        key."""
        center = self.rows + self.problem.diag_offset
        visible = torch.ones(self.problem.seqlen_q, self.problem.seqlen_k, dtype=torch.bool)
        if self.problem.window_left >= 0:
            visible &= self.keys >= center - self.problem.window_left
        if self.problem.window_right >= 0:
            visible &= self.keys <= center + self.problem.window_right
        return visible

    def _scores(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        problem = self.problem
        scores = self.raw * problem.scale
        tolerance = self.raw_tolerance * abs(problem.scale)
        if problem.softcap:
            scores = problem.softcap * torch.tanh(scores / problem.softcap)
            tolerance = tolerance + problem.softcap * APPROX
        if mask is not None:
            mask = mask.cpu()
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, -torch.inf)
            else:
                scores = scores + mask.double()
        scores = scores.masked_fill(~self.in_window, -torch.inf)
        magnitude = scores.abs().nan_to_num(posinf=0.0)
        return scores, tolerance + magnitude * APPROX

    def num_n_blocks(self) -> int:
        """Return number of key tiles, the last one partial or not."""
        return -(-self.problem.seqlen_k // self.plan.block_n)

    def skippable(self) -> Tensor:
        """Return [seqlen_q, seqlen_k]: True where the (m_block, n_block) tile has no key in the
        window."""
        block_m, block_n = self.plan.block_m, self.plan.block_n
        m_block = (self.rows // block_m).expand_as(self.in_window)
        n_block = (self.keys // block_n).expand_as(self.in_window)
        tile = m_block * self.num_n_blocks() + n_block
        counts = torch.zeros(int(tile.max()) + 1 if tile.numel() else 0, dtype=torch.long)
        counts.index_add_(0, tile.flatten(), self.in_window.flatten().long())
        return counts[tile] == 0

    def qk(self) -> list[Expected]:
        """Model gate qk: raw Q K^T [batch, num_heads_q, seqlen_q, seqlen_k], before scale and
        masks."""
        optional = self.skippable().expand_as(self.raw)
        return [Expected("scores", self.raw, self.raw_tolerance, optional)]

    def softmax(self) -> list[Expected]:
        """Model gate softmax: P of every key tile against the running max after that tile, and the
        running max and sum [batch, num_heads_q, seqlen_q, num_n_blocks] after every tile, in the
        order in which the kernel visits them."""
        block_n, tiles = self.plan.block_n, self.num_n_blocks()
        spans = [slice(i * block_n, (i + 1) * block_n) for i in range(tiles)]
        may_skip = self.skippable()
        slack = self._row_slack()
        running_max = torch.full_like(slack, -torch.inf)
        running_sum, sum_tolerance = torch.zeros_like(slack), torch.zeros_like(slack)
        columns: list[list[Tensor]] = [[], [], [], [], [], []]
        backwards = self.plan.keys_backwards
        for span in reversed(spans) if backwards else spans:
            tile, tile_tolerance = self.scores[..., span], self.score_tolerance[..., span]
            new_max = torch.maximum(running_max, tile.amax(-1, keepdim=True))
            p = _exp_difference(tile, new_max)
            decay = _exp_difference(running_max, new_max)
            error = 2 * (tile_tolerance + slack) + 4 * APPROX
            p_tolerance = (_exp_difference(tile + error, new_max) - p).clamp(max=1.0) + 1e-7
            running_sum = running_sum * decay + p.sum(-1, keepdim=True)
            sum_tolerance = sum_tolerance * decay + p_tolerance.sum(-1, keepdim=True)
            sum_tolerance = sum_tolerance + running_sum * _relative_error(2 * slack + 4 * APPROX)
            # A P is between 0 and 1, however little the scores say about it.
            sum_tolerance = sum_tolerance.clamp(max=float(self.problem.seqlen_k))
            running_max = new_max
            optional = may_skip[:, span].all(-1, keepdim=True).expand_as(slack)
            parts = (p, p_tolerance, running_max, running_sum, sum_tolerance + 1e-6, optional)
            for column, part in zip(columns, parts, strict=True):
                column.append(part)
        p, p_tolerance, row_max, row_sum, sum_tolerance, optional = (
            torch.cat(column[::-1] if backwards else column, -1) for column in columns
        )
        return [
            Expected("row_max", row_max, (2 * slack + 1e-6).expand_as(row_max), optional),
            Expected("scores", p, p_tolerance, may_skip.expand_as(p)),
            Expected("row_sum", row_sum, sum_tolerance, optional),
        ]

    def pv(self, p: Tensor) -> list[Expected]:
        """Model gate pv: P V for a P that the element type represents exactly, no normalisation."""
        p = p.double()
        value, magnitude = p @ self.v, p.abs() @ self.v.abs()
        accumulation = 2 * (self.problem.seqlen_k + 16) * U32 * magnitude
        return [Expected("out", value, accumulation + self.store_rounding(value))]

    def attention(self, first_tile_only: bool = False) -> list[Expected]:
        """Model the gates tile and pv_serial, and no gate: out and lse.

        Args:
            first_tile_only: attend only to the keys of the first key tile that the block of
                BLOCK_M query rows visits.
        """
        scores = self.scores
        if first_tile_only:
            scores = scores.masked_fill(~self._in_first_tile(), -torch.inf)
        lse = (
            torch.logsumexp(scores, -1)
            if scores.shape[-1]
            else scores.new_full(scores.shape[:-1], -torch.inf)
        )
        if self.sinks is not None:
            lse = torch.logaddexp(lse, self.sinks[:, None].expand_as(lse))
        p = _exp_difference(scores, lse[..., None])
        value, magnitude = p @ self.v, p @ self.v.abs()
        slack = self._row_slack()
        unit = UNIT_ROUNDOFF[self.problem.dtype]
        relative = _relative_error(4 * slack) + 2 * unit + 2 * (scores.shape[-1] + 16) * U32
        # P below the normal range of the element type keeps an absolute step, not a relative one.
        step = SMALLEST_STEP[self.problem.dtype] * (p > 0).double() @ self.v.abs()
        # However little the scores say about P, the output is a mean of V.
        farthest = 2 * self.v.abs().amax(-2, keepdim=True) if scores.shape[-1] else magnitude
        tolerance = (relative * magnitude).minimum(farthest) + step + self.store_rounding(value)
        lse_tolerance = 4 * slack[..., 0] + 1e-5
        return [
            Expected("lse", lse, lse_tolerance.expand_as(lse)),
            Expected("out", value, tolerance),
        ]

    def max_score(self, found: Tensor) -> tuple[Expected, Tensor]:
        """Model the largest score of each head, and return what was found beside it: both in the
        row that has it, of [batch, num_heads_q, seqlen_q], and -inf in the others."""
        row_max = self.scores.amax(-1)
        row = row_max.argmax(-1, keepdim=True)
        others = torch.ones_like(row_max, dtype=torch.bool).scatter(-1, row, False)
        value, found = (
            x.masked_fill(others, -torch.inf)
            for x in (row_max, found.cpu()[..., None].expand_as(row_max))
        )
        return Expected("max_score", value, 2 * self._row_slack()[..., 0] + 1e-5), found

    def visible_probabilities(self) -> Tensor:
        """Return softmax(s) [batch, num_heads_q, seqlen_q, seqlen_k] float64, 0 in rows that see
        nothing."""
        return _exp_difference(self.scores, torch.logsumexp(self.scores, -1, keepdim=True))

    def _in_first_tile(self) -> Tensor:
        block_m, block_n = self.plan.block_m, self.plan.block_n
        problem = self.problem
        first_row = self.rows // block_m * block_m
        if self.plan.keys_backwards:
            key = torch.full_like(self.rows, problem.seqlen_k - 1)
            if problem.window_right >= 0:
                last_row = (first_row + block_m).clamp(max=problem.seqlen_q) - 1
                key = key.minimum(last_row + problem.diag_offset + problem.window_right)
        else:
            key = torch.zeros_like(self.rows)
            if problem.window_left >= 0:
                key = (first_row + problem.diag_offset - problem.window_left).clamp(min=0)
        return self.keys // block_n == key.div(block_n, rounding_mode="floor")

    def _row_slack(self) -> Tensor:
        """Return the error of the largest score of a row, for exp: [batch, num_heads_q, seqlen_q,
        1]."""
        if self.problem.seqlen_k == 0:
            return self.score_tolerance.new_zeros((*self.score_tolerance.shape[:-1], 1))
        return self.score_tolerance.amax(-1, keepdim=True)

    def store_rounding(self, value: Tensor) -> Tensor:
        """Return what rounding to the dtype of q may change in a result."""
        dtype = self.problem.dtype
        return UNIT_ROUNDOFF[dtype] * value.abs() + SMALLEST_STEP[dtype] + 1e-9


def by_error_rule(expected: Expected, rule: ErrorReport) -> Expected:
    """Return out or lse with the limits of the error rule, as `verify` has them. The model allows
    for the rounding of every score, so of large ones it tells little; the rule sees that equal
    scores stay equal."""
    value = expected.value
    limit = torch.full_like(value, rule.max_limit)
    if expected.name == "lse":
        limit = rule.lse_limit * (1 + value.abs().nan_to_num(posinf=0.0))
    return Expected(f"{expected.name}, error rule", value, limit)


def _relative_error(error: Tensor) -> Tensor:
    """Return exp(error) - 1, finite also where scores are so large that their error is."""
    return torch.expm1(error.clamp(max=600.0))


def _exp_difference(a: Tensor, b: Tensor) -> Tensor:
    """Return exp(a - b), and 0 where a is -inf, also where b is -inf too."""
    return torch.where(a == -math.inf, torch.zeros_like(a), torch.exp(a - b))
