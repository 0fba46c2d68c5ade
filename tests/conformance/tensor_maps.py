"""Tensor maps for the kernels of this folder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashcore.params_sm90 import TensorMap, encode_tensor_map


@dataclass(frozen=True)
class Map:
    """A tensor map of a tensor [batch, heads, rows, cols] and the box that it moves."""

    tensor: str
    box_rows: int
    box_cols: int


def make_map(spec: Map, tensor: Tensor) -> TensorMap:
    batches, heads, rows, cols = tensor.shape
    batch, head, row, _ = (stride * tensor.element_size() for stride in tensor.stride())
    row_bytes = spec.box_cols * tensor.element_size()
    box = (spec.box_cols, spec.box_rows, tensor.element_size(), row_bytes)
    return TensorMap(tensor.data_ptr(), row, head, batch, cols, rows, heads, batches, *box)


def encode_map(spec: Map, tensor: Tensor) -> TensorMap:
    """As the GPU reads it."""
    dtype = "float16" if tensor.dtype == torch.float16 else "bfloat16"  # only the size counts
    return encode_tensor_map(make_map(spec, tensor), dtype)
