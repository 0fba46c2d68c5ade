"""Calls of aten's flash operators that flashcore does not compute: torch's own kernels do."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from flashcore.backends import torch_own
from flashcore.errors import BackendUnavailableError, FallbackWarning, stacklevel_of_caller
from flashcore.problem.validation import HEAD_DIM_MAX, factor_fits

_warned: set[str] = set()


def by_torch(reason: str, name: str, key: str, *arguments: Any, **options: Any) -> Any:
    """Call torch's own kernel, with one warning per reason and process."""
    if not torch_own.has_own(name, key):
        raise BackendUnavailableError(
            f"aten::{name} on flashcore: {reason}, and torch has no kernel of its own for {key} "
            "tensors"
        )
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"aten::{name} falls back to torch's own kernel: {reason}. The result is the same; "
            "filter flashcore.FallbackWarning to silence this",
            FallbackWarning,
            stacklevel=stacklevel_of_caller(),
        )
    return torch_own.call_own(name, key, *arguments, **options)


def obstacle(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    scale: float | None,
    rank: int = 4,
) -> str | None:
    """Return why torch must compute a call: because flashcore does not, or because torch raises."""
    if dropout_p != 0.0:
        return f"dropout_p={dropout_p}: the kernels have no dropout"
    if scale is not None and not factor_fits(scale):
        return f"scale={scale} is not a positive number"
    if backend != "torch" and q.dtype not in (torch.float16, torch.bfloat16):
        return f"no kernel serves {q.dtype}"
    if not q.dim() == k.dim() == v.dim() == rank:
        return f"query, key and value have {q.dim()}, {k.dim()} and {v.dim()} dimensions"
    if not q.shape[-1] == k.shape[-1] == v.shape[-1] <= HEAD_DIM_MAX:
        return (
            f"query, key and value have head_dim {q.shape[-1]}, {k.shape[-1]} and {v.shape[-1]}; "
            f"equal ones up to {HEAD_DIM_MAX} are served"
        )
    return None


def lengths_obstacle(
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    num_splits: int | None,
) -> str | None:
    """Return why torch must compute a call with such lengths; None is each one's default."""
    if block_table is not None and cum_seq_q is None:
        return "block_table without cum_seq_q"
    has_lengths = block_table is not None and seqused_k is not None
    if (cum_seq_q is None) != (cum_seq_k is None) and not has_lengths:
        return "one of cum_seq_q and cum_seq_k is None"
    # 1 promises the same bits for a sequence whatever else is in the batch.
    if num_splits == 1:
        return "num_splits=1: tiles depend on the batch, and the last bits on tiles"
    return None
