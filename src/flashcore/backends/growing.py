"""Prepare calls of few queries whose keys grow, for example in decoding: many lengths share one
plan.

With each new token there is one more key, which makes another call of it. Choosing a plan and
filling in the kernel's argument takes the host longer than the call takes the GPU. So plans are
chosen for steps of lengths, each as for its longest, and a length that was not met before takes
over what was prepared for another of its step (launch.KernelCall.with_keys). A plan for a few more
keys is as right, and as fast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from flashcore.problem import Problem
from flashcore.problem.folding import MAX_QUERIES
from flashcore.problem.memory_layout import Strides3, mask_spec, strides_of
from flashcore.problem.options import Options

if TYPE_CHECKING:
    from flashcore.launch.kernel_call import KernelCall

MIN_STEP = 64  # keys; few key tiles have less
_STEPS = 16  # at least, from one power of two to the next
_ANY_STRIDE, _LARGE_STRIDE = 8, 2**31
_ALIGNED_BYTES = 16  # of which _ANY_STRIDE elements of two bytes are a multiple


def planned_as(problem: Problem) -> Problem:
    """Return the problem whose plan serves this one: with few queries, one with all the keys of its
    step; else the same.

    All that a plan has to be right about stays as it is: which sides are bounded, how a mask is
    read, alignment. Of strides of keys there remains only whether there are any.
    """
    length, mask = problem.seqlen_k, problem.mask
    if not 1 <= problem.seqlen_q <= MAX_QUERIES or length < 2 or problem.varlen != "none":
        return problem
    if mask is not None:
        if problem.seqlen_q > 1:  # whether heads can be folded depends on the mask's strides
            return problem
        mask = dataclasses.replace(mask, strides=(*_kind(mask.strides[:3]), mask.strides[3]))
    more = -length % _step(length)
    is_bounded = problem.window_left >= 0 or problem.window_right >= 0
    moves = is_bounded and problem.causal != "upper_left"  # the diagonal, with the last key
    return dataclasses.replace(
        problem,
        seqlen_k=length + more,
        diag_offset=problem.diag_offset + more if moves else problem.diag_offset,
        mask=mask,
        k_strides=_kind(problem.k_strides),
        v_strides=_kind(problem.v_strides),
    )


def _step(length: int) -> int:
    return max(MIN_STEP, (1 << length.bit_length()) // (2 * _STEPS))


def _kind(strides: Strides3) -> Strides3:
    batch, head, row = (
        stride if stride == 0 or stride >= _LARGE_STRIDE else _ANY_STRIDE for stride in strides
    )
    return batch, head, row


class Growing:
    """Hold what was decided for one query a head, of a cache of any length of the same step.

    Args:
        problem: of the first of them.
        call: its kernel's.
        fits: whether q, k and v are like the first, but for the number of keys and their strides.
        options: as it was asked for.
    """

    def __init__(
        self,
        problem: Problem,
        call: KernelCall,
        fits: Callable[[Tensor, Tensor, Tensor], bool],
        options: Options,
    ) -> None:
        self._problem, self._call, self._fits, self.options = problem, call, fits, options
        self._planned = planned_as(problem)
        self._begin = self._planned.seqlen_k - _step(problem.seqlen_k)

    @staticmethod
    def serves(problem: Problem) -> bool:
        """Return whether there can be such calls, whose other keys change nothing but addresses,
        strides and their number."""
        return (
            problem.seqlen_q == 1
            and problem.seqlen_k > 1
            and problem.varlen == "none"
            and problem.window_left == problem.window_right == -1
            and problem.load_bytes == _ALIGNED_BYTES
        )

    def of_length(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> KernelCall | None:
        """Return the call for these tensors, whose addresses are as aligned as those of the first,
        with options that hide no key of any length; None where it has to be looked at closely."""
        first, spec = self._problem, None
        if not self._fits(q, k, v):
            return None
        length = k.shape[2]
        if not self._begin < length <= self._planned.seqlen_k or v.shape[2] != length:
            return None
        k_strides, v_strides = strides_of(k), strides_of(v)
        if (
            _kind(k_strides) != self._planned.k_strides
            or _kind(v_strides) != self._planned.v_strides
        ):
            return None
        if any(stride % _ANY_STRIDE for stride in (*k_strides, *v_strides)):
            return None
        if mask is not None:
            spec, planned = mask_spec(mask), self._planned.mask
            if planned is None or mask.dim() != 4 or mask.shape[3] != length:
                return None
            if (*_kind(spec.strides[:3]), spec.strides[3]) != planned.strides:
                return None
            if (spec.dtype, spec.load_bytes) != (planned.dtype, planned.load_bytes):
                return None
        elif first.mask is not None:
            return None
        problem = dataclasses.replace(
            first, seqlen_k=length, k_strides=k_strides, v_strides=v_strides, mask=spec
        )
        return self._call.with_keys(problem)
