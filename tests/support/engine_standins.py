"""Stand-ins for what flashcore's backends for vLLM and SGLang touch: small classes with the same
names, members and arguments. tests/engines/test_interfaces.py holds them against the real
ones, where those are installed."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import Tensor

T = TypeVar("T")


class AttentionType(str, Enum):
    DECODER = "decoder"
    ENCODER_ONLY = "encoder_only"


@dataclass(frozen=True)
class MultipleOf:
    base: int


class AttentionBackend:
    supported_dtypes: Any = ()
    supported_kv_cache_dtypes: Any = ()
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(1)]

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        return dtype in cls.supported_dtypes


class AttentionCGSupport(Enum):
    ALWAYS = 3
    UNIFORM_BATCH = 2


class AttentionMetadataBuilder(Generic[T]):
    supports_update_block_table: bool = False
    reorder_batch_threshold: int | None = None

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        self.kv_cache_spec, self.layer_names = kv_cache_spec, layer_names

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        raise NotImplementedError

    def update_block_table(self, metadata: Any, blk_table: Tensor, slot_mapping: Tensor) -> Any:
        raise NotImplementedError

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        return self.build(common_prefix_len=0, common_attn_metadata=common_attn_metadata)


class AttentionImpl(Generic[T]):
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
        raise NotImplementedError


class Registry(Enum):
    FLASH_ATTN = "..."
    CUSTOM = None

    @classmethod
    def register(cls, name: str, value: str) -> Any:
        raise NotImplementedError


class SglangBackend:
    needs_cpu_seq_lens: bool = True

    def init_forward_metadata(self, forward_batch: Any) -> None:
        raise NotImplementedError

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        raise NotImplementedError

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        raise NotImplementedError

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        raise NotImplementedError

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        raise NotImplementedError

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        raise NotImplementedError


class SglangAttentionType(Enum):
    DECODER = "decoder"
    ENCODER_ONLY = "encoder_only"


@dataclass
class KVWriteLoc:
    loc: Tensor

    @classmethod
    def for_layer(cls, forward_batch: Any, layer: Any) -> KVWriteLoc:
        return cls(forward_batch.out_cache_loc)


def module(patch: pytest.MonkeyPatch, name: str, **members: Any) -> types.ModuleType:
    """Return a module, with the packages above it, that an import finds until the test ends."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules:
            patch.setitem(sys.modules, path, types.ModuleType(path))
    made = sys.modules[name]
    for key, member in members.items():
        setattr(made, key, member)
    return made


def forget(patch: pytest.MonkeyPatch, package: str) -> None:
    """Let flashcore's own modules for an engine be imported anew, and forgotten afterwards."""
    for name in [n for n in sys.modules if n.startswith(f"{package}.")]:
        patch.delitem(sys.modules, name)


def stand_in_for_vllm(patch: pytest.MonkeyPatch, takes_names: bool = True) -> dict[Any, str]:
    """Install the stand-in for vLLM; return what is registered, by name."""
    forget(patch, "flashcore.integrations.vllm")
    members = (
        AttentionType, MultipleOf, AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder,
        AttentionImpl,
    )  # fmt: skip
    module(patch, "vllm.v1.attention.backend", **{m.__name__: m for m in members})
    registered: dict[Any, str] = {}
    names: dict[str, Any] = {"__members__": registered, "CUSTOM": "CUSTOM"}
    if takes_names:
        names["register"] = None
    module(
        patch,
        "vllm.v1.attention.backends.registry",
        AttentionBackendEnum=type("AttentionBackendEnum", (), names),
        register_backend=lambda name, path: registered.__setitem__(name, path),
    )
    return registered


def stand_in_for_sglang(patch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Install the stand-in for SGLang; return its list of backends and that of their names."""
    forget(patch, "flashcore.integrations.sglang")
    lists = types.SimpleNamespace(backends={}, choices=["fa3"])

    def register_attention_backend(name: str) -> Any:
        return lambda function: lists.backends.setdefault(name, function)

    attention = "sglang.srt.layers.attention"
    module(patch, f"{attention}.base_attn_backend", AttentionBackend=SglangBackend)
    registry = module(
        patch,
        f"{attention}.attention_registry",
        ATTENTION_BACKENDS=lists.backends,
        register_attention_backend=register_attention_backend,
    )
    sys.modules[attention].attention_registry = registry  # type: ignore[attr-defined]
    module(patch, "sglang.srt.layers.radix_attention", AttentionType=SglangAttentionType)
    module(patch, "sglang.srt.server_args", ATTENTION_BACKEND_CHOICES=lists.choices)
    module(patch, "sglang.srt.mem_cache.memory_pool", KVWriteLoc=KVWriteLoc)
    return lists
