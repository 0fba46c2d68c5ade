"""Check the arguments of `attention`; each failure names the argument, its value, the way out.

Kept apart from problem/problem.py so that one can read what a Problem is without reading what it is
not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

# Of the kernels. PyTorch operations take any head_dim, and copies are padded to the next multiple.
HEAD_DIM_MAX = 256
HEAD_DIM_MULTIPLE = 8
# Positions and windows are 32-bit in the kernels; i + diag_offset + window_right must not overflow.
SEQLEN_MAX = 2**30 - 1

DTYPES: dict[torch.dtype, str] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
CAUSAL_NAMES = {False: "none", True: "lower_right"}
DEVICE_TYPES = ("cpu", "cuda", "meta")


def type_name(x: object) -> str:
    """Return the type of `x` as a user would write it."""
    cls = type(x)
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__name__}"


def shape_text(x: torch.Tensor) -> str:
    """Return `[2, 8, 512, 64]`."""
    return str(list(x.shape))


def check_plain_tensor(name: str, x: object) -> None:
    """Raise unless `x` is a dense tensor whose memory can be read through its strides."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, but is a {type_name(x)}")
    if x.is_nested:
        raise NotImplementedError(
            f"{name} is a nested tensor; pad it with torch.nested.to_padded_tensor and pass a mask"
        )
    if x.is_quantized:
        raise NotImplementedError(f"{name} is quantized; pass {name}.dequantize()")
    if x.layout != torch.strided:
        raise NotImplementedError(f"{name} has layout {x.layout}; pass {name}.to_dense()")
    if x.device.type not in DEVICE_TYPES:
        raise NotImplementedError(
            f"{name} is on device {str(x.device)!r}; flashcore computes on 'cpu' and 'cuda' tensors"
        )
    if x.is_neg():  # the memory holds the values with the sign flipped
        raise NotImplementedError(f"{name} is a lazily negated view; pass {name}.resolve_neg()")


def check_device(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    """Raise unless `x` lies where `q` does."""
    if x.device != q.device:
        raise ValueError(
            f"{name} is on {x.device} but q is on {q.device}; move it with {name}.to(q.device)"
        )


def check_kinds(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise unless rank, dtype and device of q, k and v fit: all that can be said where sizes are
    symbolic."""
    named = (("q", q), ("k", k), ("v", v))
    for name, x in named:
        check_plain_tensor(name, x)
        if x.dim() != 4:
            raise ValueError(
                f"{name} has {x.dim()} dimensions (shape {shape_text(x)}); "
                "it must be [batch, num_heads, seqlen, head_dim], or have as many as the others: "
                f"add the missing ones with {name}[None] or {name}.unflatten(...)"
            )
    for name, x in named:
        if x.dtype == torch.float8_e4m3fn and x is not q:
            raise TypeError(
                f"{name} has dtype {x.dtype}; caches of 8 bits come with lengths and scales: pass "
                f"seqlens_k, k_scale and v_scale, or convert it, {name}.to(q.dtype)"
            )
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name} has dtype {x.dtype}; supported are {', '.join(DTYPES.values())}: "
                f"convert it, e.g. with {name}.to(torch.float16)"
            )
    for name, x in named[1:]:
        if x.dtype != q.dtype:
            raise TypeError(
                f"{name} has dtype {x.dtype} but q has {q.dtype}; convert it, e.g. with "
                f"{name}.to(q.dtype)"
            )
        check_device(name, x, q)


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise unless q, k and v go together: rank, device, dtype, batch, heads, lengths, head_dim."""
    check_kinds(q, k, v)
    named = (("q", q), ("k", k), ("v", v))
    for name, x in named[1:]:
        if x.shape[0] != q.shape[0]:
            raise ValueError(
                f"{name} has batch {x.shape[0]} but q has {q.shape[0]} (shapes {shape_text(x)} and "
                f"{shape_text(q)}); to share one among all, {name}.expand(...) makes no copy"
            )
    _check_heads_and_lengths(q, k, v)
    for name, x in named:
        if x.shape[3] == 0:
            raise NotImplementedError(f"{name} has head_dim 0; it must be at least 1")


def _check_heads_and_lengths(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    num_heads_q, num_heads_kv = q.shape[1], k.shape[1]
    if v.shape[1] != num_heads_kv:
        raise ValueError(
            f"v has {v.shape[1]} heads but k has {num_heads_kv}; they must have the same number"
        )
    if num_heads_q % num_heads_kv if num_heads_kv else num_heads_q:
        raise ValueError(
            f"q has {num_heads_q} heads and k has {num_heads_kv}; q's must be a multiple of k's "
            "(each k/v head serves num_heads_q / num_heads_kv consecutive q heads)"
        )
    if v.shape[2] != k.shape[2]:
        raise ValueError(
            f"v has seqlen {v.shape[2]} but k has {k.shape[2]}; each key needs its value"
        )
    if k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k has head_dim {k.shape[3]} but q has {q.shape[3]}; they must be equal "
            "(only v's may differ)"
        )
    for name, x in (("q", q), ("k", k)):
        if x.shape[2] > SEQLEN_MAX:
            raise NotImplementedError(
                f"{name} has seqlen {x.shape[2]}; at most {SEQLEN_MAX} is supported: "
                "split the keys and merge by lse"
            )


def check_mask_kind(mask: torch.Tensor, q: torch.Tensor) -> None:
    """Raise unless `mask` is boolean or additive and lies where `q` does."""
    check_plain_tensor("mask", mask)
    if mask.dtype not in (torch.bool, q.dtype, torch.float32):
        allowed = " or ".join(dict.fromkeys(map(str, (torch.bool, q.dtype, torch.float32))))
        way_out = "mask.bool()" if not mask.dtype.is_floating_point else f"mask.to({q.dtype})"
        raise TypeError(
            f"mask has dtype {mask.dtype}; with {q.dtype} tensors it must be {allowed} "
            f"(bool: True = attend; float: added to the scores): pass {way_out}"
        )
    check_device("mask", mask, q)


def check_mask(mask: torch.Tensor, q: torch.Tensor, seqlen_k: int) -> None:
    """Raise unless `mask` is boolean or additive and broadcasts to the scores of `q`."""
    check_mask_kind(mask, q)
    target = (q.shape[0], q.shape[1], q.shape[2], seqlen_k)
    aligned = target[4 - mask.dim() :] if mask.dim() <= 4 else ()
    if mask.dim() > 4 or any(
        have not in (1, want) for have, want in zip(mask.shape, aligned, strict=True)
    ):
        raise ValueError(
            f"mask has shape {shape_text(mask)}, which does not broadcast to "
            f"[batch, num_heads_q, seqlen_q, seqlen_k] = {list(target)}; "
            "a mask per key of each sequence is [batch, 1, 1, seqlen_k]: mask[:, None, None, :]"
        )


def check_tree_mask(tree_mask: torch.Tensor, q: torch.Tensor) -> None:
    """Raise unless `tree_mask` is boolean and broadcasts to the scores of the queries of `q` and as
    many keys."""
    _check_is_boolean_like_q(tree_mask, q)
    target = (q.shape[0], q.shape[1], q.shape[2], q.shape[2])
    if not may_broadcast(tree_mask.shape, target):
        raise ValueError(
            f"tree_mask has shape {shape_text(tree_mask)}, which does not broadcast to [batch, "
            f"num_heads_q, seqlen_q, seqlen_q] = {list(target)}; of one a sequence pass "
            "tree_mask[:, None]"
        )


def check_packed_tree_mask(tree_mask: torch.Tensor, q: torch.Tensor, batch: int) -> None:
    """Raise unless `tree_mask` is boolean and broadcasts to a square of any size for each of
    `batch` sequences and each head of packed queries, [total_q, num_heads_q, head_dim]."""
    _check_is_boolean_like_q(tree_mask, q)
    size = tree_size(tree_mask)
    target = (batch, q.shape[1], size, size)
    if not may_broadcast(tree_mask.shape, target):
        raise ValueError(
            f"tree_mask has shape {shape_text(tree_mask)}; beside cu_seqlens_q it must broadcast "
            f"to [batch, num_heads_q, m, m] = [{batch}, {q.shape[1]}, m, m], of which a sequence "
            "of n <= m queries uses [0, n) and a longer one nothing; of one a sequence pass "
            "tree_mask[:, None]"
        )


def tree_size(tree: torch.Tensor) -> int:
    """Return how many rows and columns a tree has, of which a size of 1 may stand for all."""
    rows, columns = (1, 1, *tree.shape)[-2:]
    return columns if rows == 1 else rows


def _check_is_boolean_like_q(tree_mask: torch.Tensor, q: torch.Tensor) -> None:
    if tree_mask.dtype != torch.bool:
        raise TypeError(
            f"tree_mask has dtype {tree_mask.dtype}; it must be boolean (True = attend): pass "
            "tree_mask.bool()"
        )
    check_device("tree_mask", tree_mask, q)


def check_sinks(sinks: object, q: torch.Tensor, num_heads_q: int) -> None:
    """Raise unless `sinks` is a vector of one logit a head of `q`, where `q` lies."""
    check_plain_tensor("sinks", sinks)
    assert isinstance(sinks, torch.Tensor)
    if sinks.dtype not in (q.dtype, torch.float32):
        allowed = " or ".join(dict.fromkeys(map(str, (torch.float32, q.dtype))))
        raise TypeError(
            f"sinks has dtype {sinks.dtype}; with {q.dtype} tensors it must be {allowed}: pass "
            "sinks.float()"
        )
    check_device("sinks", sinks, q)
    if sinks.dim() != 1 or sinks.shape[0] != num_heads_q:
        raise ValueError(
            f"sinks has shape {shape_text(sinks)}, but q has {num_heads_q} heads; it holds one "
            "logit for each of them, [num_heads_q]"
        )


def checked_causal(causal: object) -> str:
    """Return the alignment's name: "none", "upper_left" or "lower_right"."""
    if isinstance(causal, bool):
        return CAUSAL_NAMES[causal]
    if not isinstance(causal, str):
        raise TypeError(
            f"causal must be True, False, 'lower_right' or 'upper_left', but is {causal!r} "
            f"({type_name(causal)})"
        )
    if causal not in ("lower_right", "upper_left"):
        raise ValueError(
            f"causal={causal!r} is unknown; use False, True or 'lower_right' (the last query sees "
            "all keys), or 'upper_left' (the first query sees the first key)"
        )
    return causal


def certainly(condition: Any) -> bool:
    """Return whether a condition holds, as far as is known: False where code is being compiled for
    numbers that come only when it runs. Then the operators look again."""
    if is_dynamo_compiling() or isinstance(condition, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return bool(condition)


def may_broadcast(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Return whether a shape broadcasts to another one, or may: see `certainly`."""
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and not any(
        not certainly(have == 1) and certainly(have != want) for have, want in pairs
    )


def factor_fits(factor: Any) -> bool:
    """Return whether a scale or softcap is one that the kernels, which work in float32, can use:
    neither it nor the ratio of two can overflow or vanish there, whatever the finite scores are."""
    # Literals: torch.compile may take a module's floats for variables, and compile a second time.
    too_small, too_large = certainly(factor < 1e-18), certainly(factor > 1e18)
    return not (too_small or too_large or certainly(factor != factor))


def checked_factor(name: str, value: object, unset: float, way_out: str) -> float:
    """Return a positive finite number, or `unset` for None."""
    if value is None:
        return unset
    if not is_number(value):
        raise TypeError(f"{name} must be a number or None, but is {value!r} ({type_name(value)})")
    try:
        number = torch.sym_float(value)
    except OverflowError:  # an int or Fraction beyond the largest float
        number = math.inf
    # Not math.isfinite, which takes no symbolic number.
    if certainly(number <= 0.0) or certainly(number == math.inf) or certainly(number != number):
        raise ValueError(f"{name}={value!r} must be positive and finite; {way_out}")
    if not factor_fits(number):
        raise ValueError(
            f"{name}={value!r} is outside [1e-18, 1e+18], where float32 cannot overflow; {way_out}"
        )
    return number


def is_number(value: object) -> bool:
    """Return whether `value` is a real number, perhaps one that compiled code knows only when it
    runs."""
    if isinstance(value, bool):
        return False
    return isinstance(value, (Real, torch.SymInt, torch.SymFloat))


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless the argument of that name is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, but is {value!r}")


def checked_window(window: object) -> tuple[int, int]:
    """Return (left, right), -1 for an unbounded side; None is (-1, -1)."""
    if window is None:
        return -1, -1
    if isinstance(window, (str, bytes)) or not isinstance(window, Sequence):
        raise TypeError(
            f"window must be (left, right) or None, but is {window!r} ({type_name(window)}); "
            "for the n keys before each query and itself pass (n, 0)"
        )
    if len(window) != 2:
        raise ValueError(f"window={window!r} has {len(window)} entries; it must be (left, right)")
    for side, size in zip(("left", "right"), window, strict=True):
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
            raise TypeError(
                f"window's {side} side must be an int, but is {size!r} ({type_name(size)})"
            )
        if certainly(size < -1):
            raise ValueError(
                f"window={window!r}: {side} is {size}; it must be at least 0, or -1 for unbounded"
            )
    return window[0], window[1]
