"""Test what is known of the driver without asking it, against its bindings; and what it may
lack."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from flashcore.errors import BackendUnavailableError, FlashCoreError
from flashcore.launch import descriptors, driver


def test_a_launch_is_described_as_the_bindings_do_it() -> None:
    bindings = pytest.importorskip("cuda.bindings.driver")
    theirs = bindings.CUlaunchConfig()
    for i, axis in enumerate("XYZ"):
        setattr(theirs, f"gridDim{axis}", 10 + i)
        setattr(theirs, f"blockDim{axis}", 20 + i)
    theirs.sharedMemBytes, theirs.hStream = 30, bindings.CUstream(1 << 40)
    attribute = bindings.CUlaunchAttribute()
    kinds = bindings.CUlaunchAttributeID
    attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    theirs.attrs, theirs.numAttrs = [attribute], 1
    ours = driver.LaunchConfig.from_address(int(theirs.getPtr()))
    assert (list(ours.grid), list(ours.block)) == ([10, 11, 12], [20, 21, 22])
    assert (ours.smem_bytes, ours.stream, ours.num_attributes) == (30, 1 << 40, 1)
    (first,) = ours.attributes[:1]
    assert first.id == driver.PROGRAMMATIC_STREAM_SERIALIZATION
    assert first.programmatic_stream_serialization_allowed == 1


def test_numbers_are_those_of_the_bindings() -> None:
    bindings = pytest.importorskip("cuda.bindings.driver")
    assert bindings.CUresult.CUDA_ERROR_INVALID_CONTEXT == driver.INVALID_CONTEXT
    dtypes = bindings.CUtensorMapDataType
    assert descriptors._DATA_TYPES == {
        "float16": dtypes.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        "bfloat16": dtypes.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    }
    swizzles = bindings.CUtensorMapSwizzle
    assert descriptors._SWIZZLES == {
        0: swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
        64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
        128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
    }
    promotions = bindings.CUtensorMapL2promotion
    assert promotions.CU_TENSOR_MAP_L2_PROMOTION_L2_128B == descriptors._L2_PROMOTION_128B
    assert bindings.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE == 0
    assert bindings.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE == 0


@pytest.mark.parametrize("answer", [(500, 0, 0), (0, 0, 1)])
def test_a_driver_without_a_function_says_so(
    monkeypatch: pytest.MonkeyPatch, answer: tuple[int, int, int]
) -> None:
    old = SimpleNamespace(cuGetProcAddress=lambda *_: answer)
    monkeypatch.setattr(driver, "import_driver", lambda: old)
    with pytest.raises(BackendUnavailableError, match="no cuTensorMapReplaceAddress"):
        driver.entry_point.__wrapped__("cuTensorMapReplaceAddress")


def test_a_failure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "import_driver", lambda: SimpleNamespace(CUresult=int))
    driver.check(0, "nothing")
    with pytest.raises(FlashCoreError, match="launching a kernel failed: 700"):
        driver.check(700, "launching a kernel")


def test_descriptors_are_aligned() -> None:
    for size in (128, 1000):
        content = bytes(range(100)) * (size // 100)
        kept = [descriptors.aligned(content) for _ in range(20)]
        for memory, address in kept:
            assert address % descriptors.ALIGNMENT == 0
            begin = address - ctypes.addressof(memory)
            assert bytes(memory)[begin : begin + len(content)] == content
