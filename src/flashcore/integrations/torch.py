"""flashcore behind torch's own door for flash attention: aten's flash operators run on it.

    import flashcore.integrations.torch as door

    door.activate()

torch.nn.functional.scaled_dot_product_attention, torch.nn.attention.varlen_attn, context_parallel
and whoever else calls `aten::_flash_attention_forward`, `_scaled_dot_product_flash_attention` or
their backward operators then run on flashcore, forward and backward. docs/torch-door.md says when
to take this door, and when flashcore.enable().

The operators keep their schemas, autograd formulas and fakes; their kernels for CUDA tensors are
replaced. A call that flashcore does not compute as torch does (dropout, say) goes to the kernel
that was there before, with one FallbackWarning per reason and process.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from flashcore.backends import torch_own
from flashcore.base import forks
from flashcore.dropins import aten_flash
from flashcore.errors import BackendUnavailableError

__all__ = ["Activation", "activate", "deactivate", "register"]

_NAME = "flashcore"  # of the implementation, for torch
BACKENDS = ("auto", "sm90", "wmma", "sim", "torch")
_ON_CPU = ("sim", "torch")  # what they compute lies on the CPU
_FLASH = 1  # torch.nn.attention.SDPBackend.FLASH_ATTENTION

_lock = forks.lock()


class _Handle:
    """Hold the replaced kernels, which torch keeps while the implementation is active.

    Args:
        backend: as in `activate`.
        prefer: as in `activate`.
    """

    def __init__(self, backend: str, prefer: bool) -> None:
        self._key = "CPU" if backend in _ON_CPU else "CUDA"
        self._order: tuple[list[int], list[int]] | None = None  # before, and as it was set
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        for name, function in aten_flash.functions(backend, self._key).items():
            if hasattr(torch.ops.aten, name):  # some are newer than others
                torch_own.keep(name, self._key)
                _impl(self._library, name, function, self._key)
        if prefer and self._key == "CUDA" and torch.cuda.is_available():
            self._prefer_flash()

    def _prefer_flash(self) -> None:
        # The first choice of all sets the order that torch prefers on this GPU, cuDNN in front on
        # Hopper; it would undo an order that is set before.
        x = torch.empty(1, 1, 8, 8, dtype=torch.float16, device="cuda")
        torch._fused_sdp_choice(x, x, x)
        before = torch._C._get_sdp_priority_order()
        ours = [_FLASH, *(backend for backend in before if backend != _FLASH)]
        torch._C._set_sdp_priority_order(ours)
        self._order = before, ours

    def remove(self) -> None:
        """Give the operators their kernels back, and SDPA its order unless somebody changed it."""
        with _lock:
            if self._library is None:
                return
            self._library._destroy()
            self._library = None
            torch_own.release(self._key)
            if self._order is not None and torch._C._get_sdp_priority_order() == self._order[1]:
                torch._C._set_sdp_priority_order(self._order[0])


def _impl(
    library: torch.library.Library, name: str, function: Callable[..., Any], key: str
) -> None:
    with warnings.catch_warnings():
        # torch warns of an operator whose kernel is replaced, which is the purpose.
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        library.impl(name, function, key, allow_override=True)  # torch 2.11 wants to be told


class Activation:
    """An activation is the context manager that `activate` returns. At its end the implementation
    that was active before is active again.

    Args:
        previous: its name; None is torch's own.
    """

    def __init__(self, previous: str | None) -> None:
        self._previous = previous

    def __enter__(self) -> Activation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._previous is None:
            deactivate()
        else:
            _attention_module().activate_flash_attention_impl(self._previous)


def _attention_module() -> Any:
    """torch.nn.attention, if it has the door."""
    import torch.nn.attention as module

    if not hasattr(module, "register_flash_attention_impl"):
        raise BackendUnavailableError(
            f"torch {torch.__version__} has no torch.nn.attention.register_flash_attention_impl; "
            "torch 2.11 has: update torch, or use flashcore.enable(), which needs nothing of it"
        )
    return module


def register(*, backend: str = "auto", prefer: bool = True) -> None:
    """Tell torch of the implementation "flashcore", without activating it.

    Afterwards `torch.nn.attention.activate_flash_attention_impl("flashcore")` does what `activate`
    does.

    Args:
        backend: as in `activate`.
        prefer: as in `activate`.

    Raises:
        BackendUnavailableError: this torch has no such door; the message names its version.
        ValueError: an unknown backend.
        TypeError: prefer is no bool.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"backend={backend!r} is unknown; use one of {', '.join(map(repr, BACKENDS))}"
        )
    if not isinstance(prefer, bool):
        raise TypeError(f"prefer must be True or False, but is {prefer!r}")
    make = functools.partial(_Handle, backend, prefer)
    _attention_module().register_flash_attention_impl(_NAME, register_fn=make)


def activate(*, backend: str = "auto", prefer: bool = True) -> Activation:
    """Run aten's flash operators on flashcore, for the whole process, until `deactivate`.

        with flashcore.integrations.torch.activate():
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    It takes effect at once; the block is optional. One implementation is active at a time, so this
    replaces whatever torch.nn.attention.activate_flash_attention_impl activated before. Code that
    torch.compile has compiled runs on it too, for it calls the operators.

    Args:
        backend: of `flashcore.attention`: "auto" by the GPU, "sm90" or "wmma" to insist on a
            kernel. "sim" and "torch" serve the operators' CPU tensors instead, for which torch has
            no such kernels: for tests.
        prefer: put flash attention first in the order in which SDPA looks for a kernel (on Hopper
            torch prefers cuDNN). With False the order stays, and SDPA comes here where it would
            have taken FlashAttention-2, or under sdpa_kernel(SDPBackend.FLASH_ATTENTION).

    Returns:
        A context manager, which may be ignored: at its end the implementation before is back.

    Raises:
        BackendUnavailableError: this torch has no such door; the message names its version.
        ValueError: an unknown backend.
        TypeError: prefer is no bool.
    """
    register(backend=backend, prefer=prefer)
    module = _attention_module()
    previous = module.current_flash_attention_impl()
    module.activate_flash_attention_impl(_NAME)
    return Activation(None if previous == _NAME else previous)


def deactivate() -> None:
    """Give aten's flash operators torch's own kernels back. Does nothing where flashcore is not the
    active implementation."""
    module = _attention_module()
    if module.current_flash_attention_impl() == _NAME:
        module.restore_flash_attention_impl()
