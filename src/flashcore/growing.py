"""Calls of few queries whose keys grow, as in decoding: many lengths share one plan.

With each new token there is one more key, which makes another call of it. Choosing a plan and
filling in the kernel's argument takes the host longer than the call takes the GPU. So plans are
chosen for steps of lengths, each as for its longest, and a length that was not met before takes
over what was prepared for another of its step (launch.KernelCall.with_keys). A plan for a few more
keys is as right, and as fast.
"""

from __future__ import annotations

import dataclasses

from flashcore.folding import MAX_QUERIES
from flashcore.memory_layout import Strides3
from flashcore.problem import Problem

MIN_STEP = 64  # keys; few key tiles have less
_STEPS = 16  # at least, from one power of two to the next
_ANY_STRIDE, _LARGE_STRIDE = 8, 2**31


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
    more = -length % max(MIN_STEP, (1 << length.bit_length()) // (2 * _STEPS))
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


def _kind(strides: Strides3) -> Strides3:
    batch, head, row = (
        stride if stride == 0 or stride >= _LARGE_STRIDE else _ANY_STRIDE for stride in strides
    )
    return batch, head, row
