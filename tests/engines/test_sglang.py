"""Test the attention backend for SGLang with a stand-in for SGLang, against attention one sequence
at a time."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_standins import KVWriteLoc, SglangAttentionType, stand_in_for_sglang
from torch import Tensor

from flashcore.checks.accuracy import error_report

HEADS, HEADS_KV, DIM, SLOTS = 4, 2, 16, 256
KEYS, QUERIES = [20, 40, 33, 16], [1, 24, 2, 16]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    stand_in_for_sglang(monkeypatch)
    return importlib.import_module("flashcore.integrations.sglang.backend")


class Mode:
    def __init__(self, decodes: bool) -> None:
        self.decodes = decodes

    def is_decode_or_idle(self) -> bool:
        return self.decodes


class Pool:
    """A Pool holds keys and values of one layer, token by token."""

    def __init__(self, dim_v: int, wide: bool) -> None:
        # Where layers lie interleaved, tokens are further apart than one layer's heads.
        self.k, self.v = (
            torch.zeros(SLOTS, HEADS_KV * (2 if wide else 1), dim)[:, :HEADS_KV]
            for dim in (DIM, dim_v)
        )

    def get_kv_buffer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        return self.k, self.v

    def set_kv_buffer(
        self, layer: Any, loc: KVWriteLoc, k: Tensor, v: Tensor, k_scale: None, v_scale: None
    ) -> None:
        self.k[loc.loc], self.v[loc.loc] = k, v


class Batch:
    """Hold a batch as SGLang describes it, and what each sequence is on its own."""

    def __init__(
        self, counts: list[int], page_size: int, dim_v: int = DIM, wide: bool = False
    ) -> None:
        self.counts, self.dim_v = counts, dim_v
        generator = torch.Generator().manual_seed(3)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.q = draw(sum(counts), HEADS * DIM)
        self.keys = [(draw(n, HEADS_KV, DIM), draw(n, HEADS_KV, dim_v)) for n in KEYS]
        pages = torch.randperm(SLOTS // page_size, generator=generator)
        req_to_token, taken = torch.zeros(9, 64, dtype=torch.int32), 0
        rows = torch.tensor([7, 2, 5, 0])
        self.pool, locations = Pool(dim_v, wide), []
        for row, n, m, (k, v) in zip(rows, KEYS, counts, self.keys, strict=True):
            needed = -(-n // page_size)
            places = torch.arange(n)
            own = pages[taken : taken + needed]
            slots = own[places // page_size] * page_size + places % page_size
            req_to_token[row, :n] = slots.int()
            taken += needed
            self.pool.k[slots[: n - m]], self.pool.v[slots[: n - m]] = k[: n - m], v[: n - m]
            locations.append(slots[n - m :])
        self.new = [
            torch.cat([x[i][n - m :] for x, n, m in zip(self.keys, KEYS, counts, strict=True)])
            for i in (0, 1)
        ]
        self.runner = SimpleNamespace(
            device=torch.device("cpu"), page_size=page_size,
            model_config=SimpleNamespace(context_len=64, is_encoder_decoder=False),
            req_to_token_pool=SimpleNamespace(req_to_token=req_to_token),
            token_to_kv_pool=self.pool, use_mla_backend=False, is_draft_worker=False,
            kv_cache_dtype_str="auto",
        )  # fmt: skip
        self.batch = SimpleNamespace(
            forward_mode=Mode(max(counts) == 1), spec_info=None, batch_size=len(KEYS),
            seq_lens=torch.tensor(KEYS), seq_lens_cpu=torch.tensor(KEYS), req_pool_indices=rows,
            extend_seq_lens=torch.tensor(counts, dtype=torch.int32), extend_seq_lens_cpu=counts,
            out_cache_loc=torch.cat(locations),
        )  # fmt: skip

    def layer(self, **changed: Any) -> SimpleNamespace:
        return SimpleNamespace(**{
            "tp_q_head_num": HEADS, "tp_k_head_num": HEADS_KV, "qk_head_dim": DIM,
            "v_head_dim": self.dim_v, "layer_id": 0, "scaling": 0.25, "logit_cap": 0.0,
            "sliding_window_size": -1, "is_cross_attention": False, "k_scale": None,
            "v_scale": None, "attn_type": SglangAttentionType.DECODER, **changed,
        })  # fmt: skip

    def run(self, backend: Any, layer: SimpleNamespace, **others: Any) -> Tensor:
        name = "forward_decode" if self.batch.forward_mode.is_decode_or_idle() else "forward_extend"
        out = getattr(backend, name)(self.q, *self.new, layer, self.batch, **others)
        assert out.shape == (self.q.shape[0], HEADS * self.dim_v)
        return out.view(-1, HEADS, self.dim_v)

    def check(self, out: Tensor, **options: Any) -> None:
        begin = 0
        for b, ((k, v), m) in enumerate(zip(self.keys, self.counts, strict=True)):
            rows = slice(begin, begin + m)
            q, own = (
                x.view(-1, HEADS, dim)[rows].transpose(0, 1)[None]
                for x, dim in ((self.q, DIM), (out, self.dim_v))
            )
            k, v = (x.transpose(0, 1)[None] for x in (k, v))
            report = error_report(own, q, k, v, scale=0.25, causal=True, **options)
            assert report.ok, f"sequence {b}: {report}"
            begin += m


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("counts", [QUERIES, [1, 1, 1, 1]], ids=["prompts", "decoding"])
@pytest.mark.parametrize("wide", [False, True])
def test_a_batch_is_as_each_sequence_alone(
    module: Any, counts: list[int], page_size: int, wide: bool
) -> None:
    batch = Batch(counts, page_size, wide=wide)
    backend = module.FlashcoreAttnBackend(batch.runner)
    backend.init_forward_metadata(batch.batch)
    batch.check(batch.run(backend, batch.layer()))


@pytest.mark.parametrize(("counts", "dims"), [(QUERIES, 3), ([1, 1, 1, 1], 4)])
def test_sequences_of_one_query_are_not_packed(
    module: Any, monkeypatch: pytest.MonkeyPatch, counts: list[int], dims: int
) -> None:
    batch, seen, compute = Batch(counts, 16), [], module.attention_with_kvcache

    def attend(q: Tensor, *caches: Tensor, **options: Any) -> Any:
        seen.append(q.dim())
        return compute(q, *caches, **options)

    monkeypatch.setattr(module, "attention_with_kvcache", attend)
    backend = module.FlashcoreAttnBackend(batch.runner)
    backend.init_forward_metadata(batch.batch)
    batch.check(batch.run(backend, batch.layer()))
    assert seen == [dims]


def test_lengths_that_only_the_device_knows_will_do(module: Any) -> None:
    batch = Batch(QUERIES, 16)
    batch.batch.seq_lens_cpu = batch.batch.extend_seq_lens_cpu = None
    backend = module.FlashcoreAttnBackend(batch.runner)
    backend.init_forward_metadata(batch.batch)
    batch.check(batch.run(backend, batch.layer()))


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "window": ({"sliding_window_size": 4}, {}, {"window": (4, 0)}),
    "softcap": ({"logit_cap": 2.0}, {}, {"softcap": 2.0}),
    "sinks": ({}, {"sinks": torch.linspace(-1, 1, HEADS)}, {"sinks": torch.linspace(-1, 1, HEADS)}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_mean_what_sglang_means(module: Any, name: str) -> None:
    of_layer, of_call, meant = OPTIONS[name]
    batch = Batch(QUERIES, 16, dim_v=8)
    backend = module.FlashcoreAttnBackend(batch.runner)
    backend.init_forward_metadata(batch.batch)
    batch.check(batch.run(backend, batch.layer(**of_layer), **of_call), **meant)


def test_a_graph_reads_what_is_written_before_each_replay(module: Any) -> None:
    batch = Batch([1, 1, 1, 1], 16)
    backend = module.FlashcoreAttnBackend(batch.runner)
    backend.init_cuda_graph_state(8, 8)
    lengths, batch.batch.seq_lens = batch.batch.seq_lens, torch.ones(4, dtype=torch.int64)
    backend.init_forward_metadata_out_graph(batch.batch, in_capture=True)
    captured = backend.forward_metadata
    batch.batch.seq_lens = lengths
    backend.init_forward_metadata_out_graph(batch.batch)
    for name in ("seqlens_k", "page_table", "cu_seqlens_q"):
        have, want = (getattr(x, name).data_ptr() for x in (captured, backend.forward_metadata))
        assert have == want
    backend.forward_metadata = captured
    batch.check(batch.run(backend, batch.layer()))
    assert backend.get_cuda_graph_seq_len_fill_value() == 1


def test_prompts_are_not_captured(module: Any) -> None:
    batch = Batch(QUERIES, 16)
    backend = module.FlashcoreAttnBackend(batch.runner)
    backend.init_cuda_graph_state(8, 64)
    with pytest.raises(NotImplementedError, match="only decoding"):
        backend.init_forward_metadata_out_graph(batch.batch, in_capture=True)


RUNNERS: dict[str, dict[str, Any]] = {
    "MLA": {"use_mla_backend": True},
    "a draft model": {"is_draft_worker": True},
    "kv-cache-dtype fp8": {"kv_cache_dtype_str": "fp8_e4m3"},
    "sliding windows": {"token_to_kv_pool": SimpleNamespace(swa_kv_pool=object())},
    "unified-memory": {"kv_index_translator": SimpleNamespace(is_translating=True)},
    "cross-attention": {"model_config": SimpleNamespace(is_encoder_decoder=True)},
}


@pytest.mark.parametrize("name", RUNNERS)
def test_models_that_are_not_served_are_refused_by_name(module: Any, name: str) -> None:
    runner = SimpleNamespace(**{**vars(Batch(QUERIES, 16).runner), **RUNNERS[name]})
    with pytest.raises(NotImplementedError, match=f"{name}.*another backend"):
        module.FlashcoreAttnBackend(runner)


LAYERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cross-attention": ({"is_cross_attention": True}, {}),
    "ENCODER_ONLY": ({"attn_type": SglangAttentionType.ENCODER_ONLY}, {}),
    "q_rope": ({}, {"q_rope": torch.zeros(1)}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_are_not_computed_are_refused_by_name(module: Any, name: str) -> None:
    of_layer, of_call = LAYERS[name]
    batch = Batch(QUERIES, 16)
    backend = module.FlashcoreAttnBackend(batch.runner)
    backend.init_forward_metadata(batch.batch)
    with pytest.raises(NotImplementedError, match=f"{name}.*another backend"):
        batch.run(backend, batch.layer(**of_layer), **of_call)


def test_speculation_is_refused(module: Any) -> None:
    batch = Batch(QUERIES, 16)
    batch.batch.spec_info = object()
    with pytest.raises(NotImplementedError, match="speculative decoding"):
        module.FlashcoreAttnBackend(batch.runner).init_forward_metadata(batch.batch)


def test_register_adds_the_backend_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = stand_in_for_sglang(monkeypatch)
    entry = importlib.import_module("flashcore.integrations.sglang")
    entry.register()
    entry.register()
    assert lists.choices == ["fa3", "flashcore"]
    made = lists.backends["flashcore"](Batch(QUERIES, 16).runner)
    assert type(made).__name__ == "FlashcoreAttnBackend"
