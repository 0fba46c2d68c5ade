"""List the calls of scripts/sanitize.py that are more than a dense forward pass: gradients, packed
sequences, caches, appending and merging; and judge each by PyTorch.

A call makes its tensors by PyTorch's generator for CPUs, so that they are the same everywhere. Its
results on the GPU are held to those of backend="torch" on the CPU, where no kernel of flashcore
runs and no memory of the GPU holds right values for a kernel that writes none. Sizes are small, for
racecheck is slow.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import flashcore
from flashcore.backends import gradients as choosing
from flashcore.backends import torch_backward
from flashcore.checks.paged_cases import PagedCase, make_paged_inputs
from flashcore.kernels.bwd_sm90 import plan_one
from flashcore.ops import rings
from flashcore.ops.paged import attention_paged
from flashcore.ops.paged_varlen import attention_paged_varlen
from flashcore.serving import append

FLOAT8 = torch.float8_e4m3fn
# Largest error of a result, over the largest value of what it should be. Two right computations
# differ by some last places of the dtype; in 8 bits a value may be rounded to either neighbour.
TOLERANCES = {
    torch.float16: 2.0**-8,
    torch.bfloat16: 2.0**-5,
    torch.float32: 2.0**-8,  # lse, of what was rounded to fewer bits
    FLOAT8: 2.0**-3,
}
# Functions that would compute a call by PyTorch where no kernel of flashcore does.
FALLBACKS = (
    (choosing, "attention_backward_tiled"),
    (torch_backward, "flash_gradients"),
    (torch_backward, "efficient_gradients"),
    (rings, "merge_plain"),
    (rings, "merge_backward_plain"),
    (append, "_append"),
)
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Draw:
    """A draw makes the tensors of a call; the values do not depend on the device."""

    device: str
    seed: int
    generator: torch.Generator

    @classmethod
    def of(cls, name: str, device: str) -> Draw:
        """Return the draw of a call: no two have the same values."""
        seed = zlib.crc32(name.encode())
        return cls(device, seed, torch.Generator().manual_seed(seed))

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return normally distributed values."""
        return torch.randn(shape, generator=self.generator).to(dtype).to(self.device)

    def int32(self, *values: int) -> Tensor:
        """Return these numbers."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def ends(self, lengths: tuple[int, ...]) -> Tensor:
        """Return where each of some packed sequences ends, behind a 0."""
        return self.int32(*(sum(lengths[:i]) for i in range(len(lengths) + 1)))

    def scales(self, *shape: int) -> Tensor:
        """Return scales of a cache of 8 bits."""
        values = torch.rand(shape, generator=self.generator) * 0.02 + 0.005
        return values.to(self.device)


@dataclass(frozen=True)
class Call:
    """A call is a row of the table: what is computed, and by which kernels on a GPU.

    Attributes:
        name: of the row, different from all others.
        compute: makes the results by name, given a draw, a backend and the options.
        kernels: those of flashcore that the call is there for.
        options: of `compute`.
        backend: of the call on a GPU; "sm90" needs a Hopper GPU.
        by_one: whether one kernel computes dq, dk and dv.
        workspace: bytes to add up dq in, where one kernel does.
    """

    name: str
    compute: Callable[..., Results]
    kernels: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    backend: str = "sm90"
    by_one: bool = False
    workspace: int = 64 << 20

    def describe(self) -> str:
        """Return the name."""
        return self.name

    def results(self, device: str, backend: str) -> Results:
        """Compute the call on a device."""
        return self.compute(Draw.of(self.name, device), backend, **self.options)

    def judge(self) -> list[str]:
        """Compute the call on the GPU by kernels alone; return a line for each wrong result."""
        expected = self.results("cpu", "torch")
        with self.by_kernels():
            found = self.results("cuda", self.backend)
        return wrong_results(found, expected)

    @contextmanager
    def by_kernels(self) -> Iterator[None]:
        """Let no fallback compute, and one kernel or two the gradients, as the call wants it."""
        flashcore.set_gradient_workspace(self.workspace if self.by_one else 0)
        with ExitStack() as stack:
            for module, name in FALLBACKS:
                refused = AssertionError(f"{name} computes the call instead of a kernel")
                stack.enter_context(mock.patch.object(module, name, side_effect=refused))
            if self.by_one:
                pays = stack.enter_context(mock.patch.object(plan_one, "pays", return_value=True))
            try:
                yield
            finally:
                flashcore.set_gradient_workspace()
        if self.by_one:
            assert pays.called, "nobody asked whether one kernel computes the gradients"


def wrong_results(found: Results, expected: Results) -> list[str]:
    """Return a line for each result that is further from what is expected than the tolerance of its
    dtype allows; infinities must be in the same places."""
    wrong = []
    for name, want in expected.items():
        limit = TOLERANCES[want.dtype]
        have, want = (x.detach().cpu().to(torch.float64) for x in (found[name], want))
        finite = want.isfinite()
        if not torch.equal(have[~finite], want[~finite]):
            wrong.append(f"{name}: not infinite where it should be")
            continue
        largest = float(want[finite].abs().max())
        error = float((have - want)[finite].abs().max()) / largest
        if not error <= limit:  # NaN is wrong
            wrong.append(f"{name}: error {error:.3g} of the largest value, limit {limit:.3g}")
    return wrong


def dense(
    x: Draw,
    backend: str,
    *,
    rows: int,
    keys: int,
    heads: tuple[int, int] = (2, 2),
    batch: int = 1,
    dim: int = 64,
    dim_v: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    mask: str = "",
    through_lse: bool = False,
    lengths: tuple[int, ...] = (),
    **options: Any,
) -> Results:
    """Compute `attention` and its gradients. `mask` is "bool", of all pairs, or else of which
    dimensions an additive one is, "hqk" say, with "+grad" where it needs a gradient; `lengths` are
    seqlens_k."""
    q = x.normal(batch, heads[0], rows, dim, dtype=dtype)
    k = x.normal(batch, heads[1], keys, dim, dtype=dtype)
    v = x.normal(batch, heads[1], keys, dim_v or dim, dtype=dtype)
    leaves = {"dq": q.requires_grad_(), "dk": k.requires_grad_(), "dv": v.requires_grad_()}
    of_dims, _, grad = mask.partition("+")
    if of_dims == "bool":
        options["mask"] = x.normal(1, heads[0], rows, keys) > -0.5
    elif of_dims:
        sizes = {"b": batch, "h": heads[0], "q": rows, "k": keys}
        shape = [n if d in of_dims else 1 for d, n in sizes.items()]
        options["mask"] = x.normal(*shape, dtype=dtype).requires_grad_(bool(grad))
        leaves |= {"dmask": options["mask"]} if grad else {}
    if lengths:
        options["seqlens_k"] = x.int32(*lengths)
    results = flashcore.attention(q, k, v, return_lse=True, backend=backend, **options)
    arriving = [x.normal(*results[0].shape, dtype=dtype)]
    if through_lse:
        arriving.append(x.normal(*results[1].shape, dtype=torch.float32))
    found = torch.autograd.grad(results[: len(arriving)], list(leaves.values()), arriving)
    return dict(zip(("out", "lse", *leaves), (*results, *found), strict=True))


def packed(
    x: Draw,
    backend: str,
    *,
    lengths_q: tuple[int, ...],
    lengths_k: tuple[int, ...],
    heads: tuple[int, int] = (2, 2),
    dim: int = 64,
    backward: bool = True,
    **options: Any,
) -> Results:
    """Compute `attention_varlen`, and its gradients unless told not to."""
    totals = sum(lengths_q), sum(lengths_k), sum(lengths_k)
    sizes = zip(totals, (heads[0], heads[1], heads[1]), strict=True)
    q, k, v = (x.normal(n, h, dim).requires_grad_(backward) for n, h in sizes)
    lengths: Any = x.ends(lengths_q), x.ends(lengths_k), max(lengths_q), max(lengths_k)
    options |= {"return_lse": True, "backend": backend}
    out, lse = flashcore.attention_varlen(q, k, v, *lengths, **options)
    if not backward:
        return {"out": out, "lse": lse}
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), x.normal(*out.shape))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def over_cache(
    x: Draw,
    backend: str,
    *,
    lengths: tuple[int, ...],
    room: int,
    rows: int = 1,
    heads: tuple[int, int] = (4, 1),
    dim: int = 64,
    is_8_bit: bool = False,
    with_sinks: bool = False,
    **options: Any,
) -> Results:
    """Compute `attention` over a contiguous cache."""
    q = x.normal(len(lengths), heads[0], rows, dim)
    k, v = (x.normal(len(lengths), heads[1], room, dim) for _ in range(2))
    if is_8_bit:
        k, v = k.to(FLOAT8), v.to(FLOAT8)
        options |= {"k_scale": x.scales(heads[1]) * 40, "v_scale": x.scales(len(lengths), heads[1])}
    if with_sinks:
        options["sinks"] = x.normal(heads[0], dtype=torch.float32) + 3.0
    results = flashcore.attention(
        q, k, v, seqlens_k=x.int32(*lengths), return_lse=True, backend=backend, **options
    )
    return dict(zip(("out", "lse", "max_score"), results, strict=False))


def over_pages(
    x: Draw,
    backend: str,
    *,
    lengths: tuple[int, ...],
    page_size: int,
    counts: tuple[int, ...] = (),
    rows: int = 1,
    heads: tuple[int, int] = (4, 1),
    dim: int = 64,
    cache: str = "",
    with_tree: bool = False,
    with_sinks: bool = False,
    **options: Any,
) -> Results:
    """Compute attention over pages, by packed queries where there are `counts` of them."""
    case = PagedCase(
        lengths=lengths, page_size=page_size, seqlen_q=max(counts, default=rows), dtype="bfloat16",
        num_heads_q=heads[0], num_heads_kv=heads[1], head_dim=dim, head_dim_v=dim,
        cache_dtype=cache, tree=with_tree, seed=x.seed,
    )  # fmt: skip
    made = make_paged_inputs(case, x.device)
    options |= {"return_lse": True, "backend": backend, **made.scales()}
    if with_sinks:
        options["sinks"] = x.normal(heads[0], dtype=torch.float32) + 3.0
    q, k, v, table, told = made.arguments()
    if counts:
        each = zip(q, counts, strict=True)
        q = torch.cat([own[:, :n].transpose(0, 1) for own, n in each])
        options |= {"cu_seqlens_q": x.ends(counts), "max_seqlen_q": max(counts), "causal": True}
        results = attention_paged_varlen(q, k, v, table, told, tree_mask=made.tree_mask, **options)
    else:
        results = attention_paged(q, k, v, table, told, tree_mask=made.tree_mask, **options)
    return dict(zip(("out", "lse", "max_score"), results, strict=False))


def step(
    x: Draw,
    backend: str,
    *,
    lengths: tuple[int, ...],
    page_size: int = 0,
    counts: tuple[int, ...] = (),
    rows: int = 1,
    is_8_bit: bool = False,
    interleaved: bool = False,
    rotary_dim: int = 64,
    dim: int = 64,
) -> Results:
    """Append new tokens, rotated, to a cache with 64 places a sequence, and attend to all."""
    batch, heads = len(lengths), (4, 2)
    shape = (batch * 64 // page_size, page_size) if page_size else (batch, 64)
    caches = [x.normal(*shape, heads[1], dim).transpose(1, 2) for _ in range(2)]
    options: dict[str, Any] = {}
    if is_8_bit:
        caches = [(cache * 0.01).to(FLOAT8) for cache in caches]
        options |= {"k_scale": x.scales(batch, heads[1]), "v_scale": x.scales(heads[1])}
    if page_size:
        order = torch.randperm(shape[0], generator=x.generator).view(batch, -1)
        options["page_table"] = order.int().to(x.device)
    if counts:
        given = [x.normal(sum(counts), n, dim) for n in (heads[0], heads[1], heads[1])]
        options |= {"cu_seqlens_q": x.ends(counts), "max_seqlen_q": max(counts)}
    else:
        given = [x.normal(batch, n, rows, dim) for n in (heads[0], heads[1], heads[1])]
    angles = torch.arange(64)[:, None] * 0.7 ** torch.arange(rotary_dim // 2)
    out, lse = flashcore.attention_with_kvcache(
        given[0], *caches, *given[1:], seqlens_k=x.int32(*lengths), return_lse=True,
        rotary_cos=angles.cos().to(x.device), rotary_sin=angles.sin().to(x.device),
        rotary_interleaved=interleaved, backend=backend, **options,
    )  # fmt: skip
    return {"out": out, "lse": lse, "k_cache": caches[0], "v_cache": caches[1]}


def merged(x: Draw, backend: str, *, shape: tuple[int, ...], dtype: torch.dtype) -> Results:
    """Merge two results, some rows of which are empty, and compute the gradients; `backend` decides
    nothing here."""
    outs = [x.normal(*shape, dtype=dtype).requires_grad_() for _ in range(2)]
    lses = [x.normal(*shape[:-1], dtype=torch.float32) * 3.0 for _ in range(2)]
    lses[0].view(-1)[0] = -torch.inf
    lses[1].view(-1)[:2] = -torch.inf
    leaves = [outs[0], lses[0].requires_grad_(), outs[1], lses[1].requires_grad_()]
    out, lse = flashcore.merge(*leaves)
    arriving = x.normal(*shape, dtype=dtype), x.normal(*shape[:-1], dtype=torch.float32)
    found = torch.autograd.grad((out, lse), leaves, arriving)
    names = "out", "lse", "dout_a", "dlse_a", "dout_b", "dlse_b"
    return dict(zip(names, (out, lse, *found), strict=True))
