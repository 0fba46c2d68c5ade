"""Compute torch's scaled_dot_product_attention, argument for argument, on flashcore's kernels.

Every call has one of three ends: the kernels compute it (`as_4d` found the [batch, num_heads,
seqlen, head_dim] view of its tensors); torch computes it, because the kernels do not (`obstacle`
says why, as a FallbackWarning); or torch refuses it, with torch's own message, because the call is
wrong. The last two are the same line of code: torch is asked, and the warning follows its success.

dropins/routing.py puts this function in torch's place.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from flashcore.api import attention
from flashcore.backends.autocasting import autocast_dtype
from flashcore.dropins.sdpa.call import Arguments
from flashcore.dropins.sdpa.nested import attention_nested, nested_obstacle, packed
from flashcore.dropins.sdpa.obstacles import obstacle
from flashcore.dropins.sdpa.shapes import PLAIN_TYPES, as_4d
from flashcore.errors import FallbackWarning
from flashcore.launch import launcher
from flashcore.ops.calls import Found, attend, find
from flashcore.ops.eager import needs_dispatcher, record
from flashcore.problem.spelling import OF_SDPA, other_names, refuse

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias

# torch's function itself: torch.nn.functional.scaled_dot_product_attention may be this module's.
torch_sdpa = torch._C._nn.scaled_dot_product_attention

# The module takes a second to import, for it imports torch's compiler. A caller with a CausalBias
# has imported it.
BIAS_MODULE = "torch.nn.attention.bias"

_warned: set[str] = set()
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled  # looked up once, not in every call


class Call(Arguments):
    """A Call is one that torch, or its classes, can compute too."""

    __slots__ = ()

    def by_torch(self) -> torch.Tensor:
        """Return what torch makes of it: a result, or its error."""
        with _in_forward_mode():
            if causal_bias(self.attn_mask) is not None:
                return self.by_its_classes()
            return torch_sdpa(*self[:6], scale=self.scale, enable_gqa=self.enable_gqa)

    def by_its_classes(self) -> torch.Tensor:
        """Return what a tensor subclass makes of it, through its __torch_function__."""
        if not torch.overrides.has_torch_function(self.tensors):  # a class calls from within
            return torch_sdpa(*self[:6], scale=self.scale, enable_gqa=self.enable_gqa)
        # Classes compare what they are given with this name, which enable() may have rebound.
        public: Any = torch.nn.functional.scaled_dot_product_attention
        positional: Any = self[:6]
        options = {"scale": self.scale, "enable_gqa": self.enable_gqa}
        return torch.overrides.handle_torch_function(public, self.tensors, *positional, **options)


@other_names(OF_SDPA)
def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    **_unknown: object,
) -> torch.Tensor:
    """Compute torch.nn.functional.scaled_dot_product_attention on flashcore's kernels.

    Signature, meaning and errors are torch's. Calls that no kernel computes go to torch's own
    function, with one FallbackWarning per reason and process; see docs/drop-ins.md for the list.
    CPU tensors go there without a warning, for no kernel is passed over; so do calls with nothing
    to compute (a size of 0).

    Args:
        query: [..., num_heads_q, seqlen_q, head_dim], float16 or bfloat16 on a GPU for the
            kernels. Leading dimensions of query, key and value broadcast against each other;
            there may be none ([seqlen, head_dim]) or several.
        key: [..., num_heads_kv, seqlen_k, head_dim].
        value: [..., num_heads_kv, seqlen_k, head_dim_v].
        attn_mask: boolean (True = attend) or additive, broadcastable to [..., num_heads_q,
            seqlen_q, seqlen_k]; or a torch.nn.attention.bias.CausalBias, of which no mask is made.
        dropout_p: probability of dropping a weight. The kernels know only 0.
        is_causal: query i sees keys up to i ("upper_left" in flashcore.attention).
        scale: multiplies query.key; 1 / sqrt(head_dim) by default.
        enable_gqa: allow num_heads_q to be a multiple of num_heads_kv. Nothing is repeated.

    Returns:
        [..., num_heads_q, seqlen_q, head_dim_v], dtype of query (under torch.autocast, of
        autocast). A row with nothing to attend to is 0.

    Raises:
        TypeError: as torch does.
        RuntimeError: as torch does, e.g. for shapes that do not fit.
        BackendUnavailableError: the GPU kernels cannot be compiled or launched here.

    Numerics:
        Those of flashcore.attention; see docs/numerics.md.

    Source:
        torch.nn.functional.scaled_dot_product_attention, torch 2.8 to 2.13.
    """
    if _unknown:
        refuse(scaled_dot_product_attention, _unknown)
    result = known(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, "auto"
    )  # fmt: skip
    if result is not None:
        return result
    return route(
        Call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa), "auto"
    )


def known(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str,
) -> torch.Tensor | None:
    """Compute a call whose tensors are what `attention` takes, and which nobody else needs to see.

    One such call in a row is looked at closely; those like it are looked up by their arguments.

    Returns:
        The output; None where `route` has to look at the call.
    """
    if (
        is_dynamo_compiling()
        or dropout_p != 0.0
        or (is_causal is not False and is_causal is not True)
    ):
        return None
    causal = "upper_left" if is_causal else False
    decide = _decide_grouped if enable_gqa else _decide_equal
    if launcher.attend is not None:
        result: torch.Tensor | None = launcher.attend(
            query, key, value, attn_mask, causal, None, None, scale, None, False, backend, True,
            decide,
        )  # fmt: skip
        if result is not None:
            return result
    if _is_any_autocast_enabled() or needs_dispatcher(query, key, value, attn_mask):
        return None
    return attend(  # type: ignore[return-value]
        query, key, value, attn_mask, causal, None, None, scale, False, backend, record, decide
    )  # fmt: skip


def _decide(
    enable_gqa: bool,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: Any,
    window: None,
    softcap: None,
    scale: float | None,
    return_lse: bool,
    backend: str,
    recorded: bool,
    key: object,
) -> Found | None:
    """Return what `find` does for a call that means the same there; None for others."""
    if key is None or _left_to_torch(q, backend):
        return None
    call = Call(q, k, v, mask, 0.0, causal is not False, scale, enable_gqa)
    if obstacle(call, q, k, v, mask, backend) is not None:
        return None
    view = as_4d(q, k, v, mask, enable_gqa)
    if view is None or any(x is not y for x, y in zip(view, (q, k, v, mask), strict=False)):
        return None
    return find(
        q, k, v, mask, causal, window, softcap, scale, return_lse, backend, recorded, key
    )  # fmt: skip


# One for each meaning of enable_gqa, for what they find is kept apart.
_decide_equal, _decide_grouped = (functools.partial(_decide, x) for x in (False, True))


def route(call: Call, backend: str) -> torch.Tensor:
    """Compute a call on a backend of `attention` ("auto" leaves CPU tensors to torch), or by torch.

    Args:
        call: the arguments.
        backend: "auto", "sm90", "wmma", "sim" or "torch".

    Returns:
        The output, as torch shapes it.
    """
    tensors = call.tensors
    if not all(isinstance(x, torch.Tensor) for x in tensors):
        return call.by_torch()  # raises
    bias = causal_bias(call.attn_mask)
    if bias is not None:
        return _route_causal_bias(call, bias, backend)
    if call.query.is_nested:
        return _route_nested(call, backend)
    if any(type(x) not in PLAIN_TYPES for x in tensors) and _overridden(tensors):
        return call.by_its_classes()
    return _compute(call, backend, "upper_left" if call.is_causal is True else False)


def _in_forward_mode() -> contextlib.AbstractContextManager[None]:
    """Return whether forward mode asks for torch's sequence of plain operations, the only one of
    its kernels that has it."""
    if forward_ad._current_level < 0:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


def _left_to_torch(query: torch.Tensor, backend: str) -> bool:
    """Return whether no kernel is passed over: a meta tensor has nothing to compute."""
    return query.is_meta or (backend == "auto" and query.device.type == "cpu")


def _overridden(tensors: list[torch.Tensor]) -> bool:
    """Return whether a tensor's class has a __torch_function__ of its own (a mode does not
    count)."""
    passive = (torch.Tensor.__torch_function__, torch._C._disabled_torch_function_impl)
    return any(getattr(type(x), "__torch_function__", None) not in passive for x in tensors)


def causal_bias(mask: torch.Tensor | None) -> CausalBias | None:
    """Return the mask if it is a torch.nn.attention.bias.CausalBias, else None."""
    if mask is None or type(mask) in PLAIN_TYPES:
        return None
    module: Any = sys.modules.get(BIAS_MODULE)
    return mask if module is not None and isinstance(mask, module.CausalBias) else None


def _route_causal_bias(call: Call, bias: CausalBias, backend: str) -> torch.Tensor:
    """Compute a call whose mask is a CausalBias, an option of the kernels; torch's class would
    answer for itself otherwise."""
    lengths = (call.query.shape[-2], call.key.shape[-2]) if call.query.dim() > 1 else None
    if call.is_causal or lengths != (bias.seq_len_q, bias.seq_len_kv):
        return call.by_torch()
    return _compute(call, backend, bias.variant.name.lower())  # "upper_left" or "lower_right"


def _route_nested(call: Call, backend: str) -> torch.Tensor:
    """Send packed sequences to attention_varlen, and the rest to torch."""
    if _left_to_torch(call.query, backend):
        return call.by_torch()
    reason = nested_obstacle(call)
    if reason is None:
        tensors = [packed(x) for x in call.tensors]
        if autocast_dtype(call.query.device.type) is None:
            reason = obstacle(call, tensors[0], tensors[1], tensors[2], None, backend)
        else:
            reason = "torch.autocast with nested tensors"
        if reason is None:
            return attention_nested(call, backend)
    out = call.by_torch()
    if reason:
        _warn(reason)
    return out


def _compute(call: Call, backend: str, causal: bool | str) -> torch.Tensor:
    q, k, v, mask = call.query, call.key, call.value, call.attn_mask
    if _left_to_torch(q, backend):
        return call.by_torch()
    if causal_bias(mask) is not None:  # that is in `causal`
        mask = None
    dtype = autocast_dtype(q.device.type)
    if dtype is not None:
        q, k, v = (_autocast(x, dtype) for x in (q, k, v))
        mask = None if mask is None else _autocast(mask, dtype)
    reason = obstacle(call, q, k, v, mask, backend)
    if reason is None:
        view = as_4d(q, k, v, mask, call.enable_gqa)
        if view is not None:
            out = attention(
                view.q, view.k, view.v, causal=causal, scale=call.scale, mask=view.mask,
                backend=backend,
            )  # fmt: skip
            return out if out.shape == view.out_shape else out.reshape(view.out_shape)
        reason = "only torch combines these shapes and dtypes"  # if they are not simply wrong
    out = call.by_torch()
    if reason:
        _warn(reason)
    return out


def _autocast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return an argument of SDPA, cast as torch.autocast does."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def _warn(reason: str) -> None:
    """Give one FallbackWarning per reason and process; none while compiling, which runs but
    once."""
    if torch.compiler.is_compiling() or reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(
        f"scaled_dot_product_attention falls back to torch: {reason}. The result is the same; "
        "filter flashcore.FallbackWarning to silence this",
        FallbackWarning,
        stacklevel=5,  # the caller of scaled_dot_product_attention
    )
