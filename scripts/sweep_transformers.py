"""Run every architecture of Transformers that a config can make small, beside eager attention.

    python scripts/sweep_transformers.py [--only bert llama ...] [--output sweep.json]

Each model has random weights, float32, four layers, a width of 64 and a sliding window of 5 where
it has one. It runs a batch without padding and one with padding by eager attention, and generates
if it can. Then flashcore is asked for in both ways that Transformers has:
`from_config(..., attn_implementation="flashcore")` and `set_attn_implementation("flashcore")`. Each
of them must end in one of three ways: the outputs of real tokens and the generated tokens are
eager's ("equal", with the number of calls that flashcore served), the model is refused with its
class named ("refused"), or it keeps the attention that it had ("kept"). "wrong" and "crash" fail
the run; "not made" is a model that this script cannot make or run by eager attention either, and
the last column says why.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import json
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashcore.integrations import transformers as integration

NAME = "flashcore"
BATCH, SEQLEN, PADDING = 2, 12, 4
VOCABULARY = 100
SECONDS_PER_MODEL = 300
BAD = ("wrong", "crash")
# By the end of an attribute's name; the first that matches counts.
SIZES: tuple[tuple[str, int], ...] = (
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num", 2),
    (r"(attention|key|value|query|linear.*)_heads|num_heads|n_heads?|nhead", 4),
    (r"num_(?!feat_extract).*layers|n_layers?|(en|de)coder_layers|num_blocks|.*_depth", 4),
    (r"^sliding_window", 5),
    (r"attention_chunk_size", 8),
    (r"attn_layer_period", 2),
    (r"attn_layer_offset", 1),
    (r"(per_tok|topk_group|n_group|moe_topk|_top_?k|num_selected_experts)", 1),
    (r"(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts)", 4),
    (r"n_shared_experts|num_shared_experts", 1),
    (r"rotary_dim", 8),
    (r"(head_dim|d_kv|head_size|key_dim|qk_(nope|rope)_head_dim|kv_channels)", 16),
    (r"(lora_rank|rank)", 16),
    (r"(intermediate_size|ffn_dim|d_ff|n_inner|feedforward_dim|ffn_hidden_size|hidden_dim)", 64),
    (r"(hidden_size|d_model|n_embd|embed_dim|embedding_size|projection_dim|proj_dim|^dim)", 64),
    (r"vocab_size.*", VOCABULARY),
    (r"max_position_embeddings|n_positions|max_target_positions|max_source_positions", 64),
)


@dataclass(frozen=True)
class Row:
    """A row says how a class ended, `made` by from_config and `switched` afterwards."""

    model: str
    kind: str
    made: str
    switched: str
    served: int
    error: float
    note: str

    @property
    def ok(self) -> bool:
        """Return whether both ways gave eager's outputs, a refusal or what was there."""
        return self.made not in BAD and self.switched not in BAD


def small(config: Any, **given: Any) -> Any:
    """Return a config of the same class with small sizes."""
    defaults = config.to_dict()
    values: dict[str, Any] = {}
    sub_configs = getattr(type(config), "sub_configs", {})
    for key, value in defaults.items():
        if key in sub_configs:
            sub = getattr(config, key, None)
            if sub is not None:
                values[key] = small(sub)
        elif isinstance(value, int) and not isinstance(value, bool):
            for pattern, size in SIZES:
                if re.search(f"({pattern})$", key):
                    values[key] = min(value, size) if value > 0 else value
                    break
            else:
                if key.endswith("token_id") and value >= VOCABULARY:
                    values[key] = 3
    heads = ("num_key_value_heads", "num_attention_heads")
    if all(name in values for name in heads) and defaults[heads[0]] == defaults[heads[1]]:
        values[heads[0]] = values[heads[1]]  # as latent attention wants it
    values.update({key: value for key, value in given.items() if hasattr(config, key)})
    values.update(
        {key: 0.0 for key in defaults if "drop" in key and isinstance(defaults[key], float)}
    )
    return type(config)(**values)


def inputs_of(model: Any, padded: bool) -> dict[str, Tensor]:
    """Return what the model's forward asks for, padded in front where it generates, else behind."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    parameters = inspect.signature(model.forward).parameters
    ids = torch.randint(4, VOCABULARY - 10, (BATCH, SEQLEN), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        decodes = getattr(config, "is_decoder", False) or model.can_generate()
        front = decodes and not getattr(config, "is_encoder_decoder", False)
        mask[0, slice(0, PADDING) if front else slice(-PADDING, None)] = 0
    main = model.main_input_name
    batch: dict[str, Tensor] = {}
    if "input_ids" in parameters:
        batch = {"input_ids": ids, "attention_mask": mask}
    needs = parameters.get("pixel_values")
    clip = "pixel_values" in parameters and "logit_scale" in dict(model.named_parameters())
    if needs is not None and (main == "pixel_values" or "input_ids" not in parameters or clip):
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 32) or 32
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(vision, "num_channels", 3)
        batch["pixel_values"] = torch.randn(BATCH, channels, height, width, generator=generator)
    elif main == "input_values":
        batch = {"input_values": torch.randn(BATCH, 4000, generator=generator)}
        if padded:
            batch["attention_mask"] = torch.ones(BATCH, 4000, dtype=torch.long)
            batch["attention_mask"][0, 3000:] = 0
    elif main == "input_features":
        bins = getattr(config, "num_mel_bins", 0) or getattr(config, "input_feat_per_channel", 80)
        frames = 2 * getattr(config, "max_source_positions", 50)
        batch = {"input_features": torch.randn(BATCH, bins, frames, generator=generator)}
    if "decoder_input_ids" in parameters:
        batch["decoder_input_ids"] = ids.clone()
    if "bbox" in parameters:
        batch["bbox"] = torch.zeros(BATCH, SEQLEN, 4, dtype=torch.long)
    return {key: value for key, value in batch.items() if key in parameters}


def outputs_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the first floating tensor that the model returns, without rows of padding."""
    torch.manual_seed(2)
    with torch.inference_mode():
        output = model(**batch, return_dict=True)
    first = next(
        x for x in output.to_tuple() if isinstance(x, Tensor) and x.is_floating_point() and x.dim()
    )
    mask = batch.get("attention_mask")
    if mask is not None and first.shape[:2] == mask.shape and "decoder_input_ids" not in batch:
        first = first[mask.bool()]
    return first.float().clone()


def tokens_of(model: Any) -> Tensor | None:
    """Return a few tokens after a padded batch, greedily with a KV cache; None where it cannot."""
    if not model.can_generate() or model.main_input_name != "input_ids":
        return None
    batch = inputs_of(model, padded=True)
    batch.pop("decoder_input_ids", None)
    with torch.inference_mode():
        return model.generate(**batch, do_sample=False, min_new_tokens=4, max_new_tokens=4)


def sharpen(model: Any) -> None:
    """Give a model weights that attend sharply: Transformers' own 0.02 weighs all keys alike."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.is_floating_point():
            with torch.no_grad():
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5, generator=generator)


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the layers that flashcore serves."""
    from transformers import AttentionInterface

    calls: Counter[str] = Counter()

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls[NAME] += 1
        return integration.attention_forward(*args, **kwargs)

    AttentionInterface.register(NAME, spy)
    try:
        yield calls
    finally:
        AttentionInterface.register(NAME, integration.attention_forward)


def make(kind: Any, config: Any, implementation: str) -> Any:
    """Return a model that asks for an implementation as `from_config` does."""
    model = kind._from_config(copy.deepcopy(config), attn_implementation=implementation)
    return model.eval()


def judge(kind: Any, config: Any, model_type: str) -> Row:
    """Run one class."""
    name = kind.__name__
    try:
        eager = make(kind, config, "eager")
        sharpen(eager)
        batches = [inputs_of(eager, padded) for padded in (False, True)]
        exact = [outputs_of(eager, batch) for batch in batches]
        if not all(x.isfinite().all() for x in exact):
            return Row(model_type, name, "not made", "not made", 0, 0.0, "eager gives nan")
    except Exception as error:  # anything may go wrong in a model that no config was meant for
        return Row(model_type, name, "not made", "not made", 0, 0.0, _short(error))
    tokens = None
    with contextlib.suppress(Exception):  # models that generate in ways of their own
        tokens = tokens_of(eager)
    notes, served, worst = [], 0, 0.0
    ends = []
    for way in ("made", "switched"):
        try:
            if way == "made":
                try:
                    model = make(kind, config, NAME)
                except ValueError as error:
                    if NAME not in str(error):
                        raise
                    ends.append("refused")
                    notes.append(_short(error))
                    continue
                model.load_state_dict(eager.state_dict())
            else:
                model = eager
                try:
                    model.set_attn_implementation(NAME)
                except ValueError as error:
                    if NAME not in str(error):
                        raise
                    ends.append("refused")
                    continue
            with counted() as calls:
                ours = [outputs_of(model, batch) for batch in batches]
                again = None if tokens is None else tokens_of(model)
                same = tokens is None or (again is not None and torch.equal(again, tokens))
            error_now = max(
                float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))
                for a, b in zip(ours, exact, strict=True)
            )
            served, worst = max(served, calls[NAME]), max(worst, error_now)
            if not error_now < 1e-4 or not same:
                ends.append("wrong")
                notes.append(f"{way}: " + ("outputs" if same else "generated tokens"))
            else:
                ends.append("equal" if calls[NAME] else "kept")
        except Exception as error:  # the model worked by eager attention
            ends.append("crash")
            notes.append(f"{way}: {_short(error)}")
    made, switched = ends
    return Row(model_type, name, made, switched, served, worst, "; ".join(notes))


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def classes(model_type: str) -> Iterator[tuple[Any, Any]]:
    """Return the classes of an architecture and a small config for each: the base, and the one that
    generates."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    kind_of_config = CONFIG_MAPPING[model_type]
    base = auto.MODEL_MAPPING.get(kind_of_config, None)
    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING.get(kind_of_config, None)
    if base is not None:
        for kind in base if isinstance(base, (list, tuple)) else (base,):
            yield kind, small(kind_of_config(), **GIVEN.get(model_type, {}))
    if causal is not None:
        yield causal, small(kind_of_config(), is_decoder=True, **GIVEN.get(model_type, {}))


# Arguments that some configs need besides sizes.
GIVEN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 5},
    "informer": {"prediction_length": 4, "context_length": 8},
    "autoformer": {"prediction_length": 4, "context_length": 8},
    "bamba": {"attn_layer_indices": [1, 3]},
}


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS_PER_MODEL} s")


def sweep(names: list[str]) -> Iterator[Row]:
    """Return the rows of some architectures."""
    for model_type in names:
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(SECONDS_PER_MODEL)
        try:
            for kind, config in classes(model_type):
                yield judge(kind, config, model_type)
        except Exception as error:  # a config that cannot be made small
            yield Row(model_type, "", "not made", "not made", 0, 0.0, _short(error))
        finally:
            signal.alarm(0)


def main() -> None:
    """Print a row per class, and fail where one is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", help="architectures by model_type; all by default")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    integration.register()
    rows = []
    for row in sweep(options.only or sorted(transformers.CONFIG_MAPPING)):
        rows.append(row)
        print(
            f"{row.model:28}{row.kind:40}{row.made:9}{row.switched:9}{row.served:4}"
            f"{row.error:10.1e}  {row.note[:150]}",
            flush=True,
        )
    print(dict(Counter(f"{row.made}/{row.switched}" for row in rows)))
    if options.output:
        options.output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if not all(row.ok for row in rows):
        sys.exit("sweep_transformers: some models compute something else")


if __name__ == "__main__":
    main()
