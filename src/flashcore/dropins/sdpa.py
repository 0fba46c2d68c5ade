"""Compute torch's scaled_dot_product_attention, argument for argument, on flashcore's kernels.

Every call has one of three ends: the kernels compute it (`as_4d` found the [batch, num_heads,
seqlen, head_dim] view of its tensors); torch computes it, because the kernels do not (`_obstacle`
says why, as a FallbackWarning); or torch refuses it, with torch's own message, because the call is
wrong. The last two are the same line of code: torch is asked, and the warning follows its success.

dropins/routing.py puts this function in torch's place.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd import forward_ad

from flashcore.api import attention
from flashcore.backends.autocasting import autocast_dtype
from flashcore.backends.obstacles import BFLOAT16_MIN_ARCH, WMMA_MIN_ARCH
from flashcore.dropins.sdpa_nested import attention_nested, nested_obstacle, packed
from flashcore.dropins.sdpa_shapes import PLAIN_TYPES, as_4d
from flashcore.errors import FallbackWarning
from flashcore.problem.spelling import OF_SDPA, other_names, refuse
from flashcore.problem.validation import HEAD_DIM_MAX, factor_fits, is_number

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias

# torch's function itself: torch.nn.functional.scaled_dot_product_attention may be this module's.
torch_sdpa = torch._C._nn.scaled_dot_product_attention

# The module takes a second to import, for it imports torch's compiler. Whoever has a CausalBias
# has imported it.
BIAS_MODULE = "torch.nn.attention.bias"

_warned: set[str] = set()


class Call(NamedTuple):
    """A Call holds one call's arguments, as torch names them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Return the arguments that are tensors, or should be."""
        required = [self.query, self.key, self.value]
        return required if self.attn_mask is None else [*required, self.attn_mask]

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

    Signature, meaning and errors are torch's. What the kernels do not compute goes to torch's own
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
    return route(
        Call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa), "auto"
    )


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
            reason = _obstacle(call, tensors[0], tensors[1], tensors[2], None, backend)
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
    reason = _obstacle(call, q, k, v, mask, backend)
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


def _obstacle(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    backend: str,
) -> str | None:
    """Return why torch must be asked; None if there is no such reason, "" if it is not worth a
    warning."""
    if k.is_nested or v.is_nested:
        return "key or value is a nested tensor, and query is not"
    if any(type(x) not in PLAIN_TYPES for x in (q, k, v)):
        return f"{type(q).__name__} is not a plain tensor"
    if any(x.layout != torch.strided for x in (q, k, v)):
        return "query, key or value is sparse"
    # Compiled code has no lazily negated views, and no way to ask for them.
    if not torch.compiler.is_compiling() and any(x.is_neg() for x in (q, k, v)):
        return "query, key or value is a lazily negated view"
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return ""
    if call.dropout_p != 0.0:
        return f"dropout_p={call.dropout_p}: the kernels have no dropout"
    if mask is not None and call.is_causal:
        return "attn_mask together with is_causal"
    if not isinstance(call.is_causal, bool):
        return f"is_causal is a {type(call.is_causal).__name__}, not a bool"
    if call.scale is not None and not (is_number(call.scale) and factor_fits(call.scale)):
        return f"scale={call.scale} is not a positive number"
    return _transformed() or _unserved_dtype(q, backend) or unserved_layout(q, k, v)


def _transformed() -> str | None:
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if torch.compiler.is_compiling():
        return None
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    if any(t.key() != torch._C._functorch.TransformType.Vmap for t in transforms):
        return "a torch.func transform other than vmap"
    return None


def _unserved_dtype(q: torch.Tensor, backend: str) -> str | None:
    if q.device.type == "cpu":
        # Reached with an explicit backend alone: PyTorch operations take any of the four dtypes.
        served = q.dtype in (torch.float16, torch.bfloat16) or backend == "torch"
        return None if served else f"no kernel serves {q.dtype}"
    if q.device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels do not run on {q.device.type} devices of this kind"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"no kernel serves {q.dtype}; float16 and bfloat16 are fused"
    if torch.compiler.is_compiling():
        return None  # the operator looks at the GPU when it runs
    arch = _arch(q.device.index)
    if arch < (BFLOAT16_MIN_ARCH if q.dtype == torch.bfloat16 else WMMA_MIN_ARCH):
        return f"no kernel serves {q.dtype} on sm_{arch}"
    return None


@functools.cache
def _arch(device_index: int | None) -> int:
    if not torch.cuda.is_available():  # a fake tensor on a device that is not here
        return 0
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


def unserved_layout(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Return why the kernels cannot read such tensors; None if they can, "" if torch raises."""
    for name, x in (("query", q), ("key", k), ("value", v)):
        if x.dim() < 2:
            return ""  # torch raises
        head_dim = x.shape[-1]
        if head_dim > HEAD_DIM_MAX:
            return f"{name} has head_dim {head_dim}; the kernels take at most {HEAD_DIM_MAX}"
    return None


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
