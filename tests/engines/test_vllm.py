"""Test the attention backend for vLLM with a stand-in for vLLM, against attention one sequence at a
time."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_standins import AttentionType, stand_in_for_vllm
from torch import Tensor

from flashcore.checks.accuracy import error_report
from flashcore.serving.with_kvcache import attention_with_kvcache

HEADS, HEADS_KV, DIM, BLOCK, BLOCKS = 4, 2, 16, 16, 12
KEYS, QUERIES = [20, 40, 33, 16], [1, 24, 2, 16]  # decoding, a chunk, a draft, a prompt


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    stand_in_for_vllm(monkeypatch)
    return importlib.import_module("flashcore.integrations.vllm.backend").FlashcoreBackend


class Batch:
    """Hold a batch as vLLM describes it, and what each sequence is on its own."""

    def __init__(
        self, layout: str, dtype: torch.dtype = torch.float32, shared: int = 0, padding: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(7)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        total = sum(QUERIES)
        self.query = draw(total + padding, HEADS, DIM)
        self.keys = [draw(2, n, HEADS_KV, DIM) for n in KEYS]
        for x in self.keys[1:]:
            x[:, :shared] = self.keys[0][:, :shared]
        pages = torch.randperm(BLOCKS - 1, generator=generator) + 1
        table, taken = torch.full((len(KEYS), 4), -1, dtype=torch.int32), 0
        for b, n in enumerate(KEYS):
            needed = -(-n // BLOCK)
            table[b, :needed] = pages[taken : taken + needed]
            table[b, : shared // BLOCK] = table[0, : shared // BLOCK]
            taken += needed
        slots = [
            int(table[b, t // BLOCK]) * BLOCK + t % BLOCK
            for b, (n, m) in enumerate(zip(KEYS, QUERIES, strict=True))
            for t in range(n - m, n)
        ]
        self.cache = {
            "now": torch.zeros(BLOCKS, HEADS_KV, BLOCK, 2 * DIM, dtype=dtype),
            "now, tokens first": torch.zeros(
                BLOCKS, BLOCK, HEADS_KV, 2 * DIM, dtype=dtype
            ).transpose(1, 2),
            "two first": torch.zeros(2, BLOCKS, BLOCK, HEADS_KV, DIM, dtype=dtype),
            "two second": torch.zeros(BLOCKS, 2, BLOCK, HEADS_KV, DIM, dtype=dtype),
        }[layout]
        layer = importlib.import_module("flashcore.integrations.vllm.layer")
        views = layer.split_cache(self.cache, DIM)
        for b, (n, m) in enumerate(zip(KEYS, QUERIES, strict=True)):
            for view, x in zip(views, self.keys[b], strict=True):
                for t in range(n - m):
                    view[int(table[b, t // BLOCK]), :, t % BLOCK] = x[t]
        pairs = list(zip(self.keys, KEYS, QUERIES, strict=True))
        self.new = [
            torch.cat([*(x[i, n - m :] for x, n, m in pairs), draw(padding, HEADS_KV, DIM)])
            for i in (0, 1)
        ]
        starts = torch.tensor([0, *QUERIES]).cumsum(0).int()
        self.common = SimpleNamespace(
            query_start_loc=starts, query_start_loc_cpu=starts,
            seq_lens=torch.tensor(KEYS, dtype=torch.int32),
            num_actual_tokens=total + padding, max_query_len=max(QUERIES), max_seq_len=max(KEYS),
            block_table_tensor=table, causal=True,
            slot_mapping=torch.tensor([*slots, *[-1] * padding]),
        )  # fmt: skip

    def run(self, backend: Any, prefix: int = 0, **options: Any) -> Tensor:
        builder = backend.get_builder_cls()(
            SimpleNamespace(block_size=BLOCK), ["layer"], None, torch.device("cpu")
        )
        metadata = builder.build(prefix, self.common)
        impl = backend.get_impl_cls()(
            num_heads=HEADS, head_size=DIM, scale=0.25, num_kv_heads=HEADS_KV, alibi_slopes=None,
            kv_cache_dtype="auto", **{"sliding_window": None, **options},
        )  # fmt: skip
        impl.do_kv_cache_update(None, *self.new, self.cache, metadata.slot_mapping)
        output = torch.full((self.query.shape[0], HEADS * DIM), torch.nan, dtype=self.query.dtype)
        result = impl.forward(None, self.query, *self.new, self.cache, metadata, output=output)
        assert result is output
        return output.view(-1, HEADS, DIM)

    def check(self, out: Tensor, **options: Any) -> None:
        """Raise unless each sequence's rows are what it has on its own."""
        begin = 0
        for b, (x, m) in enumerate(zip(self.keys, QUERIES, strict=True)):
            if m == 0:
                continue
            q = self.query[begin : begin + m].transpose(0, 1)[None]
            k, v = (y.transpose(0, 1)[None] for y in x)
            own = out[begin : begin + m].transpose(0, 1)[None]
            report = error_report(own, q, k, v, scale=0.25, **{"causal": True, **options})
            assert report.ok, f"sequence {b}: {report}"
            begin += m


LAYOUTS = ["now", "now, tokens first", "two first", "two second"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mixed_batch_is_as_each_sequence_alone(backend: Any, layout: str) -> None:
    batch = Batch(layout)
    batch.check(batch.run(backend))


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "window": ({"sliding_window": 5}, {"window": (4, 0)}),
    "softcap": ({"logits_soft_cap": 2.0}, {"softcap": 2.0}),
    "no softcap": ({"logits_soft_cap": 0}, {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_mean_what_vllm_means(backend: Any, name: str) -> None:
    batch, (asked, meant) = Batch("now"), OPTIONS[name]
    batch.check(batch.run(backend, **asked), **meant)


def test_sinks_join_the_softmax(backend: Any) -> None:
    batch, sinks = Batch("now"), torch.linspace(-1, 1, HEADS)
    batch.check(batch.run(backend, sinks=sinks), sinks=sinks)


@pytest.mark.parametrize("sinks", [None, torch.linspace(-1, 1, HEADS)])
def test_a_prefix_that_all_share_is_computed_once(
    backend: Any, sinks: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A prefix of 16 keys, of whole blocks; sequence 3 has as many keys, all of them its queries.
    monkeypatch.setattr(sys.modules[__name__], "QUERIES", [1, 24, 2, 0])
    batch = Batch("now", shared=16)
    out = batch.run(backend, prefix=17, sinks=sinks)
    batch.check(out, **({} if sinks is None else {"sinks": sinks}))


def test_tokens_that_pad_a_graph_go_nowhere(backend: Any) -> None:
    batch = Batch("now", padding=3)
    before = batch.cache.clone()
    batch.check(batch.run(backend))
    written = (batch.cache != before).any(-1).sum()
    assert written == sum(QUERIES) * HEADS_KV


def test_without_metadata_output_is_zero(backend: Any) -> None:
    batch = Batch("now")
    impl = backend.get_impl_cls()(HEADS, DIM, 0.25, HEADS_KV)
    output = torch.full((3, HEADS * DIM), torch.nan)
    impl.forward(None, batch.query, *batch.new, batch.cache, None, output=output)
    assert not output.any()


REFUSED: dict[str, dict[str, Any]] = {
    "alibi_slopes": {"alibi_slopes": [0.5] * HEADS},
    "kv_cache_dtype='fp8'": {"kv_cache_dtype": "fp8"},
    "attn_type": {"attn_type": AttentionType.ENCODER_ONLY},
    "chunk_lookback": {"chunk_lookback": 2},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_by_name(backend: Any, name: str) -> None:
    arguments = {"num_heads": HEADS, "head_size": DIM, "scale": 0.25, **REFUSED[name]}
    with pytest.raises(NotImplementedError, match=f"{name}.*another backend"):
        backend.get_impl_cls()(**arguments)


def test_masks_that_differ_by_sequence_are_refused(backend: Any) -> None:
    batch = Batch("now")
    batch.common.causal = torch.ones(len(KEYS), dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="causal differs"):
        batch.run(backend)


def test_a_cache_of_another_shape_is_refused(backend: Any) -> None:
    layer = importlib.import_module("flashcore.integrations.vllm.layer")
    with pytest.raises(ValueError, match="kv_cache has shape"):
        layer.split_cache(torch.zeros(3, 3, BLOCK, HEADS_KV, DIM), DIM)


def test_what_is_supported(backend: Any) -> None:
    assert backend.get_name() == "FLASHCORE"
    assert backend.get_kv_cache_shape(8, 32, 2, 64) == (2, 8, 32, 2, 64)
    with pytest.raises(ValueError, match="block_size=8"):
        backend.get_kv_cache_shape(8, 8, 2, 64)
    assert [backend.supports_head_size(n) for n in (8, 100, 128, 264)] == [True, False, True, False]
    assert [backend.supports_compute_capability(c) for c in ((7, 0), (7, 5), (9, 0))] == [
        False, True, True,
    ]  # fmt: skip
    asked = 64, torch.bfloat16, "auto", 16, False, False, False, False
    assert backend.supports_combination(*asked, (9, 0)) is None
    assert "8.0" in backend.supports_combination(*asked, (7, 5))
    asked = 64, torch.bfloat16, "float16", 16, False, False, False, False
    assert "float16" in backend.supports_combination(*asked, (9, 0))


@pytest.mark.parametrize(("takes_names", "name"), [(True, "FLASHCORE"), (False, "CUSTOM")])
def test_register_adds_the_backend_once(
    monkeypatch: pytest.MonkeyPatch, takes_names: bool, name: str
) -> None:
    registered = stand_in_for_vllm(monkeypatch, takes_names)
    entry = importlib.import_module("flashcore.integrations.vllm")
    entry.register()
    entry.register()
    assert registered == {name: "flashcore.integrations.vllm.backend.FlashcoreBackend"}
    module, _, member = registered[name].rpartition(".")
    assert hasattr(importlib.import_module(module), member)


@pytest.mark.thorough
def test_flashcore_imports_no_engine() -> None:
    text = (
        "import sys, flashcore.api, flashcore.integrations.vllm, flashcore.integrations.sglang\n"
        "flashcore.attention_with_kvcache\nassert not {'vllm', 'sglang'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", text], check=True, timeout=120)


def test_entry_points_are_what_engines_look_for() -> None:
    import pathlib
    import re

    text = (pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for group, value in (
        ("vllm.general_plugins", "flashcore.integrations.vllm:register"),
        ("sglang.srt.plugins", "flashcore.integrations.sglang:register"),
    ):
        found = re.search(rf'\[project.entry-points."{group}"\]\nflashcore = "(.*)"', text)
        assert found is not None
        assert found[1] == value
        module, member = value.split(":")
        assert callable(getattr(importlib.import_module(module), member))


def test_sequences_of_one_query_are_computed_apart(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "QUERIES", [1, 1, 2, 16])
    batch, layer = Batch("now"), sys.modules["flashcore.integrations.vllm.layer"]
    longest: list[int] = []

    def counted(*tensors: Tensor, **options: Any) -> Any:
        longest.append(options["max_seqlen_q"] or tensors[0].shape[2])
        return attention_with_kvcache(*tensors, **options)

    monkeypatch.setattr(layer, "attention_with_kvcache", counted)
    batch.check(batch.run(backend))
    assert longest == [1, 16]


@pytest.mark.parametrize(
    ("queries", "want"), [([1, 1], 0), ([3, 2], 0), ([1, 1, 5], 2), ([5, 1], 0), ([1, 0], 0)]
)
def test_decodes_are_told_from_prompts(backend: Any, queries: list[int], want: int) -> None:
    metadata = sys.modules["flashcore.integrations.vllm.metadata"]
    assert metadata._num_decodes(torch.tensor([0, *queries]).cumsum(0).int()) == want


def test_a_batch_is_cut_once_for_all_layers(backend: Any) -> None:
    """A group of layers with other blocks has it cut again."""
    metadata = sys.modules["flashcore.integrations.vllm.metadata"]
    starts, lengths = torch.tensor([0, 1, 2, 7]).int(), torch.tensor([4, 9, 11]).int()
    table = torch.arange(6).int().view(3, 2)
    step = metadata.FlashcoreMetadata(
        num_actual_tokens=7, max_query_len=5, query_start_loc=starts, max_seq_len=11,
        seq_lens=lengths, block_table=table, slot_mapping=torch.arange(7), num_decodes=2,
    )  # fmt: skip
    builder = metadata.FlashcoreMetadataBuilder
    other = builder.update_block_table(None, step, table + 6, step.slot_mapping)
    for found, blocks in ((step, table), (other, table + 6)):
        decodes, chunk = found.parts
        assert (decodes.cu_seqlens_q.tolist(), decodes.max_seqlen_q) == ([0, 1, 2], 1)
        assert (chunk.cu_seqlens_q.tolist(), chunk.max_seqlen_q) == ([0, 5], 5)
        assert decodes.seqlens_k.tolist() + chunk.seqlens_k.tolist() == lengths.tolist()
        assert torch.equal(torch.cat([decodes.page_table, chunk.page_table]), blocks)
