"""Hold what a call of attention hands on: options, inputs, what is wanted, results.

The operators' schemas, their autograd and their vmap are derived from the fields here (see
ops/operators.py): a field's name, type and place are those of an operator's argument.
"""

from __future__ import annotations

import functools
import typing
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashcore.problem import Causal, Problem, Window
from flashcore.problem.validation import (
    SEQLEN_MAX,
    certainly,
    check_flag,
    checked_causal,
    checked_factor,
    checked_window,
)


class Inputs(NamedTuple):
    """Hold the tensors of a call, and the bounds that go with them.

    A family of operators takes some of these; the others stay None. Shapes are those of the
    public functions.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: boolean or additive.
        seqlens_k: int32, [batch]: the number of keys of each sequence of a padded batch.
        cu_seqlens_q: int32, [batch + 1]: where packed sequences of queries begin and end.
        cu_seqlens_k: int32, [batch + 1]: where packed sequences of keys begin and end.
        max_seqlen_q: a bound on the length of packed sequences of queries.
        max_seqlen_k: a bound on the length of packed sequences of keys.
        page_table: int32, [batch, max_pages]: the pages of each sequence, where k and v are
            [num_pages, num_heads_kv, page_size, dim].
        sinks: [num_heads_q], a logit of each head that joins the softmax and has no value.
        k_scale: float32, broadcastable to [batch, num_heads_kv]: what elements of k count, where k
            is float8_e4m3fn.
        v_scale: likewise, of v.
        tree_mask: boolean, broadcastable to [batch, num_heads_q, seqlen_q, seqlen_q]: which of the
            last seqlen_q keys of its sequence a query sees, besides all before them; instead of
            mask. Where queries are packed [batch, num_heads_q, m, m]: a sequence of n <= m queries
            uses [0, n), a longer one nothing.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    seqlens_k: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    page_table: Tensor | None = None
    sinks: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    tree_mask: Tensor | None = None


class Wanted(NamedTuple):
    """Say which results a call returns besides out: a flag for each of the others in Results, in
    their order.

    Args:
        return_lse: the log-sum-exp of each row of scores.
        return_max_score: the largest score of each head.
    """

    return_lse: bool = False
    return_max_score: bool = False

    def checked(self) -> Wanted:
        """Return this; raise TypeError unless each is True or False."""
        for name, value in zip(self._fields, self, strict=True):
            check_flag(name, value)
        return self


class Results(NamedTuple):
    """Hold what a call returns, or the gradients that arrive at it.

    A result that is not wanted has no elements; a gradient that is zero is None.

    Args:
        out: the weighted sums of v.
        lse: natural-log, float32 (float64 for float64 inputs).
        max_score: what enters the softmax at most, dtype of lse.
    """

    out: Any
    lse: Any
    max_score: Any = None

    def returned(self, wanted: Wanted) -> Any:
        """Return what a public function does: out, or a tuple of it and what else is wanted."""
        others = [x for x, want in zip(self[1:], wanted, strict=True) if want]
        return (self.out, *others) if others else self.out

    @classmethod
    def of_returned(cls, returned: Any, wanted: Wanted) -> Results:
        """Return the results of which `returned` made what a public function returns."""
        if not any(wanted):
            return cls(returned, None)
        out, *others = returned
        found = iter(others)
        return cls(out, *(next(found) if want else None for want in wanted))


# Results through which gradients flow; the backward pass is given them, too.
DIFFERENTIABLE_RESULTS = ("out", "lse")


class Options(NamedTuple):
    """Hold validated options; also the operators' arguments, in this order.

    Args:
        causal: "none", "upper_left" or "lower_right".
        window_left: number of keys visible before the diagonal, -1 for all.
        window_right: number of keys visible after the diagonal, -1 for all. If causal is not
            "none", the kernels see 0 here, whatever it says.
        softcap: the bound of the scores; 0.0 means no soft-capping.
        scale: the factor of the scores; None means 1 / sqrt(head_dim).
        batch_invariant: whether a sequence's bits may depend on that sequence alone.
        deterministic: whether gradients have the same bits in every run; without, they may.
    """

    causal: str
    window_left: int
    window_right: int
    softcap: float
    scale: float | None
    batch_invariant: bool = False
    deterministic: bool = True

    @classmethod
    def checked(
        cls,
        causal: Causal,
        window: Window,
        softcap: float | None,
        scale: float | None,
        batch_invariant: bool = False,
        deterministic: bool = True,
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
        check_flag("batch_invariant", batch_invariant)
        check_flag("deterministic", deterministic)
        return cls(alignment, left, right, factor, scale, batch_invariant, deterministic)

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
            problem.batch_invariant,
            problem.deterministic,
        )

    def problem(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        return_lse: bool,
        sinks: torch.Tensor | None = None,
    ) -> Problem:
        """Return Problem.from_tensors with these options. A backward pass needs no sinks: they are
        part of lse."""
        return Problem.from_tensors(
            q, k, v, mask=mask, return_lse=return_lse, sinks=sinks, **self.asked()
        )

    def asked(self) -> dict[str, Any]:
        """Return the keyword arguments of `attention` that mean these options."""
        return {
            "causal": False if self.causal == "none" else self.causal,
            "window": (self.window_left, self.window_right),
            "softcap": self.softcap or None,
            "scale": self.scale,
            "batch_invariant": self.batch_invariant,
            "deterministic": self.deterministic,
        }


_SCHEMA_TYPES = {
    Any: "Tensor",
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    bool: "bool",
    int: "SymInt",
    float: "Scalar",
    float | None: "Scalar?",
}


@functools.cache
def schema_of(fields: type, *names: str) -> str:
    """Return the fields of a class here as an operator's schema has them: "Tensor q, Tensor k".

    Args:
        fields: Inputs, Options, Wanted or Results.
        *names: of the fields; all by default.
    """
    hints = typing.get_type_hints(fields)
    return ", ".join(f"{_SCHEMA_TYPES[hints[name]]} {name}" for name in names or hints)
