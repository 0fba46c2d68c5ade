"""Counters on a GPU by which the blocks of one launch share out work, 0 between launches.

A kernel that draws from a counter puts it back to 0 at its end, so no call has to clear it.
Launches that may run at the same time must not share one: every stream has its own, and so has
every launch that a CUDA graph captures, for a graph may be replayed beside anything. A prepared
argument has its own too: who launches it twice at the same time has two kernels write one output.
"""

from __future__ import annotations

import threading

import torch

_COUNTERS = 1 << 20  # of a pool, 4 MiB; none is freed, for graphs and arguments keep addresses

_lock = threading.Lock()
_pools: dict[int, list[torch.Tensor]] = {}  # by device index, the one in use last
_num_taken: dict[int, int] = {}
_of_streams: dict[tuple[int, int], torch.Tensor] = {}  # by device index and stream handle


def work_counters(device: torch.device, count: int = 1) -> torch.Tensor:
    """Counters for one launch on the device's current stream.

    Args:
        device: a CUDA device with its index.
        count: how many, at least.

    Returns:
        int32, [count] or more, on the device; 0 when the stream gets there.
    """
    assert device.index is not None
    key = device.index, torch._C._cuda_getCurrentRawStream(device.index)
    capturing = torch.cuda.is_current_stream_capturing()
    found = _of_streams.get(key)
    if found is not None and not capturing and found.shape[0] >= count:
        return found
    with _lock:
        # Powers of two: a stream that asks for more and more leaves few behind.
        counters = _take(device, capturing, 1 << (count - 1).bit_length())
        if not capturing:
            _of_streams[key] = counters
        return counters


def own_counter(device: torch.device) -> torch.Tensor:
    """A counter that nobody else gets.

    Args:
        device: a CUDA device with its index.

    Returns:
        int32, [1], on the device; 0 when the current stream gets there. It lives as long as the
        process, unless a graph is being captured, whose own it may be.
    """
    with _lock:
        return _take(device, torch.cuda.is_current_stream_capturing(), 1)


def _take(device: torch.device, capturing: bool, count: int) -> torch.Tensor:
    index = device.index
    pools = _pools.setdefault(index, [])
    if not pools or _num_taken[index] + count > pools[-1].shape[0]:
        if capturing:  # a pool made now would belong to the graph; these are cleared at replay
            return torch.zeros(count, dtype=torch.int32, device=device)
        pools.append(torch.zeros(max(_COUNTERS, count), dtype=torch.int32, device=device))
        _num_taken[index] = 0
        torch.cuda.current_stream(device).synchronize()  # once: other streams may use it next
    taken = _num_taken[index]
    _num_taken[index] = taken + count
    return pools[-1][taken : taken + count]
