"""Torch's own kernels of aten operators that `integrations/torch.py` may have replaced.

A fall-back to torch's operator must not end in the function that stands in its place: that one
falls back in turn. So the kernels are kept here before they are replaced.
"""

from __future__ import annotations

from typing import Any

import torch

FLASH_BACKWARD = "_flash_attention_backward"

_kept: dict[tuple[str, str], Any] = {}  # by operator and dispatch key


def keep(name: str, key: str) -> None:
    """Keep the kernel that an aten operator has for a dispatch key. Where it has none, nothing is
    kept; what is kept already stays.

    Args:
        name: of the operator, without its namespace.
        key: "CUDA" or "CPU".
    """
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key):
        _kept.setdefault((name, key), torch.library.get_kernel(f"aten::{name}", key))


def release(key: str) -> None:
    """Forget the kernels of a dispatch key: the operators have them again."""
    for kept in [kept for kept in _kept if kept[1] == key]:
        del _kept[kept]


def has_own(name: str, key: str) -> bool:
    """Return whether a kernel is kept."""
    return (name, key) in _kept


def call_own(name: str, key: str, *arguments: Any, **options: Any) -> Any:
    """Call torch's own kernel of an aten operator, whatever stands in its place.

    Args:
        name: of the operator, without its namespace.
        key: the dispatch key, that of the tensors' device: "CUDA" or "CPU".
        *arguments: of the operator.
        **options: of the operator.

    Returns:
        Its result.
    """
    kernel = _kept.get((name, key))
    if kernel is None:
        return getattr(torch.ops.aten, name)(*arguments, **options)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.__members__[key])
    return kernel.call_boxed(keys, *arguments, **options)


def flash_attention_backward(*arguments: Any, **options: Any) -> Any:
    """Call aten's `_flash_attention_backward` on CUDA tensors, FlashAttention-2's; see there."""
    return call_own(FLASH_BACKWARD, "CUDA", *arguments, **options)
