"""Compute one attention layer of vLLM, whose cache in blocks is read as it lies."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from flashcore.integrations.vllm.metadata import FlashcoreMetadata
from flashcore.ops.rings import merge
from flashcore.serving.pages import write_at
from flashcore.serving.with_kvcache import attention_with_kvcache

__all__ = []  # vLLM alone imports this module

CACHE_DTYPES = ("auto", "float16", "bfloat16")  # vLLM's names


def split_cache(kv_cache: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Return views of a layer's keys and values, [num_blocks, num_kv_heads, block_size, head_size].

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], of any strides, as vLLM has
            it now; or of five dimensions, [2, num_blocks, block_size, num_kv_heads, head_size] or
            [num_blocks, 2, ...], as earlier versions had it.
        head_size: of one key.
    """
    if kv_cache.dim() == 4:
        k, v = kv_cache.split(head_size, dim=-1)
        return k, v
    if kv_cache.dim() != 5 or 2 not in kv_cache.shape[:2]:
        raise ValueError(
            f"kv_cache has shape {list(kv_cache.shape)}; FLASHCORE knows [num_blocks, num_kv_heads,"
            " block_size, 2 * head_size] and [2, num_blocks, block_size, num_kv_heads, head_size]"
        )
    k, v = kv_cache.unbind(0 if kv_cache.shape[0] == 2 else 1)
    return k.transpose(1, 2), v.transpose(1, 2)


class FlashcoreImpl(AttentionImpl):
    """A FlashcoreImpl is one attention layer."""

    can_return_lse_for_decode: bool = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **unknown: Any,
    ) -> None:
        refused = {
            "alibi_slopes": alibi_slopes is not None,
            f"kv_cache_dtype={kv_cache_dtype!r}": kv_cache_dtype not in CACHE_DTYPES,
            f"attn_type={attn_type!r}": attn_type != AttentionType.DECODER,
            **{f"{name}={x!r}": x not in (None, False, -1) for name, x in unknown.items()},
        }
        wrong = [name for name, is_wrong in refused.items() if is_wrong]
        if wrong:
            raise NotImplementedError(
                f"{', '.join(wrong)}: the backend FLASHCORE computes decoders with caches of 16 "
                "bits, windows, softcaps and sinks; choose another backend for this model"
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.window = None if sliding_window is None else (sliding_window - 1, 0)
        self.kv_cache_dtype, self.attn_type = kv_cache_dtype, attn_type
        self.softcap = logits_soft_cap or None  # vLLM writes 0 for none
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write new keys and values into the cache, in place; vLLM calls this before `forward`.

        Args:
            layer: vLLM's attention layer.
            key: [tokens or more, num_kv_heads, head_size].
            value: likewise.
            kv_cache: see `split_cache`.
            slot_mapping: int64, [tokens]: where each goes; one below 0 goes nowhere.
        """
        if kv_cache.numel() == 0:
            return
        k, v = split_cache(kv_cache, self.head_size)
        if key.is_cuda:  # vLLM has a kernel for it
            from vllm._custom_ops import reshape_and_cache_flash

            heads_third = k.transpose(1, 2), v.transpose(1, 2)
            scales = layer._k_scale, layer._v_scale  # not read for a cache of 16 bits
            reshape_and_cache_flash(key, value, *heads_third, slot_mapping, "auto", *scales)
            return
        n = slot_mapping.shape[0]
        write_at((k, v), slot_mapping, (key[:n], value[:n]))

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Compute a layer into `output`, and return that.

        Args:
            layer: vLLM's attention layer.
            query: [tokens or more, num_heads, head_size].
            key: the same tokens' keys, which the cache has already.
            value: likewise.
            kv_cache: see `split_cache`.
            attn_metadata: a FlashcoreMetadata; None while vLLM finds out how much memory it needs.
            output: [tokens or more, num_heads * head_size], or of three dimensions.
            output_scale: refused, as output of 8 bits is not computed.
            output_block_scale: likewise.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "output_scale is given; FLASHCORE writes output of 16 bits: turn off vLLM's fusion "
                "of attention and quantization"
            )
        if attn_metadata is None:
            return output.zero_()
        n = attn_metadata.num_actual_tokens
        out = output[:n].view(n, self.num_heads, self.head_size)
        k, v = split_cache(kv_cache, self.head_size)
        q = query[:n].view(n, self.num_heads, self.head_size)
        if attn_metadata.common_prefix_len:
            self._after_a_prefix(q, k, v, attn_metadata, out)
            return output
        decodes, begin = attn_metadata.num_decodes, 0
        for part in attn_metadata.parts:
            end = decodes if begin < decodes else n
            rows, of_rows, asked = q[begin:end], out[begin:end], part._asdict()
            if part.max_seqlen_q == 1 and part.seqlens_k.shape[0] == end - begin:
                # Each row is all that a sequence has.
                rows, of_rows = rows.unsqueeze(2), of_rows.unsqueeze(2)
                asked |= {"cu_seqlens_q": None, "max_seqlen_q": None}
            self._attend(rows, k, v, attn_metadata, out=of_rows, **asked)
            begin = end
        return output

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, metadata: FlashcoreMetadata, **others: Any
    ) -> Any:
        asked = {
            "seqlens_k": metadata.seq_lens,
            "page_table": metadata.block_table,
            "cu_seqlens_q": metadata.query_start_loc,
            "max_seqlen_q": metadata.max_query_len,
            "causal": metadata.causal,
            "scale": self.scale,
            "window": self.window,
            "softcap": self.softcap,
            "sinks": self.sinks,
        }
        return attention_with_kvcache(q, k, v, **{**asked, **others})

    def _after_a_prefix(
        self, q: Tensor, k: Tensor, v: Tensor, metadata: FlashcoreMetadata, out: Tensor
    ) -> None:
        """Compute the keys that all sequences share once for all queries, then those of each
        sequence, and merge (cascade attention)."""
        assert metadata.prefix_lens is not None
        blocks = metadata.common_prefix_len // k.shape[2]
        table = metadata.block_table
        of_prefix, lse_of_prefix = attention_with_kvcache(
            q.transpose(0, 1)[None],
            k,
            v,
            seqlens_k=metadata.prefix_lens,
            page_table=table[:1, :blocks],
            causal=False,
            scale=self.scale,
            softcap=self.softcap,
            return_lse=True,
        )
        of_rest, lse_of_rest = self._attend(
            q, k, v, metadata, page_table=table[:, blocks:], seqlens_k=metadata.suffix_lens,
            return_lse=True,
        )  # fmt: skip
        merged, _ = merge(of_prefix[0], lse_of_prefix[0], of_rest.transpose(0, 1), lse_of_rest)
        out.copy_(merged.transpose(0, 1))
