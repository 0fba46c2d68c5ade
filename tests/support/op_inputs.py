"""Provide inputs of the tests of operators and of the eager call."""

from __future__ import annotations

import torch
import torch._dynamo.testing

from flashcore.ops import dense as ops


def qkv(seqlen_q=6, seqlen_k=9, batch=2, dtype=torch.float32, requires_grad=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, 4, seqlen_q, 16), (batch, 2, seqlen_k, 16), (batch, 2, seqlen_k, 24))
    return tuple(
        torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad)
        for shape in shapes
    )


def additive_mask(*shape, requires_grad=False):
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).requires_grad_(
        requires_grad
    )


def gradients(function, *tensors):
    result = function(*tensors)
    outputs = result if isinstance(result, tuple) else (result,)
    return torch.autograd.grad(sum(x.float().square().sum() for x in outputs), tensors)


def as_arguments(options):
    return ops.Options.checked(
        options.get("causal", False),
        options.get("window"),
        options.get("softcap"),
        options.get("scale"),
    )


def compiled(function, backend="aot_eager", **options):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter
