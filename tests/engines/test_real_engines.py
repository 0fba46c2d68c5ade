"""Run a step of vLLM's and of SGLang's own attention layers by flashcore's backends, on the CPU:
their registries, configurations, pools, batches and layers, where those are installed. No model, no
scheduler and no server are part of that."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashcore.checks.accuracy import error_report

HEADS, HEADS_KV, DIM, PAGE, ROOM = 4, 2, 32, 16, 64
KEYS = [20, 40, 33, 16]
# Decoding, a mixed batch, parts of prompts behind what is cached, whole prompts: what vLLM's own
# test of its backends runs (tests/v1/attention/test_attention_backends.py), in small.
BATCHES = {
    "decodes": [1, 1, 1, 1], "mixed": [1, 1, 9, 16], "parts": [7, 24, 2, 5], "prompts": KEYS,
}  # fmt: skip


def imported(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name.split('.')[0]} cannot be imported")


class Step:
    """A Step has a batch's queries, keys and values, of which some are in the cache."""

    def __init__(self, queries: list[int]) -> None:
        self.queries = queries
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).half()

        self.q = draw(sum(queries), HEADS * DIM)
        self.keys = [draw(2, n, HEADS_KV, DIM) for n in KEYS]
        pairs = list(zip(self.keys, KEYS, queries, strict=True))
        self.new = [torch.cat([x[i, n - m :] for x, n, m in pairs]) for i in (0, 1)]
        # Which token of the cache a token of a sequence is; page 0 is nobody's.
        pages = (torch.randperm(len(KEYS) * ROOM // PAGE, generator=generator) + 1).view(
            len(KEYS), -1
        )
        place = torch.arange(ROOM)
        self.pages, self.slots = pages, pages[:, place // PAGE] * PAGE + place % PAGE
        self.num_pages = pages.numel() + 1
        rows = [
            self.slots[b, n - m : n] for b, (n, m) in enumerate(zip(KEYS, queries, strict=True))
        ]
        self.new_slots = torch.cat(rows)

    def cached(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return, of each sequence, the slots of what is in the cache, and its keys and values."""
        counts = [n - m for n, m in zip(KEYS, self.queries, strict=True)]
        return [
            (slots[:n], x[0, :n], x[1, :n])
            for slots, n, x in zip(self.slots, counts, self.keys, strict=True)
        ]

    def check(self, out: Tensor) -> None:
        """Raise unless each sequence's rows are what it has on its own."""
        begin = 0
        for x, m in zip(self.keys, self.queries, strict=True):
            q, own = (
                y.view(-1, HEADS, DIM)[begin : begin + m].transpose(0, 1)[None]
                for y in (self.q, out)
            )
            report = error_report(
                own, q, *(y.transpose(0, 1)[None] for y in x), scale=0.25, causal=True
            )
            assert report.ok, f"{self.queries}: {report}"
            begin += m


@pytest.mark.parametrize("name", BATCHES)
def test_a_layer_of_vllm(name: str) -> None:
    config = imported("vllm.config")
    context = imported("vllm.forward_context")
    layers = imported("vllm.model_executor.layers.attention")
    registry = imported("vllm.v1.attention.backends.registry")
    common = imported("vllm.v1.attention.backend").CommonAttentionMetadata
    importlib.import_module("flashcore.integrations.vllm").register()
    backend = registry.AttentionBackendEnum["FLASHCORE"].get_class()
    step = Step(BATCHES[name])
    given = config.VllmConfig(cache_config=config.CacheConfig(block_size=PAGE))
    starts = torch.tensor([0, *step.queries]).cumsum(0).int()
    of_step = common(
        query_start_loc=starts, query_start_loc_cpu=starts, num_reqs=len(KEYS),
        seq_lens=torch.tensor(KEYS, dtype=torch.int32), num_actual_tokens=step.q.shape[0],
        max_query_len=max(step.queries), max_seq_len=max(KEYS),
        block_table_tensor=step.pages.int(), slot_mapping=step.new_slots,
    )  # fmt: skip
    with config.set_current_vllm_config(given):
        layer = layers.Attention(
            HEADS, DIM, 0.25, num_kv_heads=HEADS_KV, cache_config=given.cache_config,
            prefix="layer", attn_backend=backend,
        )  # fmt: skip
        spec = layer.get_kv_cache_spec(given)
        assert spec.block_size == PAGE
        builder = backend.get_builder_cls()(spec, ["layer"], given, torch.device("cpu"))
        metadata = builder.build(0, of_step)
        shape = backend.get_kv_cache_shape(step.num_pages, PAGE, HEADS_KV, DIM)
        layer.kv_cache = torch.zeros(shape, dtype=torch.float16)
        for slots, *pair in step.cached():
            for cache, x in zip(layer.kv_cache, pair, strict=True):
                cache.view(-1, HEADS_KV, DIM)[slots] = x
        with context.set_forward_context(
            {"layer": metadata}, given, slot_mapping={"layer": step.new_slots}
        ):
            step.check(layer(step.q, *(x.flatten(1) for x in step.new)))
    for cache, x in zip(layer.kv_cache, step.new, strict=True):
        assert torch.equal(cache.view(-1, HEADS_KV, DIM)[step.new_slots], x)


@pytest.mark.parametrize("page_size", [1, PAGE])
@pytest.mark.parametrize("name", BATCHES)
def test_a_layer_of_sglang(name: str, page_size: int) -> None:
    pools = imported("sglang.srt.mem_cache.memory_pool")
    batches = imported("sglang.srt.model_executor.forward_batch_info")
    radix = imported("sglang.srt.layers.radix_attention")
    registry = imported("sglang.srt.layers.attention.attention_registry")
    importlib.import_module("flashcore.integrations.sglang").register()
    step, mode = Step(BATCHES[name]), batches.ForwardMode
    requests = pools.ReqToTokenPool(9, ROOM, "cpu", enable_memory_saver=False)
    tokens = pools.MHATokenToKVPool(
        step.num_pages * PAGE, page_size, torch.float16, HEADS_KV, DIM, 1, "cpu",
        enable_memory_saver=False,
    )  # fmt: skip
    rows = torch.tensor([7, 2, 5, 1])
    requests.req_to_token[rows, :ROOM] = step.slots.int()
    for slots, *pair in step.cached():
        for buffer, x in zip(tokens.get_kv_buffer(0), pair, strict=True):
            buffer[slots] = x
    runner = SimpleNamespace(
        device="cpu", page_size=page_size, req_to_token_pool=requests, token_to_kv_pool=tokens,
        model_config=SimpleNamespace(context_len=ROOM, is_encoder_decoder=False),
    )  # fmt: skip
    decodes = max(step.queries) == 1
    counts = torch.tensor(step.queries, dtype=torch.int32)
    batch = batches.ForwardBatch(
        forward_mode=mode.DECODE if decodes else mode.EXTEND, batch_size=len(KEYS),
        input_ids=torch.zeros(step.q.shape[0], dtype=torch.long), req_pool_indices=rows,
        seq_lens=torch.tensor(KEYS), seq_lens_cpu=torch.tensor(KEYS), seq_lens_sum=sum(KEYS),
        out_cache_loc=step.new_slots, extend_seq_lens=None if decodes else counts,
        extend_seq_lens_cpu=None if decodes else step.queries,
    )  # fmt: skip
    backend = registry.ATTENTION_BACKENDS["flashcore"](runner)
    backend.init_forward_metadata(batch)
    layer = radix.RadixAttention(HEADS, DIM, 0.25, HEADS_KV, layer_id=0)
    step.check(backend.forward(step.q, *step.new, layer, batch))
    for buffer, x in zip(tokens.get_kv_buffer(0), step.new, strict=True):
        assert torch.equal(buffer[step.new_slots], x)
