"""torch.autocast, asked in a way that every type of device can answer."""

from __future__ import annotations

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that torch.autocast casts to on a type of device; None where it does not."""
    # Of a device without autocast, as "meta" is, torch must not even be asked.
    if not torch.amp.is_autocast_available(device_type):
        return None
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)
