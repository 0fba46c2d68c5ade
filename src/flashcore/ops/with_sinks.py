"""Compute `attention` where sinks are given, around torch's dispatcher if nobody else needs to see
the call."""

from __future__ import annotations

from torch import Tensor

from flashcore.ops.calls import attend_lengths
from flashcore.ops.dense import attention_dense
from flashcore.ops.eager import is_plain
from flashcore.problem import Causal, Problem, Window
from flashcore.problem.options import Inputs, Options


def attention_with_sinks(
    inputs: Inputs,
    causal: Causal,
    window: Window,
    softcap: float | None,
    scale: float | None,
    return_lse: bool,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `attention` where sinks are given, and seqlens_k is not; see there."""
    q, k, v, mask, *_ = inputs
    sinks = inputs.sinks
    if is_plain((), q, k, v, mask, sinks):

        def describe() -> Problem:
            options = Options.checked(causal, window, softcap, scale)
            return options.problem(q, k, v, mask, return_lse, sinks)

        asked = causal, window, softcap, scale, return_lse
        result = attend_lengths(q, k, v, mask, (), sinks, asked, None, backend, describe)
        if result is not None:
            return result if return_lse else result[0]  # type: ignore[return-value]
    return attention_dense(inputs, causal, window, softcap, scale, return_lse, backend)
