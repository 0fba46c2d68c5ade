"""Keep counters on a GPU by which the blocks of one launch share out work, 0 between launches.

A kernel that draws from a counter puts it back to 0 at its end, so no call has to clear it.
Launches that may run at the same time must not share one: every stream has its own, and so has
every stream of a CUDA graph's capture, for a graph may be replayed beside anything.

Their memory comes from the driver, not from torch's allocator. While a graph is captured, and while
torch.compile warms one up, that takes all memory from the graph's own pool, whose owner clears it,
gives it to others, and counts what is left in it.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch

from flashcore.launch.driver import allocate_zeros, import_driver

_COUNTERS = 1 << 18  # of a pool, 1 MiB; none is freed, for graphs and arguments keep addresses
COUNTER_BYTES = 4


class _Counters(NamedTuple):
    address: int
    number: int


_NO_COUNTERS = _Counters(0, 0)
_lock = threading.Lock()
_free: dict[int, _Counters] = {}  # by device index, what is left of the pool in use
_of_streams: dict[tuple[int, int], _Counters] = {}  # by device index and stream handle
_of_captures: dict[tuple[int, int], tuple[int, _Counters]] = {}  # the last capture of each


def work_counters(device: torch.device, count: int = 1) -> int:
    """Return the address of counters for one launch on the device's current stream.

    Args:
        device: a CUDA device with its index.
        count: how many, at least.

    Returns:
        Where `count` int32 are, or more, which are 0 when the stream gets there.
    """
    index = device.index
    assert index is not None
    key = index, torch._C._cuda_getCurrentRawStream(index)
    if torch.cuda.is_current_stream_capturing():
        return _of_capture(key, count)
    address, number = _of_streams.get(key, _NO_COUNTERS)
    if number < count:
        with _lock:
            address, _ = _of_streams[key] = _take(index, count)
    return address


def clear_counters(device: torch.device, address: int, count: int) -> None:
    """Put counters back to 0, behind what was launched on the device's current stream: kernels that
    would have done so could not be launched.

    Args:
        device: a CUDA device with its index.
        address: of work_counters, on this stream.
        count: how many were asked for.
    """
    driver = import_driver()
    stream = driver.CUstream(torch._C._cuda_getCurrentRawStream(device.index))
    # Where that fails, too, nothing runs on the device any more, or the capture is void; who calls
    # says why.
    driver.cuMemsetD8Async(address, 0, count * COUNTER_BYTES, stream)


def _of_capture(key: tuple[int, int], count: int) -> int:
    capture = _capture_id(key[1])
    with _lock:
        known = _of_captures.get(key)
        if known is not None and known[0] == capture and known[1].number >= count:
            return known[1].address
        counters = _take(key[0], count)
        if capture is not None:
            _of_captures[key] = capture, counters
        return counters.address


def _capture_id(stream: int) -> int | None:
    """Return which capture a stream is part of, unlike all others of the process; None if the
    driver will not say."""
    driver = import_driver()
    status, _, identity, *_ = driver.cuStreamGetCaptureInfo(driver.CUstream(stream))
    return None if status else int(identity)


def _take(device_index: int, count: int) -> _Counters:
    count = 1 << (count - 1).bit_length()  # who asks for more and more leaves few behind
    free = _free.get(device_index)
    if free is None or free.number < count:
        size = max(_COUNTERS, count)
        free = _Counters(allocate_zeros(device_index, size * COUNTER_BYTES), size)
    _free[device_index] = _Counters(free.address + count * COUNTER_BYTES, free.number - count)
    return _Counters(free.address, count)
