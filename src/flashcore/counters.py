"""Counters on a GPU by which the blocks of one launch share out work, 0 between launches.

A kernel that draws from a counter puts it back to 0 at its end, so no call has to clear it.
Launches that may run at the same time must not share one: every stream has its own, and so has
every stream of a CUDA graph's capture, for a graph may be replayed beside anything. A prepared
argument has its own too: who launches it twice at the same time has two kernels write one output.
"""

from __future__ import annotations

import threading

import torch

from flashcore.driver import import_driver

_COUNTERS = 1 << 18  # of a pool, 1 MiB; none is freed, for graphs and arguments keep addresses

_lock = threading.Lock()
_pools: dict[int, list[torch.Tensor]] = {}  # by device index, the one in use last
_num_taken: dict[int, int] = {}
_of_streams: dict[tuple[int, int], torch.Tensor] = {}  # by device index and stream handle
_of_captures: dict[tuple[int, int], tuple[int, torch.Tensor]] = {}  # likewise, of the last one


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
    if torch.cuda.is_current_stream_capturing():
        return _of_capture(device, key, count)
    found = _of_streams.get(key)
    if found is not None and found.shape[0] >= count:
        return found
    with _lock:
        counters = _of_streams[key] = _take(device, count, False)
        return counters


def own_counter(device: torch.device) -> torch.Tensor:
    """A counter that nobody else gets, for as long as the process lives. Not during a capture.

    Args:
        device: a CUDA device with its index.

    Returns:
        int32, [1], on the device; 0 when the current stream gets there.
    """
    with _lock:
        return _take(device, 1, False)


def _of_capture(device: torch.device, key: tuple[int, int], count: int) -> torch.Tensor:
    capture = _capture_id(key[1])
    with _lock:
        known = _of_captures.get(key)
        if known is not None and known[0] == capture and known[1].shape[0] >= count:
            return known[1]
        counters = _take(device, count, True)
        if capture is not None:
            _of_captures[key] = capture, counters
        return counters


def _capture_id(stream: int) -> int | None:
    """Which capture a stream is part of, unlike all others of the process; None if the driver will
    not say."""
    driver = import_driver()
    status, _, identity, *_ = driver.cuStreamGetCaptureInfo(driver.CUstream(stream))
    return None if status else int(identity)


def _take(device: torch.device, count: int, capturing: bool) -> torch.Tensor:
    index = device.index
    count = 1 << (count - 1).bit_length()  # who asks for more and more leaves few behind
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
