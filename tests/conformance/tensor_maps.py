"""Make tensor maps for the kernels of this folder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashcore.kernels.fwd_sm90.params import make_ragged
from flashcore.kernels.tensor_map import TensorMap
from flashcore.launch.descriptors import encode


@dataclass(frozen=True)
class Map:
    """A Map is a tensor map of a tensor [batch, heads, rows, cols] and the box that it moves.
    `ragged`: of a tensor [1, heads, rows, cols], as kernels/fwd_sm90/params.py makes it for packed
    sequences. `box_batches`: where it is not 0, columns come in chunks of `box_cols`, and a box has
    all of them, of so many batches."""

    tensor: str
    box_rows: int
    box_cols: int
    ragged: bool = False
    box_batches: int = 0


def make_map(spec: Map, tensor: Tensor, base: int | None = None) -> TensorMap:
    batches, heads, rows, cols = tensor.shape
    batch, head, row, _ = (stride * tensor.element_size() for stride in tensor.stride())
    row_bytes = spec.box_cols * tensor.element_size()
    box = (spec.box_cols, spec.box_rows, tensor.element_size(), row_bytes)
    base = tensor.data_ptr() if base is None else base
    made = TensorMap(base, row, head, batch, cols, rows, heads, batches, *box)
    if spec.box_batches:
        made.cols, made.chunks, made.box_batches = box[0], cols // box[0], spec.box_batches
    if spec.ragged:
        make_ragged(made, 0)
    return made


def encode_map(spec: Map, tensor: Tensor) -> TensorMap:
    """Encode the map as the GPU reads it."""
    dtype = "float16" if tensor.dtype == torch.float16 else "bfloat16"  # only the size counts
    return encode(make_map(spec, tensor), dtype)
