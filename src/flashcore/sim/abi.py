"""Mirror runtime/abi.h, field by field."""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_char_p, c_int32, c_int64, c_uint64, c_void_p


class TensorStruct(ctypes.Structure):
    """Mirror FcTensor."""

    _fields_ = (
        ("name", c_char_p),
        ("address", c_uint64),
        ("data", c_void_p),
        ("bytes", c_int64),
        ("element_bytes", c_int32),
        ("writable", c_int32),
        ("is_late", c_int32),
        ("valid", c_void_p),
        ("writer", c_void_p),
        ("writer_site", c_void_p),
        ("writer_clock", c_void_p),
    )


class LaunchStruct(ctypes.Structure):
    """Mirror FcLaunch."""

    _fields_ = (
        ("params", c_void_p),
        ("grid", c_int32),
        ("num_threads", c_int32),
        ("smem_bytes", c_int32),
        ("num_tensors", c_int32),
        ("tensors", ctypes.POINTER(TensorStruct)),
        ("seed", c_uint64),
        ("starts_early", c_int32),
    )


class AgentStruct(ctypes.Structure):
    """Mirror FcAgent."""

    _fields_ = (
        ("block", c_int32),
        ("warp", c_int32),
        ("lane", c_int32),
        ("line", c_int32),
        ("file", c_char * 128),
    )


class ReportStruct(ctypes.Structure):
    """Mirror FcReport."""

    _fields_ = (
        ("kind", c_char * 32),
        ("message", c_char * 1024),
        ("array", c_char * 64),
        ("element", c_int64),
        ("tensor", c_int32),
        ("has_other", c_int32),
        ("agent", AgentStruct),
        ("other", AgentStruct),
        ("details", c_char * 8192),
        ("switches", c_uint64),
        ("smem_accesses", c_uint64),
        ("gmem_accesses", c_uint64),
        ("async_copies", c_uint64),
        ("barriers", c_uint64),
        ("warp_ops", c_uint64),
    )
