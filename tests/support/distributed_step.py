"""Take a training step in two processes, and compare its gradients with those of one.

python tests/support/distributed_step.py cuda|cpu ddp|fsdp2
"""

from __future__ import annotations

import socket
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import flashcore

RANKS, BATCH, SEQLEN, WIDTH, HEADS = 2, 2, 96, 128, 2


class Block(nn.Module):
    """A Block is attention between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = flashcore.attention(q, k, v, causal=True)
        return x + self.out(out.transpose(1, 2).flatten(2))


def model_and_input(device: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """Return the same model and batch in every process."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).to(device, dtype)
    return model, torch.randn(RANKS * BATCH, SEQLEN, WIDTH).to(device, dtype)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole gradients of a model by name, without a wrapper's prefix."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        found[name.removeprefix("module.")] = whole
    return found


def step(rank: int, kind: str, way: str, port: int) -> None:
    """Take the step as one of the processes."""
    device = f"cuda:{rank}" if kind == "cuda" else "cpu"
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    if kind == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=RANKS,
    )
    alone, x = model_and_input(device, dtype)
    alone(x).float().square().mean().backward()
    model, _ = model_and_input(device, dtype)
    if way == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh(kind, (RANKS,))
        for block in model.children():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    for _ in range(2):  # the second step finds what the first prepared
        model.zero_grad()
        model(x[rank * BATCH : (rank + 1) * BATCH]).float().square().mean().backward()
    tolerance = {"rtol": 2e-2, "atol": 2e-4} if kind == "cuda" else {"rtol": 1e-4, "atol": 1e-6}
    expected = gradients(alone)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], **tolerance)
    dist.destroy_process_group()


def main() -> None:
    """Start the processes."""
    kind, way = sys.argv[1:]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(step, args=(kind, way, port), nprocs=RANKS)


if __name__ == "__main__":
    main()
