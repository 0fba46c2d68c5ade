"""Apply the error rule: how far from the oracle a result may be.

A fused kernel is right when its error is of the size that the dtype itself makes unavoidable. The
yardstick is the same attention written plainly in the same dtype (matmul, softmax, matmul, each
intermediate rounded, as without fusion): a result passes when its maximum and its mean
error against float64 are at most twice the yardstick's, plus 1e-5. The same rule judges the tests,
`flashcore verify` and `flashcore demo`.

On a handful of outputs the yardstick may be right by luck, and a right kernel would then fail one
time in some hundred (measured: 0.1 to 0.5 % of inputs with 16 outputs). So the yardstick counts as
no better than what rounding the exact result to the dtype costs: at most half a unit in the last
place, a quarter on average. From some hundred outputs on that changes nothing.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from flashcore.checks.reference import attention_oracle, max_score_oracle, visible_pairs
from flashcore.problem import Causal, Window

FACTOR = 2.0
ABSOLUTE = {torch.float64: 1e-12}
ABSOLUTE_DEFAULT = 1e-5
# lse is float32 whatever the inputs are: |error| / (1 + |lse|). Ten times what a float32 matmul and
# approximate exp2 and log2 cost, a hundredth of what one lost or doubled key in a hundred costs.
LSE_LIMIT = {torch.float64: 1e-12}
LSE_LIMIT_DEFAULT = 1e-4


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """A report holds the errors of one result against the float64 oracle.

    Args:
        max_error: largest `|out - oracle|`; NaN when the result holds a NaN that the oracle
            has not.
        mean_error: mean `|out - oracle|`.
        torch_max_error: largest error of the plain same-dtype computation.
        torch_mean_error: its mean error.
        max_limit: what max_error may be.
        mean_limit: what mean_error may be.
        lse_error: largest `|lse - oracle| / (1 + |oracle|)`, inf when the rows at -inf differ;
            None when no lse was given.
        lse_limit: what lse_error may be, and max_score_error.
        max_score_error: the same of the largest score of each head; None when it was not given.
        of: which tensor it is, such as "dk"; nothing for an output.
    """

    max_error: float
    mean_error: float
    torch_max_error: float
    torch_mean_error: float
    max_limit: float
    mean_limit: float
    lse_error: float | None
    lse_limit: float
    max_score_error: float | None = None
    of: str = ""

    @property
    def ok(self) -> bool:
        """Return whether the result passes. A NaN fails every comparison, so it never passes."""
        lse_ok = all(
            error is None or error <= self.lse_limit
            for error in (self.lse_error, self.max_score_error)
        )
        return self.max_error <= self.max_limit and self.mean_error <= self.mean_limit and lse_ok

    def __str__(self) -> str:
        text = f"{self.of}: " if self.of else ""
        text += (
            f"max error {self.max_error:.3g} (limit {self.max_limit:.3g}, "
            f"torch {self.torch_max_error:.3g}), mean error {self.mean_error:.3g} "
            f"(limit {self.mean_limit:.3g}, torch {self.torch_mean_error:.3g})"
        )
        if self.lse_error is not None:
            text += f", lse error {self.lse_error:.3g} (limit {self.lse_limit:.3g})"
        if self.max_score_error is not None:
            text += f", max_score error {self.max_score_error:.3g} (limit {self.lse_limit:.3g})"
        return text


def error_report(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    lse: torch.Tensor | None = None,
    causal: Causal = False,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    max_score: torch.Tensor | None = None,
) -> ErrorReport:
    """Judge a result of `attention` by the rule above.

    Args:
        out: [batch, num_heads_q, seqlen_q, head_dim_v], the result.
        q: [batch, num_heads_q, seqlen_q, head_dim], as passed to `attention`.
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        lse: [batch, num_heads_q, seqlen_q], the result's lse, or None not to judge it.
        causal: False, True (aligned at the lower right) or "upper_left".
        scale: the factor of q.k; None is 1 / sqrt(head_dim).
        window: (left, right), the keys visible on either side of the diagonal, or None.
        softcap: scores become softcap * tanh(score / softcap); None is off.
        mask: boolean (True = attend) or additive, broadcast to the scores; or None.
        sinks: [num_heads_q], a logit of each head that joins the softmax; or None.
        max_score: [batch, num_heads_q], the result's max_score, or None not to judge it.

    Returns:
        The errors and their limits; `report.ok` is the verdict, `str(report)` a line for people.
    """
    of_scores: dict[str, Any] = {
        "causal": causal,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "mask": mask,
    }
    options = of_scores | {"sinks": sinks}
    want, want_lse = attention_oracle(q, k, v, **options)
    max_score_error = None
    if max_score is not None:
        max_score_error = lse_error(max_score, max_score_oracle(q, k, **of_scores))
    assert out.shape == want.shape, (out.shape, want.shape)
    plain = torch_math_attention(q, k, v, **options)
    return dataclasses.replace(
        compared(out, want, plain, q.dtype),
        lse_error=None if lse is None else lse_error(lse, want_lse),
        lse_limit=LSE_LIMIT.get(q.dtype, LSE_LIMIT_DEFAULT),
        max_score_error=max_score_error,
    )


def compared(
    have: torch.Tensor,
    want: torch.Tensor,
    plain: torch.Tensor,
    dtype: torch.dtype,
    slack: float = 1.0,
    least: tuple[float, float] = (0.0, 0.0),
    of: str = "",
) -> ErrorReport:
    """Judge a tensor by the rule above.

    Args:
        have: the result.
        want: the oracle's, float64, of the same shape.
        plain: the plain same-dtype computation's.
        dtype: of the computation.
        slack: how much more than the rule adds may be added where the plain computation is exact.
        least: the largest and the mean error that the plain computation counts as no better than,
            beside that of rounding.
        of: which tensor it is, for people.
    """
    absolute = ABSOLUTE.get(dtype, ABSOLUTE_DEFAULT)
    max_error, mean_error = max_and_mean(have, want)
    torch_max_error, torch_mean_error = max_and_mean(plain, want)
    rounding_max, rounding_mean = _rounding(want, dtype)

    def limit(torch_error: float, *others: float) -> float:
        added = absolute * (slack if torch_error == 0 else 1.0)
        return FACTOR * max(torch_error, *others) + added

    return ErrorReport(
        max_error=max_error,
        mean_error=mean_error,
        torch_max_error=torch_max_error,
        torch_mean_error=torch_mean_error,
        max_limit=limit(torch_max_error, rounding_max, least[0]),
        mean_limit=limit(torch_mean_error, rounding_mean, least[1]),
        lse_error=None,
        lse_limit=LSE_LIMIT.get(dtype, LSE_LIMIT_DEFAULT),
        of=of,
    )


def torch_math_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Return the output of `torch_math_results`, without its lse."""
    return torch_math_results(q, k, v, **options)[0]


def torch_math_results(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: Causal = False,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute unfused attention in the dtype of q: matmul, softmax, matmul, each rounded.

    Args:
        q: [batch, num_heads_q, seqlen_q, head_dim], as passed to `attention`.
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        causal: False, True (aligned at the lower right) or "upper_left".
        scale: the factor of q.k; None is 1 / sqrt(head_dim).
        window: (left, right), the keys visible on either side of the diagonal, or None.
        softcap: scores become softcap * tanh(score / softcap); None is off.
        mask: boolean (True = attend) or additive, broadcast to the scores; or None.
        sinks: [num_heads_q], a logit of each head that joins the softmax; or None.

    Returns:
        out: [batch, num_heads_q, seqlen_q, head_dim_v], dtype of q. Where the scores overflow the
            dtype (fp16 beyond 65504), the scores alone are kept in float32.
        lse: [batch, num_heads_q, seqlen_q], of the same scores, but summed in float32 at least.
    """
    group_size = q.shape[1] // k.shape[1] if k.shape[1] else 1
    k = k.repeat_interleave(group_size, dim=1)
    v = v.repeat_interleave(group_size, dim=1)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    # As torch does: half of the scale to each side, so that fp16 overflows later.
    score = (q * math.sqrt(scale)) @ (k.transpose(-1, -2) * math.sqrt(scale))
    if not torch.isfinite(score).all():
        score = (q.float() @ k.float().transpose(-1, -2)) * scale
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    visible = visible_pairs(q.shape[2], k.shape[2], causal, window, q.device)
    score = score.masked_fill(~visible, -math.inf)
    if mask is not None:
        if mask.dtype == torch.bool:
            score = score.masked_fill(~mask, -math.inf)
        else:
            score = score + mask
    if sinks is not None:
        of_rows = sinks.to(score.dtype)[None, :, None, None].expand(*score.shape[:3], 1)
        score, v = torch.cat([score, of_rows], dim=-1), torch.nn.functional.pad(v, (0, 0, 0, 1))
    empty = torch.all(score == -math.inf, dim=-1, keepdim=True)
    score = score.masked_fill(empty, 0.0)
    weight = torch.softmax(score, dim=-1).masked_fill(empty, 0.0)
    wide = torch.promote_types(score.dtype, torch.float32)
    lse = score.to(wide).logsumexp(-1).masked_fill(empty[..., 0], -math.inf)
    return weight.to(q.dtype) @ v, lse


def lse_error(lse: torch.Tensor, want: torch.Tensor) -> float:
    """Return the largest |lse - want| / (1 + |want|).

    Args:
        lse: [batch, num_heads_q, seqlen_q], the result; or the largest score of each head.
        want: the oracle's, float64.

    Returns:
        The error; inf when -inf is not in the same rows of both.
    """
    lse = lse.to(device=want.device, dtype=torch.float64)
    empty = want == -math.inf
    if not torch.equal(empty, lse == -math.inf):
        return math.inf
    relative = ((lse - want) / (1.0 + want.abs())).masked_fill(empty, 0.0)
    return max_and_mean(relative, torch.zeros_like(relative))[0]


def _rounding(exact: torch.Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Return largest and mean error that rounding to `dtype` costs: 1/2 and 1/4 of a last place."""
    if exact.numel() == 0:
        return 0.0, 0.0
    # exact = mantissa * 2**e, with |mantissa| in [1/2, 1). Not by torch.ldexp, which faults on a
    # GPU that is not the current one (torch 2.11). 0 and infinity have no last place.
    mantissa, _ = torch.frexp(exact)
    last_place = (exact / mantissa).nan_to_num(nan=0.0) * (torch.finfo(dtype).eps / 2)
    return float(last_place.max()) / 2, float(last_place.mean()) / 4


def max_and_mean(have: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """Return the largest and the mean absolute difference; 0 without any element."""
    if want.numel() == 0:
        return 0.0, 0.0
    difference = (have.to(device=want.device, dtype=torch.float64) - want).abs()
    return float(difference.max()), float(difference.mean())
