"""Time decoding over caches whose sequences differ in length, beside FlashAttention-3.

Each cell is a batch with one query a sequence. It is timed with the cache in one piece and in
pages, with elements of 8 bits, with `batch_invariant`, in a whole step that rotates and appends a
token, and as single tokens beside a chunk of a prompt. Lengths lie on the device, and are true:
only one sequence is as long as the cache has room. Cells that were drawn by chance are timed in one
piece and in pages of their own size, and a larger chunk of a prompt in pages of each size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flashcore
from flashcore.bench import ceilings
from flashcore.bench.compiling_ahead import compile_ahead
from flashcore.bench.decoding.cells import CELLS, CHUNK, Cell
from flashcore.bench.document import head
from flashcore.bench.timing import Timing, first_line, time_on_cpu, time_on_gpu

Call = Callable[[], object]
# Returns the timing of each call by name, or the reason why it has none.
Timer = Callable[[Mapping[str, Call], int], Mapping[str, Timing | str]]

PAGE_SIZES = (16, 64, 256)
WHOLE = "one piece"
PAGED = tuple(f"pages of {size}" for size in PAGE_SIZES)
OTHERS = ("8 bits", "8 bits, pages of 64", "batch-invariant", "step", "mixed")
OF_ITS_OWN = "pages"  # of a cell's own size
_ROTARY_DIM = 64
_SPREAD = 0.02  # of rounds: what varies more gets more rounds
_FIRST_ROUNDS = 3


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


def kinds_of(cell: Cell) -> tuple[str, ...]:
    """Return what is timed of a cell."""
    if cell.chunk:
        return PAGED
    return (WHOLE, OF_ITS_OWN) if cell.page_size else (WHOLE, *PAGED, *OTHERS)


def calls_of(
    cell: Cell, device: str, kinds: Sequence[str]
) -> Iterator[tuple[str, dict[str, Callable[[], Call]]]]:
    """Yield what is timed of a cell, of these kinds, and what binds each library's call of it."""
    lengths = torch.tensor(cell.lengths(), dtype=torch.int32, device=device)
    q = torch.randn(
        cell.batch, 1, cell.num_heads_q, cell.head_dim, device=device, dtype=torch.bfloat16
    )
    page_sizes = dict(zip((WHOLE, *PAGED), (None, *PAGE_SIZES), strict=True))
    page_sizes[OF_ITS_OWN] = cell.page_size
    cached: dict[tuple[int | None, bool], Cache] = {}

    def cache_of(page_size: int | None, is_8_bit: bool = False) -> Cache:
        """Return the cache, which what follows may share."""
        if (page_size, is_8_bit) not in cached:
            cached.clear()
            cached[page_size, is_8_bit] = make_cache(cell, page_size, device, is_8_bit)
        return cached[page_size, is_8_bit]

    for kind in kinds:
        if cell.chunk:
            cache = cache_of(page_sizes[kind])
            yield kind, _mixed(cell, cache, lengths, cell.chunk)
        elif kind in page_sizes:
            cache = cache_of(page_sizes[kind])
            yield (
                kind,
                {
                    "flashcore": lambda c=cache: _flashcore(q, c, lengths),  # type: ignore[misc]
                    "fa3": lambda c=cache: _fa3(q, c, lengths),  # type: ignore[misc]
                },
            )
        elif kind in OTHERS[:2]:
            cache = cache_of(None if kind == OTHERS[0] else 64, is_8_bit=True)
            one = torch.ones((), device=device)
            scales = {"k_scale": one, "v_scale": one}
            yield kind, {"flashcore": lambda c=cache, s=scales: _flashcore(q, c, lengths, **s)}  # type: ignore[misc]
        else:
            cache = cache_of(64)
            if kind == "batch-invariant":
                yield (
                    kind,
                    {"flashcore": lambda c=cache: _flashcore(q, c, lengths, batch_invariant=True)},  # type: ignore[misc]
                )
            elif kind == "step":
                yield kind, _steps(cell, q, cache, lengths)
            else:
                yield kind, _mixed(cell, cache, lengths, min(CHUNK, cell.longest))


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


def _mixed(cell: Cell, cache: Cache, lengths: Tensor, chunk: int) -> dict[str, Callable[[], Call]]:
    """Return a call in which the first sequence has a chunk of queries, the others one each."""
    counts = torch.tensor([0, chunk, *[1] * (cell.batch - 1)], device=lengths.device)
    q = torch.randn(
        chunk + cell.batch - 1, cell.num_heads_q, cell.head_dim, device=lengths.device,
        dtype=torch.bfloat16,
    )  # fmt: skip
    ends = counts.cumsum(0).int()

    def ours() -> Call:
        heads_first = cache.heads_first()
        return lambda: flashcore.attention_with_kvcache(
            q, *heads_first, seqlens_k=lengths, page_table=cache.page_table, cu_seqlens_q=ends,
            max_seqlen_q=chunk,
        )  # fmt: skip

    return {
        "flashcore": ours,
        "fa3": lambda: _fa3(q, cache, lengths, cu_seqlens_q=ends, max_seqlen_q=chunk),
    }


def _bind(binders: Mapping[str, Callable[[], Call]]) -> tuple[dict[str, Call], dict[str, str]]:
    """Return the calls of the libraries that there are, and why there is none of others."""
    bound: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for name, bind in binders.items():
        try:
            bound[name] = bind()
        except ImportError as error:
            missing[name] = first_line(error)
    return bound, missing


def _time(timer: Timer, calls: Mapping[str, Call], rounds: int) -> Mapping[str, Timing | str]:
    """Time calls in few rounds, and in all where those spread."""
    found = timer(calls, min(rounds, _FIRST_ROUNDS))
    timings = [t for t in found.values() if isinstance(t, Timing)]
    spread = max((max(t.rounds) / min(t.rounds) - 1 for t in timings), default=0.0)
    return timer(calls, rounds) if rounds > _FIRST_ROUNDS and spread > _SPREAD else found


def compile_all(cells: Sequence[Cell], device: str, only: Sequence[str] = ()) -> None:
    """Compile the kernels of all cells in parallel."""
    calls = (
        _bind({"flashcore": binders["flashcore"]})[0]["flashcore"]
        for cell in cells
        for _, binders in calls_of(cell, device, _asked(cell, only))
    )
    compile_ahead(calls)


def _asked(cell: Cell, only: Sequence[str]) -> list[str]:
    return [kind for kind in kinds_of(cell) if not only or kind in only]


def run(
    device: str,
    cells: Sequence[Cell] = CELLS,
    rounds: int = 5,
    timer: Timer | None = None,
    is_over: Callable[[], bool] = lambda: False,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure.

    Args:
        device: "cuda" or "cpu"; on a CPU, where PyTorch computes, only to try the script out.
        cells: what to measure.
        rounds: timed rounds at most; the median counts.
        timer: by default CUDA graph replays on a GPU, the clock on a CPU.
        is_over: asked before each cell; True leaves the rest out.
        only: of `kinds_of` a cell; by default all.

    Returns:
        A document of plain values: date, command, machine, ceilings, and results: for each cell,
        what is timed of it and library the seconds, and seconds_at_copy_speed (in which the keys
        and values that there are could be copied), or skipped, the reason why it has none.
    """
    on_gpu = device == "cuda"
    timer = timer or (time_on_gpu if on_gpu else time_on_cpu)
    if on_gpu:
        compile_all(cells, device, only)
    limits = ceilings.measure(device, torch.float16 if on_gpu else torch.float32)
    results: list[dict[str, Any]] = []
    for cell in cells:
        about = {"cell": cell.name, **asdict(cell)}
        kinds = _asked(cell, only)
        if is_over():
            reason = "the time was over"
            results += [
                about | {"what": what, "library": name, "skipped": reason}
                for what in kinds
                for name in ("flashcore", "fa3")
            ]
            continue
        for what, binders in calls_of(cell, device, kinds):
            bound, missing = _bind(binders)
            outcomes = {**missing, **_time(timer, bound, rounds)}
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
        f"median of 3 rounds, or of {rounds} where those spread, in turns, by "
        + ("CUDA graph replays" if on_gpu else "the clock")
    )
    return head("decode", device, method) | {"ceilings": limits, "results": results}
