"""Test attention under torch.func, autocast, checkpointing, data parallel wrappers, modes,
threads."""

from __future__ import annotations

import contextlib
import itertools
import threading

import pytest
import torch
import torch._dynamo.testing
from op_inputs import additive_mask, as_arguments, compiled, gradients, qkv
from torch.utils.checkpoint import checkpoint

import flashcore
from flashcore.ops import dense as ops


@pytest.mark.parametrize("batched", list(itertools.product((False, True), repeat=4))[1:], ids=str)
def test_vmap(batched):
    """Over every choice of batched arguments, each in another place."""
    dims = [place if yes else None for place, yes in zip((0, 2, 1, 0), batched, strict=True)]
    tensors = [
        torch.stack([x, 2 * x, 3 * x], dim) if dim is not None else x
        for x, dim in zip((*qkv(), additive_mask(1, 6, 9)), dims, strict=True)
    ]

    def function(q, k, v, mask):
        return flashcore.attention(q, k, v, mask=mask, causal=True, return_lse=True)

    out, lse = torch.func.vmap(function, in_dims=tuple(dims))(*tensors)
    for i in range(3):
        one = [x if d is None else x.select(d, i) for x, d in zip(tensors, dims, strict=True)]
        torch.testing.assert_close((out[i], lse[i]), function(*one))


@pytest.mark.parametrize("mask_shape", [(6, 9), (2, 1, 6, 9), (1, 4, 1, 9)], ids=str)
def test_per_sample_gradients(mask_shape):
    """vmap of grad, the mask shared by all samples or one of each."""
    samples = [torch.stack([x, 2 * x, 3 * x]) for x in qkv()]
    shared = additive_mask(*mask_shape)
    own = torch.stack([shared, -shared, 2 * shared])

    def loss(q, k, v, mask):
        out, lse = flashcore.attention(q, k, v, mask=mask, softcap=2.0, return_lse=True)
        return out.square().sum() + lse.sum()

    grad = torch.func.grad(loss, argnums=(0, 1, 2, 3))
    for mask, dim in ((shared, None), (own, 0)):
        got = torch.func.vmap(grad, in_dims=(0, 0, 0, dim))(*samples, mask)
        for i in range(3):
            leaves = [x[i] for x in samples] + [shared if dim is None else mask[i]]
            leaves = [x.detach().clone().requires_grad_() for x in leaves]
            want = torch.autograd.grad(loss(*leaves), leaves)
            torch.testing.assert_close(tuple(x[i] for x in got), want)


def test_transforms_of_transforms():
    q, k, v = qkv(3, 4, dtype=torch.float64)

    def loss(q):
        return flashcore.attention(q, k, v, causal=True).square().sum()

    def penalty(q):
        return torch.func.grad(loss)(q).square().sum()

    leaf = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(q), first.detach())
    torch.testing.assert_close(torch.func.grad(penalty)(q), second)
    batch = torch.stack([q, 2 * q])
    over_vmap = torch.func.grad(lambda x: torch.func.vmap(loss)(x).sum())(batch)
    torch.testing.assert_close(over_vmap[1], torch.func.grad(loss)(2 * q))
    _, vjp = torch.func.vjp(lambda x: flashcore.attention(x, k, v), q)
    assert torch.func.jacrev(lambda x: flashcore.attention(x, k, v).sum())(q).shape == q.shape
    assert vjp(torch.ones(2, 4, 3, 24, dtype=torch.float64))[0].shape == q.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("compiling", [False, True])
def test_autocast_is_what_it_is_for_sdpa(dtype, compiling):
    q, k, v = (x.detach().requires_grad_() for x in qkv(6, 6, dtype=dtype))
    mask = additive_mask(6, 6).to(dtype)

    def ours(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return flashcore.attention(q, k, v, mask=mask)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    function = compiled(ours)[0] if compiling else ours
    out = function(q, k, v)
    assert out.dtype == theirs.dtype
    rounded = [x.detach().to(out.dtype).requires_grad_() for x in (q, k, v)]
    own_mask = mask if dtype == torch.float32 else mask.to(out.dtype)
    want = flashcore.attention(*rounded, mask=own_mask)
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    got = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    expected = torch.autograd.grad(want.float().square().sum(), rounded)
    for ours_, theirs_ in zip(got, expected, strict=True):
        torch.testing.assert_close(ours_, theirs_.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    tensors = qkv(requires_grad=True)

    def function(q, k, v):
        return flashcore.attention(q, k, v, causal=True)

    checkpoint(function, *tensors, use_reentrant=reentrant).square().sum().backward()
    got = [x.grad for x in tensors]
    torch.testing.assert_close(got, list(gradients(function, *tensors)))


def test_selective_checkpoint_can_save_the_operator():
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    def contexts():
        return create_selective_checkpoint_contexts([ops.forward])

    tensors = qkv(requires_grad=True)
    out = checkpoint(flashcore.attention, *tensors, use_reentrant=False, context_fn=contexts)
    got = torch.autograd.grad(out.square().sum(), tensors)
    torch.testing.assert_close(got, gradients(flashcore.attention, *tensors))


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return flashcore.attention(q, k, v, causal=True).sum()


@contextlib.contextmanager
def group_of_one():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_data_parallel_wrappers(wrapper):
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    plain = Attention()
    plain(x).backward()
    with group_of_one():
        model = Attention()
        if wrapper == "ddp":
            model = torch.nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        model(x).backward()
        gradient = next(model.parameters()).grad
        gradient = gradient.full_tensor() if wrapper == "fsdp2" else gradient
        torch.testing.assert_close(gradient, plain.qkv.weight.grad)


def test_modes_subclasses_and_tracers_see_one_operator():
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Dispatches(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Subclass(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    q, k, v = qkv()
    want = flashcore.attention(q, k, v)
    for mode in (Functions(), Dispatches()):
        seen.clear()
        with mode:
            torch.testing.assert_close(flashcore.attention(q, k, v), want, rtol=0, atol=0)
        assert ops.forward in seen
    seen.clear()
    assert type(flashcore.attention(q.as_subclass(Subclass), k, v)) is Subclass
    assert ops.forward in seen
    for tracing in ("real", "fake", "symbolic"):
        graph = make_fx(lambda *x: flashcore.attention(*x), tracing_mode=tracing)(q, k, v)
        assert [n.target for n in graph.graph.nodes if "attention" in str(n.target)] == [
            ops.forward
        ]


def test_third_derivatives():
    """The second-order formula is made of differentiable operations."""
    q, k, v = qkv(2, 3, batch=1, dtype=torch.float64)

    def second(x):
        (first,) = torch.autograd.grad(
            flashcore.attention(x, k, v).pow(3).sum(), x, create_graph=True
        )
        return torch.autograd.grad(first.square().sum(), x, create_graph=True)[0].sum()

    assert torch.autograd.gradcheck(second, (q.requires_grad_(),), fast_mode=True)


def test_a_gradient_that_needs_lse_computes_it():
    """Called directly, the operator may be recorded without lse."""
    q, k, v = qkv(requires_grad=True)
    out, lse, _ = ops.forward(q, k, v, None, None, *as_arguments({}), *ops.Wanted(), "auto")
    assert lse.numel() == 0
    got = torch.autograd.grad(out.square().sum(), (q, k, v))
    torch.testing.assert_close(got, gradients(flashcore.attention, q, k, v))


def test_several_threads():
    """Each with its own shapes and gradients; results are those of one thread."""
    cases = [qkv(5 + i % 3, 8 + i % 2, requires_grad=True, seed=i) for i in range(8)]
    wanted = [gradients(flashcore.attention, *case) for case in cases]
    results = [[] for _ in cases]
    start = threading.Barrier(len(cases))

    def work(i):
        start.wait()
        for _ in range(20):
            results[i].append(gradients(flashcore.attention, *cases[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for want, found in zip(wanted, results, strict=True):
        assert len(found) == 20
        for got in found:
            torch.testing.assert_close(got, want, rtol=0, atol=0)
