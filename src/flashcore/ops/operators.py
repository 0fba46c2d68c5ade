"""One factory of operators: forward, backward, fakes, autograd, vmap and FLOPs of a family.

A Family describes what is its own: which inputs it takes, how it computes, where a batch that vmap
maps over finds room. Everything that follows from that is derived here, from the fields of
problem/options.py. ops/dense.py, ops/padded.py and ops/varlen.py are the families.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashcore.backends.dispatch import check_backend, without_autocast
from flashcore.ops import flops
from flashcore.ops.autograd import (
    below_autograd,
    needs_grad,
    register_autograd,
    warn_of_forward_mode,
)
from flashcore.ops.batching import Places, backward_over_batch, forward_over_batch
from flashcore.problem.options import (
    DIFFERENTIABLE_RESULTS,
    Inputs,
    Options,
    Results,
    Wanted,
    schema_of,
)
from flashcore.problem.validation import check_return_lse

Gradients = tuple[Tensor | None, ...]  # of a family's differentiable inputs, in its order

_LIBRARY = torch.library.Library("flashcore", "DEF")
# A compiler may choose other strides for what lies between operators; head_dim must stay
# contiguous, an expanded mask should stay expanded, and strides decide which kernel serves.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_ALWAYS_DIFFERENTIABLE = 3  # q, k and v; the gradient of another input is computed where asked for


@dataclass(frozen=True)
class Family:
    """What a pair of operators, forward and backward, has of its own.

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
    """The arguments of a forward operator."""

    inputs: Inputs
    options: Options
    wanted: Wanted
    backend: str


class BackwardCall(NamedTuple):
    """The arguments of a backward operator; `needs` says which inputs that follow v need a
    gradient."""

    arriving: Results
    inputs: Inputs
    results: Results
    options: Options
    needs: tuple[bool, ...]
    backend: str


class Operators:
    """The operators of a family, defined and registered.

    Args:
        family: see Family.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self._needs = tuple(
            f"needs_{name}_grad" for name in family.differentiable[_ALWAYS_DIFFERENTIABLE:]
        )
        inputs, options = schema_of(Inputs, *family.inputs), schema_of(Options)
        _LIBRARY.define(
            f"{family.name}_forward({inputs}, {options}, {schema_of(Wanted)}, str backend) "
            f"-> ({_tensors(len(Results._fields))})",
            tags=_TAGS,
        )
        arriving = ", ".join(f"Tensor? d{name}" for name in DIFFERENTIABLE_RESULTS)
        _LIBRARY.define(
            f"{family.name}_backward({arriving}, {inputs}, "
            f"{schema_of(Results, *DIFFERENTIABLE_RESULTS)}, {options}, "
            f"{''.join(f'bool {name}, ' for name in self._needs)}str backend) "
            f"-> ({_tensors(len(family.differentiable))})",
            tags=_TAGS,
        )
        self.forward = getattr(torch.ops.flashcore, f"{family.name}_forward").default
        self.backward = getattr(torch.ops.flashcore, f"{family.name}_backward").default
        self._register()

    def __call__(
        self, inputs: Inputs, options: Options, wanted: Wanted, backend: str
    ) -> tuple[Tensor, ...]:
        """Call the forward operator; returns what Results holds."""
        results: tuple[Tensor, ...] = self.forward(*self._given(inputs), *options, *wanted, backend)
        return results

    def attend(self, inputs: Inputs, options: Options, wanted: Wanted, backend: str) -> Any:
        """Compute what a public function returns. torch.compile traces this function."""
        check_backend(backend)
        check_return_lse(wanted.return_lse)
        if not torch.compiler.is_dynamo_compiling():  # then the fake checks
            self.family.check(inputs)
        if torch.is_grad_enabled():
            refuse_gradients(self.family, inputs)
        results = self(inputs, options, self._computing(inputs, wanted), backend)
        return Results(*results).returned(wanted)

    def gradients(self, call: BackwardCall) -> tuple[Tensor, ...]:
        """Call the backward operator."""
        gradients: tuple[Tensor, ...] = self.backward(*self.backward_arguments(call))
        return gradients

    def backward_arguments(self, call: BackwardCall) -> tuple[Any, ...]:
        """Return a call as the backward operator takes it."""
        return (
            *_differentiable(call.arriving),
            *self._given(call.inputs),
            *_differentiable(call.results),
            *call.options,
            *call.needs,
            call.backend,
        )

    def _computing(self, inputs: Inputs, wanted: Wanted) -> Wanted:
        """Return what a call has to compute: lse too, where its gradient may be asked for."""
        # Where autograd records at a level that this one does not see, the gradient would have to
        # compute lse itself.
        needs_lse = wanted.return_lse or needs_grad(*inputs)
        if not torch.compiler.is_dynamo_compiling():
            needs_lse = needs_lse or torch._C._are_functorch_transforms_active()
        return wanted._replace(return_lse=needs_lse)

    def _given(self, inputs: Inputs) -> tuple[Any, ...]:
        return tuple([getattr(inputs, name) for name in self.family.inputs])

    def _inputs(self, arguments: tuple[Any, ...]) -> Inputs:
        return Inputs(**dict(zip(self.family.inputs, arguments, strict=True)))

    def _forward_call(self, arguments: tuple[Any, ...]) -> ForwardCall:
        inputs, options, wanted, (backend,) = _cut(
            arguments, len(self.family.inputs), len(Options._fields), len(Wanted._fields)
        )
        return ForwardCall(self._inputs(inputs), Options(*options), Wanted(*wanted), backend)

    def _backward_call(self, arguments: tuple[Any, ...]) -> BackwardCall:
        number = len(DIFFERENTIABLE_RESULTS)
        arriving, inputs, results, options, needs, (backend,) = _cut(
            arguments,
            number,
            len(self.family.inputs),
            number,
            len(Options._fields),
            len(self._needs),
        )
        return BackwardCall(
            _results(arriving), self._inputs(inputs), _results(results), Options(*options),
            needs, backend,
        )  # fmt: skip

    def _register(self) -> None:
        record_forward, record_backward = _functions(self)
        for op, compute, fake, record, plain, over_batch in (
            (
                self.forward, self._forward, self._forward_fake, record_forward,
                self._forward_plain, self._forward_vmap,
            ),
            (
                self.backward, self._backward, self._backward_fake, record_backward,
                self._backward_plain, self._backward_vmap,
            ),
        ):  # fmt: skip
            name = op._schema.name.partition("::")[2]
            for device in ("CPU", "CUDA"):
                _LIBRARY.impl(name, compute, device)
            torch.library.register_fake(op, fake, lib=_LIBRARY)
            register_autograd(_LIBRARY, op, record, plain)
            torch.library.register_vmap(op, over_batch, lib=_LIBRARY)
        flops.register(f"{self.family.name}_forward", self._forward_flops)
        flops.register(f"{self.family.name}_backward", self._backward_flops)

    def _forward_flops(self, *arguments: Any, **_: Any) -> int:
        inputs = self._inputs(arguments[: len(self.family.inputs)])
        return flops.forward(self.family.scores(inputs), inputs.q, inputs.v)

    def _backward_flops(self, *arguments: Any, **_: Any) -> int:
        start = len(DIFFERENTIABLE_RESULTS)
        inputs = self._inputs(arguments[start : start + len(self.family.inputs)])
        return flops.backward(self.family.scores(inputs), inputs.q, inputs.v)

    def _forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        call = self._forward_call(arguments)
        return _those_wanted(self.family.compute(*call), call.wanted)

    def _forward_fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        call = self._forward_call(arguments)
        self.family.check(call.inputs)
        check_backend(call.backend)
        q, shapes = call.inputs.q, self.family.shapes(call.inputs)
        # out has the dtype of q, what is said of scores that of the scores.
        results = [q.new_empty(shapes.out)]
        results += [q.new_empty(shape, dtype=_score_dtype(q)) for shape in shapes[1:]]
        return _those_wanted(Results(*results), call.wanted)

    def _forward_plain(self, *arguments: Any) -> tuple[Tensor, ...]:
        call = self._forward_call(arguments)
        self.family.check(call.inputs)
        options = call.options.with_checked_factors()
        warn_of_forward_mode(call.inputs.q, call.backend)
        with without_autocast(call.inputs.q.device.type):
            return _those_wanted(self.family.plain(call.inputs, options), call.wanted)

    def _forward_vmap(self, info: Any, in_dims: Any, *arguments: Any) -> Any:
        call = self._forward_call(arguments)
        number = len(self.family.inputs)
        return forward_over_batch(
            self.forward,
            self.family.places,
            info.batch_size,
            dict(zip(self.family.inputs, in_dims, strict=False)),
            dict(zip(self.family.inputs, arguments[:number], strict=True)),
            arguments[number:],
            [name for name, x in _names_of(call.wanted).items() if x],
        )

    def _backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        call = self._backward_call(arguments)
        check_backend(call.backend)
        with without_autocast(call.inputs.q.device.type):
            gradients = self.family.differentiate(*call)
        return self._those_needed(call, gradients)

    def _backward_fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        call = self._backward_call(arguments)
        check_backend(call.backend)
        inputs = [getattr(call.inputs, name) for name in self.family.differentiable]
        gradients = [None if x is None else torch.empty_like(x) for x in inputs]
        return self._those_needed(call, gradients)

    def _backward_plain(self, *arguments: Any) -> tuple[Tensor, ...]:
        call = self._backward_call(arguments)
        with without_autocast(call.inputs.q.device.type):
            gradients = self.family.differentiate_plain(call.arriving, call.inputs, call.options)
        return self._those_needed(call, gradients)

    def _backward_vmap(self, info: Any, in_dims: Any, *arguments: Any) -> Any:
        names = (
            *(f"d{name}" for name in DIFFERENTIABLE_RESULTS),
            *self.family.inputs,
            *DIFFERENTIABLE_RESULTS,
        )
        needs = self._backward_call(arguments).needs
        optional = self.family.differentiable[_ALWAYS_DIFFERENTIABLE:]
        unneeded = {name for name, need in zip(optional, needs, strict=True) if not need}
        return backward_over_batch(
            self.backward,
            self.family.places,
            info.batch_size,
            dict(zip(names, in_dims, strict=False)),
            dict(zip(names, arguments, strict=False)),
            arguments[len(names) :],
            {name: name not in unneeded for name in self.family.differentiable},
        )

    def _those_needed(self, call: BackwardCall, gradients: Any) -> tuple[Tensor, ...]:
        """Return the gradients; one that is not asked for has no elements."""
        needs = (*(True,) * _ALWAYS_DIFFERENTIABLE, *call.needs)
        return tuple(
            call.inputs.q.new_empty(0) if g is None or not need else g
            for g, need in zip(gradients, needs, strict=True)
        )


def _functions(
    operators: Operators,
) -> tuple[type[torch.autograd.Function], type[torch.autograd.Function]]:
    """Return what records the forward operator of a family, and what records its backward one.

    The forward saves inputs, out and lse, so memory is linear in seqlen (besides the user's mask).
    """
    family = operators.family
    is_tensor = [name for name in family.inputs if not name.startswith("max_")]

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            call = operators._forward_call(arguments)
            refuse_gradients(family, call.inputs)
            results = Results(*below_autograd(operators.forward, keyset, arguments))
            ctx.call, ctx.num_arguments = call._replace(inputs=_bounds(call.inputs)), len(arguments)
            tensors = (getattr(call.inputs, name) for name in is_tensor)
            ctx.save_for_backward(*tensors, *_differentiable(results))
            ctx.set_materialize_grads(False)
            names = _names_of(call.wanted)
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
            saved, results = (
                ctx.saved_tensors[: len(is_tensor)],
                ctx.saved_tensors[len(is_tensor) :],
            )
            inputs = bounds._replace(**dict(zip(is_tensor, saved, strict=True)))
            results = _results(results)
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
                    tuple(wants[_ALWAYS_DIFFERENTIABLE:]),
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
            call = operators._backward_call(arguments)
            ctx.bounds, ctx.options = _bounds(call.inputs), call.options
            ctx.num_arguments = len(arguments)
            tensors = (getattr(call.inputs, name) for name in is_tensor)
            ctx.save_for_backward(*_differentiable(call.arriving), *tensors)
            ctx.set_materialize_grads(False)
            optional = zip(gradients[_ALWAYS_DIFFERENTIABLE:], call.needs, strict=True)
            ctx.mark_non_differentiable(*(g for g, need in optional if not need))
            return gradients

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
            """By operations of torch, which are recorded too."""
            number = len(DIFFERENTIABLE_RESULTS)
            saved = ctx.saved_tensors
            inputs = ctx.bounds._replace(**dict(zip(is_tensor, saved[number:], strict=True)))
            with without_autocast(inputs.q.device.type):
                of_arriving_and_inputs = family.second_order(
                    _results(saved[:number]), inputs, cotangents, ctx.options
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


def refuse_gradients(family: Family, inputs: Inputs) -> None:
    """Raise where a mask wants a gradient that the family does not compute."""
    mask = inputs.mask
    if "mask" not in family.differentiable and mask is not None and mask.requires_grad:
        raise NotImplementedError(
            "with seqlens_k a mask has no gradient; pass mask.detach(), or -inf past each "
            "sequence's end in the mask instead of seqlens_k"
        )


def _bounds(inputs: Inputs) -> Inputs:
    """Return the inputs without their tensors, which autograd saves in its own way."""
    nothing: Any = None
    bounds = {"max_seqlen_q": inputs.max_seqlen_q, "max_seqlen_k": inputs.max_seqlen_k}
    return Inputs(nothing, nothing, nothing, **bounds)


def _tensors(count: int) -> str:
    return ", ".join(["Tensor"] * count)


def _cut(arguments: tuple[Any, ...], *counts: int) -> list[tuple[Any, ...]]:
    """Arguments in groups of so many; the rest comes last."""
    groups, start = [], 0
    for count in counts:
        groups.append(arguments[start : start + count])
        start += count
    return [*groups, arguments[start:]]


def _differentiable(results: Results) -> tuple[Any, ...]:
    return tuple([getattr(results, name) for name in DIFFERENTIABLE_RESULTS])


def _results(differentiable: tuple[Any, ...]) -> Results:
    """Results of which only the differentiable ones are known."""
    known = dict(zip(DIFFERENTIABLE_RESULTS, differentiable, strict=True))
    return Results(**{name: known.get(name) for name in Results._fields})


def _names_of(wanted: Wanted) -> dict[str, bool]:
    """Whether each result is wanted, by its name."""
    return {"out": True, **{f.removeprefix("return_"): x for f, x in wanted._asdict().items()}}


def _those_wanted(results: Results, wanted: Wanted) -> tuple[Tensor, ...]:
    """Return the results; one that is not wanted has no elements."""
    q = results.out
    return tuple(
        x if want else q.new_empty(0, dtype=_score_dtype(q))
        for x, want in zip(results, _names_of(wanted).values(), strict=True)
    )


def _score_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
