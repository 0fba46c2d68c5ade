"""Read arguments as flash-attn has them: for its functions here, of versions 2 and 3."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from flashcore.problem.validation import certainly, is_number, shape_text, type_name
from flashcore.serving.checking import check_plain

_WAYS_OUT = {
    "qv": "pass torch.cat([q, qv], -1) and keys that are torch.cat([k, v], -1)",
    "attention_chunk": "flashcore.attention has a mask, which says the same",
    "seqused_q": "make cu_seqlens_q say where each sequence's last query is",
    "cp_world_size": "merge the parts' results by flashcore.merge",
}


def refuse_dropout(dropout_p: float) -> None:
    """Raise NotImplementedError for dropout of attention weights."""
    if type(dropout_p) is float and dropout_p == 0.0:  # what most calls have
        return
    if not is_number(dropout_p):
        raise TypeError(f"dropout_p must be 0.0, but is {dropout_p!r} ({type_name(dropout_p)})")
    if dropout_p != 0.0:
        raise NotImplementedError(
            f"dropout_p={dropout_p}: flashcore has no dropout of attention weights; pass 0.0 (in "
            "evaluation it has no effect), or use flashcore.scaled_dot_product_attention, which "
            "leaves dropout to torch"
        )


def window_of(window_size: tuple[int, int]) -> tuple[int, int] | None:
    """Return flash-attn's window as `attention` takes it: None where neither side is bounded."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(
            f"window_size must be (left, right), -1 for an unbounded side, but is {window_size!r}"
        )
    # Any negative number is unbounded in flash-attn. What is no number is refused by `attention`.
    left, right = (max(-1, size) if is_number(size) else size for size in window_size)
    return None if certainly(left == -1) and certainly(right == -1) else (left, right)


def cap_of(softcap: float) -> float | None:
    """Return flash-attn's softcap as `attention` takes it: None where it is off."""
    return None if is_number(softcap) and certainly(softcap == 0.0) else softcap


def unless(off: int, value: Any) -> Any:
    """Return None for the number that switches an argument off, and all else as it is."""
    return None if type(value) is int and value == off else value


def refuse_unsupported(**given: object) -> None:
    """Raise NotImplementedError for arguments that flashcore has no equal of, unless unset."""
    for name, value in given.items():
        if value is not None:
            shown = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(f"{name} ({shown}) is not supported: {_WAYS_OUT[name]}")


def check_rows(shape: str, **tensors: Any) -> None:
    """Raise unless tensors have as many dimensions as a shape that is written out, perhaps with
    words behind it."""
    rank = shape.partition("]")[0].count(",") + 1
    for name, x in tensors.items():
        check_plain(name, x)
        if x.dim() != rank:
            raise ValueError(f"{name} has shape {shape_text(x)}; it must be {shape}")


def names_of(s_aux: Tensor | None) -> dict[str, str]:
    """Return what flash-attn calls arguments of `attention`, its sinks by the name that is used."""
    return {
        "scale": "softmax_scale",
        "window": "window_size",
        "return_lse": "return_attn_probs",
        "sinks": "learnable_sink" if s_aux is None else "s_aux",
    }


def named(
    names: Mapping[str, str], compute: Callable[..., Any], *given: Any, **options: Any
) -> Any:
    """Compute a call; raise what it raises about arguments with the names that the caller has for
    them."""
    try:
        return compute(*given, **options)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise renamed(error, names) from None


def renamed(error: Exception, names: Mapping[str, str]) -> Exception:
    """Return an error whose message calls arguments what the caller does.

    Args:
        error: a TypeError, ValueError or NotImplementedError.
        names: of arguments here, and what flash-attn calls them.
    """
    words = re.compile(r"\b(" + "|".join(names) + r")\b")
    return type(error)(words.sub(lambda found: names[found[1]], str(error)))


def unpacked(name: str, x: Tensor, parts: int, shape: str) -> tuple[Tensor, ...]:
    """Return the parts of a tensor whose shape is written out, with their number in it."""
    check_plain(name, x)
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
