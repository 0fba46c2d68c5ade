"""Test what layers of HuggingFace models ask of flashcore, against the formula: options, masks,
sinks, packed rows, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers 4.53 or later")
masking_utils = pytest.importorskip(
    "transformers.masking_utils", reason="needs transformers 4.53 or later"
)

from flashcore.integrations import transformers as integration  # noqa: E402


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = randn(2, 4, 5, 8), randn(2, 2, 9, 8, seed=1), randn(2, 2, 9, 8, seed=2)
LAYER = SimpleNamespace(is_causal=True)


def by_formula(*, visible=None, bias=None, sink=None):
    """Compute attention by its formula: [batch, seqlen_q, num_heads, head_dim], with scale 0.4."""
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
    for name, way_out in (
        ("cache", "generate"),
        ("head_mask", "eager"),
        ("block_indices", "eager"),
    ):
        with pytest.raises(NotImplementedError, match=way_out):
            integration.attention_forward(LAYER, Q, K, V, None, **{name: object()})


INDICES = torch.tensor([[[0, 3], [1, 1], [8, 5], [2, 6], [5, 4]]]).expand(2, -1, -1)
CHOSEN = torch.zeros(2, 1, 5, 9, dtype=torch.bool).scatter(-1, INDICES[:, None], True)
ALL = torch.ones((), dtype=torch.bool).expand(1, 9)  # what `attention_mask` makes of no padding


@pytest.mark.parametrize(
    ("options", "visible"),
    [
        ({"attention_mask": ALL, "is_causal": False}, CAUSAL),
        ({"attention_mask": ALL, "sliding_window": 3}, CAUSAL & (distance() < 3)),
        ({"indices": INDICES, "is_causal": False}, CHOSEN),
        ({"indices": INDICES, "attention_mask": torch.ones(2, 1, 5, 9, dtype=torch.bool)}, CHOSEN),
        ({"indices": INDICES, "attention_mask": ALL}, CHOSEN & CAUSAL),
    ],
)
def test_causality_that_a_layer_denies_and_keys_by_index(options, visible):
    options = {"attention_mask": None, "scaling": 0.4, **options}
    out, _ = integration.attention_forward(LAYER, Q, K, V, **options)
    torch.testing.assert_close(out, by_formula(visible=visible))


def test_a_sink_for_each_query():
    sinks = randn(2, 4, 5, 1, seed=6)
    out, _ = integration.attention_forward(LAYER, Q, K, V, None, scaling=0.4, sinks=sinks)
    k, v = (x.repeat_interleave(2, dim=1) for x in (K, V))
    scores = (0.4 * Q @ k.mT).masked_fill(~CAUSAL, -torch.inf)
    weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    torch.testing.assert_close(out, (weights @ v).transpose(1, 2))


@pytest.mark.parametrize("head_dim", [12, 512])
def test_what_no_kernel_reads_is_computed_by_torch(head_dim):
    """Rows with nothing to see give 0 there too."""
    q, k, v = (x.repeat(1, 1, 1, 64)[..., :head_dim].float() for x in (Q, K, V))
    tokens = TOKENS.clone()
    tokens[0, :6] = False  # the first query of the first sequence sees up to the fifth key
    for options, visible in (
        ({"attention_mask": None}, CAUSAL),
        ({"attention_mask": tokens}, CAUSAL & tokens[:, None, None]),
        ({"attention_mask": None, "sliding_window": 3}, CAUSAL & (distance() < 3)),
    ):
        out, _ = integration.attention_forward(LAYER, q, k, v, scaling=0.01, **options)
        kk, vv = (x.repeat_interleave(2, dim=1) for x in (k, v))
        scores = (0.01 * q @ kk.mT).masked_fill(~visible, -torch.inf)
        want = (scores.softmax(-1).nan_to_num(0.0) @ vv).transpose(1, 2)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [12, 512])
@pytest.mark.filterwarnings("ignore::flashcore.FallbackWarning")
def test_what_no_kernel_reads_is_computed_by_torch_on_the_gpu(head_dim):
    q, k, v = (x.repeat(1, 1, 1, 64)[..., :head_dim].half().cuda() for x in (Q, K, V))
    tokens = TOKENS.clone()
    tokens[0, :6] = False
    out, _ = integration.attention_forward(LAYER, q, k, v, tokens.cuda(), scaling=0.01)
    want, _ = integration.attention_forward(
        LAYER, q.cpu().double(), k.cpu().double(), v.cpu().double(), tokens, scaling=0.01
    )
    torch.testing.assert_close(out.cpu().double(), want, rtol=2e-3, atol=2e-3)


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
