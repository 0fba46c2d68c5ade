"""Counters on a GPU by which the blocks of one launch share out work, 0 between launches.

A kernel that draws from a counter puts it back to 0 at its end, so no call has to clear it.
Launches that may run at the same time must not share one: every stream has its own, and so has
every launch that a CUDA graph captures, for a graph may be replayed beside anything. A prepared
argument has its own too: who launches it twice at the same time has two kernels write one output.
"""

from __future__ import annotations

import threading

import torch

_COUNTERS = 1 << 18  # of a pool, 1 MiB; none is freed, for graphs and arguments keep addresses

_lock = threading.Lock()
_pools: dict[int, list[torch.Tensor]] = {}  # by device index, the one in use last
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


def own_counter(device: torch.device) -> torch.Tensor:
    """A counter that nobody else gets.

    Args:
        device: a CUDA device with its index.

    Returns:
        int32, [1], on the device; 0 when the current stream gets there. It lives as long as the
        process, unless a graph is being captured, whose own it may be.
    """
    with _lock:
        return _take(device, torch.cuda.is_current_stream_capturing())


def _take(device: torch.device, capturing: bool) -> torch.Tensor:
    index = device.index
    pools = _pools.setdefault(index, [])
    if not pools or _num_taken[index] == _COUNTERS:
        if capturing:  # a pool made now would belong to the graph; this one is cleared at replay
            return torch.zeros(1, dtype=torch.int32, device=device)
        pools.append(torch.zeros(_COUNTERS, dtype=torch.int32, device=device))
        _num_taken[index] = 0
        torch.cuda.current_stream(device).synchronize()  # once: other streams may use it next
    taken = _num_taken[index]
    _num_taken[index] = taken + 1
    return pools[-1][taken : taken + 1]
