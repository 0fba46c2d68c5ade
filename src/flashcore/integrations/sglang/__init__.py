"""SGLang computes attention by flashcore where it is asked to: `--attention-backend flashcore`.

SGLang finds `register` by an entry point of this package (group `sglang.srt.plugins`) and calls it
in every process it starts. Nothing of flashcore imports SGLang before that. docs/serving.md says
what the backend takes, and what of it was run.
"""

from __future__ import annotations

from typing import Any

__all__ = ["register"]

NAME = "flashcore"


def register() -> None:
    """Add the backend to SGLang's list, and its name to the choices of `--attention-backend`.
    Another call changes nothing.

    Raises:
        ImportError: SGLang is missing, or has no such list
            (sglang.srt.layers.attention.attention_registry).
    """
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

    if NAME not in ATTENTION_BACKEND_CHOICES:
        ATTENTION_BACKEND_CHOICES.append(NAME)
    if NAME not in attention_registry.ATTENTION_BACKENDS:
        attention_registry.register_attention_backend(NAME)(_create)


def _create(runner: Any) -> Any:
    from flashcore.integrations.sglang.backend import FlashcoreAttnBackend

    return FlashcoreAttnBackend(runner)
