"""FlashcoreAttnBackend is an attention backend for SGLang: its pool of keys and values is read in
place, as pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from torch import Tensor

from flashcore.serving.with_kvcache import attention_with_kvcache

__all__ = []  # SGLang alone imports this module

_REFUSED = {"use_mla_backend": "latent attention (MLA)", "is_draft_worker": "a draft model"}


@dataclass
class Metadata:
    """Hold what all layers of a batch share.

    Args:
        seqlens_k: int32, [batch]: keys of each sequence, those of the queries among them.
        page_table: int32, [batch, pages].
        cu_seqlens_q: int32, [batch + 1]: where the queries of each sequence begin.
        max_seqlen_q: of the longest sequence.
    """

    seqlens_k: Tensor
    page_table: Tensor
    cu_seqlens_q: Tensor
    max_seqlen_q: int


def pages_of(pool: Tensor, page_size: int, heads: int, dim: int) -> Tensor:
    """Return a view of a layer's keys or values as [num_pages, heads, page_size, dim].

    Args:
        pool: [tokens, heads, dim] or [tokens, heads * dim], of any stride from one token to the
            next; or [num_pages, heads, page_size, dim] already.
        page_size: tokens of a page, which divides the pool.
        heads: of keys and values.
        dim: of a key, or of a value.
    """
    if pool.dim() == 4:
        return pool
    tokens = pool.view(pool.shape[0], heads, dim)
    step, head_step, column_step = tokens.stride()
    # as_strided, as the stride between the tokens of a page of one must be that of tokens, too.
    return tokens.as_strided(
        (tokens.shape[0] // page_size, heads, page_size, dim),
        (step * page_size, head_step, step, column_step),
    )


class FlashcoreAttnBackend(AttentionBackend):
    """A FlashcoreAttnBackend is what computes the attention layers of a decoder: prompts, chunks of
    prompts behind a cached prefix, and decoding, which CUDA graphs may replay."""

    needs_cpu_seq_lens: bool = False

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        self._refuse(model_runner)
        self.device = model_runner.device
        self.page_size: int = model_runner.page_size
        self.max_pages = -(-model_runner.model_config.context_len // self.page_size)
        self.req_to_token: Tensor = model_runner.req_to_token_pool.req_to_token
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.forward_metadata: Metadata | None = None
        self._in_graphs: Metadata | None = None

    @staticmethod
    def _refuse(runner: Any) -> None:
        wrong = [text for name, text in _REFUSED.items() if getattr(runner, name, False)]
        if getattr(runner.model_config, "is_encoder_decoder", False):
            wrong.append("cross-attention")
        if getattr(runner.token_to_kv_pool, "swa_kv_pool", None) is not None:
            wrong.append("a pool of its own for sliding windows (pass --disable-hybrid-swa-memory)")
        if getattr(getattr(runner, "kv_index_translator", None), "is_translating", False):
            wrong.append("--enable-unified-memory")
        if str(getattr(runner, "kv_cache_dtype_str", "auto")) not in ("auto", "bfloat16", "bf16"):
            wrong.append(f"--kv-cache-dtype {runner.kv_cache_dtype_str}")
        if wrong:
            raise NotImplementedError(
                f"{', '.join(wrong)}: --attention-backend flashcore serves decoders with one cache "
                "of 16 bits; choose another backend"
            )

    def _page_table(self, forward_batch: Any, num_pages: int) -> Tensor:
        """Return the first pages of each sequence, int32. Of a page its first token is looked up:
        SGLang has the tokens of a page side by side."""
        first = self.req_to_token[:, : num_pages * self.page_size : self.page_size]
        rows = first[forward_batch.req_pool_indices]
        return (rows if self.page_size == 1 else rows // self.page_size).to(torch.int32)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Make the metadata of a batch that no graph replays."""
        mode, lengths = forward_batch.forward_mode, forward_batch.seq_lens
        if forward_batch.spec_info is not None:
            raise NotImplementedError(
                "speculative decoding is not computed by --attention-backend flashcore; pass "
                "another backend, or leave out --speculative-algorithm"
            )
        on_host = getattr(forward_batch, "seq_lens_cpu", None)
        longest = self.max_pages * self.page_size
        if on_host is not None and on_host.numel():
            longest = int(on_host.max())
        table = self._page_table(forward_batch, max(1, -(-longest // self.page_size)))
        if mode.is_decode_or_idle():
            max_seqlen_q = 1
            cu_seqlens_q = torch.arange(
                lengths.shape[0] + 1, dtype=torch.int32, device=lengths.device
            )
        else:
            ends = forward_batch.extend_seq_lens.cumsum(0, dtype=torch.int32)
            cu_seqlens_q = torch.nn.functional.pad(ends, (1, 0))
            of_host = getattr(forward_batch, "extend_seq_lens_cpu", None)
            # Without the host's copy all tokens of the batch are a bound.
            tokens = forward_batch.out_cache_loc.shape[0]
            max_seqlen_q = tokens if of_host is None else max([int(x) for x in of_host], default=1)
        self.forward_metadata = Metadata(
            lengths.to(torch.int32), table, cu_seqlens_q, max(1, max_seqlen_q)
        )

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what graphs of decoding read: one set for all of them."""
        numbers = {"dtype": torch.int32, "device": self.device}
        self._in_graphs = Metadata(
            torch.zeros(max_bs, **numbers),
            torch.zeros(max_bs, self.max_pages, **numbers),
            torch.arange(max_bs + 1, **numbers),
            1,
        )

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Write the metadata of a batch where the graph that is captured, or replayed, reads it."""
        if (
            not forward_batch.forward_mode.is_decode_or_idle()
            or forward_batch.spec_info is not None
        ):
            raise NotImplementedError(
                "only decoding is captured in CUDA graphs with --attention-backend flashcore: "
                "leave out --speculative-algorithm, and graphs of prompts"
            )
        buffers = self._in_graphs
        assert buffers is not None, "init_cuda_graph_state comes first"
        n = forward_batch.batch_size
        own = Metadata(
            buffers.seqlens_k[:n], buffers.page_table[:n], buffers.cu_seqlens_q[: n + 1], 1
        )
        own.seqlens_k.copy_(forward_batch.seq_lens[:n])
        own.page_table.copy_(self._page_table(forward_batch, self.max_pages)[:n])
        self.forward_metadata = own

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Return how many keys a sequence has that pads a graph's batch."""
        return 1

    def support_triton(self) -> bool:
        """Return True: SGLang may prepare batches by its Triton kernels."""
        return True

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: Tensor | None = None,
        **unknown: Any,
    ) -> Tensor:
        """Compute a layer of decoding; see `forward_extend`."""
        return self.forward_extend(
            q, k, v, layer, forward_batch, save_kv_cache, sinks=sinks, **unknown
        )

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: Tensor | None = None,
        **unknown: Any,
    ) -> Tensor:
        """Write a layer's new keys and values into the pool, and compute attention over all that
        each sequence has there.

        Args:
            q: [tokens, heads * head_dim], or of three dimensions.
            k: the new keys, [tokens, heads_kv, head_dim]; None: the pool has them.
            v: likewise, values.
            layer: SGLang's RadixAttention.
            forward_batch: SGLang's ForwardBatch.
            save_kv_cache: whether k and v are written.
            sinks: [heads], a logit of each head that joins the softmax.
            unknown: refused, unless it is None or False.

        Returns:
            [tokens, heads * head_dim of v].
        """
        self._refuse_layer(layer, unknown)
        metadata = self.forward_metadata
        assert metadata is not None, "init_forward_metadata comes first"
        if save_kv_cache and k is not None and v is not None:
            location = _location(forward_batch, layer)
            scales = layer.k_scale, layer.v_scale
            self.token_to_kv_pool.set_kv_buffer(layer, location, k, v, *scales)
        k_pool, v_pool = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        heads, heads_kv, dim_v = layer.tp_q_head_num, layer.tp_k_head_num, layer.v_head_dim
        windowed = layer.sliding_window_size is not None and layer.sliding_window_size >= 0
        rows = q.reshape(-1, heads, layer.qk_head_dim)
        packs: dict[str, Any] = {
            "cu_seqlens_q": metadata.cu_seqlens_q, "max_seqlen_q": metadata.max_seqlen_q
        }  # fmt: skip
        if metadata.max_seqlen_q == 1 and metadata.seqlens_k.shape[0] == rows.shape[0]:
            rows, packs = rows.unsqueeze(2), {}  # each row is all that a sequence has
        out = attention_with_kvcache(
            rows,
            pages_of(k_pool, self.page_size, heads_kv, layer.qk_head_dim),
            pages_of(v_pool, self.page_size, heads_kv, dim_v),
            seqlens_k=metadata.seqlens_k,
            page_table=metadata.page_table,
            # SGLang's window has that many keys before the query's own, as here.
            window=(layer.sliding_window_size, 0) if windowed else None,
            scale=layer.scaling,
            softcap=layer.logit_cap or None,
            sinks=sinks,
            **packs,
        )
        return out.view(-1, heads * dim_v)

    @staticmethod
    def _refuse_layer(layer: Any, unknown: dict[str, Any]) -> None:
        wrong = [name for name, x in unknown.items() if x is not None and x is not False]
        if layer.is_cross_attention:
            wrong.append("cross-attention")
        if layer.attn_type != AttentionType.DECODER:
            wrong.append(f"attn_type {layer.attn_type}")
        if wrong:
            raise NotImplementedError(
                f"layer {layer.layer_id} asks for {', '.join(wrong)}, which --attention-backend "
                "flashcore does not compute; choose another backend"
            )


def _location(forward_batch: Any, layer: Any) -> Any:
    """Return where new tokens go, as `set_kv_buffer` takes it: older versions of SGLang take the
    slots alone."""
    try:
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc
    except ImportError:
        return forward_batch.out_cache_loc
    return KVWriteLoc.for_layer(forward_batch, layer)
