"""Say why the kernels do not compute a call of scaled_dot_product_attention."""

from __future__ import annotations

import functools

import torch
from torch.autograd import forward_ad

from flashcore.backends.obstacles import BFLOAT16_MIN_ARCH, WMMA_MIN_ARCH
from flashcore.dropins.sdpa.call import Arguments
from flashcore.dropins.sdpa.shapes import PLAIN_TYPES
from flashcore.problem.validation import HEAD_DIM_MAX, factor_fits, is_number


def obstacle(
    call: Arguments,
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
