"""Who is timed: flashcore, torch's SDPA with each of its backends, and plain unfused PyTorch."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashcore.bench.workloads import Workload

Call = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Library:
    """One implementation: `prepare` binds it to a workload's tensors."""

    name: str
    prepare: Callable[[Workload, Tensor, Tensor, Tensor], Call]
    max_score_bytes: float | None = None  # for those that store the S x S scores

    def skip_reason(self, workload: Workload) -> str | None:
        """Why this workload is not run, or None."""
        scores = 4.0 * workload.batch * workload.num_heads * workload.seqlen**2
        if self.max_score_bytes is not None and scores > self.max_score_bytes:
            return f"would store {scores / 2**30:.0f} GiB of scores"
        return None


def flashcore_call(backend: str) -> Callable[[Workload, Tensor, Tensor, Tensor], Call]:
    """flashcore.attention with a given backend."""

    def prepare(workload: Workload, q: Tensor, k: Tensor, v: Tensor) -> Call:
        from flashcore import attention

        return lambda: attention(q, k, v, causal=workload.causal, backend=backend)

    return prepare


def _sdpa(backend: SDPBackend | None) -> Callable[[Workload, Tensor, Tensor, Tensor], Call]:
    def prepare(workload: Workload, q: Tensor, k: Tensor, v: Tensor) -> Call:
        def call() -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=workload.causal
            )

        if backend is None:
            return call

        def with_backend() -> Tensor:
            with sdpa_kernel(backend):
                return call()

        return with_backend

    return prepare


def _fa3(workload: Workload, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """FlashAttention-3, which takes [batch, seqlen, num_heads, head_dim]."""
    from flash_attn_interface import flash_attn_func

    rows_first = [x.transpose(1, 2) for x in (q, k, v)]

    def call() -> Tensor:
        result = flash_attn_func(*rows_first, causal=workload.causal)
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out.transpose(1, 2)

    return call


def _optional_peers() -> list[Library]:
    """Peers that are not part of torch, where they are installed."""
    found = importlib.util.find_spec("flash_attn_interface") is not None
    return [Library("fa3", _fa3)] if found else []


def _unfused(workload: Workload, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """Three separate operations, the scores in memory between them."""
    scale = 1.0 / math.sqrt(workload.head_dim)
    hidden = None
    if workload.causal:
        ones = torch.ones(workload.seqlen, workload.seqlen, dtype=torch.bool, device=q.device)
        hidden = ones.triu(1)

    def call() -> Tensor:
        scores = (q @ k.mT) * scale
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        return torch.softmax(scores, dim=-1) @ v

    return call


_SCORES_LIMIT = 20.0 * 2**30


def gpu_libraries() -> list[Library]:
    """Everything that runs on a GPU, flashcore first."""
    return [
        Library("flashcore", flashcore_call("auto")),
        Library("flashcore-wmma", flashcore_call("wmma")),
        Library("sdpa-flash", _sdpa(SDPBackend.FLASH_ATTENTION)),
        Library("sdpa-efficient", _sdpa(SDPBackend.EFFICIENT_ATTENTION)),
        Library("sdpa-cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION)),
        *_optional_peers(),
        Library("sdpa-math", _sdpa(SDPBackend.MATH), _SCORES_LIMIT),
        Library("unfused", _unfused, _SCORES_LIMIT),
    ]


def cpu_libraries() -> list[Library]:
    """What a CPU can run fast."""
    return [
        Library("flashcore", flashcore_call("auto")),
        Library("sdpa", _sdpa(None)),
        Library("sdpa-math", _sdpa(SDPBackend.MATH)),
        Library("unfused", _unfused),
    ]
