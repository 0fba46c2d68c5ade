"""Ask torch.autocast in a way that every type of device can answer."""

from __future__ import annotations

import torch

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
