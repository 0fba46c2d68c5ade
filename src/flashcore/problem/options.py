"""Hold the options of `attention` as the operators take them: plain values, whatever the shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashcore.problem import Causal, Problem, Window
from flashcore.problem.validation import (
    SEQLEN_MAX,
    certainly,
    checked_causal,
    checked_factor,
    checked_window,
)


class Options(NamedTuple):
    """Hold validated options; also the operators' arguments, in this order.

    Args:
        causal: "none", "upper_left" or "lower_right".
        window_left: number of keys visible before the diagonal, -1 for all.
        window_right: number of keys visible after the diagonal, -1 for all. If causal is not
            "none", the kernels see 0 here, whatever it says.
        softcap: the bound of the scores; 0.0 means no soft-capping.
        scale: the factor of the scores; None means 1 / sqrt(head_dim).
    """

    causal: str
    window_left: int
    window_right: int
    softcap: float
    scale: float | None

    @classmethod
    def checked(
        cls, causal: Causal, window: Window, softcap: float | None, scale: float | None
    ) -> Options:
        """Make validated options from the arguments of `attention`.

        Raises the TypeError or ValueError of `attention` for a wrong argument.
        """
        alignment = checked_causal(causal)
        # No sequence is that long, and the operators' integers have 64 bits.
        left, right = (
            -1 if certainly(size > SEQLEN_MAX) else size for size in checked_window(window)
        )
        if scale is not None:
            scale = checked_factor("scale", scale, 1.0, "pass None for 1 / sqrt(head_dim)")
        factor = checked_factor("softcap", softcap, 0.0, "pass None for no softcap")
        return cls(alignment, left, right, factor, scale)

    def with_checked_factors(self) -> Options:
        """Return the same options after checking softcap and scale again.

        While code was being compiled, `checked` may not have known their values. Raises ValueError
        for a wrong one.
        """
        softcap = None if certainly(self.softcap == 0.0) else self.softcap
        Options.checked(False, None, softcap, self.scale)
        return self

    @classmethod
    def of(cls, problem: Problem) -> Options:
        """Return those options that give the same Problem again for the same tensors."""
        return cls(
            problem.causal,
            problem.window_left,
            problem.window_right,
            problem.softcap,
            problem.scale,
        )

    def problem(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        return_lse: bool,
    ) -> Problem:
        """Return Problem.from_tensors with these options."""
        return Problem.from_tensors(
            q,
            k,
            v,
            causal=False if self.causal == "none" else self.causal,
            window=(self.window_left, self.window_right),
            softcap=self.softcap or None,
            scale=self.scale,
            mask=mask,
            return_lse=return_lse,
        )
