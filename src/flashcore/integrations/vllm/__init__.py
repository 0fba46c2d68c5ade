"""vLLM computes attention by flashcore where it is asked to: `--attention-backend FLASHCORE`.

vLLM finds `register` by an entry point of this package (group `vllm.general_plugins`) and calls it
in every process it starts. Nothing of flashcore imports vLLM before that. docs/serving.md says what
the backend takes, and what of it was run.
"""

from __future__ import annotations

__all__ = ["register"]

NAME = "FLASHCORE"
_CLASS = "flashcore.integrations.vllm.backend.FlashcoreBackend"


def register() -> None:
    """Add the backend to vLLM's list under the name FLASHCORE, or, where that list takes no new
    names, as CUSTOM. Another call changes nothing.

    Raises:
        ImportError: vLLM is missing, or has no list of attention backends
            (vllm.v1.attention.backends.registry).
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    takes_names = hasattr(AttentionBackendEnum, "register")
    if NAME in AttentionBackendEnum.__members__:
        return
    register_backend(NAME if takes_names else AttentionBackendEnum.CUSTOM, _CLASS)
