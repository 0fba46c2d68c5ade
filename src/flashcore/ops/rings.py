"""Serve rings of GPUs, each of which holds a part of the keys: `merge` makes one result of two over
different keys, and `attention_backward` takes whatever out and lse it is given.

`merge` is an operator of torch, `flashcore::merge`, and so are its gradients,
`flashcore::merge_backward`. Each is one kernel on a GPU, see launch/merge_call.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashcore.backends.dispatch import check_backend
from flashcore.launch.merge_call import merge_backward_on_gpu, merge_on_gpu
from flashcore.ops import dense
from flashcore.ops.family import BackwardCall, results_of
from flashcore.plain.merging import merge_backward_plain, merge_plain
from flashcore.problem import Causal, Window
from flashcore.problem.options import Inputs, Options
from flashcore.problem.validation import (
    DTYPES,
    check_device,
    check_kinds,
    check_mask_kind,
    check_plain_tensor,
    shape_text,
)

_LSE_DTYPES = (torch.float32, torch.float64)

_LIBRARY = torch.library.Library("flashcore", "FRAGMENT")
_LIBRARY.define(
    "merge(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, ScalarType out_dtype) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "merge_backward(Tensor? dout, Tensor? dlse, Tensor out_a, Tensor lse_a, Tensor out_b, "
    "Tensor lse_b, ScalarType out_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def merge(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return attention over two sets of keys, given the attention of the same queries over each.

    With lse = log(exp(lse_a) + exp(lse_b)), out = exp(lse_a - lse) * out_a + exp(lse_b - lse) *
    out_b. Differentiable in all four, twice too. Merge in any order; in a ring keep out in float32
    between the steps (`out_dtype=torch.float32`), so that only the last step rounds.

    Args:
        out_a: [..., head_dim_v], float16, bfloat16, float32 or float64: [batch, num_heads,
            seqlen_q, head_dim_v] from `attention`. Any strides.
        lse_a: float32 or float64, shape of out_a without its last dimension, natural-log; -inf in
            rows that attend to nothing, of which out_a is not read. `attention_varlen` returns
            [num_heads, total_q]: pass lse.t() with its out.
        out_b: shape and device of out_a, for the other keys.
        lse_b: likewise, dtype of lse_a.
        out_dtype: of the result; by default that of out_a and out_b, or the wider of both.

    Returns:
        out: shape of out_a, out_dtype.
        lse: shape and dtype of lse_a. A row with -inf on both sides has out 0, lse -inf and
        gradients 0.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape or device.

    Numerics:
        float32, float64 where lse is; out is rounded once, to out_dtype. On a GPU one kernel
        computes out and lse, and one the gradients; PyTorch does in float64, and where gradients
        of gradients are wanted.

    Source:
        FlashAttention-2, arXiv:2307.08691, section 3.1, on merging two blocks of keys.
    """
    _check_merged(out_a, lse_a, out_b, lse_b)
    if out_dtype is None:
        out_dtype = torch.promote_types(out_a.dtype, out_b.dtype)
    elif not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"out_dtype={out_dtype!r} must be a torch.dtype, or None")
    elif out_dtype not in DTYPES:
        raise TypeError(f"out_dtype={out_dtype} must be one of {', '.join(DTYPES.values())}")
    operator: Any = torch.ops.flashcore.merge
    if not torch.compiler.is_compiling() and _is_differentiated_by_functorch():
        operator = merge_plain
    out, lse = operator(out_a, lse_a, out_b, lse_b, out_dtype)
    return out, lse


def _is_differentiated_by_functorch() -> bool:
    """Return whether torch.func.grad or jvp is at work, which take no operator with a gradient that
    a library registers."""
    if not torch._C._are_functorch_transforms_active():
        return False
    vmap = torch._C._functorch.TransformType.Vmap
    return any(t.key() != vmap for t in torch._C._functorch.get_interpreter_stack() or ())


def _check_merged(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    named = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    for name, x in named.items():
        _check_plain(name, x)
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name} has dtype {x.dtype}; supported are {', '.join(DTYPES.values())}: pass "
                f"{name}.float()"
            )
        if x.device != out_a.device:
            raise ValueError(
                f"{name} is on {x.device} but out_a is on {out_a.device}; move it with "
                f"{name}.to(out_a.device)"
            )
    for name, x in (("lse_a", lse_a), ("lse_b", lse_b)):
        if x.dtype not in _LSE_DTYPES or x.dtype != lse_a.dtype:
            raise TypeError(
                f"{name} has dtype {x.dtype}; lse_a and lse_b must both be float32, or both "
                f"float64: pass {name}.float()"
            )
    if out_a.dim() == 0:
        raise ValueError("out_a has no dimensions; it must be [..., head_dim_v]")
    if out_b.shape != out_a.shape:
        raise ValueError(
            f"out_b has shape {shape_text(out_b)} but out_a has {shape_text(out_a)}; both are "
            "results of the same queries"
        )
    for name, x in (("lse_a", lse_a), ("lse_b", lse_b)):
        if x.shape != out_a.shape[:-1]:
            raise ValueError(
                f"{name} has shape {shape_text(x)}; it must be out_a's {shape_text(out_a)} without "
                "the last dimension. With attention_varlen, whose lse is [num_heads, total_q], "
                f"pass {name}.t()"
            )


def _check_plain(name: str, x: object) -> None:
    """Refuse what check_plain_tensor refuses, except in compiled code, which has no lazily negated
    views and no way to ask for them."""
    if not torch.compiler.is_compiling():
        check_plain_tensor(name, x)


def _merge_fake(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape, dtype=out_dtype), lse_a.new_empty(lse_a.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.out_dtype = inputs[4]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Compute the gradient: by operations of torch where it is recorded in its turn, else by the
    operator, which is one kernel on a GPU."""
    given = dout, dlse, *ctx.saved_tensors
    if torch.is_grad_enabled():
        return *merge_backward_plain(*given), None
    gradients = list(torch.ops.flashcore.merge_backward(*given, ctx.out_dtype))
    if dout is None:
        gradients[0] = gradients[2] = None
    return *gradients, None


def _merge(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Compute the operator: by one kernel on a GPU, else by PyTorch."""
    return merge_on_gpu(*arguments) or merge_plain(*arguments)


def _backward_op(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute the operator of the gradients, contiguous; zeros where none arrives."""
    found = merge_backward_on_gpu(*arguments) or merge_backward_plain(*arguments[:6])
    return tuple(
        torch.zeros_like(x, memory_format=torch.contiguous_format)
        if gradient is None
        else gradient.contiguous()
        for gradient, x in zip(found, arguments[2:6], strict=True)
    )


def _backward_fake(dout: Any, dlse: Any, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in arguments[:4])


def _in_front(info: Any, tensors: Sequence[Any], dims: Sequence[int | None]) -> list[Any]:
    """Return tensors with what vmap maps over as one more dimension in front."""
    return [
        x if x is None
        else x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None
        else x.movedim(dim, 0)
        for x, dim in zip(tensors, dims, strict=True)
    ]  # fmt: skip


def _merge_vmap(info, in_dims, *arguments):  # type: ignore[no-untyped-def]
    """Merge a batch."""
    tensors = _in_front(info, arguments[:4], in_dims[:4])
    return torch.ops.flashcore.merge(*tensors, arguments[4]), (0, 0)


def _backward_vmap(info, in_dims, *arguments):  # type: ignore[no-untyped-def]
    """Compute the gradients of a batch."""
    tensors = _in_front(info, arguments[:6], in_dims[:6])
    return torch.ops.flashcore.merge_backward(*tensors, arguments[6]), (0,) * 4


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("merge", _merge, _device)
    _LIBRARY.impl("merge_backward", _backward_op, _device)
torch.library.register_fake("flashcore::merge", _merge_fake, lib=_LIBRARY)
torch.library.register_fake("flashcore::merge_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "flashcore::merge", _backward, setup_context=_setup_context, lib=_LIBRARY
)
torch.library.register_vmap("flashcore::merge", _merge_vmap, lib=_LIBRARY)
torch.library.register_vmap("flashcore::merge_backward", _backward_vmap, lib=_LIBRARY)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    *,
    delta: Tensor | None = None,
    dlse: Tensor | None = None,
    causal: Causal = False,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    deterministic: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, given out and lse of whatever forward pass.

    The weights are recomputed as exp(scores - lse). Where out and lse are those of more keys than
    k and v hold (of all keys of a ring, say, merged), the gradients are this part's share: dk and
    dv are whole, and the dq of all parts add up to the whole. Autograd does not record the call.

    Args:
        dout: gradient of out, [batch, num_heads_q, seqlen_q, head_dim_v], dtype of q.
        q: [batch, num_heads_q, seqlen_q, head_dim], as in `attention`, like k and v.
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        out: shape of dout, any floating-point dtype (it is rounded to that of q); None with delta,
            and not read then.
        lse: natural-log, [batch, num_heads_q, seqlen_q], float32 (float64 for float64 inputs). A
            row with -inf has gradients 0.
        delta: the row sums of dout * out, shape and dtype of lse. By default they are computed from
            out. A ring may compute them once, from an out in float32. Given them, torch's fused
            operators cannot serve, so on GPUs other than Hopper PyTorch operations do.
        dlse: gradient of lse, shape and dtype of lse; by default 0.
        causal: as in `attention`.
        scale: as in `attention`.
        window: as in `attention`.
        softcap: as in `attention`.
        mask: as in `attention`. It gets no gradient here.
        deterministic: as in `attention`.
        backend: as in `attention`.

    Returns:
        dq, dk, dv: shapes and dtypes of q, k and v.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or value; neither out nor delta.

    Numerics:
        As the gradients of `attention`; see docs/numerics.md.

    Source:
        FlashAttention-2, arXiv:2307.08691, algorithm 2.
    """
    options = Options.checked(causal, window, softcap, scale, deterministic=deterministic)
    check_backend(backend)
    if not torch.compiler.is_compiling():
        check_kinds(q, k, v)
        if mask is not None:
            check_mask_kind(mask, q)
    rows = q.shape[:3]
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    _check_like("dout", dout, q, (*rows, v.shape[3]), q.dtype)
    _check_like("lse", lse, q, rows, lse_dtype)
    for name, x in (("delta", delta), ("dlse", dlse)):
        if x is not None:
            _check_like(name, x, q, rows, lse_dtype)
    if out is not None:
        _check_like("out", out, q, (*rows, v.shape[3]), None)
    elif delta is None:
        raise ValueError("out and delta are both None; pass one of them")
    with torch.no_grad():
        if delta is not None:
            # The row sums of an out of zeros are 0, and those of dlse are subtracted.
            out = torch.zeros_like(dout, memory_format=torch.contiguous_format)
            dlse = -delta if dlse is None else dlse - delta
        assert out is not None
        arriving, results = results_of((dout, dlse)), results_of((out.to(q.dtype), lse))
        inputs, needs = Inputs(q, k, v, mask), (False, False)  # of mask and sinks
        call = BackwardCall(arriving, inputs, results, options, needs, backend)
        dq, dk, dv, *_ = dense.OPERATORS.gradients(call)
    return dq, dk, dv


def _check_like(
    name: str, x: object, q: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None
) -> None:
    """Raise unless `x` is a tensor of a shape and dtype (None: any floating-point one) beside q."""
    _check_plain(name, x)
    assert isinstance(x, Tensor)
    if dtype is None and not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; it must be a floating-point dtype")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name} has dtype {x.dtype}; it must be {dtype}: pass {name}.to({dtype})")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {shape_text(x)}; it must be {tuple(shape)}")
    check_device(name, x, q)
