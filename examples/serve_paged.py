"""Serve eight prompts at once with a paged cache: continuous batching, in the smallest form.

    python examples/serve_paged.py
    python examples/serve_paged.py --device cuda --width 512 --layers 8 --tokens 200

A decoder with random weights continues each prompt, so what it says is noise; what matters is that
each sequence says the same as if it were alone, which `--check` verifies. Requests come and go: a
step takes whatever is running, prompts in chunks and single tokens alike, packed into one call.
Attention is where flashcore is called, and Engine is where pages are handed out.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import flashcore

PROMPTS = (
    "To be, or not to be, that is the question: whether 'tis nobler",
    "Call me",
    "It was the best of times, it was the worst of times, it was the age of wisdom",
    "A",
    "All happy families are alike; each unhappy family is unhappy in its own way",
    "It is a truth universally acknowledged",
    "In a hole in the ground",
    "You don't know about me without you have read a book by the name of",
)
PAGE_SIZE = 16


@dataclass
class Batch:
    """A batch is the tokens of one step, packed, and where their sequences lie in the cache.

    Args:
        ids: [total], the tokens.
        cu_seqlens_q: int32, [sequences + 1], where each sequence's tokens end.
        seqlens_k: int32, [sequences], the tokens that each has in the cache before the step.
        page_table: int32, [sequences, pages], filled up with -1.
        longest: the most tokens of a sequence in this step.
    """

    ids: Tensor
    cu_seqlens_q: Tensor
    seqlens_k: Tensor
    page_table: Tensor
    longest: int


class Attention(nn.Module):
    """Attend to a paged cache, which each step's keys and values are appended to."""

    cache: Tensor  # [2, pages, PAGE_SIZE, heads_kv, dim]: keys and values
    cos: Tensor  # [positions, dim / 2]
    sin: Tensor

    def __init__(self, width: int, heads: int, heads_kv: int, pages: int) -> None:
        super().__init__()
        self.counts = (heads, heads_kv, heads_kv)
        self.dim = width // heads
        self.qkv = nn.Linear(width, sum(self.counts) * self.dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        shape = (2, pages, PAGE_SIZE, heads_kv, self.dim)
        self.register_buffer("cache", torch.zeros(shape), persistent=False)
        angle = torch.arange(4096)[:, None] * 10000 ** -torch.linspace(0, 1, self.dim // 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Map x [total, width] to the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.dim)).split(self.counts, dim=1)
        k_cache, v_cache = self.cache.transpose(2, 3)  # heads first: views, changed in place
        y = flashcore.attention_with_kvcache(
            q, k_cache, v_cache, k, v, seqlens_k=batch.seqlens_k, page_table=batch.page_table,
            cu_seqlens_q=batch.cu_seqlens_q, max_seqlen_q=batch.longest,
            rotary_cos=self.cos, rotary_sin=self.sin, rotary_interleaved=False,
        )  # fmt: skip
        return self.out(y.flatten(1))


class Decoder(nn.Module):
    """A decoder is a small transformer over bytes, whose layers have paged caches."""

    def __init__(self, width: int, layers: int, heads: int, heads_kv: int, pages: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.attention = nn.ModuleList(
            Attention(width, heads, heads_kv, pages) for _ in range(layers)
        )
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits [sequences, 256] of what follows each sequence's last token."""
        x = self.bytes(batch.ids)
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + 4 * attention(self.norm(x), batch)  # more than usual, so that the past counts
            x = x + mlp(self.norm(x))
        last = batch.cu_seqlens_q[1:] - 1
        return self.head(self.norm(x[last]))


@dataclass
class Request:
    """A request is a prompt that is being continued.

    Args:
        number: of the prompt.
        ids: its tokens, and those that were generated.
        wanted: how many tokens there are in the end.
        in_cache: how many of them the cache has.
        pages: where they lie.
    """

    number: int
    ids: list[int]
    wanted: int
    in_cache: int = 0
    pages: list[int] = field(default_factory=list)


class Engine:
    """An engine runs requests, as many at once as there are pages and slots for.

    Args:
        model: with caches of `pages` pages.
        pages: of each layer's cache.
        slots: requests that run at once.
        chunk: tokens of a prompt that one step takes.
    """

    def __init__(self, model: Decoder, pages: int, slots: int, chunk: int) -> None:
        self.model, self.slots, self.chunk = model, slots, chunk
        self.free = list(range(pages))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.steps = 0

    def admit(self) -> None:
        """Let waiting requests run; each is given all pages that it may need."""
        while self.waiting and len(self.running) < self.slots:
            needed = -(-self.waiting[0].wanted // PAGE_SIZE)
            if needed > len(self.free):
                if not self.running:
                    raise RuntimeError(f"a prompt needs {needed} pages; pass more by --pages")
                return
            request = self.waiting.popleft()
            request.pages = [self.free.pop() for _ in range(needed)]
            self.running.append(request)

    def batch(self) -> Batch:
        """Pack the next tokens of all that run: a chunk of a prompt, or one."""
        device = self.model.bytes.weight.device
        parts = [r.ids[r.in_cache : r.in_cache + self.chunk] for r in self.running]
        columns = max(len(r.pages) for r in self.running)
        ends = [0]
        for part in parts:
            ends.append(ends[-1] + len(part))

        def int32(values: Sequence[object]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)

        return Batch(
            int32([token for part in parts for token in part]),
            int32(ends),
            int32([r.in_cache for r in self.running]),
            int32([r.pages + [-1] * (columns - len(r.pages)) for r in self.running]),
            max(map(len, parts)),
        )

    def step(self) -> list[Request]:
        """Compute one step; returns the requests that it finished, whose pages are free again."""
        self.admit()
        batch = self.batch()
        following = self.model(batch).argmax(-1).tolist()
        self.steps += 1
        for request, token in zip(self.running, following, strict=True):
            request.in_cache = min(request.in_cache + self.chunk, len(request.ids))
            if request.in_cache == len(request.ids):  # else the prompt goes on
                request.ids.append(token)
        done = [r for r in self.running if len(r.ids) >= r.wanted]
        self.running = [r for r in self.running if len(r.ids) < r.wanted]
        for request in done:
            self.free += request.pages
        return done

    def serve(self, prompts: Sequence[str], tokens: int) -> list[list[int]]:
        """Return the bytes that follow each prompt, `tokens` of them."""
        for number, prompt in enumerate(prompts):
            ids = list(prompt.encode())
            self.waiting.append(Request(number, ids, len(ids) + tokens))
        found: dict[int, list[int]] = {}
        while self.waiting or self.running:
            for request in self.step():
                found[request.number] = request.ids[-tokens:]
        return [found[number] for number in range(len(prompts))]


def positive(text: str) -> int:
    """Read a number of things, of which there is one at least."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> list[list[int]]:
    """Serve the prompts and print what was made of each; returns the bytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=positive, default=24, help="generated for each prompt")
    parser.add_argument("--width", type=positive, default=64)
    parser.add_argument("--layers", type=positive, default=2)
    parser.add_argument("--heads", type=positive, default=4)
    parser.add_argument("--heads-kv", type=positive, default=2)
    parser.add_argument("--slots", type=positive, default=5, help="requests that run at once")
    parser.add_argument("--pages", type=positive, default=24, help=f"of {PAGE_SIZE} tokens")
    parser.add_argument("--chunk", type=positive, default=32, help="tokens of a prompt in one step")
    parser.add_argument("--check", action="store_true", help="serve each prompt alone, too")
    asked = parser.parse_args(arguments)
    if asked.heads % asked.heads_kv or asked.width % asked.heads:
        parser.error("--heads must be a multiple of --heads-kv, and --width one of --heads")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if asked.device.startswith("cuda") else torch.float32
    model = Decoder(asked.width, asked.layers, asked.heads, asked.heads_kv, asked.pages)
    model = model.to(asked.device, dtype)
    engine = Engine(model, asked.pages, asked.slots, asked.chunk)
    found = engine.serve(PROMPTS, asked.tokens)
    for prompt, ids in zip(PROMPTS, found, strict=True):
        print(f"{prompt[-20:]:>20} | {bytes(ids)!r}")
    print(f"{len(PROMPTS)} prompts in {engine.steps} steps")
    if asked.check:
        alone = Engine(model, asked.pages, 1, asked.chunk)
        same = sum(
            alone.serve([prompt], asked.tokens)[0] == ids
            for prompt, ids in zip(PROMPTS, found, strict=True)
        )
        print(f"{same} of {len(PROMPTS)} say the same when they are served alone")
    return found


if __name__ == "__main__":
    main()
