"""Load real attention inputs that ship with the package; see README.md beside this file."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from importlib.resources import files

import torch
from torch import Tensor

__all__ = ["CapturedAttention", "load_minilm"]

_DTYPES = {"F16": torch.float16, "BOOL": torch.bool}


@dataclass(frozen=True)
class CapturedAttention:
    """Hold what one attention layer of a model gets as input for one batch of text.

    Attributes:
        q: queries [batch, num_heads, seqlen, head_dim] float16, contiguous, on the CPU.
        k: keys, as q.
        v: values, as q.
        mask: True = attend, False = padding; bool [batch, 1, 1, seqlen].
        sentences: the batch's text, one string an element.
        layer: index of the encoder layer.
        scale: the model's softmax scale, 1 / sqrt(head_dim).
        model: the model's public name.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    sentences: tuple[str, ...]
    layer: int
    scale: float
    model: str

    @property
    def lengths(self) -> list[int]:
        """Return the tokens of each sentence; what lies behind them is padding."""
        return [int(n) for n in self.mask.sum(dim=(1, 2, 3))]


def load_minilm() -> CapturedAttention:
    """Load Q, K and V of a layer of all-MiniLM-L6-v2 on three sentences of different length.

    Returns:
        batch 3, 12 heads of 32, the shorter sentences padded to the longest. Padded positions hold
        what the model computed there, not zeros. Every call returns new tensors.
    """
    blob = files(__name__).joinpath("minilm.safetensors").read_bytes()
    # The safetensors layout: 8 bytes of header length, a JSON header, the raw tensors.
    (header_bytes,) = struct.unpack_from("<Q", blob)
    header = json.loads(blob[8 : 8 + header_bytes])
    about = header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        start, stop = (8 + header_bytes + offset for offset in entry["data_offsets"])
        flat = torch.frombuffer(bytearray(blob[start:stop]), dtype=_DTYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return CapturedAttention(
        q=tensors["q"],
        k=tensors["k"],
        v=tensors["v"],
        mask=tensors["mask"],
        sentences=tuple(json.loads(about["sentences"])),
        layer=int(about["layer"]),
        scale=float(about["scale"]),
        model=about["model"],
    )
