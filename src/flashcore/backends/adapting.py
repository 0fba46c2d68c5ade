"""Adapt tensors that a kernel cannot read as they lie: what is copied, and what is read in another
shape.

The kernels read rows of whole 16 bytes: head_dim is a multiple of 8, and contiguous. Of other
tensors they are given copies, padded with zeros: they add nothing to a score, and the columns of
the output that belong to them are dropped. k and v that are expanded over their heads have one head
that all heads of q share. The Hopper kernel reads by TMA, which also wants rows that start at
multiples of 16 bytes: other tensors are copied for it if that takes less time than it saves, or if
it was asked for. It reads a mask from anywhere, but from such rows faster: a mask that is broadcast
is copied, too (copy_of_mask).

Everything here happens once for a description of tensors, below the operators: gradients, which
PyTorch computes, are those of the caller's own tensors. Read next: dispatch.prepare.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch

from flashcore.backends.readable import PACKET_BYTES, Copy, Dims, copy_of_mask, expanded
from flashcore.kernels.kernel import ForwardKernel
from flashcore.kernels.registry import BY_BACKEND, PORTABLE, forward_for
from flashcore.problem import Problem
from flashcore.problem.folding import with_copied_q
from flashcore.problem.memory_layout import Strides3
from flashcore.problem.validation import HEAD_DIM_MULTIPLE

Tensor = torch.Tensor

# A copy pays if the time that the Hopper kernel saves is longer than it takes: the time saved for
# each operation, that of a copied byte, and that of a copy besides. Medians over 14 shapes
# on an H200 (2026-11-29, float16, head_dim 128, CUDA graphs), both kernels with and without a copy
# of q.
SECONDS_SAVED_PER_FLOP = 3.44e-15
SECONDS_PER_COPIED_BYTE = 6.61e-13
SECONDS_PER_COPY = 2.1e-6


@dataclass(frozen=True, slots=True)
class Adapted:
    """Adapted describes a call as a kernel, or PyTorch, gets it.

    Args:
        problem: describes the tensors that `tensors` returns.
        one_head: k and v are given with the first of their heads alone.
        copies: of q, k, v and the mask, one each at most.
        head_dim_v: of the call's output; that of `problem` may be greater.
        notes: the same in words, a sentence each.
    """

    problem: Problem
    one_head: bool
    copies: tuple[Copy, ...]
    head_dim_v: int
    notes: tuple[str, ...]

    @property
    def is_as_asked(self) -> bool:
        """Return whether tensors and result need no change."""
        return not (self.copies or self.one_head)

    def tensors(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return what the kernel reads, of the call's q, k and v: [batch, num_heads, seqlen, dim];
        and of its mask, if there is one."""
        if self.one_head:
            k, v = k[:, :1], v[:, :1]
        copies = {copy.name: copy for copy in self.copies}
        q, k, v = (
            copies[name].of(x) if name in copies else x
            for name, x in (("q", q), ("k", k), ("v", v))
        )
        if mask is not None and "mask" in copies:
            mask = copies["mask"].of(mask)
        return q, k, v, mask

    def result(self, out: Tensor) -> Tensor:
        """Return the call's output, of what the kernel wrote: [..., head_dim_v], contiguous."""
        if out.shape[-1] == self.head_dim_v:
            return out
        return out[..., : self.head_dim_v].contiguous()


class _Adapting:
    """Collect changes one after the other."""

    def __init__(self, problem: Problem) -> None:
        self.asked = self.problem = problem
        self.one_head = False
        self.copies: dict[str, Copy] = {}
        self.notes: list[str] = []

    def change(self, **fields: Any) -> None:
        self.problem = dataclasses.replace(self.problem, **fields)

    def copy(self, name: str, columns: int, keeps: Dims, reason: str) -> None:
        """Replace the tensor, or the copy of it that there is, by a copy."""
        p = self.problem
        if name in self.copies:
            reason = f"{self.copies[name].reason}; {reason}"
        copy = self.copies[name] = Copy(name, columns, keeps, _sizes(p, name), reason)
        misaligned = p.misaligned.replace(name, "")
        fields: dict[str, Any] = {
            f"{name}_strides": copy.strides,
            "head_dim_v" if name == "v" else "head_dim": columns,
            "strided": p.strided.replace(name, ""),
            "misaligned": misaligned,
        }
        if p.misaligned and not misaligned:
            fields["load_bytes"] = 16
        self.change(**fields)

    def copy_mask(self, copy: Copy) -> None:
        assert self.problem.mask is not None
        self.copies[copy.name] = copy
        strides, width = (*copy.strides, 1), PACKET_BYTES
        self.change(mask=dataclasses.replace(self.problem.mask, strides=strides, load_bytes=width))

    def done(self) -> Adapted:
        copies = tuple(self.copies.values())
        notes = [f"{copy.name} is copied: {copy.reason}" for copy in copies]
        head_dim_v = self.asked.head_dim_v
        return Adapted(self.problem, self.one_head, copies, head_dim_v, (*self.notes, *notes))


def _sizes(problem: Problem, name: str) -> tuple[int, int, int]:
    """Return (batch, heads, seqlen) of q, k or v as the kernels see it; of pages their number and
    size."""
    packed = problem.packs_queries
    batch = 1 if packed else problem.batch
    if name == "q":
        return batch, problem.num_heads_q, problem.total_q if packed else problem.seqlen_q
    if problem.has_pages:
        return problem.num_pages, problem.num_heads_kv, problem.page_size
    return batch, problem.num_heads_kv, problem.total_k if packed else problem.seqlen_k


def _expanded(problem: Problem, name: str) -> Dims:
    """Return in which of (batch, heads, seqlen) a tensor is expanded."""
    strides: Strides3 = getattr(problem, f"{name}_strides")
    return expanded(strides, _sizes(problem, name))


def _shares_one_head(problem: Problem) -> bool:
    """Return whether k and v are expanded over their heads, and so are their scales."""
    _, k_scale_stride, _, v_scale_stride = problem.scale_strides  # of batch and head, k before v
    strides = problem.k_strides[1], problem.v_strides[1], k_scale_stride, v_scale_stride
    return problem.num_heads_kv > 1 and not any(strides)


@functools.lru_cache(maxsize=4096)
def adapt(problem: Problem, kernel: str) -> Adapted:
    """Return what a kernel is given instead of the tensors of a call.

    Args:
        problem: the call.
        kernel: a kernel's backend, "wmma" or "sm90"; or "torch" for PyTorch operations, which only
            want the last dimension to be contiguous.

    Returns:
        The call as that kernel reads it. Only the kernel's `obstacle` can still be in the way.
    """
    if problem.is_readable and _is_read_in_place(problem, kernel):
        return Adapted(problem, False, (), problem.head_dim_v, ())
    adapting = _Adapting(problem)
    if kernel == "torch":
        _make_readable(adapting, 1)
        return adapting.done()
    if _shares_one_head(problem):
        adapting.one_head = True
        adapting.change(num_heads_kv=1)
        adapting.notes.append(
            "k and v are expanded over their heads: all heads of q share one, read in place"
        )
    _make_readable(adapting, HEAD_DIM_MULTIPLE)
    _make_readable_by(BY_BACKEND[kernel], adapting)
    mask = _copy_of_mask(adapting.problem, kernel)
    if mask is not None:
        adapting.copy_mask(mask)
    if with_copied_q(adapting.problem) is not None:
        reason = "heads that share one of k and v become rows of one row tile by that"
        adapting.copy("q", adapting.problem.head_dim, (False, False, False), reason)
    return adapting.done()


def _is_read_in_place(problem: Problem, kernel: str) -> bool:
    """Return whether a problem that is readable needs no change: the common case, which a cache of
    keys that grows meets anew with every key."""
    if kernel == "torch":
        return True
    if BY_BACKEND[kernel].unreadable(problem) or _copy_of_mask(problem, kernel) is not None:
        return False
    return not _shares_one_head(problem) and with_copied_q(problem) is None


def _make_readable(adapting: _Adapting, multiple: int) -> None:
    """Make rows contiguous and a multiple of so many elements."""
    asked = adapting.asked
    names = "qkv"
    if asked.cache_dtype:  # a cache of 8 bits is not copied; so q keeps its head_dim, too
        names, multiple = "q", 1
    for name in names:
        head_dim = asked.head_dim_v if name == "v" else asked.head_dim
        columns = -(-head_dim // multiple) * multiple
        reasons = []
        if name in asked.strided:
            reasons.append("its last dimension is not contiguous")
        if columns > head_dim:
            reasons.append(f"it is padded with zeros from head_dim {head_dim} to {columns}")
        if reasons:
            keeps = _expanded(adapting.problem, name)
            adapting.copy(name, columns, keeps, ", and ".join(reasons))


def _make_readable_by(kernel: ForwardKernel[Any], adapting: _Adapting) -> None:
    for name, reason in kernel.unreadable(adapting.problem).items():
        p = adapting.problem
        if p.cache_dtype and name in "kv":
            continue  # the kernel's obstacle says why
        of_batch, of_heads, _ = _expanded(p, name)
        columns = p.head_dim_v if name == "v" else p.head_dim
        adapting.copy(name, columns, (of_batch, of_heads, False), reason)


def _copy_of_mask(problem: Problem, kernel: str) -> Copy | None:
    """Return the copy of the mask that a kernel is given, if it reads rows faster that begin at
    multiples of 16 bytes. Whether it pays depends on the batch, so batch-invariant calls have
    none."""
    is_wanted = BY_BACKEND[kernel].prefers_aligned_masks and not problem.batch_invariant
    return copy_of_mask(problem, forward=True) if is_wanted else None


def rather_portable(problem: Problem, preferred: ForwardKernel[Any]) -> str | None:
    """Return why the portable kernel should compute a call, though the one that the architecture
    prefers can be given copies of its tensors; None if that one should."""
    if preferred is PORTABLE:
        return None
    reason = preferred.obstacle(problem)
    if reason is None and problem.is_readable:
        return None
    hopper, portable = (adapt(problem, kernel.backend) for kernel in (preferred, PORTABLE))
    reason = preferred.obstacle(hopper.problem)
    if reason is not None:
        return reason
    needed = {copy.name for copy in portable.copies} | {"mask"}  # which is copied where it pays
    extra = [copy for copy in hopper.copies if copy.name not in needed]
    if problem.has_pages and any(copy.name in "kv" for copy in extra):
        return f"{extra[0].reason}; a cache in pages is not copied for it"
    num_bytes = sum(copy.num_bytes for copy in extra)
    if not extra or problem.batch_invariant or copies_pay(problem, num_bytes, len(extra)):
        return None
    names = " and ".join(copy.name for copy in extra)
    return (
        f"{extra[0].reason}; a copy of {names} ({num_bytes / 1e6:.3g} MB) would take longer than "
        f"it saves here: where the same {names} serves several calls, make it contiguous once"
    )


def copies_pay(problem: Problem, num_bytes: int, num_copies: int) -> bool:
    """Return whether the Hopper kernel saves more time than copies of so many bytes take."""
    rows_q, rows_k = problem.seqlen_q, problem.seqlen_k
    flops = 2 * problem.batch * problem.num_heads_q * rows_q * rows_k
    flops *= problem.head_dim + problem.head_dim_v
    if problem.window_right >= 0 or problem.window_left >= 0:
        flops //= 2
    seconds = num_bytes * SECONDS_PER_COPIED_BYTE + num_copies * SECONDS_PER_COPY
    return flops * SECONDS_SAVED_PER_FLOP > seconds


def kernel_for(problem: Problem, arch: int) -> str:
    """Return the kernel, by its backend, that "auto" takes on a GPU of an architecture, and the
    simulator of one."""
    preferred = forward_for(arch)
    chosen = preferred if rather_portable(problem, preferred) is None else PORTABLE
    return chosen.backend
