"""Continuous batching of Transformers on flashcore: the same tokens as by its own attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parameters import thorough_but

from flashcore.integrations.transformers import attention_forward, register

transformers = pytest.importorskip("transformers", minversion="5.23", reason="has no such cache")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Transformers' own, on what it finds on a machine
    pytest.mark.slow,
]

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("Llama", {}),
    "sliding": ("Mistral", {"sliding_window": 4}),
    "sinks": ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4,
                         "head_dim": 16}),
}  # fmt: skip
PROMPTS = [[5, 9, 3, 7, 11], [4, 4], [13, 8, 2, 6, 1, 9, 10, 33, 21, 3, 50, 12]]


def generated(model: Any) -> list[list[int]]:
    config = transformers.GenerationConfig(
        max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    batching = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16)
    found = model.generate_batch(
        inputs=PROMPTS, generation_config=config, continuous_batching_config=batching
    )
    return [found[key].generated_tokens for key in found]


@pytest.mark.parametrize("name", thorough_but(["sinks"], MODELS))  # it has a window, too
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
def test_batches_say_what_eager_attention_says(device: str, dtype: torch.dtype, name: str) -> None:
    register()
    kind, more = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **more)
    made = getattr(transformers, f"{kind}ForCausalLM")(config).eval().to(device, dtype)
    made.set_attn_implementation("eager")
    want = generated(made)
    # Transformers itself says "paged|flashcore" where it batches; a user may say so, too.
    made.set_attn_implementation("paged|flashcore" if name == "sinks" else "flashcore")
    calls = []
    import flashcore.integrations.transformers as integration

    packed = integration.attention_packed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            integration, "attention_packed", lambda *a, **b: calls.append(1) or packed(*a, **b)
        )
        have = generated(made)
    assert calls  # and not masks, or somebody else's attention
    if device == "cpu":
        assert have == want
    else:  # one token may be a tie in bfloat16
        same = sum(
            a == b for x, y in zip(have, want, strict=True) for a, b in zip(x, y, strict=True)
        )
        assert same >= 12


def test_a_cache_of_another_version_is_refused() -> None:
    class Cache:
        def update(self, key: Any, value: Any, layer_idx: int, read_index: Any) -> None: ...

    x = torch.zeros(1, 2, 3, 16)
    with pytest.raises(NotImplementedError, match=r"5\.23"):
        attention_forward(SimpleNamespace(layer_idx=0), x, x, x, None, cache=Cache())  # type: ignore[arg-type]
