"""Test masks of a decode step with Transformers: never read, and of rows that kernels read fast."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers 4.53 or later")
masking_utils = pytest.importorskip(
    "transformers.masking_utils", reason="needs transformers 4.53 or later"
)
if transformers.__version__.startswith("4."):
    pytest.skip("there the interface does not name the number of queries", allow_module_level=True)

from flashcore.integrations.transformers import attention_forward, attention_mask  # noqa: E402


def mask(tokens, q_length=1, **options):
    kv_length = tokens.shape[1]
    return attention_mask(
        batch_size=tokens.shape[0], q_length=q_length, q_offset=kv_length - q_length,
        kv_length=kv_length, attention_mask=tokens, device=tokens.device,
        mask_function=masking_utils.causal_mask_function, **options,
    )  # fmt: skip


def test_a_step_reads_no_mask():
    """Reading a tensor without memory raises."""
    tokens = torch.ones(2, 9, dtype=torch.bool, device="meta")
    assert mask(tokens).shape == (2, 1, 1, 9)
    with pytest.raises(RuntimeError):
        mask(tokens, q_length=3)


def test_a_step_with_a_window_leaves_the_window_to_the_layer():
    class Config:
        sliding_window = 4

    tokens = torch.ones(2, 9, dtype=torch.bool)
    assert mask(tokens, local_size=4, config=Config()).shape == (2, 9)


def test_a_step_hides_what_its_mask_hides():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    tokens = torch.ones(2, 9, dtype=torch.bool)
    tokens[0, :3] = False
    layer = torch.nn.Module()
    layer.is_causal = True
    out, _ = attention_forward(layer, q, k, v, mask(tokens), scaling=0.3)
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = (0.3 * q @ k.mT).masked_fill(~tokens[:, None, None], -torch.inf)
    torch.testing.assert_close(out, (scores.softmax(-1) @ v).transpose(1, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("q_length", [1, 5])
def test_rows_of_masks_are_aligned_and_a_capture_reads_none(q_length):
    tokens = torch.ones(3, 37, dtype=torch.bool, device="cuda")
    tokens[1, :5] = False
    found = mask(tokens, q_length)
    assert found.stride(0) % 16 == 0
    torch.testing.assert_close(found.reshape(3, -1)[:, -37:], tokens, rtol=0, atol=0)
    static = mask(tokens, q_length, allow_is_causal_skip=False)
    assert static.shape == (3, 1, q_length, 37)
    assert static.stride(2) % 16 == 0 or q_length == 1
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mask(tokens, q_length)
    graph.replay()
    assert torch.equal(captured.reshape(3, -1), found.reshape(3, -1))


@pytest.mark.gpu
def test_a_step_does_not_wait():
    tokens = torch.ones(3, 37, dtype=torch.bool, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask(tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
