"""A Problem is what one attention call asks for, validated and normalised; hashable and printable.

Read next: selection/select.py chooses a kernel from a Problem, checks/reference.py computes
one in PyTorch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch

from flashcore.problem.bands import visible_band
from flashcore.problem.memory_layout import (
    MaskSpec,
    Strides3,
    Strides4,
    described_memory,
    mask_spec,
)
from flashcore.problem.validation import (
    DTYPES,
    HEAD_DIM_MULTIPLE,
    check_flag,
    check_mask,
    check_qkv,
    check_sinks,
    checked_causal,
    checked_factor,
    checked_window,
)

Causal = bool | str
PACKS_QUERIES = ("packed", "packed_pages")  # of the kinds of Problem.varlen
Window = tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Problem:
    """A Problem describes one attention call.

    Key j is visible to query i iff
    `i + diag_offset - window_left <= j <= i + diag_offset + window_right`, where -1 as a window
    size is an unbounded side, and the mask, if any, allows it. A side that excludes no key at
    these lengths is normalised to -1, so that a kernel without that test serves.

    Args:
        batch: number of sequences.
        num_heads_q: heads of q; a multiple of num_heads_kv.
        num_heads_kv: heads of k and v; head h of q uses head h // (num_heads_q / num_heads_kv).
        seqlen_q: queries per sequence.
        seqlen_k: keys, and values, per sequence.
        head_dim: of q and k, at least 1; the kernels take what is_readable says.
        head_dim_v: of v and the output, at least 1.
        dtype: "float16", "bfloat16", "float32" or "float64".
        device: "cpu", "cuda" or "meta".
        arch: compute capability, 90 for sm_90; 0 on the CPU and on GPUs not made by NVIDIA.
        scale: multiplies q.k.
        softcap: scores become softcap * tanh(score / softcap); 0.0 is off.
        window_left: keys visible before the diagonal, -1 for all.
        window_right: keys visible after the diagonal, -1 for all.
        diag_offset: the diagonal is j = i + diag_offset.
        causal: "none", "upper_left" or "lower_right", as asked for; for printing.
        mask: how the mask is read, or None.
        return_lse: whether the log-sum-exp of the scores is wanted too.
        q_strides: of (batch, head, seqlen) in elements; 0 for a dimension of size 0 or 1.
        k_strides: of (batch, head, seqlen) of k, in elements.
        v_strides: of (batch, head, seqlen) of v, in elements.
        load_bytes: the widest of 16, 8, 4, 2 that divides every address of a row of q, k and v
            and the bytes of a row, of those that the kernels read in place (backends/adapting.py).
        varlen: how sequences differ in length, one of plan.VARLEN_KINDS. If they do, only the
            device knows by how much: seqlen_q and seqlen_k are the longest possible, and
            diag_offset is 0. "packed": strides are those of [1, heads, total, dim] views;
            "packed_pages": those of q are, and keys lie in pages.
        total_q: rows of packed q; else 0.
        total_k: rows of packed k and v; else 0.
        strided: those of "q", "k" and "v" whose last dimension is not contiguous, joined.
        misaligned: those of "q", "k" and "v" whose own load_bytes is less than 16, joined.
        page_size: keys of a page of the cache; 0 unless has_pages. Then seqlen_k is what
            the page table reaches, and the first strides of k and v are those of pages.
        num_pages: of the cache.
        page_table_stride: entries from one sequence's row of the page table to the next one's.
        return_max_score: whether the largest score of each head is wanted too.
        has_sinks: whether a logit of each head joins the softmax.
        cache_dtype: of k and v where it is not that of q: "float8_e4m3fn"; else "". load_bytes,
            strides and `misaligned` of k and v count its elements.
        scale_strides: of (sequence, head) of k_scale, then of v_scale, in elements; 0 where one
            serves all.
        batch_invariant: whether a sequence's bits may depend on that sequence alone.
        deterministic: whether gradients have the same bits in every run.
    """

    batch: int
    num_heads_q: int
    num_heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    dtype: str
    device: str
    arch: int
    scale: float
    softcap: float
    window_left: int
    window_right: int
    diag_offset: int
    causal: str
    mask: MaskSpec | None
    return_lse: bool
    q_strides: Strides3
    k_strides: Strides3
    v_strides: Strides3
    load_bytes: int
    varlen: str = "none"
    total_q: int = 0
    total_k: int = 0
    strided: str = ""
    misaligned: str = ""
    page_size: int = 0
    num_pages: int = 0
    page_table_stride: int = 0
    return_max_score: bool = False
    has_sinks: bool = False
    cache_dtype: str = ""
    scale_strides: Strides4 = (0, 0, 0, 0)
    batch_invariant: bool = False
    deterministic: bool = True

    @classmethod
    def from_tensors(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: Causal = False,
        scale: float | None = None,
        window: Window = None,
        softcap: float | None = None,
        mask: torch.Tensor | None = None,
        return_lse: bool = False,
        return_max_score: bool = False,
        sinks: torch.Tensor | None = None,
        batch_invariant: bool = False,
        deterministic: bool = True,
    ) -> Problem:
        """Validate the arguments of `attention`; return the problem, which keeps no tensor.

        Args:
            q: [batch, num_heads_q, seqlen_q, head_dim].
            k: [batch, num_heads_kv, seqlen_k, head_dim].
            v: [batch, num_heads_kv, seqlen_k, head_dim_v].
            causal: False, True (aligned at the lower right) or "upper_left".
            scale: the factor of q.k; None is 1 / sqrt(head_dim).
            window: (left, right), the keys visible on either side of the diagonal, or None.
            softcap: scores become softcap * tanh(score / softcap); None is off.
            mask: boolean (True = attend) or additive, broadcast to the scores; or None.
            return_lse: whether the log-sum-exp of each row of scores is returned too.
            return_max_score: whether the largest score of each head is returned too.
            sinks: [num_heads_q], a logit of each head that joins the softmax; or None.
            batch_invariant: as in `attention`.
            deterministic: as in `attention`.

        Raises:
            TypeError, ValueError, NotImplementedError: as `attention`.
        """
        check_qkv(q, k, v)
        check_flag("return_lse", return_lse)
        check_flag("return_max_score", return_max_score)
        check_flag("batch_invariant", batch_invariant)
        check_flag("deterministic", deterministic)
        if mask is not None:
            check_mask(mask, q, k.shape[2])
        if sinks is not None:
            check_sinks(sinks, q, q.shape[1])
        batch, num_heads_q, seqlen_q, head_dim = q.shape
        seqlen_k = k.shape[2]
        alignment = checked_causal(causal)
        left, right, diag_offset = visible_band(
            alignment, checked_window(window), seqlen_q, seqlen_k
        )
        default_scale = 1.0 / math.sqrt(head_dim)
        return cls(
            batch=batch,
            num_heads_q=num_heads_q,
            num_heads_kv=k.shape[1],
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            head_dim=head_dim,
            head_dim_v=v.shape[3],
            dtype=DTYPES[q.dtype],
            device=q.device.type,
            arch=arch_of_device(q.device.index) if q.device.type == "cuda" else 0,
            scale=checked_factor("scale", scale, default_scale, "pass None for 1 / sqrt(head_dim)"),
            softcap=checked_factor("softcap", softcap, 0.0, "pass None for no softcap"),
            window_left=left,
            window_right=right,
            diag_offset=diag_offset,
            causal=alignment,
            mask=None if mask is None else mask_spec(mask),
            return_lse=return_lse,
            **described_memory(q, k, v),
            return_max_score=return_max_score,
            has_sinks=sinks is not None,
            batch_invariant=batch_invariant,
            deterministic=deterministic,
        )

    @property
    def group_size(self) -> int:
        """Return how many heads of q share one head of k and v."""
        return self.num_heads_q // self.num_heads_kv if self.num_heads_kv else 0

    @property
    def packs_queries(self) -> bool:
        """Return whether q is [total_q, num_heads_q, head_dim], one sequence after the other."""
        return self.varlen in PACKS_QUERIES

    @property
    def has_pages(self) -> bool:
        """Return whether keys and values lie in the pages of a cache."""
        return self.varlen in ("pages", "packed_pages")

    @property
    def is_empty(self) -> bool:
        """Return whether there is nothing to compute: no output, or no keys (out 0, lse -inf, or
        the sink)."""
        if self.packs_queries:
            num_keys = self.seqlen_k if self.has_pages else self.total_k
            return not (self.batch and self.num_heads_q and self.total_q and num_keys)
        return not (self.batch and self.num_heads_q and self.seqlen_q and self.seqlen_k)

    @property
    def is_readable(self) -> bool:
        """Return whether the kernels can read q, k and v as they are: rows of whole 16 bytes,
        contiguous. See backends/adapting.py for others."""
        dims = self.head_dim, self.head_dim_v
        return not self.strided and all(dim % HEAD_DIM_MULTIPLE == 0 for dim in dims)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the dtype of q, k, v and the output."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def lse_dtype(self) -> torch.dtype:
        """Return float32, except float64 for float64 inputs."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of an element of k or v."""
        return 1 if self.cache_dtype else self.torch_dtype.itemsize

    def of_sequence(self, seqlen_q: int, seqlen_k: int) -> Problem:
        """Return the call that one of its sequences of different lengths amounts to."""
        left, right, diag_offset = visible_band(
            self.causal, (self.window_left, self.window_right), seqlen_q, seqlen_k
        )
        return dataclasses.replace(
            self,
            batch=1,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            window_left=left,
            window_right=right,
            diag_offset=diag_offset,
            varlen="none",
            total_q=0,
            total_k=0,
            page_size=0,
            num_pages=0,
            page_table_stride=0,
            cache_dtype="",
            scale_strides=(0, 0, 0, 0),
        )

    def describe(self) -> str:
        """Return one line for people, e.g. in `explain` and in test reports."""
        heads = f"H{self.num_heads_q}"
        if self.num_heads_kv != self.num_heads_q:
            heads += f"/{self.num_heads_kv}"
        lengths = f"S{self.seqlen_q}"
        if self.seqlen_k != self.seqlen_q:
            lengths += f"/{self.seqlen_k}"
        dims = f"D{self.head_dim}"
        if self.head_dim_v != self.head_dim:
            dims += f"/{self.head_dim_v}"
        parts = [f"B{self.batch} {heads} {lengths} {dims} {self.dtype}"]
        if self.varlen == "packed":
            parts.append(f"packed {self.total_q}/{self.total_k} rows")
        elif self.varlen == "packed_pages":
            parts.append(f"packed {self.total_q} rows")
        elif self.varlen == "keys":
            parts.append("seqlens_k")
        if self.has_pages:
            parts.append(f"pages of {self.page_size}")
        if self.causal != "none":
            parts.append(f"causal {self.causal}")
        if self.window_left >= 0 or (self.window_right >= 0 and self.causal == "none"):
            parts.append(f"window ({self.window_left}, {self.window_right})")
        if self.softcap:
            parts.append(f"softcap {self.softcap:g}")
        if self.mask is not None:
            parts.append(f"{self.mask.dtype} mask")
        if self.has_sinks:
            parts.append("sinks")
        if self.cache_dtype:
            parts.append(f"cache {self.cache_dtype}")
        return ", ".join(parts)


@functools.cache
def arch_of_device(device_index: int | None) -> int:
    """Return 10 * major + minor of an NVIDIA GPU; 0 for any other."""
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor
