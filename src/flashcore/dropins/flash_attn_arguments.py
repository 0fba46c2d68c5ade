"""Read the arguments of flash-attn's functions as those of `attention`."""

from __future__ import annotations

import torch

from flashcore.problem.validation import certainly


def refuse_dropout(dropout_p: float) -> None:
    """Raise unless there is none."""
    if dropout_p != 0.0:
        raise NotImplementedError(
            f"dropout_p={dropout_p}: flashcore has no dropout of attention weights; pass 0.0 (in "
            "evaluation it has no effect), or use flashcore.scaled_dot_product_attention, which "
            "leaves dropout to torch"
        )


def window_of(window_size: tuple[int, int]) -> tuple[int, int] | None:
    """Return a window as `attention` has it; any negative number is unbounded in flash-attn."""
    left, right = (max(-1, size) for size in window_size)
    return None if certainly(left == -1) and certainly(right == -1) else (left, right)


def unpacked(name: str, x: torch.Tensor, parts: int, shape: str) -> tuple[torch.Tensor, ...]:
    """Return the parts of a tensor whose shape is written out, with their number in it."""
    packed_dim = shape.count(",") - 2
    if x.dim() != packed_dim + 3 or x.shape[packed_dim] != parts:
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be {shape}")
    return x.unbind(packed_dim)


def sinks_of(
    learnable_sink: torch.Tensor | None, s_aux: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the sinks, which flash-attn 4 calls learnable_sink, and builds of flash-attn 3 s_aux.

    Raises:
        TypeError: both are given.
    """
    if learnable_sink is not None and s_aux is not None:
        raise TypeError("learnable_sink and s_aux are two names of one argument; pass one of them")
    return s_aux if learnable_sink is None else learnable_sink
