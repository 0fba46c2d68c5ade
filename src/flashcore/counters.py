"""Counters on a GPU by which the blocks of one launch share out work, 0 between launches.

A kernel that draws from a counter puts it back to 0 at its end, so no call has to clear it.
Launches that may run at the same time must not share one: every stream has its own, and so has
every launch that a CUDA graph captures, for a graph may be replayed beside anything.
"""

from __future__ import annotations

import threading

import torch

_COUNTERS = 1 << 18  # of a device, 1 MiB; graphs keep theirs

_lock = threading.Lock()
_pools: dict[int, torch.Tensor] = {}  # by device index
_num_taken: dict[int, int] = {}
_of_streams: dict[tuple[int, int], torch.Tensor] = {}  # by device index and stream handle


def work_counter(device: torch.device) -> torch.Tensor:
    """A counter for one launch on the device's current stream.

    Args:
        device: a CUDA device with its index.

    Returns:
        int32, [1], on the device; 0 when the stream gets there.
    """
    assert device.index is not None
    key = device.index, torch.cuda.current_stream(device).cuda_stream
    capturing = torch.cuda.is_current_stream_capturing()
    with _lock:
        if not capturing and key in _of_streams:
            return _of_streams[key]
        counter = _take(device, capturing)
        if not capturing:
            _of_streams[key] = counter
        return counter


def _take(device: torch.device, capturing: bool) -> torch.Tensor:
    index = device.index
    if index not in _pools or _num_taken[index] == _COUNTERS:
        if capturing:  # a pool made now would belong to the graph; this one is cleared at replay
            return torch.zeros(1, dtype=torch.int32, device=device)
        _pools[index] = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
        _num_taken[index] = 0
        torch.cuda.current_stream(device).synchronize()  # once: other streams may use it next
    taken = _num_taken[index]
    _num_taken[index] = taken + 1
    return _pools[index][taken : taken + 1]
