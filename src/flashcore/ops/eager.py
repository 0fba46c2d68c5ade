"""Tell what an eager call of `attention` needs to go around torch's dispatcher.

A layer of the dispatcher costs as much as the launch of a kernel, so it is left to the calls that
need it: see `needs_dispatcher` and ops/dense.py. The way itself is calls.attend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from flashcore.backends.dispatch import without_autocast
from flashcore.backends.gradients import prepare_gradients
from flashcore.launch import launcher
from flashcore.launch.types import Computed, PassEntry, Prepared
from flashcore.ops.calls import Found, Result, State
from flashcore.ops.dense import OPERATORS, attention_dense
from flashcore.ops.family import BackwardCall
from flashcore.ops.gradient_calls import circumstances, find_pass, is_current
from flashcore.ops.length_calls import RecordLengths, attend_lengths
from flashcore.ops.operators import Operators
from flashcore.ops.transforms.autograd import needs_grad
from flashcore.problem import Causal, Problem, Window
from flashcore.problem.options import Inputs, Options, Results

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)

# Looked up once, not in every call.
_is_grad_enabled = torch.is_grad_enabled
_len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack
_len_torch_function_stack = torch._C._len_torch_function_stack
_are_functorch_transforms_active = torch._C._are_functorch_transforms_active
_get_tracing_state = torch._C._get_tracing_state


def needs_dispatcher(q: object, k: object, v: object, mask: object) -> bool:
    """Return whether somebody (a mode, a subclass, a transform, a tracer, forward-mode AD) must see
    the call as an operator, or it has to be refused there."""
    if (
        _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return True
    if type(q) is type(k) is type(v) is Tensor and (mask is None or type(mask) is Tensor):
        # A guard asks for strides, which ends the process where a nested tensor has none. Shapes of
        # q and k are asked for before.
        return bool(v.is_nested)
    return any(isinstance(x, Tensor) and type(x) not in _PLAIN_TYPES for x in (q, k, v, mask))


def is_plain(
    lengths: tuple[object, ...],
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    sinks: Any,
    is_recorded: bool = False,
) -> bool:
    """Return whether a call with lengths or sinks needs neither the dispatcher nor, unless it is
    recorded around that, autograd.

    Args:
        lengths: of its sequences.
        q: as in `attention`, like all that follow.
        k: see q.
        v: see q.
        mask: or None.
        sinks: or None; then is_recorded is False.
        is_recorded: whether gradients of q, k and v are recorded around the dispatcher.
    """
    if is_dynamo_compiling() or needs_dispatcher(q, k, v, mask):
        return False
    for x in lengths:
        if type(x) is not Tensor:
            return False
    if sinks is not None and type(sinks) not in _PLAIN_TYPES:
        return False
    if not _is_grad_enabled():
        return True
    if is_recorded:
        return mask is None or not needs_grad(mask)
    if type(q) is type(k) is type(v) is Tensor and mask is None and sinks is None:
        return not (q.requires_grad or k.requires_grad or v.requires_grad)  # what most calls need
    return not needs_grad(q, k, v, mask, sinks)


def attention_with_sinks(
    inputs: Inputs,
    causal: Causal,
    window: Window,
    softcap: float | None,
    scale: float | None,
    return_lse: bool,
    return_max_score: bool,
    backend: str,
    batch_invariant: bool = False,
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, ...]:
    """Compute `attention` where sinks are given, and seqlens_k is not; see there."""
    q, k, v, mask, *_ = inputs
    sinks = inputs.sinks
    if is_plain((), q, k, v, mask, sinks):

        def describe() -> Problem:
            options = Options.checked(causal, window, softcap, scale, batch_invariant)
            return options.problem(q, k, v, mask, return_lse, sinks)

        asked = causal, window, softcap, scale, return_lse, return_max_score
        result = attend_lengths(
            q, k, v, mask, (), sinks, asked, None, backend, describe, batch_invariant
        )
        if result is not None:
            return result
    return attention_dense(
        inputs, causal, window, softcap, scale, return_lse, return_max_score, backend,
        batch_invariant, deterministic,
    )  # fmt: skip


class Recording(NamedTuple):
    """Hold how autograd records the calls of a family that go around the dispatcher.

    Args:
        operators: of the family, for gradients that were not prepared.
        describe: returns the Problem of a backward pass, given inputs and options.
        lengths: the fields of Inputs that say where sequences end, in the order of launch.LENGTHS.
        num_optional: of differentiable inputs behind q, k and v.
    """

    operators: Operators
    describe: Callable[[Inputs, Options], Problem]
    lengths: tuple[str, ...] = ()
    num_optional: int = 1


def _problem_of_dense(inputs: Inputs, options: Options) -> Problem:
    q, k, v, mask, *_ = inputs
    return options.problem(q, k, v, mask, return_lse=True)


_DENSE = Recording(OPERATORS, _problem_of_dense, num_optional=2)


class _Recorded(torch.autograd.Function):
    """Do what the operator's autograd does, for half the time. The backward is the operator, or
    what was prepared in its place.

    Saves q, k, v, the mask, out and lse, so memory is linear in seqlen (besides the user's mask).
    """

    @staticmethod
    def forward(ctx: Any, state: State, q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Result:
        found, return_lse, addresses = state
        computed = found[1](q, k, v, mask[0] if mask else None, addresses)
        ctx.found = found
        ctx.save_for_backward(q, k, v, computed[0], computed[1], *mask)
        if return_lse is False and len(computed) == 2:
            return computed[0]
        return _several(ctx, return_lse, computed)

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *masks = ctx.saved_tensors
        _, *needs = ctx.needs_input_grad
        mask = masks[0] if masks else None
        arriving = dout, others[0] if others else None  # max_score, in its place, has none
        needs_mask = mask is not None and needs[3]
        computed = _differentiate(
            _DENSE, ctx.found, (q, k, v, out, lse), arriving, mask, (), None, needs_mask
        )
        return None, *[g if need else None for g, need in zip(computed, needs, strict=False)]


class _RecordedLengths(torch.autograd.Function):
    """Do the same for sequences that differ in length. The mask and lengths, which have no
    gradient, come with the state."""

    @staticmethod
    def forward(ctx: Any, state: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor) -> Result:
        (found, return_lse, addresses), mask, lengths, ctx.recording, ctx.longest = state
        computed = found[1](q, k, v, mask, addresses)
        ctx.found = found
        masks = () if mask is None else (mask,)
        ctx.save_for_backward(q, k, v, computed[0], computed[1], *lengths, *masks)
        if return_lse is False and len(computed) == 2:
            return computed[0]
        return _several(ctx, return_lse, computed)

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *rest = ctx.saved_tensors
        recording: Recording = ctx.recording
        num = len(recording.lengths)
        mask = rest[num] if len(rest) > num else None
        arriving = dout, others[0] if others else None
        lengths = tuple(rest[:num])
        computed = _differentiate(
            recording, ctx.found, (q, k, v, out, lse), arriving, mask, lengths, ctx.longest, False
        )
        _, *needs = ctx.needs_input_grad
        return None, *[g if need else None for g, need in zip(computed, needs, strict=False)]


def _several(ctx: Any, return_lse: bool, computed: Computed) -> tuple[Tensor, ...]:
    """Return what a recorded call does that returns more than out."""
    out, lse, *max_score = computed
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*max_score)
    return (out, lse, *max_score) if return_lse else (out, *max_score)


def _differentiate(
    recording: Recording,
    found: Found,
    of_rows: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    arriving: tuple[Tensor | None, Tensor | None],
    mask: Tensor | None,
    lengths: tuple[Tensor, ...],
    longest: tuple[int, int] | None,
    needs_mask: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v and the mask, and perhaps more: by what was prepared for such
    tensors, else by the operator, which is recorded in turn.

    Args:
        recording: of the family.
        found: what computed the call.
        of_rows: q, k, v, out and lse.
        arriving: gradients of out and lse, None for zero.
        mask: of the call, or None.
        lengths: as recording.lengths names them.
        longest: bounds of packed sequences of queries and keys, or None.
        needs_mask: whether the mask needs a gradient.
    """
    dout, dlse = arriving
    if dout is not None and dlse is None and not needs_mask and not _is_grad_enabled():
        prepared = _find_pass(recording, found, (*of_rows, dout), mask, lengths, longest)
        if prepared is not None:
            run, addresses = prepared
            return *run(addresses), None
    *qkv, out, lse = of_rows
    inputs = _inputs(recording, qkv, mask, lengths, longest)
    needs = (needs_mask, False)[-recording.num_optional :]
    return recording.operators.gradients(
        BackwardCall(
            Results(dout, dlse), inputs, Results(out, lse), found.options, needs, found.backend
        )
    )


def _find_pass(
    recording: Recording,
    found: Found,
    of_rows: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    mask: Tensor | None,
    lengths: tuple[Tensor, ...],
    longest: tuple[int, int] | None,
) -> tuple[Prepared, tuple[int, ...]] | None:
    """Return what was prepared for such tensors, and what it takes, or None; `of_rows` ends with
    the gradient of out."""
    q, k, _, _, _, dout = of_rows
    if not is_current(q) or needs_dispatcher(q, k, dout, mask):
        return None

    def prepare() -> Prepared | None:
        *qkv, out, lse, _ = of_rows
        inputs = _inputs(recording, qkv, mask, lengths, longest)
        problem = recording.describe(inputs, found.options)
        named = dict(zip(recording.lengths, lengths, strict=True))
        with without_autocast(problem.device):
            return prepare_gradients(problem, *inputs[:4], out, lse, dout, found.backend, named)

    others = lengths if mask is None else (mask, *lengths)
    return find_pass(found.passes, of_rows, others, prepare)


def _inputs(
    recording: Recording,
    qkv: Sequence[Tensor],
    mask: Tensor | None,
    lengths: tuple[Tensor, ...],
    longest: tuple[int, int] | None,
) -> Inputs:
    longest_q, longest_k = longest or (0, 0)
    named: dict[str, Any] = dict(zip(recording.lengths, lengths, strict=True))
    q, k, v = qkv
    return Inputs(q, k, v, mask, max_seqlen_q=longest_q, max_seqlen_k=longest_k, **named)


def _run_pass(found: Found, *of_rows: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return dq, dk and dv of a call that the compiled launcher recorded, or None."""
    prepared = _find_pass(_DENSE, found, of_rows, None, (), None)  # type: ignore[arg-type]
    return None if prepared is None else prepared[0](prepared[1])


def _entry_of_pass(found: Found, *of_rows: Tensor) -> PassEntry | None:
    """Return what the compiled launcher needs to compute those itself, or None."""
    prepared = _find_pass(_DENSE, found, of_rows, None, (), None)  # type: ignore[arg-type]
    return None if prepared is None else prepared[0].entry()


def launched_by(device: str) -> str:
    """Return what makes eager calls on a device, "python" or "compiled", once it is settled."""
    return launcher.settled() if device == "cuda" else "python"


launcher.passes = launcher.Passes(_entry_of_pass, _run_pass, circumstances)
# torch.autograd.Function.apply first looks for functorch's transforms, which never come here.
record = super(torch.autograd.Function, _Recorded).apply
_record_lengths = super(torch.autograd.Function, _RecordedLengths).apply


def recorder(recording: Recording) -> RecordLengths:
    """Return what records the calls of a family whose sequences differ in length."""

    def record_lengths(
        state: State,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        lengths: tuple[Tensor, ...],
        longest: tuple[int, int] | None,
    ) -> Any:
        return _record_lengths((state, mask, lengths, recording, longest), q, k, v)

    return record_lengths
