"""Make the metadata of a step, which all layers share, out of what vLLM knows of a batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder

__all__ = []  # vLLM alone imports this module

# A prefix that all sequences of a batch share is computed once, where that saves enough reads to
# pay for another launch and the merge.
CASCADE_MIN_TOKENS, CASCADE_MIN_SEQUENCES = 256, 8


class Part(NamedTuple):
    """A part is sequences of a batch that one launch computes.

    Args:
        cu_seqlens_q: int32, [sequences + 1].
        max_seqlen_q: queries of the longest.
        seqlens_k: int32, [sequences].
        page_table: int32, [sequences, blocks].
    """

    cu_seqlens_q: Tensor
    max_seqlen_q: int
    seqlens_k: Tensor
    page_table: Tensor


@dataclass
class FlashcoreMetadata:
    """Hold what all layers of a step share.

    Args:
        num_actual_tokens: queries, without those that pad a CUDA graph's batch.
        max_query_len: of the longest sequence.
        query_start_loc: int32, [sequences + 1]: where the queries of each begin.
        max_seq_len: of keys, or more.
        seq_lens: int32, [sequences]: keys of each, those of the queries among them.
        block_table: int32, [sequences, blocks].
        slot_mapping: int64: where each new token goes, block * block_size + place; -1 for nowhere.
        causal: whether a query sees no keys after its own.
        common_prefix_len: keys that all sequences share, of whole blocks; computed once.
        prefix_lens: int32, [1]: the same on the device; None without such a prefix.
        suffix_lens: int32, [sequences]: keys behind it.
        num_decodes: sequences at the front that have one query each, where others follow them;
            else 0. They are computed by a launch of their own, in which blocks share keys and heads
            row tiles: 63 of them beside a prompt take an H200 0.3 ms then instead of 0.8.
    """

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: Tensor
    max_seq_len: int
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    causal: bool = True
    common_prefix_len: int = 0
    prefix_lens: Tensor | None = None
    suffix_lens: Tensor | None = None
    num_decodes: int = 0

    def __post_init__(self) -> None:
        """Cut the batch into parts, once for all layers."""
        first, starts = self.num_decodes, self.query_start_loc
        lengths, table = self.seq_lens, self.block_table
        self.parts = [Part(starts, self.max_query_len, lengths, table)]
        if first:
            self.parts = [
                Part(starts[: first + 1], 1, lengths[:first], table[:first]),
                Part(starts[first:] - first, self.max_query_len, lengths[first:], table[first:]),
            ]


class FlashcoreMetadataBuilder(AttentionMetadataBuilder):
    """A FlashcoreMetadataBuilder makes the metadata of a step. It copies nothing: all tensors are
    vLLM's own, so a CUDA graph that was captured with them sees what vLLM writes later."""

    # A graph is replayed with other lengths of keys. Launches depend on the number of tokens, and
    # of a uniform batch (decoding, speculation) on how many each sequence has.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    reorder_batch_threshold: int | None = 1  # vLLM puts sequences of one query in front

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size = kv_cache_spec.block_size

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> FlashcoreMetadata:
        """Return the metadata of a step.

        Args:
            common_prefix_len: keys that all sequences share, 0 in current versions of vLLM.
            common_attn_metadata: vLLM's CommonAttentionMetadata.
            fast_build: not used, as there is nothing to do slowly.
        """
        common = common_attn_metadata
        if not isinstance(common.causal, bool):
            raise NotImplementedError(
                "causal differs from sequence to sequence in one batch, which FLASHCORE does not "
                "compute: choose another backend for this model"
            )
        metadata = FlashcoreMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=common.causal,
            num_decodes=_num_decodes(common.query_start_loc_cpu),
        )
        whole_blocks = common_prefix_len // self.block_size * self.block_size
        if whole_blocks > 0:
            metadata.common_prefix_len = whole_blocks
            metadata.prefix_lens = torch.full(
                (1,), whole_blocks, dtype=torch.int32, device=common.seq_lens.device
            )
            metadata.suffix_lens = common.seq_lens - whole_blocks
        return metadata

    def use_cascade_attention(
        self, common_prefix_len: int, query_lens: Any, *_: Any, **asked: Any
    ) -> bool:
        """Return whether a common prefix should be computed once; asked by older versions."""
        if asked.get("use_sliding_window") or asked.get("use_alibi"):
            return False
        enough = len(query_lens) >= CASCADE_MIN_SEQUENCES
        return enough and common_prefix_len >= CASCADE_MIN_TOKENS

    def update_block_table(
        self, metadata: FlashcoreMetadata, blk_table: Tensor, slot_mapping: Tensor
    ) -> FlashcoreMetadata:
        """Return the metadata of another group of layers, whose blocks are others."""
        return dataclasses.replace(metadata, block_table=blk_table, slot_mapping=slot_mapping)

    supports_update_block_table = True


def _num_decodes(query_start_loc: Tensor) -> int:
    """Return how many sequences at the front of a mixed batch have one query, 0 where all or none
    of them do.

    Args:
        query_start_loc: int32, [sequences + 1], on the CPU.
    """
    numbers = query_start_loc.diff()
    longer = (numbers != 1).nonzero()
    return int(longer[0]) if longer.numel() and int(numbers.max()) > 1 else 0
