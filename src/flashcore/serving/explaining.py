"""Explain how a call of `attention_with_kvcache` would run, and why.

The call's own functions decide, and are given tensors without memory: so they compute nothing, read
no length and no page table, and make what a step makes (rotated queries, copies of a cache) in
shape alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TextIO

import torch
from torch import Tensor

from flashcore.base import env
from flashcore.explanation.deciding import explained
from flashcore.explanation.found import Explanation, check_asked
from flashcore.explanation.gradient import no_gradient
from flashcore.kernels.append.params import AppendPlan
from flashcore.ops.padded import padded_problem
from flashcore.ops.paged import paged_problem
from flashcore.ops.paged_varlen import packed_pages_problem
from flashcore.ops.varlen import varlen_problem
from flashcore.problem import Causal, Problem, Window, arch_of_device
from flashcore.problem.memory_layout import as_batch, described_memory, mask_spec
from flashcore.problem.options import Inputs, Options
from flashcore.problem.spelling import OF_KVCACHE, other_names, refuse
from flashcore.serving.append import plan_to_append
from flashcore.serving.arguments import Step, rotary_of
from flashcore.serving.attend import COPY_TEXT, Reading, read_cache, warns_of_copy
from flashcore.serving.rotary import Rotary
from flashcore.serving.step import appended, check_step

__all__ = ["explain_with_kvcache"]

_DESCRIBE: dict[str, Callable[[Inputs, Options], Problem]] = {
    "contiguous": padded_problem,
    "pages": paged_problem,
    "packed pages": packed_pages_problem,
    "packed": varlen_problem,
}


@other_names(OF_KVCACHE)
def explain_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    *,
    seqlens_k: Tensor,
    page_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_new: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool | None = None,
    rotary_offsets: Tensor | None = None,
    rotary_positions: Tensor | None = None,
    causal: Causal = True,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    tree_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    batch_invariant: bool = False,
    backend: str = "auto",
    arch: int | None = None,
    file: TextIO | None = None,
    **_unknown: object,
) -> Explanation:
    """Print which backend, kernels and tile configuration `attention_with_kvcache` would use, and
    why.

    Nothing is computed, compiled or written, and no length and no page table is read: plans depend
    on how much room a sequence has. See `explain`.

    Args:
        q: as in `attention_with_kvcache`, like all the arguments that follow.
        k_cache: [batch or num_pages, num_heads_kv, seqlen_cache or page_size, head_dim].
        v_cache: likewise, with head_dim_v.
        k_new: new keys; or None.
        v_new: new values; or None.
        seqlens_k: int32, [batch].
        page_table: int32, [batch, pages of the longest sequence]; or None.
        cache_batch_idx: int32, [batch]; or None.
        cache_leftpad: int32, [batch]; or None.
        cu_seqlens_q: int32, [batch + 1], where q is packed.
        cu_seqlens_new: int32, [batch + 1]; or None.
        max_seqlen_q: the longest sequence of packed queries, or a bound on it; or None.
        rotary_cos: [positions, rotary_dim / 2]; or None.
        rotary_sin: likewise.
        rotary_interleaved: which elements are pairs.
        rotary_offsets: int32, [batch]; or None.
        rotary_positions: int32, [batch, seqlen_q] or [total_q]; or None.
        causal: True or "lower_right", "upper_left", or False.
        scale: the factor of q.k; None is 1 / sqrt(head_dim).
        window: (left, right), or None.
        softcap: scores become softcap * tanh(score / softcap); None is off.
        mask: boolean or additive, over the places of a sequence; or None.
        tree_mask: boolean, over the last seqlen_q keys, or of packed queries [.., m, m]; or None.
        sinks: [num_heads_q]; or None.
        k_scale: of a k_cache of float8_e4m3fn; or None.
        v_scale: likewise, of v_cache.
        return_lse: whether the log-sum-exp of each row of scores is returned too.
        out: receives the result; or None.
        lse: receives the log-sum-exp; or None.
        batch_invariant: whether a sequence's bits may depend on that sequence alone.
        backend: "auto", "sm90", "wmma", "sim" or "torch".
        arch: GPU architecture to plan for, as in `explain`. For CPU tensors the problem is then
            that of such a GPU, which is given packed queries as they are.
        file: where to print; by default standard output.

    Returns:
        The same as an object; its gradient has the code "none".

    Raises:
        Exception: what `attention_with_kvcache` would raise for these arguments.
    """
    if _unknown:
        refuse(explain_with_kvcache, _unknown)
    check_asked(arch, file)
    rotary = rotary_of(rotary_cos, rotary_sin, rotary_interleaved, rotary_offsets, rotary_positions)
    step = Step(
        q, k_cache, v_cache, k_new, v_new, seqlens_k, page_table, cache_batch_idx, cache_leftpad,
        cu_seqlens_q, cu_seqlens_new, max_seqlen_q, rotary, mask, tree_mask, return_lse, out, lse,
        backend,
    )  # fmt: skip
    options = {
        "causal": causal, "scale": scale, "window": window, "softcap": softcap, "sinks": sinks,
        "k_scale": k_scale, "v_scale": v_scale, "batch_invariant": batch_invariant,
    }  # fmt: skip
    check_step(step, options)
    return _explained(step, options, arch).printed(file)


def _explained(step: Step, options: dict[str, Any], arch: int | None) -> Explanation:
    q, backend = step.q, step.backend
    shapes = _Shapes()
    reading, problem, tensors = _read(step, options, shapes, q.is_cuda, backend)
    on_gpu, preview = q.is_cuda, None
    if q.device.type == "cpu" and backend != "sim":
        # With "torch", too, it is said what a kernel would be given.
        there = _read(step, options, shapes, True, "auto")
        preview = there[1] if there[1] != problem else None
        if arch is not None:
            (reading, problem, tensors), preview, on_gpu = there, None, True
    warnings = []
    if reading.is_copied and warns_of_copy(on_gpu, backend):
        warnings.append(COPY_TEXT)
    append, notes = _append(step, arch or problem.arch or env.sim_arch())
    return explained(
        problem,
        tensors,
        backend,
        arch,
        no_gradient("attention_with_kvcache has no backward pass"),
        on_gpu=preview,
        notes=[*notes, *_notes(step, reading, preview)],
        warnings=warnings,
        append=append,
    )


class _Shapes:
    """Tensors without memory, each in the place of one that has some."""

    def __init__(self) -> None:
        # By the id of the other; both are kept, for an id is that of one object while it lives.
        self._shapes: dict[int, Tensor] = {}
        self._given: dict[int, Tensor] = {}

    def of(self, x: Any) -> Any:
        """Return a tensor's shape, strides and dtype as a tensor; anything else as it is."""
        if isinstance(x, Rotary):
            return Rotary(*map(self.of, x))
        if not isinstance(x, Tensor):
            return x
        if id(x) not in self._shapes:
            found = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
            self._shapes[id(x)], self._given[id(found)] = found, x
        return self._shapes[id(x)]

    def given(self, x: Tensor) -> Tensor:
        """Return the tensor that a shape stands for: the caller's, unless a step makes it."""
        return self._given.get(id(x), x)


def _read(
    step: Step, options: dict[str, Any], shapes: _Shapes, on_gpu: bool, backend: str
) -> tuple[Reading, Problem, tuple[Tensor, Tensor, Tensor]]:
    """Return how a step's cache is read, the call that this makes, and its q, k and v as it
    describes them."""
    of_shapes: Any = map(shapes.of, step)
    described_options = {name: shapes.of(x) for name, x in options.items()}
    left = appended(Step(*of_shapes), described_options)
    reading = read_cache(left._replace(backend=backend), described_options, on_gpu)
    inputs = reading.inputs
    scalars = "causal", "window", "softcap", "scale", "batch_invariant"
    asked = Options.checked(**{name: options[name] for name in scalars})
    problem = _DESCRIBE[reading.road](inputs, asked)
    # What the caller gave lies where it lies.
    q, k, v = (
        x if x.dim() == 4 else as_batch(x)
        for x in map(shapes.given, (inputs.q, inputs.k, inputs.v))
    )
    masked = {}
    for name, x in (("mask", inputs.mask), ("tree_mask", inputs.tree_mask)):
        if x is not None:
            masked["mask"] = mask_spec(shapes.given(x), is_tree=name == "tree_mask")
    device = step.q.device
    described = dataclasses.replace(
        problem,
        device=device.type,
        arch=arch_of_device(device.index) if device.type == "cuda" else 0,
        return_lse=step.return_lse or step.lse is not None,
        **described_memory(q, k, v),
        **masked,  # type: ignore[arg-type]
    )
    return reading, described, (q, k, v)


def _append(step: Step, arch: int) -> tuple[AppendPlan | None, list[str]]:
    """Return the kernel that writes new tokens, and what is to be said of it, and of rotation."""
    rotary = step.rotary
    if step.k_new is None:
        no_kernel = "PyTorch's operations rotate the queries, as there are no new tokens beside"
        return None, [] if rotary is None else [no_kernel]
    plan = None
    if step.backend != "sim" and not step.q.is_meta:
        cos, interleaved = (None, False) if rotary is None else (rotary.cos, rotary.interleaved)
        plan = plan_to_append(
            step.k_cache, step.q, step.k_new, step.seqlens_k, cos, interleaved, step.backend, arch
        )
    turned = "" if rotary is None else "; them and the queries rotated"
    notes = []
    if plan is None or not step.q.is_cuda:
        notes.append(f"PyTorch's operations write new tokens into the cache{turned}")
    if plan is not None:
        where = "" if step.q.is_cuda else "on a GPU "
        notes.append(f"{where}one kernel writes new tokens into the cache{turned}")
    return plan, notes


def _notes(step: Step, reading: Reading, preview: Problem | None) -> list[str]:
    """Return what is to be said of how a cache is read."""
    notes = []
    if step.tree_mask is not None and step.mask is not None:
        notes.append("mask and tree_mask become one mask over the whole cache first")
    if reading.longest is not None:
        notes.append(
            f"packed queries are padded to {reading.longest} a sequence, which costs PyTorch less"
        )
        if preview is not None:
            notes.append(f"a GPU is given them as they are: {preview.describe()}")
    if reading.is_copied:
        notes.append(
            "the cache's tokens are copied into one piece first, which a kernel then reads"
        )
    return notes
