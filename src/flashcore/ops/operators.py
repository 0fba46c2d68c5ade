"""Make operators by one factory: forward, backward, fakes, autograd, vmap and FLOPs of a family.

A Family describes what is its own: which inputs it takes, how it computes, where a batch that vmap
maps over finds room. Everything that follows from that is derived here, from the fields of
problem/options.py. ops/dense.py, ops/padded.py and ops/varlen.py are the families.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcore.backends.dispatch import check_backend, without_autocast
from flashcore.ops import flops
from flashcore.ops.family import (
    ALWAYS_DIFFERENTIABLE,
    BackwardCall,
    Family,
    ForwardCall,
    differentiable_of,
    names_of,
    refuse_gradients,
    results_of,
    score_dtype,
    those_wanted,
)
from flashcore.ops.transforms.autograd import needs_grad, register_autograd, warn_of_forward_mode
from flashcore.ops.transforms.batching import backward_over_batch, forward_over_batch
from flashcore.ops.transforms.recorded import recording
from flashcore.problem.options import (
    DIFFERENTIABLE_RESULTS,
    Inputs,
    Options,
    Results,
    Wanted,
    schema_of,
)

_LIBRARY = torch.library.Library("flashcore", "DEF")
# A compiler may choose other strides for what lies between operators; head_dim must stay
# contiguous, an expanded mask should stay expanded, and strides decide which kernel serves.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


class Operators:
    """Define and register the operators of a family.

    Args:
        family: see Family.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        # Where an operator's argument is each of Inputs; or None, and what stands for it.
        self._places = [
            (family.inputs.index(x) if x in family.inputs else None, Inputs._field_defaults.get(x))
            for x in Inputs._fields
        ]
        self._needs = tuple(
            f"needs_{name}_grad" for name in family.differentiable[ALWAYS_DIFFERENTIABLE:]
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
        wanted.checked()
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
            *differentiable_of(call.arriving),
            *self._given(call.inputs),
            *differentiable_of(call.results),
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
        return Inputs._make([x if at is None else arguments[at] for at, x in self._places])

    def forward_call(self, arguments: tuple[Any, ...]) -> ForwardCall:
        """Return the forward operator's arguments as objects."""
        inputs, options, wanted, (backend,) = _cut(
            arguments, len(self.family.inputs), len(Options._fields), len(Wanted._fields)
        )
        return ForwardCall(self._inputs(inputs), Options(*options), Wanted(*wanted), backend)

    def backward_call(self, arguments: tuple[Any, ...]) -> BackwardCall:
        """Return the backward operator's arguments as objects."""
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
            results_of(arriving), self._inputs(inputs), results_of(results), Options(*options),
            needs, backend,
        )  # fmt: skip

    def _register(self) -> None:
        record_forward, record_backward = recording(self.family, self)
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
        call = self.forward_call(arguments)
        return those_wanted(self.family.compute(*call), call.wanted)

    def _forward_fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        call = self.forward_call(arguments)
        self.family.check(call.inputs)
        check_backend(call.backend)
        q, shapes = call.inputs.q, self.family.shapes(call.inputs)
        # out has the dtype of q, what is said of scores that of the scores.
        results = [q.new_empty(shapes.out)]
        results += [q.new_empty(shape, dtype=score_dtype(q)) for shape in shapes[1:]]
        return those_wanted(Results(*results), call.wanted)

    def _forward_plain(self, *arguments: Any) -> tuple[Tensor, ...]:
        call = self.forward_call(arguments)
        self.family.check(call.inputs)
        options = call.options.with_checked_factors()
        warn_of_forward_mode(call.inputs.q, call.backend)
        with without_autocast(call.inputs.q.device.type):
            return those_wanted(self.family.plain(call.inputs, options), call.wanted)

    def _forward_vmap(self, info: Any, in_dims: Any, *arguments: Any) -> Any:
        call = self.forward_call(arguments)
        number = len(self.family.inputs)
        return forward_over_batch(
            self.forward,
            self.family.places,
            info.batch_size,
            dict(zip(self.family.inputs, in_dims, strict=False)),
            dict(zip(self.family.inputs, arguments[:number], strict=True)),
            arguments[number:],
            [name for name, x in names_of(call.wanted).items() if x],
        )

    def _backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        call = self.backward_call(arguments)
        check_backend(call.backend)
        with without_autocast(call.inputs.q.device.type):
            gradients = self.family.differentiate(*call)
        return self._those_needed(call, gradients)

    def _backward_fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        call = self.backward_call(arguments)
        check_backend(call.backend)
        inputs = [getattr(call.inputs, name) for name in self.family.differentiable]
        gradients = [None if x is None else torch.empty_like(x) for x in inputs]
        return self._those_needed(call, gradients)

    def _backward_plain(self, *arguments: Any) -> tuple[Tensor, ...]:
        call = self.backward_call(arguments)
        with without_autocast(call.inputs.q.device.type):
            gradients = self.family.differentiate_plain(call.arriving, call.inputs, call.options)
        return self._those_needed(call, gradients)

    def _backward_vmap(self, info: Any, in_dims: Any, *arguments: Any) -> Any:
        names = (
            *(f"d{name}" for name in DIFFERENTIABLE_RESULTS),
            *self.family.inputs,
            *DIFFERENTIABLE_RESULTS,
        )
        needs = self.backward_call(arguments).needs
        optional = self.family.differentiable[ALWAYS_DIFFERENTIABLE:]
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
        needs = (*(True,) * ALWAYS_DIFFERENTIABLE, *call.needs)
        return tuple(
            call.inputs.q.new_empty(0) if g is None or not need else g
            for g, need in zip(gradients, needs, strict=True)
        )


def _tensors(count: int) -> str:
    return ", ".join(["Tensor"] * count)


def _cut(arguments: tuple[Any, ...], *counts: int) -> list[tuple[Any, ...]]:
    """Return arguments in groups of so many; the rest comes last."""
    groups, start = [], 0
    for count in counts:
        groups.append(arguments[start : start + count])
        start += count
    return [*groups, arguments[start:]]
