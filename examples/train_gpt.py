"""Train a small GPT on text that ships with Python, with flashcore as its attention.

    python examples/train_gpt.py
    python examples/train_gpt.py --device cuda --steps 3000 --width 384 --layers 6 --context 512

The text is Python's own language reference (what `help("with")` shows), letter by letter; `--text`
takes another file. On a CPU the first line runs in a minute. On a GPU the matrix products and the
attention are bfloat16 (sm_80 or later). Written to be read: SelfAttention is what to look at.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import flashcore

Cache = tuple[Tensor, Tensor]  # the keys and values of a layer so far, [batch, heads, seqlen, dim]


@dataclass(frozen=True)
class Shape:
    """A shape holds the sizes of the model.

    Args:
        vocabulary: number of different letters.
        context: letters seen at a time.
        width: channels.
        layers: blocks of attention and MLP.
        heads: attention heads; width / heads is the head_dim, a multiple of 8.
    """

    vocabulary: int
    context: int
    width: int
    layers: int
    heads: int


class SelfAttention(nn.Module):
    """Compute causal attention of a sequence to itself, and to what a cache holds of its past."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Map x [batch, seqlen, width] to the same shape; the cache returned includes x."""
        # Views of one product, [batch, heads, seqlen, head_dim]: read in place, not copied.
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        # The last query sees all keys, so this is right with and without a cache.
        y = flashcore.attention(q, k, v, causal=True)
        return self.out(y.transpose(1, 2).flatten(2)), (k, v)


class Block(nn.Module):
    """Apply attention and an MLP, each on a normalised copy and added back."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(shape.width)
        self.attention = SelfAttention(shape)
        self.norm_mlp = nn.LayerNorm(shape.width)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width),
            nn.GELU(),
            nn.Linear(4 * shape.width, shape.width),
        )

    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Map x [batch, seqlen, width] to the same shape, with the layer's new cache."""
        y, cache = self.attention(self.norm_attention(x), cache)
        x = x + y
        return x + self.mlp(self.norm_mlp(x)), cache


class GPT(nn.Module):
    """A GPT is a decoder-only transformer over letters."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.letters = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(
        self, ids: Tensor, caches: Sequence[Cache] | None = None
    ) -> tuple[Tensor, list[Cache]]:
        """Return logits [batch, seqlen, vocabulary] for ids [batch, seqlen], and the caches."""
        past = caches[0][0].shape[2] if caches else 0
        positions = torch.arange(past, past + ids.shape[1], device=ids.device)
        x = self.letters(ids) + self.positions(positions)
        new = []
        for i, block in enumerate(self.blocks):
            x, cache = block(x, caches[i] if caches else None)
            new.append(cache)
        return self.head(self.norm(x)), new


def python_text() -> str:
    """Return the topics of Python's built-in help, about 460,000 letters."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def batch_of(ids: Tensor, shape: Shape, batch: int, generator: torch.Generator) -> Tensor:
    """Return random slices of the text, [batch, context + 1]."""
    starts = torch.randint(len(ids) - shape.context, (batch, 1), generator=generator)
    return ids[starts + torch.arange(shape.context + 1)]


def loss_of(model: Callable[..., Any], slices: Tensor, device: torch.device) -> Tensor:
    """Return the mean cross-entropy, in nats a letter, of the next letter everywhere in slices."""
    slices = slices.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits, _ = model(slices[:, :-1])
    return functional.cross_entropy(logits.float().flatten(0, 1), slices[:, 1:].flatten())


@torch.no_grad()
def sample(model: GPT, prompt: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Continue a prompt letter by letter, with a cache of keys and values.

    Args:
        model: in eval mode.
        prompt: ids [1, seqlen]; seqlen + count must not exceed the model's context.
        count: letters to add.
        generator: of the prompt's device.

    Returns:
        ids [1, seqlen + count].
    """
    ids, new, caches = prompt, prompt, None
    for _ in range(count):
        with torch.autocast(
            prompt.device.type, torch.bfloat16, enabled=prompt.device.type == "cuda"
        ):
            logits, caches = model(new, caches)
        weights = (logits[:, -1].float() / 0.8).softmax(-1)  # below 1: likelier letters
        new = torch.multinomial(weights, 1, generator=generator)
        ids = torch.cat([ids, new], dim=1)
    return ids


def positive(text: str) -> int:
    """Read a number of things, of which there is one at least."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=positive, default=500, help="optimizer steps")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    parser.add_argument("--text", type=Path, help="text file to learn instead")
    parser.add_argument("--batch", type=positive, default=16, help="slices of the text a step")
    parser.add_argument("--context", type=positive, default=128, help="letters in a slice")
    parser.add_argument("--width", type=positive, default=128, help="channels")
    parser.add_argument("--layers", type=positive, default=3)
    parser.add_argument("--heads", type=positive, default=4, help="width / heads: a multiple of 8")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.width % options.heads:
        parser.error(f"--width {options.width} is no multiple of --heads {options.heads}")
    if options.context < 4:
        parser.error(f"--context {options.context} is too short: 4 letters at least")
    return options


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train, print losses, print a sample.

    Args:
        arguments: the command line; by default the process's.

    Returns:
        The loss of every step, in nats a letter.
    """
    options = options_of(arguments)
    device = torch.device(options.device)
    text = options.text.read_text(encoding="utf-8") if options.text else python_text()
    letters = sorted(set(text))
    index = {letter: i for i, letter in enumerate(letters)}
    ids = torch.tensor([index[letter] for letter in text])
    held_out = len(ids) // 10  # the end of the text, never trained on
    shape = Shape(len(letters), options.context, options.width, options.layers, options.heads)

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    model = GPT(shape).to(device)
    trained = torch.compile(model) if options.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    warm_up = min(20, options.steps // 4 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1, (i + 1) / warm_up) * (0.55 + 0.45 * math.cos(math.pi * i / options.steps)),
    )
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(text):,} letters, {size:,} parameters, {options.device}, a random guess costs "
          f"{math.log(len(letters)):.2f} nats a letter")  # fmt: skip

    losses = []
    start = time.perf_counter()
    for step in range(options.steps):
        loss = loss_of(trained, batch_of(ids[:-held_out], shape, options.batch, generator), device)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % max(1, options.steps // 10) == 0 or step == options.steps - 1:
            print(f"step {step:5}  loss {losses[-1]:.3f}  {time.perf_counter() - start:6.1f} s")

    model.eval()
    with torch.no_grad():
        loss = loss_of(model, batch_of(ids[-held_out:], shape, options.batch, generator), device)
    print(f"loss on text not seen: {loss:.3f}")
    prompt = ids[: options.context // 4][None].to(device)
    count = options.context - prompt.shape[1]
    drawn = sample(model, prompt, count, torch.Generator(device).manual_seed(options.seed))
    print("sample, after the bar:", end=" ")
    first, rest = drawn[0].split([prompt.shape[1], count])
    print("|".join("".join(letters[i] for i in part) for part in (first.tolist(), rest.tolist())))
    return losses


if __name__ == "__main__":
    main()
