"""Ask torch.autocast in a way that every type of device can answer."""

from __future__ import annotations

import torch

from flashcore.problem.scales import is_float8

# Of a device without autocast, as "meta" is, torch must not even be asked. Found out once: the
# compiler of torch 2.11 cannot trace the question.
_HAVE_AUTOCAST = frozenset(
    name for name in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(name)
)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype that torch.autocast casts to on a type of device; None where it does not."""
    if device_type not in _HAVE_AUTOCAST or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def cast_like(x: torch.Tensor | None, cache: torch.Tensor) -> torch.Tensor | None:
    """Return queries or new tokens in the dtype of a cache under autocast, or where the cache is of
    8 bits, in that of autocast; what is no tensor of numbers as it is."""
    if not isinstance(x, torch.Tensor) or not isinstance(cache, torch.Tensor):
        return x
    if not x.is_floating_point():
        return x
    return x.to(autocast_dtype(x.device.type) if is_float8(cache) else cache.dtype)
