"""Time decoding over caches whose sequences differ in length, beside FlashAttention-3.

Each cell is a batch with one query a sequence. It is timed with the cache in one piece and in
pages, with elements of 8 bits, with `batch_invariant`, in a whole step that rotates and appends a
token, and as single tokens beside a chunk of a prompt. Lengths lie on the device, and are true:
only one sequence is as long as the cache has room.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flashcore
from flashcore.bench import ceilings
from flashcore.bench.document import head
from flashcore.bench.reporting.report import table
from flashcore.bench.timing import Timing, first_line, time_on_cpu, time_on_gpu

Call = Callable[[], object]
# Returns the timing of each call by name, or the reason why it has none.
Timer = Callable[[Mapping[str, Call], int], Mapping[str, Timing | str]]

PAGE_SIZES = (16, 64, 256)
WHOLE = "one piece"
PAGED = tuple(f"pages of {size}" for size in PAGE_SIZES)
OTHERS = ("8 bits", "8 bits, pages of 64", "batch-invariant", "step", "mixed")
CHUNK = 512  # tokens of a prompt beside single tokens
_ROTARY_DIM = 64


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell is a batch of sequences with one query each.

    Args:
        batch: sequences.
        num_heads_q: of queries.
        num_heads_kv: of the cache.
        head_dim: of all.
        longest: tokens of the longest sequence, and the room of each.
    """

    batch: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    longest: int

    @property
    def name(self) -> str:
        """Return the name for tables."""
        heads = f"H{self.num_heads_q}/{self.num_heads_kv}"
        return f"B{self.batch} {heads} D{self.head_dim} {self.longest}"

    def lengths(self) -> list[int]:
        """Return how many tokens each sequence has: log-normal around a sixth of the longest, which
        the first one has; the same in every run."""
        draw = random.Random(0)
        others = [
            min(self.longest, max(1, round(self.longest / 6 * draw.lognormvariate(0.0, 0.8))))
            for _ in range(self.batch - 1)
        ]
        return [self.longest, *others]


CELLS = (
    Cell(8, 32, 8, 128, 8192),
    Cell(64, 32, 8, 128, 8192),
    Cell(64, 64, 8, 128, 4096),
    Cell(32, 16, 2, 256, 8192),
    Cell(128, 32, 32, 64, 2048),
    Cell(1, 32, 8, 128, 131072),
    Cell(4, 128, 8, 128, 32768),
    Cell(256, 32, 8, 128, 1024),
    Cell(16, 32, 4, 64, 16384),
)


class Cache(NamedTuple):
    """A Cache holds keys and values with tokens before heads, in one piece or in pages.

    Args:
        k: [batch, room, num_heads_kv, head_dim], or [num_pages, page_size, ...].
        v: like k.
        page_table: int32, [batch, max_pages]; None where it is one piece.
    """

    k: Tensor
    v: Tensor
    page_table: Tensor | None

    def heads_first(self) -> tuple[Tensor, Tensor]:
        """Return k and v as flashcore takes them: views."""
        return self.k.transpose(1, 2), self.v.transpose(1, 2)


def make_cache(cell: Cell, page_size: int | None, device: str, is_8_bit: bool = False) -> Cache:
    """Return a cache of random elements. Its pages lie in an order by chance.

    Args:
        cell: of what sizes.
        page_size: tokens of a page; None: each sequence's tokens are one piece.
        device: where.
        is_8_bit: whether elements are float8_e4m3fn instead of bfloat16.
    """
    generator = torch.Generator(device=device).manual_seed(0)
    shape: tuple[int, ...] = (cell.batch, cell.longest, cell.num_heads_kv, cell.head_dim)
    page_table = None
    if page_size is not None:
        pages = -(-cell.longest // page_size)
        shape = (cell.batch * pages, page_size, *shape[2:])
        order = torch.randperm(cell.batch * pages, generator=generator, device=device)
        page_table = order.view(cell.batch, pages).int()
    dtype = torch.float8_e4m3fn if is_8_bit else torch.bfloat16
    k, v = (
        torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).to(dtype)
        for _ in range(2)
    )
    return Cache(k, v, page_table)


def calls_of(cell: Cell, device: str) -> Iterator[tuple[str, dict[str, Callable[[], Call]]]]:
    """Yield what is timed of a cell, and what binds each library's call of it."""
    lengths = torch.tensor(cell.lengths(), dtype=torch.int32, device=device)
    q = torch.randn(
        cell.batch, 1, cell.num_heads_q, cell.head_dim, device=device, dtype=torch.bfloat16
    )
    for page_size, name in zip((None, *PAGE_SIZES), (WHOLE, *PAGED), strict=True):
        cache = make_cache(cell, page_size, device)
        yield (
            name,
            {
                "flashcore": lambda c=cache: _flashcore(q, c, lengths),  # type: ignore[misc]
                "fa3": lambda c=cache: _fa3(q, c, lengths),  # type: ignore[misc]
            },
        )
    for page_size, name in ((None, OTHERS[0]), (64, OTHERS[1])):
        cache = make_cache(cell, page_size, device, is_8_bit=True)
        one = torch.ones((), device=device)
        scales = {"k_scale": one, "v_scale": one}
        yield name, {"flashcore": lambda c=cache, s=scales: _flashcore(q, c, lengths, **s)}  # type: ignore[misc]
    cache = make_cache(cell, 64, device)
    yield (
        "batch-invariant",
        {"flashcore": lambda: _flashcore(q, cache, lengths, batch_invariant=True)},
    )
    yield "step", _steps(cell, q, cache, lengths)
    yield "mixed", {"flashcore": lambda: _mixed(cell, cache, lengths)}


def _flashcore(q: Tensor, cache: Cache, lengths: Tensor, **options: Any) -> Call:
    arguments = q.transpose(1, 2), *cache.heads_first()
    return lambda: flashcore.attention_with_kvcache(
        *arguments, seqlens_k=lengths, page_table=cache.page_table, **options
    )


def _fa3(q: Tensor, cache: Cache, lengths: Tensor, **options: Any) -> Call:
    function = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache
    return lambda: function(
        q, cache.k, cache.v, cache_seqlens=lengths, page_table=cache.page_table, causal=True,
        num_splits=0, **options,
    )  # fmt: skip


def _steps(cell: Cell, q: Tensor, cache: Cache, lengths: Tensor) -> dict[str, Callable[[], Call]]:
    """Return a step that rotates q and a new key, appends the token, and attends."""
    rotary_dim = min(_ROTARY_DIM, cell.head_dim)
    frequencies = 10000 ** -torch.linspace(0, 1, rotary_dim // 2, device=q.device)
    angles = torch.arange(cell.longest, device=q.device)[:, None] * frequencies
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    new = torch.randn(
        cell.batch, 1, cell.num_heads_kv, cell.head_dim, device=q.device, dtype=q.dtype
    )
    before = (lengths - 1).int()  # the new token is each sequence's last
    heads_first = new.transpose(1, 2)
    turned: dict[str, Any] = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": False}

    def ours() -> Call:
        arguments = q.transpose(1, 2), *cache.heads_first(), heads_first, heads_first
        return lambda: flashcore.attention_with_kvcache(
            *arguments, seqlens_k=before, page_table=cache.page_table, **turned
        )

    return {"flashcore": ours, "fa3": lambda: _fa3(q, cache, before, k=new, v=new, **turned)}


def _mixed(cell: Cell, cache: Cache, lengths: Tensor) -> Call:
    """Return a call in which the first sequence has a chunk of queries, the others one each."""
    chunk = min(CHUNK, cell.longest)
    counts = torch.tensor([0, chunk, *[1] * (cell.batch - 1)], device=lengths.device)
    q = torch.randn(
        chunk + cell.batch - 1, cell.num_heads_q, cell.head_dim, device=lengths.device,
        dtype=torch.bfloat16,
    )  # fmt: skip
    ends, heads_first = counts.cumsum(0).int(), cache.heads_first()
    return lambda: flashcore.attention_with_kvcache(
        q, *heads_first, seqlens_k=lengths, page_table=cache.page_table, cu_seqlens_q=ends,
        max_seqlen_q=chunk,
    )  # fmt: skip


def run(
    device: str,
    cells: Sequence[Cell] = CELLS,
    rounds: int = 5,
    timer: Timer | None = None,
    is_over: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Measure.

    Args:
        device: "cuda" or "cpu"; on a CPU, where PyTorch computes, only to try the script out.
        cells: what to measure.
        rounds: timed rounds; the median counts.
        timer: by default CUDA graph replays on a GPU, the clock on a CPU.
        is_over: asked before each cell; True leaves the rest out.

    Returns:
        A document of plain values: date, command, machine, ceilings, and results: for each cell,
        what is timed of it and library the seconds, and seconds_at_copy_speed (in which the keys
        and values that there are could be copied), or skipped, the reason why it has none.
    """
    on_gpu = device == "cuda"
    timer = timer or (time_on_gpu if on_gpu else time_on_cpu)
    limits = ceilings.measure(device, torch.float16 if on_gpu else torch.float32)
    results: list[dict[str, Any]] = []
    for cell in cells:
        about = {"cell": cell.name, **asdict(cell)}
        if is_over():
            reason = "the time was over"
            results += [
                about | {"what": what, "library": name, "skipped": reason}
                for what in (WHOLE, *PAGED, *OTHERS)
                for name in ("flashcore", "fa3")
            ]
            continue
        for what, binders in calls_of(cell, device):
            bound: dict[str, Call] = {}
            outcomes: dict[str, Timing | str] = {}
            for name, bind in binders.items():
                try:
                    bound[name] = bind()
                except ImportError as error:
                    outcomes[name] = first_line(error)
            outcomes |= timer(bound, rounds)
            element_bytes = 1 if what in OTHERS[:2] else 2
            tokens = sum(cell.lengths())
            cache_bytes = 2 * tokens * cell.num_heads_kv * cell.head_dim * element_bytes
            least = cache_bytes / limits["copy_bytes"]
            for name in binders:
                outcome = outcomes[name]
                row = about | {"what": what, "library": name}
                if isinstance(outcome, str):
                    row["skipped"] = outcome
                else:
                    row |= {"seconds": outcome.median, "seconds_at_copy_speed": least}
                results.append(row)
        if on_gpu:
            torch.cuda.empty_cache()
    method = (
        "bfloat16, one query a sequence; lengths log-normal around a sixth of the longest; "
        f"median of {rounds} rounds, in turns, by "
        + ("CUDA graph replays" if on_gpu else "the clock")
    )
    return head("decode", device, method) | {"ceilings": limits, "results": results}


def markdown(document: Mapping[str, Any]) -> str:
    """Return two tables: beside FlashAttention-3, and what is ours alone."""
    times: dict[str, dict[tuple[str, str], str]] = {}
    least: dict[str, str] = {}
    for row in document["results"]:
        cell = times.setdefault(row["cell"], {})
        if "seconds" in row:
            cell[row["library"], row["what"]] = f"{row['seconds'] * 1e6:.1f}"
            if row["what"] == WHOLE:
                least[row["cell"]] = f"{row['seconds_at_copy_speed'] * 1e6:.1f}"
    both = (WHOLE, *PAGED, "step")

    def cells(name: str, library: str, columns: Sequence[str]) -> list[str]:
        return [times[name].get((library, what), "-") for what in columns]

    lines = [
        [name, least.get(name, "-")]
        + [
            " / ".join(pair)
            for pair in zip(cells(name, "flashcore", both), cells(name, "fa3", both), strict=True)
        ]
        for name in times
    ]
    ours = [WHOLE, *(what for what in OTHERS if what != "step")]
    return "\n\n".join(
        [
            table(["us, flashcore / fa3", "bytes at copy speed", *both], lines),
            table(
                ["us, flashcore", *ours],
                [[name, *cells(name, "flashcore", ours)] for name in times],
            ),
        ]
    )
