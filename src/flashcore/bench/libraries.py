"""Define who is timed: flashcore, torch's SDPA with each of its backends, plain unfused PyTorch;
other peers are in peers.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashcore.bench.timing import Passes
from flashcore.bench.workloads import Workload
from flashcore.problem.memory_layout import as_batch

Call = Callable[[], Tensor]
Prepare = Callable[[Workload, Tensor, Tensor, Tensor, "Tensor | None"], Call]
BindPasses = Callable[[Workload, Sequence[Tensor], Tensor], Passes]


@dataclass(frozen=True, slots=True)
class Library:
    """A library describes one implementation.

    Args:
        name: for tables.
        prepare: binds it to a workload, q, k, v and the mask.
        takes: which of "window", "softcap", "mask", "gqa", "varlen" it has an argument for.
        groups: where it is timed; None: everywhere.
        max_score_bytes: for those that store all scores.
        compiles_slowly: takes seconds to compile for a shape.
        head_dims: those that it was built for; None: any.
        bind_passes: of one that autograd cannot differentiate; binds its backward to a workload, q,
            k, v and the gradient of the output.
        fault: why its results of a workload are known to be wrong, or None.
    """

    name: str
    prepare: Prepare
    takes: frozenset[str] = frozenset()
    groups: tuple[str, ...] | None = None
    max_score_bytes: float | None = None
    compiles_slowly: bool = False
    head_dims: tuple[int, ...] | None = None
    bind_passes: BindPasses | None = None
    fault: Callable[[Workload], str | None] | None = None

    def row(self, workload: Workload) -> dict[str, Any]:
        """Return what a row of the results begins with."""
        row = {"workload": workload.name, **asdict(workload), "library": self.name}
        if workload.group in ("window", "given"):
            row["window_tiles"] = workload.window_tiles
        return row

    def skip_reason(self, workload: Workload) -> str | None:
        """Return why this workload is not run, or None."""
        if self.groups is not None and workload.group not in self.groups:
            return f"timed only in the groups {' and '.join(self.groups)}"
        if self.compiles_slowly and not workload.compiles:
            return "compiles for seconds per shape, so timed on some shapes only"
        if self.head_dims is not None and workload.head_dim not in self.head_dims:
            return f"built for head_dim {', '.join(map(str, self.head_dims))} only"
        wanted = {
            "a window": ("window", workload.window is not None),
            "softcap": ("softcap", workload.softcap is not None),
            "a mask tensor": ("mask", workload.mask is not None),
            "packed sequences": ("varlen", workload.lengths is not None),
            "fewer heads of k and v": ("gqa", workload.heads_kv != workload.num_heads),
        }
        for words, (option, asked) in wanted.items():
            if asked and option not in self.takes:
                return f"does not take {words}"
        fault = None if self.fault is None else self.fault(workload)
        if fault is not None:
            return fault
        scores = 4.0 * workload.batch * workload.num_heads * workload.seqlen * workload.keys
        if self.max_score_bytes is not None and scores > self.max_score_bytes:
            return f"would store {scores / 2**30:.0f} GiB of scores"
        return None


EVERYTHING = frozenset({"window", "softcap", "mask", "gqa"})


def packed(workload: Workload, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """Return the arguments that all functions for packed sequences begin with, on a workload that
    has them: q, k, v [total, num_heads, head_dim], cu_seqlens twice, the longest length twice."""
    lengths = workload.lengths
    assert lengths is not None
    ends = torch.tensor((0, *lengths), device=q.device).cumsum(0).int()
    rows = (x[0].transpose(0, 1) for x in (q, k, v))
    return *rows, ends, ends, max(lengths), max(lengths)


def flashcore_call(backend: str) -> Prepare:
    """Return a call of flashcore.attention with a given backend."""

    def prepare(workload: Workload, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Call:
        from flashcore import attention, attention_varlen

        if workload.lengths is not None:
            arguments, causal = packed(workload, q, k, v), workload.causal
            return lambda: as_batch(attention_varlen(*arguments, causal=causal, backend=backend))
        return lambda: attention(
            q,
            k,
            v,
            causal=workload.causal,
            window=workload.window,
            softcap=workload.softcap,
            mask=mask,
            backend=backend,
        )

    return prepare


def _sdpa(backend: SDPBackend | None) -> Prepare:
    def prepare(workload: Workload, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Call:
        options: dict[str, Any] = {} if mask is None else {"attn_mask": mask}
        if workload.heads_kv != workload.num_heads:
            options["enable_gqa"] = True

        def call() -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=workload.causal, **options
            )

        if backend is None:
            return call

        def with_backend() -> Tensor:
            with sdpa_kernel(backend):
                return call()

        return with_backend

    return prepare


def _flash(workload: Workload, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Call:
    """Return a call of torch's FlashAttention-2. SDPA has no window, but the operation under it
    has; it takes [batch, seqlen, num_heads, head_dim]."""
    if workload.window is None:
        return _sdpa(SDPBackend.FLASH_ATTENTION)(workload, q, k, v, mask)
    rows_first = [x.transpose(1, 2) for x in (q, k, v)]
    lengths = (None, None, workload.seqlen, workload.keys)
    left, right = workload.window

    def call() -> Tensor:
        out: Tensor = torch.ops.aten._flash_attention_forward(
            *rows_first,
            *lengths,
            0.0,
            workload.causal,
            False,
            window_size_left=left,
            window_size_right=right,
        )[0]
        return out.transpose(1, 2)

    return call


def _unfused(workload: Workload, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Call:
    """Compute attention by three separate operations, the scores in memory between them."""
    del mask  # timed without
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
_STORING = {"groups": ("seed", "sweep"), "max_score_bytes": _SCORES_LIMIT}


def gpu_libraries() -> list[Library]:
    """Return what is always there on a GPU, flashcore first."""
    masks = frozenset({"mask", "gqa"})
    return [
        Library("flashcore", flashcore_call("auto"), EVERYTHING | {"varlen"}),
        Library("flashcore-wmma", flashcore_call("wmma"), EVERYTHING | {"varlen"}),
        Library("sdpa-flash", _flash, frozenset({"window", "gqa"})),
        Library("sdpa-efficient", _sdpa(SDPBackend.EFFICIENT_ATTENTION), masks),
        Library("sdpa-cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION), masks),
        Library("sdpa-math", _sdpa(SDPBackend.MATH), **_STORING),  # type: ignore[arg-type]
        Library("unfused", _unfused, **_STORING),  # type: ignore[arg-type]
    ]


def cpu_libraries() -> list[Library]:
    """Return what a CPU can run fast."""
    return [
        Library("flashcore", flashcore_call("auto"), EVERYTHING | {"varlen"}),
        Library("sdpa", _sdpa(None), frozenset({"mask", "gqa"})),
        Library("sdpa-math", _sdpa(SDPBackend.MATH), frozenset({"mask", "gqa"})),
        Library("unfused", _unfused),
    ]
