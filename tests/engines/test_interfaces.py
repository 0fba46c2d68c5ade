"""Hold the stand-ins for vLLM and SGLang, and flashcore's backends, against the real classes where
those are installed: names, and the arguments that they are called with."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import engine_standins as engines
import pytest

VLLM = "vllm.v1.attention.backend"
SGLANG = "sglang.srt.layers.attention.base_attn_backend"


def real(module: str) -> Any:
    return pytest.importorskip(module, reason=f"{module.split('.')[0]} is not installed")


def arguments(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.kind for p in parameters}


def same_methods(stand_in: type, original: type) -> None:
    """Raise unless each method of the stand-in takes what the original's takes."""
    for name, member in vars(stand_in).items():
        if inspect.isfunction(member) or isinstance(member, (staticmethod, classmethod)):
            if name.startswith("_") and name != "__init__":
                continue
            have = arguments(getattr(stand_in, name))
            assert have == arguments(getattr(original, name)), f"{original.__name__}.{name}"
        elif not name.startswith("_"):
            assert hasattr(original, name), f"{original.__name__}.{name}"


@pytest.mark.parametrize(
    "name", ["AttentionBackend", "AttentionMetadataBuilder", "AttentionImpl", "MultipleOf"]
)
def test_the_stand_in_for_vllm_is_like_vllm(name: str) -> None:
    same_methods(getattr(engines, name), getattr(real(VLLM), name))


def test_vllm_finds_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    real(VLLM)
    registry = real("vllm.v1.attention.backends.registry")
    entry = importlib.import_module("flashcore.integrations.vllm")
    entry.register()
    entry.register()
    backend = registry.AttentionBackendEnum["FLASHCORE"].get_class()
    assert backend.get_name() == "FLASHCORE"
    import torch
    from vllm.platforms.interface import DeviceCapability

    asked = {
        "head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16,
        "use_mla": False, "has_sink": True, "use_sparse": False, "use_mm_prefix": False,
        "use_per_head_quant_scales": False, "device_capability": DeviceCapability(9, 0),
        "attn_type": "decoder", "has_sliding_window": True,
    }  # fmt: skip
    assert backend.validate_configuration(**asked) == []
    assert backend.validate_configuration(**{**asked, "block_size": 8}) != []
    assert backend.validate_configuration(**{**asked, "kv_cache_dtype": "fp8"}) != []
    assert not backend.get_impl_cls().__abstractmethods__
    assert not backend.get_builder_cls().__abstractmethods__


def test_the_stand_in_for_sglang_is_like_sglang() -> None:
    same_methods(engines.SglangBackend, real(SGLANG).AttentionBackend)
