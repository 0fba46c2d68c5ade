"""FlashcoreBackend is an attention backend for vLLM: vLLM's cache in blocks is read in place.

vLLM asks a backend for three classes: this one says what is supported, a builder (metadata.py)
makes the metadata of a step, and an implementation (layer.py) computes one layer.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf

from flashcore.backends.obstacles import BFLOAT16_MIN_ARCH, WMMA_MIN_ARCH
from flashcore.integrations.vllm.layer import CACHE_DTYPES, FlashcoreImpl
from flashcore.integrations.vllm.metadata import FlashcoreMetadataBuilder
from flashcore.problem.validation import HEAD_DIM_MAX, HEAD_DIM_MULTIPLE

__all__ = []  # vLLM alone imports this module

BLOCK_MULTIPLE = 16  # tokens of a block


class FlashcoreBackend(AttentionBackend):
    """A FlashcoreBackend says what is supported, and which classes compute it."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = list(CACHE_DTYPES)
    forward_includes_kv_cache_update: bool = False  # see FlashcoreImpl.do_kv_cache_update

    @staticmethod
    def get_name() -> str:
        """Return the name under which the backend is registered."""
        return "FLASHCORE"

    @staticmethod
    def get_impl_cls() -> type[FlashcoreImpl]:
        """Return the class that computes a layer."""
        return FlashcoreImpl

    @staticmethod
    def get_builder_cls() -> type[FlashcoreMetadataBuilder]:
        """Return the class that makes the metadata of a step."""
        return FlashcoreMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Return which numbers of tokens may make a block."""
        return [MultipleOf(BLOCK_MULTIPLE)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """Return the shape of a layer's cache, for versions of vLLM that let the backend choose
        it: [2, num_blocks, block_size, num_kv_heads, head_size]."""
        if block_size % BLOCK_MULTIPLE:
            raise ValueError(
                f"block_size={block_size} must be a multiple of {BLOCK_MULTIPLE}: pass vLLM "
                f"--block-size {BLOCK_MULTIPLE}"
            )
        return (2, num_blocks, block_size, num_kv_heads, head_size)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Return whether the kernels read rows of this size in place."""
        return head_size % HEAD_DIM_MULTIPLE == 0 and 0 < head_size <= HEAD_DIM_MAX

    @classmethod
    def supports_sink(cls) -> bool:
        """Return True: sinks are an option of flashcore's attention."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Return True: windows are an option of flashcore's attention."""
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Return True: a batch may be causal or not. It may not be mixed of both."""
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """Return whether the kernels run on a GPU."""
        return _arch(capability) >= WMMA_MIN_ARCH

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Return False: the longest query that the host knows of has to be a bound."""
        return False

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        *others: Any,
        **named: Any,
    ) -> str | None:
        """Return why a combination of what is supported is not; None if it is."""
        capability = named.get("device_capability", others[-1] if others else None)
        is_old = capability is not None and _arch(capability) < BFLOAT16_MIN_ARCH
        if dtype == torch.bfloat16 and is_old:
            return "bfloat16 needs compute capability 8.0"
        names = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
        if kv_cache_dtype not in (None, "auto", names.get(dtype)):
            return f"a cache of {kv_cache_dtype} needs queries of {kv_cache_dtype}"
        return None


def _arch(capability: Any) -> int:
    """Return 10 * major + minor."""
    major, minor = tuple(capability)[:2]
    return int(10 * major + minor)
