"""Record the operators of a family for autograd, the backward operator too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcore.backends.dispatch import without_autocast
from flashcore.ops.family import (
    ALWAYS_DIFFERENTIABLE,
    BackwardCall,
    Family,
    differentiable_of,
    names_of,
    refuse_gradients,
    results_of,
)
from flashcore.ops.transforms.autograd import below_autograd
from flashcore.problem.options import DIFFERENTIABLE_RESULTS, Inputs, Results, Wanted


def recording(
    family: Family, operators: Any
) -> tuple[type[torch.autograd.Function], type[torch.autograd.Function]]:
    """Return what records the forward operator of a family, and what records its backward one.

    The forward saves inputs, out and lse, so memory is linear in seqlen (besides the user's mask).

    Args:
        family: see Family.
        operators: its Operators.
    """
    is_tensor = [name for name in family.inputs if not name.startswith("max_")]

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            call = operators.forward_call(arguments)
            refuse_gradients(family, call.inputs)
            results = Results(*below_autograd(operators.forward, keyset, arguments))
            ctx.call, ctx.num_arguments = call._replace(inputs=_bounds(call.inputs)), len(arguments)
            tensors = (getattr(call.inputs, name) for name in is_tensor)
            ctx.save_for_backward(*tensors, *differentiable_of(results))
            ctx.set_materialize_grads(False)
            names = names_of(call.wanted)
            ctx.mark_non_differentiable(
                *(
                    getattr(results, name)
                    for name in Results._fields[1:]
                    if not names[name] or name not in DIFFERENTIABLE_RESULTS
                )
            )
            return tuple(results)

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
            """Through the backward operator, which is recorded too."""
            bounds, options, wanted, backend = ctx.call
            tensors = ctx.saved_tensors  # once: a checkpoint lets nobody read them again
            saved, results = tensors[: len(is_tensor)], tensors[len(is_tensor) :]
            inputs = bounds._replace(**dict(zip(is_tensor, saved, strict=True)))
            results = results_of(results)
            if not wanted.return_lse:  # it was not asked for: compute it now
                results = Results(*operators(inputs, options, Wanted(return_lse=True), backend))
            needs = dict(zip(family.inputs, ctx.needs_input_grad[1:], strict=False))
            wants = [needs[name] for name in family.differentiable]
            gradients = operators.gradients(
                BackwardCall(
                    Results(*cotangents),
                    inputs,
                    results,
                    options,
                    tuple(wants[ALWAYS_DIFFERENTIABLE:]),
                    backend,
                )
            )
            given = {
                name: g if want else None
                for name, g, want in zip(family.differentiable, gradients, wants, strict=True)
            }
            found = [given.get(name) for name in family.inputs]
            return None, *found, *(None,) * (ctx.num_arguments - len(found))

    class Backward(torch.autograd.Function):
        # out and lse get no gradient: they are functions of the others, and counted there.
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            gradients = below_autograd(operators.backward, keyset, arguments)
            call = operators.backward_call(arguments)
            ctx.bounds, ctx.options = _bounds(call.inputs), call.options
            ctx.num_arguments = len(arguments)
            tensors = (getattr(call.inputs, name) for name in is_tensor)
            ctx.save_for_backward(*differentiable_of(call.arriving), *tensors)
            ctx.set_materialize_grads(False)
            optional = zip(gradients[ALWAYS_DIFFERENTIABLE:], call.needs, strict=True)
            ctx.mark_non_differentiable(*(g for g, need in optional if not need))
            return gradients

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
            """Compute the gradient by operations of torch, which are recorded too."""
            number = len(DIFFERENTIABLE_RESULTS)
            saved = ctx.saved_tensors
            inputs = ctx.bounds._replace(**dict(zip(is_tensor, saved[number:], strict=True)))
            with without_autocast(inputs.q.device.type):
                of_arriving_and_inputs = family.second_order(
                    results_of(saved[:number]), inputs, cotangents, ctx.options
                )
            of_inputs = dict(
                zip(family.differentiable, of_arriving_and_inputs[number:], strict=True)
            )
            gradients = [
                *of_arriving_and_inputs[:number],
                *(of_inputs.get(name) for name in family.inputs),
            ]
            needed = zip(gradients, ctx.needs_input_grad[1:], strict=False)
            return (
                None,
                *(g if need else None for g, need in needed),
                *(None,) * (ctx.num_arguments - len(gradients)),
            )

    return Forward, Backward


def _bounds(inputs: Inputs) -> Inputs:
    """Return the inputs without their tensors, which autograd saves in its own way."""
    nothing: Any = None
    return Inputs(
        nothing,
        nothing,
        nothing,
        max_seqlen_q=inputs.max_seqlen_q,
        max_seqlen_k=inputs.max_seqlen_k,
    )
