"""attn_implementation="flashcore" of models of all kinds: those whose layers ask for an
implementation compute what eager attention computes, the others are refused or keep their own."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import torch
from parameters import thorough_but

import flashcore
from flashcore.dropins import own_attention

transformers = pytest.importorskip("transformers", reason="needs transformers 4.53 or later")
pytest.importorskip("transformers.masking_utils", reason="needs transformers 4.53 or later")

from flashcore.dropins import transformers_hooks as hooks  # noqa: E402
from flashcore.integrations import transformers as integration  # noqa: E402

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "sweep_transformers.py"
spec = importlib.util.spec_from_file_location("sweep_transformers", SCRIPT)
sweep = sys.modules["sweep_transformers"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep)

IS_V4 = transformers.__version__.startswith("4.")


@pytest.fixture(autouse=True, scope="module")
def _registered():
    transformers.logging.set_verbosity_error()
    integration.register()


# Outcomes of from_config and set_attn_implementation with flashcore, for the base class and,
# where there is one, the class that generates. In Transformers 5.23; all are in the script.
EQUAL, REFUSED, KEPT = ("equal", "equal"), ("refused", "kept"), ("kept", "kept")
TWICE_REFUSED = ("refused", "refused")  # the file has layers that ask, too
ENDS = {
    "llama": [EQUAL, EQUAL],
    "bert": [EQUAL, EQUAL],
    "gpt2": [EQUAL, EQUAL],
    "bart": [EQUAL, EQUAL],
    "gemma4_text": [EQUAL, EQUAL],  # head_dim 512, layers that share keys
    "aimv2": [EQUAL],  # its layers say that they are not causal, under a causal mask
    "paligemma": [EQUAL],  # likewise
    "nllb-moe": [EQUAL],  # likewise, and its router reads the mask
    "deepseek_v4": [EQUAL, EQUAL],  # its layers lay more over the mask
    "splinter": [EQUAL],  # its layers say nothing, under a mask that is not causal
    "hy_v4": [EQUAL, EQUAL],  # sparse: keys by index
    "inkling2": [EQUAL],  # a sink for each query
    "bigbird_pegasus": [EQUAL, EQUAL],  # the decoder alone asks, the encoder reads the mask
    "bloom": [REFUSED, REFUSED],
    "xglm": [REFUSED, REFUSED],
    "led": [REFUSED],
    "mpnet": [REFUSED],
    "rembert": [REFUSED, REFUSED],
    "roformer": [REFUSED, REFUSED],
    "convbert": [REFUSED],
    "luke": [REFUSED],
    "gptj": [REFUSED, REFUSED],
    "falcon": [REFUSED, REFUSED],
    "mpt": [REFUSED, REFUSED],
    "git": [TWICE_REFUSED, TWICE_REFUSED],
    "deberta": [KEPT],  # its layers make their own masks
    "resnet": [KEPT],  # has no attention
}
# Of those that end alike, the first or so.
FEW = ("llama", "bart", "gemma4_text", "deepseek_v4", "bloom", "git", "resnet")


@pytest.mark.skipif(IS_V4, reason="the list is that of Transformers 5")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", thorough_but(FEW, ENDS))
def test_eagers_outputs_or_a_refusal_or_its_own_attention(model_type):
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    rows = list(sweep.sweep([model_type]))
    assert [(row.made, row.switched) for row in rows] == ENDS[model_type], rows
    for row in rows:
        assert (row.served > 0) == (row.made == "equal"), row


@pytest.mark.filterwarnings("ignore")
def test_a_refusal_names_the_class_the_reason_and_the_way_out():
    config = transformers.BloomConfig(hidden_size=32, n_head=2, n_layer=1, vocab_size=20)
    with pytest.raises(ValueError, match=r"BloomForCausalLM does not .*BloomAttention.*\"eager\""):
        transformers.BloomForCausalLM._from_config(config, attn_implementation="flashcore")
    config._attn_implementation = "flashcore"
    with pytest.raises(ValueError, match="BloomModel does not support"):
        transformers.BloomModel(config)


def test_a_part_of_a_larger_model_is_refused_by_name_and_can_be_left_out():
    decoder = transformers.XGLMConfig(
        d_model=32, ffn_dim=32, num_layers=1, attention_heads=2, vocab_size=20,
        is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    encoder = transformers.BertConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=20,
    )  # fmt: skip
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    kind = transformers.EncoderDecoderModel
    with pytest.raises(ValueError, match="XGLMForCausalLM does not support"):
        kind._from_config(config, attn_implementation="flashcore")
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = kind._from_config(
        config, attn_implementation={"encoder": "flashcore", "decoder": "eager"}
    )
    assert model.encoder.config._attn_implementation == "flashcore"
    assert model.decoder.config._attn_implementation == "eager"


def test_a_config_that_is_changed_later_is_refused_in_the_forward(monkeypatch):
    monkeypatch.setattr(hooks, "_judged", set())
    config = transformers.MPNetConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=20,
    )  # fmt: skip
    model = transformers.MPNetModel._from_config(config, attn_implementation="eager")
    if IS_V4:
        pytest.skip("MPNet makes its masks itself in Transformers 4")
    model.config._attn_implementation = "flashcore"
    with pytest.raises(ValueError, match="MPNetModel does not support"):
        model(torch.ones(1, 4, dtype=torch.long))


def test_a_model_that_keeps_its_own_attention_says_so_once(monkeypatch):
    monkeypatch.setattr(hooks, "_warned", set())
    config = transformers.DebertaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=20,
    )  # fmt: skip
    config._attn_implementation = "flashcore"
    with pytest.warns(flashcore.FallbackWarning, match="DebertaModel keeps its own attention"):
        transformers.DebertaModel(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transformers.DebertaModel(config)


class _Attention(torch.nn.Module):
    """Compute attention as a user's own file may have it."""

    def forward(self, x, mask):
        return torch.softmax(x @ x.mT + mask, -1) @ x


class _Table(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = TABLE[config._attn_implementation]()


TABLE = {"eager": _Attention}


def create_causal_mask(*_):
    return None


class Masked(transformers.PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.layer = _Attention()

    def forward(self, x):
        return self.layer(x, create_causal_mask(x))


class Unmasked(transformers.PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.layer = _Attention()


class WithTable(transformers.PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.layer = _Table(config)


def test_code_that_transformers_does_not_have_is_read_too():
    assert "_Attention computes attention itself" in own_attention.examine(Masked).obstacle
    assert "TABLE" in own_attention.examine(WithTable).obstacle
    found = own_attention.examine(Unmasked)
    assert (found.own, found.obstacle, found.dispatches) == ("_Attention", None, False)
    config = transformers.LlamaConfig(attn_implementation="flashcore")
    with pytest.raises(ValueError, match="Masked does not support"):
        Masked(config)


def test_other_implementations_are_left_alone():
    config = transformers.BloomConfig(hidden_size=32, n_head=2, n_layer=1, vocab_size=20)
    model = transformers.BloomModel._from_config(config, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="nonsense"):
        transformers.BloomModel._from_config(config, attn_implementation="nonsense")
