"""flashcore has fused attention kernels for PyTorch, readable, and provable on any machine.

    >>> import torch, flashcore
    >>> q, k, v = (torch.randn(1, 8, 512, 64, dtype=torch.float16) for _ in range(3))
    >>> out = flashcore.attention(q, k, v, causal=True)

Names are imported when first used, so that `flashcore --help` need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashcore.api import Explanation, attention, explain
    from flashcore.base.gradient_workspace import set_gradient_workspace
    from flashcore.dropins.routing import enable
    from flashcore.dropins.sdpa.attention import scaled_dot_product_attention
    from flashcore.errors import (
        BackendUnavailableError,
        CompileError,
        FallbackWarning,
        FlashCoreError,
    )
    from flashcore.explanation.packed import explain_varlen
    from flashcore.ops.rings import attention_backward, merge
    from flashcore.ops.varlen import attention_varlen
    from flashcore.preparing import prepare
    from flashcore.problem import Problem
    from flashcore.serving.explaining import explain_with_kvcache
    from flashcore.serving.with_kvcache import attention_with_kvcache

__version__ = "0.1.0"  # the only place; pyproject.toml and scripts/bootstrap.py read it here

# The module that defines each public name. The functions live in api.py and not in attention.py:
# importing a submodule of that name would put the module in the place of the function.
_MODULES = {
    "BackendUnavailableError": "errors",
    "CompileError": "errors",
    "Explanation": "api",
    "FallbackWarning": "errors",
    "FlashCoreError": "errors",
    "Problem": "problem",
    "attention": "api",
    "attention_backward": "ops.rings",
    "attention_varlen": "ops.varlen",
    "attention_with_kvcache": "serving.with_kvcache",
    "enable": "dropins.routing",
    "explain": "api",
    "explain_varlen": "explanation.packed",
    "explain_with_kvcache": "serving.explaining",
    "merge": "ops.rings",
    "prepare": "preparing",
    "scaled_dot_product_attention": "dropins.sdpa.attention",
    "set_gradient_workspace": "base.gradient_workspace",
}

__all__ = [
    "BackendUnavailableError",
    "CompileError",
    "Explanation",
    "FallbackWarning",
    "FlashCoreError",
    "Problem",
    "__version__",
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_with_kvcache",
    "enable",
    "explain",
    "explain_varlen",
    "explain_with_kvcache",
    "merge",
    "prepare",
    "scaled_dot_product_attention",
    "set_gradient_workspace",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'flashcore' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"flashcore.{_MODULES[name]}"), name)
    globals()[name] = value  # the next look-up is an ordinary one
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
