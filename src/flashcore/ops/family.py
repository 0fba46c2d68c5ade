"""Describe a family of operators, and the arguments of its two operators as objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashcore.ops.transforms.autograd import needs_grad
from flashcore.ops.transforms.batching import Places
from flashcore.problem.options import (
    DIFFERENTIABLE_RESULTS,
    Inputs,
    Options,
    Results,
    Wanted,
)

Gradients = tuple[Tensor | None, ...]  # of a family's differentiable inputs, in its order

ALWAYS_DIFFERENTIABLE = 3  # q, k and v; the gradient of another input is computed where asked for


@dataclass(frozen=True)
class Family:
    """Hold what a pair of operators, forward and backward, has of its own.

    Args:
        name: of the operators, without _forward and _backward.
        inputs: the fields of Inputs that they take.
        differentiable: those with a gradient; q, k and v come first.
        places: where the batch that vmap maps over joins each tensor, by the name of the input or
            result; see batching.Places.
        check: raises unless ranks, dtypes and devices of the inputs fit; sizes may be symbolic.
        compute: the results of a call on a backend as it was asked for.
        differentiate: the gradients of `differentiable` (None: not asked for), given the gradients
            that arrive, inputs, results, options, which of the inputs that follow v need one,
            and the backend.
        shapes: of the results, all of them.
        plain: `compute` by operations of torch, for forward mode.
        differentiate_plain: gradients by operations of torch, given those that arrive, inputs and
            options.
        second_order: gradients of the gradients that arrive at out and lse, and then of
            `differentiable`, given the former, inputs, cotangents of the latter, and options.
        scores: how many there are, for counts of floating-point operations.
    """

    name: str
    inputs: tuple[str, ...]
    differentiable: tuple[str, ...]
    places: Places
    check: Callable[[Inputs], None]
    compute: Callable[[Inputs, Options, Wanted, str], Results]
    differentiate: Callable[[Results, Inputs, Results, Options, tuple[bool, ...], str], Gradients]
    shapes: Callable[[Inputs], Results]
    plain: Callable[[Inputs, Options], Results]
    differentiate_plain: Callable[[Results, Inputs, Options], Gradients]
    second_order: Callable[[Results, Inputs, Gradients, Options], Gradients]
    scores: Callable[[Inputs], int]


class ForwardCall(NamedTuple):
    """Hold the arguments of a forward operator."""

    inputs: Inputs
    options: Options
    wanted: Wanted
    backend: str


class BackwardCall(NamedTuple):
    """Hold the arguments of a backward operator; `needs` says which inputs that follow v need a
    gradient."""

    arriving: Results
    inputs: Inputs
    results: Results
    options: Options
    needs: tuple[bool, ...]
    backend: str


def why_no_gradient(inputs: Inputs) -> str | None:
    """Return why a call has no gradient at all; None if it has."""
    if inputs.k_scale is not None:
        return "k and v have 8 bits, through which there is no gradient"
    if inputs.tree_mask is not None:
        return "with tree_mask there is no gradient"
    return None


def refuse_gradients(family: Family, inputs: Inputs) -> None:
    """Raise where something wants a gradient that the family does not compute."""
    mask, why_none = inputs.mask, why_no_gradient(inputs)
    if why_none is not None and needs_grad(*inputs):
        has_scales = inputs.k_scale is not None
        way_out = "pass k and v in the dtype of q" if has_scales else "pass a mask"
        raise NotImplementedError(f"{why_none}; call under torch.no_grad(), or {way_out}")
    if "mask" not in family.differentiable and mask is not None and mask.requires_grad:
        raise NotImplementedError(
            "with seqlens_k a mask has no gradient; pass mask.detach(), or -inf past each "
            "sequence's end in the mask instead of seqlens_k"
        )


def differentiable_of(results: Results) -> tuple[Any, ...]:
    """Return those of the results through which gradients flow."""
    return tuple([getattr(results, name) for name in DIFFERENTIABLE_RESULTS])


def results_of(differentiable: tuple[Any, ...]) -> Results:
    """Return results of which only the differentiable ones are known."""
    known = dict(zip(DIFFERENTIABLE_RESULTS, differentiable, strict=True))
    return Results(**{name: known.get(name) for name in Results._fields})


def names_of(wanted: Wanted) -> dict[str, bool]:
    """Return whether each result is wanted, by its name."""
    return {"out": True, **{f.removeprefix("return_"): x for f, x in wanted._asdict().items()}}


def those_wanted(results: Results, wanted: Wanted) -> tuple[Tensor, ...]:
    """Return the results; one that is not wanted has no elements."""
    out, *others = results
    dtype = score_dtype(out)
    # `wanted` has a flag for each of the others, in their order.
    pairs = zip(others, wanted, strict=True)
    return (out, *[x if want else out.new_empty(0, dtype=dtype) for x, want in pairs])


def score_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of what is said of scores, as lse is."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32
