"""Read arguments as flash-attn has them: for its functions here, of versions 2 and 3."""

from __future__ import annotations

import re

from torch import Tensor

from flashcore.problem.validation import certainly

_WAYS_OUT = {
    "qv": "pass torch.cat([q, qv], -1) and keys that are torch.cat([k, v], -1)",
    "attention_chunk": "flashcore.attention has a mask, which says the same",
    "seqused_q": "make cu_seqlens_q say where each sequence's last query is",
    "cp_world_size": "merge the parts' results by flashcore.merge",
}


def refuse_dropout(dropout_p: float) -> None:
    """Raise NotImplementedError for dropout of attention weights."""
    if dropout_p != 0.0:
        raise NotImplementedError(
            f"dropout_p={dropout_p}: flashcore has no dropout of attention weights; pass 0.0 (in "
            "evaluation it has no effect), or use flashcore.scaled_dot_product_attention, which "
            "leaves dropout to torch"
        )


def window_of(window_size: tuple[int, int]) -> tuple[int, int] | None:
    """Return flash-attn's window as `attention` takes it: None where neither side is bounded."""
    # Any negative number is unbounded in flash-attn.
    left, right = (max(-1, size) for size in window_size)
    return None if certainly(left == -1) and certainly(right == -1) else (left, right)


def refuse_unsupported(**given: object) -> None:
    """Raise NotImplementedError for arguments that flashcore has no equal of, unless unset."""
    for name, value in given.items():
        if value is not None:
            shown = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(f"{name} ({shown}) is not supported: {_WAYS_OUT[name]}")


def renamed(error: Exception, names: dict[str, str]) -> Exception:
    """Return an error whose message calls arguments what the caller does.

    Args:
        error: a TypeError, ValueError or NotImplementedError.
        names: of arguments here, and what flash-attn calls them.
    """
    words = re.compile(r"\b(" + "|".join(names) + r")\b")
    return type(error)(words.sub(lambda found: names[found[1]], str(error)))


def unpacked(name: str, x: Tensor, parts: int, shape: str) -> tuple[Tensor, ...]:
    """Return the parts of a tensor whose shape is written out, with their number in it."""
    packed_dim = shape.count(",") - 2
    if x.dim() != packed_dim + 3 or x.shape[packed_dim] != parts:
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be {shape}")
    return x.unbind(packed_dim)


def sinks_of(learnable_sink: Tensor | None, s_aux: Tensor | None) -> Tensor | None:
    """Return the sinks, which flash-attn 4 calls learnable_sink, and builds of flash-attn 3 s_aux.

    Raises:
        TypeError: both are given.
    """
    if learnable_sink is not None and s_aux is not None:
        raise TypeError("learnable_sink and s_aux are two names of one argument; pass one of them")
    return s_aux if learnable_sink is None else learnable_sink
