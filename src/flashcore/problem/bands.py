"""Say which keys a query sees, by causal masks and windows. Pure functions."""

from __future__ import annotations


def visible_band(
    alignment: str, window: tuple[int, int], seqlen_q: int, seqlen_k: int
) -> tuple[int, int, int]:
    """Return (window_left, window_right, diag_offset) as Problem defines them."""
    left, right = window
    if alignment != "none":
        right = 0  # right < 0 is unbounded, and any right > 0 is cut back by causality
    diag_offset = 0 if alignment == "upper_left" else seqlen_k - seqlen_q
    # The last query has the leftmost bound farthest right, the first query the rightmost bound
    # farthest left: if neither excludes a key, none does.
    if left >= 0 and seqlen_q - 1 + diag_offset - left <= 0:
        left = -1
    if right >= 0 and diag_offset + right >= seqlen_k - 1:
        right = -1
    if left == right == -1:
        return -1, -1, 0  # the diagonal has no meaning then: one Problem, not many
    return left, right, diag_offset


def widest_band(
    alignment: str, window: tuple[int, int], seqlen_q: int, seqlen_k: int
) -> tuple[int, int]:
    """Return (window_left, window_right) of a call whose sequences have at most these lengths: a
    side is -1 if it excludes no key of any of them.

    The key that the last query is aligned with has at most `last` keys before it, the one of the
    first query at most `ahead` after it, whatever the lengths.
    """
    left, right = window
    if alignment != "none":
        right = 0
    upper_left = alignment == "upper_left"
    last = (seqlen_q if upper_left else seqlen_k) - 1
    ahead = (seqlen_k if upper_left else seqlen_q) - 1
    return (-1 if left >= last else left), (-1 if right >= ahead else right)
