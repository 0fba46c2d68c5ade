"""Find peers that are not always there: FlexAttention (it needs Triton), FlashAttention-3 and
-4."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flashcore.bench.libraries import EVERYTHING, Call, Library, packed
from flashcore.bench.timing import Passes
from flashcore.bench.workloads import Workload
from flashcore.problem.memory_layout import as_batch

_VARLEN = "torch.nn.attention.varlen"
_COMPILE_SECONDS = 60.0
_POSITIONS = frozenset({"window", "softcap", "gqa"})


def find_peers() -> tuple[list[Library], list[dict[str, str]]]:
    """Return the peers that can be imported; and for each of the others {"library", "reason"}."""
    candidates = [
        (Library("flex", _flex, EVERYTHING, compiles_slowly=True), "triton"),
        (Library("fa3", _fa3, _POSITIONS | {"varlen"}), "flash_attn_interface"),
        (Library("fa4", _fa4, _POSITIONS), "flash_attn.cute"),
        (Library("torch-varlen", _torch_varlen, frozenset({"varlen"}), ("varlen",)), _VARLEN),
    ]
    return _importable(candidates)


def find_backward_peers() -> tuple[list[Library], list[dict[str, str]]]:
    """Return the peers with a backward pass, as `find_peers` does."""
    # JAX would take most of the GPU's memory when it starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    deterministic = functools.partial(_fa4, deterministic=True)
    by_jax = Library(
        "fa3-jax",
        _not_by_torch,
        frozenset({"gqa"}),
        head_dims=(128,),
        bind_passes=_fa3_jax_passes,
        fault=_fa3_jax_fault,
    )
    candidates = [
        (Library("flex", _flex, EVERYTHING, compiles_slowly=True), "triton"),
        (Library("fa3", _fa3, _POSITIONS | {"varlen"}), "flash_attn_interface"),
        (by_jax, "flash_attn3_jax"),
        (Library("fa4", _fa4, _POSITIONS), "flash_attn.cute"),
        (Library("fa4-deterministic", deterministic, _POSITIONS), "flash_attn.cute"),
        (Library("torch-varlen", _torch_varlen, frozenset({"varlen"}), ("varlen",)), _VARLEN),
    ]
    return _importable(candidates)


def _importable(
    candidates: Sequence[tuple[Library, str]],
) -> tuple[list[Library], list[dict[str, str]]]:
    found, left_out = [], []
    for library, module in candidates:
        try:
            importlib.import_module(module)
        except Exception as error:  # a package built for another torch raises all kinds of things
            reason = f"{module} cannot be imported ({type(error).__name__}: {error})"
            left_out.append({"library": library.name, "reason": reason.splitlines()[0][:160]})
        else:
            found.append(library)
    return found, left_out


def _flex(workload: Workload, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Call:
    """Return a call of FlexAttention, compiled for this shape."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    visible = _visible(workload, mask)
    if visible is not None:
        per_batch = workload.mask == "padding"
        batch = workload.batch if per_batch else None
        block_mask = create_block_mask(
            visible, batch, None, workload.seqlen, workload.keys, device=q.device
        )
    torch._dynamo.reset()  # or the ninth shape would exceed the limit of recompilations
    compiled = torch.compile(flex_attention, dynamic=False)
    options: dict[str, Any] = {
        "score_mod": _score_mod(workload, mask),
        "block_mask": block_mask,
        "enable_gqa": workload.heads_kv != workload.num_heads,
    }

    def call() -> Tensor:
        out: Tensor = compiled(q, k, v, **options)
        return out

    with _time_limit("compiling"):
        call()
    return call


@contextlib.contextmanager
def _time_limit(what: str) -> Iterator[None]:
    """Raise TimeoutError when the block takes longer than _COMPILE_SECONDS; in the main thread, as
    only that is interrupted by signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_alarm(*_: object) -> None:
        raise TimeoutError(f"{what} took longer than {_COMPILE_SECONDS:.0f} s")

    before = signal.signal(signal.SIGALRM, on_alarm)
    timer = signal.setitimer(signal.ITIMER_REAL, _COMPILE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def _visible(workload: Workload, mask: Tensor | None) -> Callable[..., Tensor] | None:
    """Return FlexAttention's mask_mod of a workload (self-attention where causal), or None."""
    left = -1 if workload.window is None else workload.window[0]
    if mask is not None and mask.dtype == torch.bool:
        keep = mask

        if workload.mask == "padding":
            return lambda b, h, i, j: keep[b, 0, 0, j]
        return lambda b, h, i, j: keep[0, 0, i, j]
    if workload.causal and left >= 0:
        return lambda b, h, i, j: (j <= i) & (i - j <= left)
    if workload.causal:
        return lambda b, h, i, j: j <= i
    return None


def _score_mod(workload: Workload, mask: Tensor | None) -> Callable[..., Tensor] | None:
    if workload.softcap is not None:
        cap = workload.softcap
        return lambda score, b, h, i, j: cap * torch.tanh(score / cap)
    if workload.mask == "additive" and mask is not None:
        bias = mask
        return lambda score, b, h, i, j: score + bias[0, h, i, j]
    return None


def _fa3(workload: Workload, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Call:
    """Return a call of FlashAttention-3."""
    del mask
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    if workload.lengths is not None:
        return packed_call(
            flash_attn_varlen_func, packed(workload, q, k, v), {"causal": workload.causal}
        )
    window = (-1, -1) if workload.window is None else workload.window
    return rows_first_call(flash_attn_func, workload, (q, k, v), window)


def _torch_varlen(workload: Workload, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Call:
    """Return a call of torch's own FlashAttention-2 for packed sequences; the option's name depends
    on its version."""
    del mask
    function = importlib.import_module(_VARLEN).varlen_attn
    options: dict[str, Any] = {"is_causal": workload.causal}
    if "is_causal" not in inspect.signature(function).parameters:
        options = {"window_size": (-1, 0 if workload.causal else -1)}
    return packed_call(function, packed(workload, q, k, v), options)


def packed_call(function: Callable[..., Any], arguments: Any, options: dict[str, Any]) -> Call:
    """Return a call of a function for packed sequences that returns out, or a tuple that starts
    with it.

    Args:
        function: of q, k and v, [total, num_heads, head_dim] each, and the lengths.
        arguments: see libraries.packed.
        options: further keyword arguments.
    """

    def call() -> Tensor:
        result = function(*arguments, **options)
        out: Tensor = result[0] if isinstance(result, (tuple, list)) else result
        return as_batch(out)

    return call


def _fa4(
    workload: Workload, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any
) -> Call:
    """Return a call of FlashAttention-4, where None is an unbounded side of a window."""
    del mask
    from flash_attn.cute import flash_attn_func

    left, right = (-1, -1) if workload.window is None else workload.window
    window = (left if left >= 0 else None, right if right >= 0 else None)
    return rows_first_call(flash_attn_func, workload, (q, k, v), window, **options)


def _not_by_torch(*_: object) -> Call:
    raise NotImplementedError("autograd cannot differentiate it")


def _fa3_jax_fault(workload: Workload) -> str | None:
    """Return that the gradients of a workload would be wrong. At head_dim 128 the backward takes
    tiles of 80 rows without a causal mask and keeps statistics of whole tiles; the binding (0.2.3)
    has room for rows up to a multiple of 128, and one head's are written over the next one's."""
    rows = workload.seqlen
    if workload.causal or -(-rows // 80) * 80 <= -(-rows // 128) * 128:
        return None
    return "the binding has no room for whole tiles of 80 rows, and gradients are wrong"


def _fa3_jax_passes(workload: Workload, leaves: Sequence[Tensor], dout: Tensor) -> Passes:
    """Return FlashAttention-3's passes by its binding for JAX, which takes [batch, seqlen,
    num_heads, head_dim]. No CUDA graph of torch holds them: they are timed by the clock."""
    import jax
    from flash_attn3_jax import flash_mha
    from jax import dlpack

    rows_first = [
        dlpack.from_dlpack(x.detach().transpose(1, 2).contiguous()) for x in (*leaves, dout)
    ]
    *qkv, cotangent = rows_first

    def attend(*of_call: Any) -> Any:
        return flash_mha(*of_call, is_causal=workload.causal)

    forward = jax.jit(lambda *of_call: jax.vjp(attend, *of_call))
    pull_back = jax.jit(lambda pull, of_call: pull(of_call))
    _, pull = forward(*qkv)
    last: list[Any] = []  # JAX returns before the GPU has done its work

    def backward() -> Any:
        last[:] = pull_back(pull, cotangent)
        return last

    def step() -> Any:
        _, pull = forward(*qkv)
        last[:] = pull_back(pull, cotangent)
        return last

    def gradients() -> list[Tensor]:
        jax.block_until_ready(backward())
        return [torch.utils.dlpack.from_dlpack(x).transpose(1, 2) for x in last]

    return Passes(backward, step, gradients, lambda: jax.block_until_ready(last))


def rows_first_call(
    function: Callable[..., Any],
    workload: Workload,
    qkv: tuple[Tensor, Tensor, Tensor],
    window: tuple[int | None, int | None],
    **further: Any,
) -> Call:
    """Return a call of a function that takes [batch, seqlen, num_heads, head_dim] and returns out,
    or a tuple that starts with it, depending on its version.

    Args:
        function: `flash_attn_func` of FlashAttention-3 or -4.
        workload: what to call it for.
        qkv: [batch, num_heads, seqlen, head_dim] each.
        window: as the function wants it.
        further: keyword arguments.
    """
    rows_first = [x.transpose(1, 2) for x in qkv]
    options: dict[str, Any] = {"causal": workload.causal, **further}
    if workload.window is not None:
        options["window_size"] = window
    if workload.softcap is not None:
        options["softcap"] = workload.softcap
    if workload.seqlen == 1 and "num_splits" in inspect.signature(function).parameters:
        options["num_splits"] = 0  # its own choice; the default is not to split

    def call() -> Tensor:
        result = function(*rows_first, **options)
        out: Tensor = result[0] if isinstance(result, (tuple, list)) else result
        return out.transpose(1, 2)

    return call
