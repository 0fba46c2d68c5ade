"""`enable()` makes unmodified code call flashcore where it calls torch's SDPA.

How: the name `scaled_dot_product_attention` is rebound in torch.nn.functional and in the loaded
modules that imported it by that name. The alternative, a TorchFunctionMode, would also see aliases,
but it makes every torch operation in the block about 2 us slower, is bound to one thread (the
autograd engine recomputes checkpoints in threads of its own), and never sees the call inside
nn.MultiheadAttention, since a mode is off while it handles a function. torch.compile guards the
name, so a function compiled inside and called outside is compiled again, and the other way round.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from flashcore.base import forks
from flashcore.dropins.sdpa.attention import (
    Call,
    known,
    route,
    scaled_dot_product_attention,
    torch_sdpa,
)

NAME = "scaled_dot_product_attention"
BACKENDS = ("auto", "sm90", "wmma", "sim")

_lock = forks.lock()
_active: list[Callable[..., torch.Tensor]] = []  # of the open blocks, in the order of entering
_replaced: Any = torch_sdpa  # what torch.nn.functional had before the first of them
_had_fast_path = True


@contextlib.contextmanager
def enable(*, backend: str = "auto") -> Iterator[None]:
    """Route torch.nn.functional.scaled_dot_product_attention of unmodified code to flashcore.

        with flashcore.enable():
            out = model(x)

    or `@flashcore.enable()` on a function. Inside, `F.scaled_dot_product_attention` is
    `flashcore.scaled_dot_product_attention`, also in modules that imported it by that name before,
    and in nn.MultiheadAttention and nn.TransformerEncoderLayer, whose inference fast path (a C++
    function that attends by itself) is switched off meanwhile. It works by rebinding the name:

    - for the whole process, other threads included. Blocks may nest and overlap: the one entered
      last decides the backend, and torch's function is back when the last one is left, by an
      exception too;
    - code that reaches torch's function in another way is not routed: an alias
      (`import scaled_dot_product_attention as sdpa`) bound outside the block, TorchScript, C++,
      torch.ops.aten;
    - under torch.compile either order works, compiling inside or calling compiled code inside;
    - a checkpointed forward inside the block needs its backward inside too, for it is run again
      there; an ordinary backward may come at any time;
    - torch.nn.attention.sdpa_kernel chooses among torch's kernels where a call falls to torch, and
      nothing else.

    Args:
        backend: "auto", or a kernel of `flashcore.attention` to insist on: "sm90", "wmma", or
            "sim", which runs float16 and bfloat16 CPU tensors through the simulator.

    Yields:
        None.

    Raises:
        ValueError: an unknown backend; "torch" is what happens without enable().
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(
            f"backend={backend!r} cannot be enabled; use one of {', '.join(map(repr, BACKENDS))}"
        )
    function = scaled_dot_product_attention if backend == "auto" else _insist_on(backend)
    _enter(function)
    try:
        yield
    finally:
        _leave(function)


def _insist_on(backend: str) -> Callable[..., torch.Tensor]:
    def insisted(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        arguments = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        result = known(*arguments, backend)
        return route(Call(*arguments), backend) if result is None else result

    return insisted


def _enter(function: Callable[..., torch.Tensor]) -> None:
    global _replaced, _had_fast_path
    with _lock:
        if not _active:
            _replaced = getattr(torch.nn.functional, NAME)
            _had_fast_path = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _rebind(_active[-1] if _active else _replaced, function)
        _active.append(function)


def _leave(function: Callable[..., torch.Tensor]) -> None:
    with _lock:
        # The last of equals: "auto" puts the same function there in every block.
        del _active[len(_active) - 1 - _active[::-1].index(function)]
        _rebind(function, _active[-1] if _active else _replaced)
        if not _active:
            torch.backends.mha.set_fastpath_enabled(_had_fast_path)


def _rebind(old: Any, new: Any) -> None:
    """Give the name a new value wherever it has the old one, torch's and our own modules aside."""
    if old is new:
        return
    for module_name, module in list(sys.modules.items()):
        # Not getattr(module, NAME): some modules import on attribute access.
        if getattr(module, "__dict__", {}).get(NAME) is not old:
            continue
        package = module_name.partition(".")[0]
        if module is torch.nn.functional or package not in ("torch", "flashcore"):
            setattr(module, NAME, new)
