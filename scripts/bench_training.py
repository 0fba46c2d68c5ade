"""Measure tokens a second of training steps: flashcore beside torch's SDPA and eager attention.

    python scripts/bench_training.py llama --json benchmarks/results/h200-training-llama.json
    python scripts/bench_training.py gpt --json benchmarks/results/h200-training-gpt.json

`llama` is a step of Transformers, uncompiled: a Llama of 1.1 billion parameters with random
weights, bfloat16, attention by `attn_implementation`. `gpt` is a step of the model that
examples/train_gpt.py trains, at the size of GPT-2 (124 million parameters), bfloat16 by autocast,
through torch.compile, with SDPA held to cuDNN or FlashAttention-2. A step is forward, loss,
backward and AdamW on the same tokens. The implementations take turns; the median of the rounds
counts.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashcore.base import machine
from flashcore.bench.document import head, write
from flashcore.integrations.transformers import register
from flashcore.ops.eager import launched_by

Step = Callable[[], Tensor]
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LLAMA, GPT = ("flashcore", "sdpa", "eager"), ("flashcore", "sdpa-cudnn", "sdpa-flash")
BACKENDS = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}
# model -> defaults of --layers, --width, --heads, --heads-kv, --vocabulary, --batch, --seqlen
SIZES: dict[str, tuple[int, ...]] = {
    "llama": (16, 2048, 32, 8, 32000, 8, 2048),
    "gpt": (12, 768, 12, 12, 50304, 80, 1024),
}
SIZE_NAMES = ("layers", "width", "heads", "heads_kv", "vocabulary", "batch", "seqlen")


def llama_steps(options: argparse.Namespace) -> tuple[dict[str, Step], int]:
    """Return a step by each implementation, of one model, and the number of its parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    register()
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads_kv,
        max_position_embeddings=options.seqlen,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).train()
        ids = torch.randint(options.vocabulary, (options.batch, options.seqlen))
    optimizer = adam_w(model, options.device)

    def step(implementation: str) -> Tensor:
        if model.config._attn_implementation != implementation:
            model.set_attn_implementation(implementation)
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return finish(optimizer, loss)

    steps: dict[str, Step] = {}
    for name in options.implementations:
        steps[name] = functools.partial(step, name)
    return steps, num_parameters(model)


def gpt_steps(options: argparse.Namespace) -> tuple[dict[str, Step], int]:
    """Return a step by each implementation, each of a model of its own, and the number of a model's
    parameters."""
    example = load_example("train_gpt")
    shape = example.Shape(
        options.vocabulary, options.seqlen, options.width, options.layers, options.heads
    )
    device = torch.device(options.device)
    sizes: list[int] = []
    torch.manual_seed(1)
    slices = torch.randint(options.vocabulary, (options.batch, options.seqlen + 1)).to(device)

    def make(name: str) -> Step:
        torch.manual_seed(0)
        model = example.GPT(shape)
        model.head.weight = model.letters.weight  # as GPT-2 has it
        if name != "flashcore":
            # A class for each, as compiled code is shared between models that look alike.
            attention = type(f"Attention_{name}", (example.SelfAttention,), {"forward": by_sdpa})
            for block in model.blocks:
                own = attention(shape)
                own.load_state_dict(block.attention.state_dict())
                block.attention = own
        model = model.to(device)
        loss_of = functools.partial(example.loss_of, model)
        compiled = torch.compile(loss_of, dynamic=False) if options.compile else loss_of
        # Its key does not say which backend SDPA is held to: the second one would run the first.
        functorch_config.enable_autograd_cache = False
        optimizer = adam_w(model, options.device)
        sizes.append(num_parameters(model))

        def step() -> Tensor:
            held = sdpa_kernel(BACKENDS[name]) if name in BACKENDS else nullcontext()
            with held:
                return finish(optimizer, compiled(slices, device))

        return step

    return {name: make(name) for name in options.implementations}, sizes[0]


def by_sdpa(self: Any, x: Tensor, cache: None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Do what SelfAttention of examples/train_gpt.py does without a cache, by torch's SDPA."""
    assert cache is None
    q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return self.out(y.transpose(1, 2).flatten(2)), (k, v)


def load_example(name: str) -> ModuleType:
    """Return a script of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass looks its module up while it is made
    spec.loader.exec_module(module)
    return module


def adam_w(model: torch.nn.Module, device: str) -> torch.optim.Optimizer:
    """Return the optimizer; on a GPU one kernel updates all parameters."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")


def finish(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """Do the backward pass and the update; return the loss."""
    torch.autograd.backward(loss)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def num_parameters(model: torch.nn.Module) -> int:
    """Return how many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters())


def wait(device: str) -> None:
    """Wait until the GPU has nothing left to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(steps: dict[str, Step], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each implementation: tokens a second, memory, first losses; or why it did
    not run."""
    rows: dict[str, dict[str, Any]] = {name: {"implementation": name} for name in steps}
    started = time.monotonic()
    for name, step in steps.items():
        if options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            losses = [float(step()) for _ in range(options.warm_ups)]
            wait(options.device)
        except Exception as error:
            rows[name]["failed"] = f"{type(error).__name__}: {error}"[:300]
            gc.collect()
            continue
        rows[name]["losses"] = [round(loss, 4) for loss in losses]
        if options.device == "cuda":
            rows[name]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    running = [name for name in steps if "failed" not in rows[name]]
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for number in range(options.rounds):
        if number and time.monotonic() - started > options.limit_s:
            break
        for name in running[number % len(running) :] + running[: number % len(running)]:
            if options.device == "cuda":
                torch.cuda.empty_cache()  # what another one left is in other sizes
                steps[name]()
            wait(options.device)
            start = time.perf_counter()
            for _ in range(options.steps):
                steps[name]()
            wait(options.device)
            seconds[name].append((time.perf_counter() - start) / options.steps)
    tokens = options.batch * options.seqlen
    for name, values in seconds.items():
        rows[name] |= {
            "tokens_per_second": round(tokens / statistics.median(values), 1),
            "rounds_seconds": values,
        }
    ours = rows.get("flashcore", {}).get("tokens_per_second")
    for row in rows.values():
        if ours and "tokens_per_second" in row:
            row["flashcore_over_this"] = round(ours / row["tokens_per_second"], 3)
    return list(rows.values())


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", choices=list(SIZES))
    parser.add_argument("--implementations", nargs="+", choices=[*dict.fromkeys(LLAMA + GPT)])
    for name in SIZE_NAMES:
        parser.add_argument("--" + name.replace("_", "-"), type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of a round, timed together")
    parser.add_argument("--warm-ups", type=int, default=3, help="steps before; the first compiles")
    parser.add_argument("--limit-s", type=float, default=70, help="no new round after that")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="gpt in eager")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args(arguments)
    known = LLAMA if options.model == "llama" else GPT
    options.implementations = options.implementations or list(known)
    for name in options.implementations:
        if name not in known:
            parser.error(f"--implementations {name}: {options.model} has {', '.join(known)}")
    for name, size in zip(SIZE_NAMES, SIZES[options.model], strict=True):
        if getattr(options, name) is None:
            setattr(options, name, size)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run what the command line asks for, and return the rows."""
    options = options_of(arguments)
    steps, parameters = (llama_steps if options.model == "llama" else gpt_steps)(options)
    launcher = launched_by(options.device)
    rows = measure(steps, options)
    for row in rows:
        print(json.dumps(row), flush=True)
    versions = machine.versions()
    if options.model == "llama":
        import transformers

        versions = versions | {"transformers": transformers.__version__}
    method = f"median of up to {options.rounds} rounds of {options.steps} steps, in turns"
    document = head("training", options.device, method) | {
        "versions": versions,
        "model": options.model,
        "launcher": launcher,
        "parameters": parameters,
        "compiled": options.model == "gpt" and options.compile,
        **{name: getattr(options, name) for name in SIZE_NAMES},
        "results": rows,
    }
    write(options.json, document)
    return rows


if __name__ == "__main__":
    main()
