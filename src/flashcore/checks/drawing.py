"""Draw what `verify` runs: cases, and the tiles to run them with, drawn from a seed and an index
alone.

Cases aim at what breaks kernels: lengths of 0, 1, primes and tile borders, strided and offset
tensors, NaN behind every sequence, masks with rows that see nothing, windows that end with a tile,
softcap, sharp softmaxes, scores that grow along the keys, packed sequences. A kernel that is right
with one tile may be wrong with another one, so tiles, stages and schedules are drawn as well: all
that ship, and small ones, which go round their loops more often.
"""

from __future__ import annotations

import bisect
import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashcore.backends.dispatch import KERNELS
from flashcore.checks.cases import DRAWN_GROWTHS
from flashcore.checks.planned import fits, parse_tile
from flashcore.checks.varlen_cases import VarlenCase, draw_varlen_case
from flashcore.kernels.fwd_sm90.kernel import SM90
from flashcore.kernels.fwd_wmma.kernel import WMMA
from flashcore.kernels.fwd_wmma.plan import SIM_ARCH
from flashcore.kernels.registry import BY_BACKEND, forward, forward_for
from flashcore.problem.case import Case
from flashcore.selection import tile_table

# One of a kind each of what goes wrong: nothing, one, primes, a tile less, exactly, and more by
# one.
_SHORT = (1, 2, 15, 16, 17, 31, 63, 64, 65, 97, 127, 128, 129)
_LONG = (*_SHORT, 191, 255, 257, 300, 511, 513, 1000, 1500)
_WMMA_ROWS, _WMMA_KEYS = (64, 128), (16, 32, 64, 128)
_SMALLEST_ARCH = 86  # 99 KiB of shared memory a block; on sm_75 one stage takes half
_MAX_SIM_KEYS = 450
_MAX_SIM_SCORES = 700_000  # of a case: a third of a second

_CAUSAL = {"causal": "lower_right"}
_TOP_LEFT = {"causal": "upper_left"}
_BFLOAT16 = {"dtype": "bfloat16"}
_PACKED = {"packed": True}
_SINKS = {"sinks": True}
_FEW = {"few_queries": True}  # with several heads a group, as rows of one
_MAX_SCORE = {"return_max_score": True}


def _dims(head_dim: int, head_dim_v: int | None = None) -> dict[str, Any]:
    return {"head_dim": head_dim, "head_dim_v": head_dim_v or head_dim}


# The simulator compiles every configuration (a second), so its cases share these: options, and a
# tile, "" for the one that is chosen. Lengths, heads, layout, tail and values stay random. Between
# them: one to three consumers, in turns or not, that share keys or not; every number of stages,
# buffers and parts that ships; bounds on one side, both and none, each with key tiles that
# consumers pass over.
_SIM_SM90: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({}, ""),
    (_CAUSAL, "192x32,ping_pong"),
    ({}, "128x32,ping_pong,q_buffers=2"),
    (_CAUSAL | _BFLOAT16, "64x32,key_slices=3,stages=6"),
    (_dims(32) | {"mask": "bool"}, ""),
    ({"window": (70, 9)}, "192x32"),
    ({}, "64x32,key_slices=3,stages=9"),
    (_PACKED | _CAUSAL, "128x32,ping_pong"),
    (_dims(96, 80) | _SINKS, "192x48,ping_pong,stages=3"),
    (_dims(40, 72) | _BFLOAT16 | {"mask": "additive"} | _MAX_SCORE, "128x32,ping_pong"),
    (_CAUSAL, "64x64,blocks=3,stages=3,q_buffers=2"),
    ({"window": (100, -1)}, "192x64,ping_pong"),
    (_dims(128) | {"window": (40, 3), "softcap": 20.0}, "128x48,ping_pong"),
    (_FEW | _MAX_SCORE | _SINKS, "64x32,splits=4"),
    (_TOP_LEFT | {"mask": "padding", "offset": 8}, "128x64"),
    (_dims(128), "128x64,q_buffers=2,ping_pong"),
    (_FEW | _CAUSAL, "64x32,key_slices=2,stages=4"),
    (_PACKED | _BFLOAT16 | _SINKS, "64x64,key_slices=2,stages=4"),
    (_CAUSAL | {"softcap": 20.0}, "192x32"),
    (_dims(256), "128x32,ping_pong,o_parts=4"),
    (_CAUSAL | {"mask": "bool"} | _MAX_SCORE, "64x32,key_slices=2,stages=6"),
    (_dims(192, 128) | _CAUSAL, "128x48,ping_pong,o_parts=2"),
    (_BFLOAT16, "64x64,key_slices=2,stages=4"),
    (_TOP_LEFT, "192x128,ping_pong,stages=3,q_buffers=2"),
    ({"window": (64, 31), "mask": "additive"}, "192x32,ping_pong"),
    (_dims(64, 96) | {"mask": "bool", "softcap": 5.0}, "128x32"),
    (_FEW | {"window": (90, -1)}, "64x32,splits=3"),
    (_PACKED | {"window": (33, 20)}, "192x32,ping_pong"),
    (_BFLOAT16 | _MAX_SCORE, "192x64,stages=2"),
    (_dims(128) | _CAUSAL, "128x128,ping_pong"),
    ({}, "128x128,ping_pong,stages=2"),
    (_dims(16) | {"window": (-1, 40)}, "128x64,ping_pong,q_buffers=2"),
)
# The portable kernel's rows are shared by nobody; its stages are one, two (with cp.async) or more.
_SIM_WMMA: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({}, ""),
    (_CAUSAL, "64x16,stages=2"),
    (_dims(32) | {"mask": "bool"}, ""),
    (_dims(40, 72) | _BFLOAT16 | {"mask": "additive"} | _MAX_SCORE, "64x32,stages=2"),
    (_dims(128) | {"window": (40, 3), "softcap": 20.0}, ""),
    (_TOP_LEFT | _SINKS | {"mask": "padding", "offset": 1}, ""),
    ({}, "128x64,stages=1"),
    (_PACKED | _CAUSAL, ""),
    (_BFLOAT16, "64x64,stages=3"),
    (_dims(96, 80) | {"window": (70, 9)}, "64x32,stages=2"),
    (_FEW | _CAUSAL | _MAX_SCORE | _SINKS, "64x32,stages=2"),
    (_dims(256), "64x32,stages=2"),
    (_CAUSAL | {"softcap": 20.0}, "128x32,stages=2"),
    (_PACKED | _SINKS, "128x32,stages=1"),
    ({"window": (100, -1)}, "64x128,stages=2"),
    (_dims(64, 16), "128x16,stages=3"),
)


_SIM = {SM90: _SIM_SM90, WMMA: _SIM_WMMA}


@dataclass(frozen=True, slots=True)
class Drawn:
    """Drawn holds a case, and the fields of the tile that it runs with; without any, the tile is
    chosen as for every call, and the call is one of the public function."""

    case: Case | VarlenCase
    tile: Mapping[str, Any] = field(default_factory=dict)


def num_configurations(arch: int | None) -> int:
    """Return how many cases in a row of a simulated kernel have configurations of their own."""
    return len(_configurations(arch))


def _configurations(arch: int | None) -> tuple[tuple[Mapping[str, Any], str], ...]:
    return _SIM[forward_for(arch or SIM_ARCH)]


def shipped_tiles(kernel: str) -> list[Mapping[str, Any]]:
    """Return the tiles of a kernel that ship with flashcore: measured ones, or all that its rules
    choose among."""
    arch = forward(kernel).only_arch
    table = None if arch is None else tile_table.read(arch)
    if table is not None:
        return list(table.tiles)
    return [{"block_m": m, "block_n": n} for m in _WMMA_ROWS for n in _WMMA_KEYS]


def draw(seed: int, index: int, backend: str, arch: int | None = None) -> Drawn:
    """Return the case of a seed and an index. It does not depend on the machine.

    Args:
        seed: of the whole run.
        index: of the case in the run.
        backend: "sm90", "wmma", "sim" or "torch".
        arch: architecture that is simulated.
    """
    rng = random.Random(f"{seed}:{index}:{backend}")
    if backend == "sim":
        configurations = _configurations(arch)
        turn, own = divmod(index, len(configurations))
        options, text = configurations[own]
        bounded = [i for i, (other, _) in enumerate(configurations) if _is_bounded(other)]
        turn = turn * (len(bounded) + 3) + bisect.bisect_left(bounded, own)
        return _draw_for_sim(rng, dict(options), parse_tile(text) if text else {}, turn)
    options = _draw_configuration(rng, backend)
    # Drawn apart, so that the numbers of all other cases stay what they are.
    options["sinks"] = random.Random(f"{seed}:{index}:{backend}:sinks").random() < 0.2
    seqlen_q = _draw_length(rng, _LONG, zero=True)
    # Half of the cases are self-attention; the rest has one length independent of the other.
    seqlen_k = seqlen_q if rng.random() < 0.5 else _draw_length(rng, _LONG, zero=True)
    if rng.random() < 0.2:  # a few queries for a long cache
        seqlen_q, seqlen_k = rng.choice((1, 1, 2, 5, 16, 100)), rng.randint(1000, 9000)
    lengths = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    case = Case(**(_draw_values(rng) | lengths | options))
    has_tile = backend in KERNELS and min(lengths.values()) > 0 and rng.random() < 0.5
    tile = _draw_tile(rng, case, backend) if has_tile else {}
    return Drawn(dataclasses.replace(case, return_max_score=rng.random() < 0.1), tile)


def _draw_values(rng: random.Random) -> dict[str, Any]:
    """Draw the fields of a Case that change no kernel."""
    heads_kv = rng.choice((1, 1, 2, 3))
    growth = rng.choice(("none", rng.choice(DRAWN_GROWTHS)))
    return {
        "batch": rng.choice((1, 1, 2, 3)),
        "num_heads_q": heads_kv * rng.choice((1, 1, 2, 4)),
        "num_heads_kv": heads_kv,
        "layout": rng.choice(("bhsd", "bshd")),
        "tail": rng.choice((0, 1, 7)),
        "scale": rng.choice((None, None, 0.5, 0.01)) if growth == "none" else None,
        "spread": rng.choice((1.0, 1.0, 1.0, 8.0)) if growth == "none" else 1.0,
        "growth": growth,
        "seed": rng.randrange(2**31),
    }


def _draw_length(rng: random.Random, lengths: Sequence[int], zero: bool) -> int:
    if zero and rng.random() < 0.04:
        return 0
    return rng.choice(lengths) if rng.random() < 0.7 else rng.randint(1, lengths[-1] // 2)


def _draw_configuration(rng: random.Random, backend: str) -> dict[str, Any]:
    """Draw the options that change the compiled kernel."""
    dtypes = ["float16", "float16", "bfloat16"]
    if backend == "torch":
        dtypes += ["float32", "float64"]
    reads_by_tma = backend in KERNELS and bool(BY_BACKEND[backend].maps)
    head_dim = rng.choice((8, 16, 24, 32, 40, 64, 64, 64, 80, 96, 128, 128, 192, 256))
    same = rng.random() < 0.8
    window = None
    if rng.random() < 0.3:
        window = (rng.choice((-1, 0, 1, 17, 64, 200)), rng.choice((-1, 0, 3, 64)))
    return {
        "head_dim": head_dim,
        "head_dim_v": head_dim if same else rng.choice((8, 32, 64, 72, 128)),
        "dtype": rng.choice(dtypes),
        "causal": rng.choice(("none", "none", "lower_right", "upper_left")),
        "window": window,
        "softcap": rng.choice((None, None, None, 20.0)),
        "mask": rng.choice(("none", "none", "bool", "padding", "additive")),
        # TMA reads 16-byte aligned rows only.
        "offset": rng.choice((0, 0, 0, 8) if reads_by_tma else (0, 0, 0, 1, 2, 8)),
    }


def _draw_tile(rng: random.Random, case: Case, backend: str) -> dict[str, Any]:
    """Return a tile that ships, if there is a table of the kernel's, or else one of the portable
    one's, that fits whatever the GPU is; none where the one that is drawn does not."""
    kernel = BY_BACKEND[backend]
    left, right = case.window or (-1, -1)
    common: dict[str, Any] = {
        "kernel": kernel.name,
        "arch": kernel.only_arch or _SMALLEST_ARCH,
        "dtype": case.dtype,
        "head_dim": case.head_dim,
        "head_dim_v": case.head_dim_v,
        "block_m": 64,
        "block_n": 16,
        "num_stages": 1,
        "min_blocks": 1,
        "mask": {"none": None, "additive": "float32"}.get(case.mask, "bool"),
        # They take registers, which not every tile leaves.
        "has_window_left": left >= 0,
        "has_window_right": right >= 0 or case.causal != "none",
        "has_softcap": case.softcap is not None,
        "has_sinks": case.sinks,
    }
    tile = dict(rng.choice(shipped_tiles(kernel.name)))
    return tile if fits(kernel.plan(**common), tile) else {}


def _draw_for_sim(
    rng: random.Random, options: dict[str, Any], tile: dict[str, Any], turn: int
) -> Drawn:
    """Draw lengths of several hundred, around the borders of the tile, or short ones."""
    values = _draw_values(rng)
    block_m, block_n = tile.get("block_m", 64), tile.get("block_n", 64)
    if options.pop("packed", False):
        return Drawn(_draw_packed(rng, options, block_m, block_n), tile)
    few = options.pop("few_queries", False)
    if few:
        values |= {"num_heads_kv": 1, "num_heads_q": 4, "batch": 2, "layout": "bhsd", "tail": 0}
        seqlen_q, seqlen_k = rng.choice((1, 2, 9, 17)), _around(rng, block_n, _MAX_SIM_KEYS)
    elif rng.random() < 0.15:
        seqlen_q, seqlen_k = rng.choice(_SHORT), rng.choice(_SHORT)
    else:
        seqlen_k = _around(rng, block_n, _MAX_SIM_KEYS)
        seqlen_q = seqlen_k if rng.random() < 0.5 else _around(rng, block_m, _MAX_SIM_KEYS)
        if options.get("causal") == "lower_right":
            seqlen_q = max(1, seqlen_k - _beside(turn, block_n))
        elif "window" in options:
            seqlen_q = max(1, seqlen_k - rng.choice((0, 0, block_n)))
    if "window" in options:
        left, right = options["window"]  # the kernel knows only which sides have a bound
        bounds = [max(0, _beside(turn, block_n)), rng.choice((0, 1, 17, block_n, 100))]
        if left >= 0 and (right < 0 or rng.random() < 0.5):
            bounds.reverse()
        options["window"] = (min(left, 0) or bounds[1], min(right, 0) or bounds[0])
    case = Case(**(values | {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k} | options))
    return Drawn(_within_reach(case), tile)


def _is_bounded(options: Mapping[str, Any]) -> bool:
    """Return whether lengths or bounds are drawn around the border of a key tile, see _beside."""
    is_bounded = options.get("causal") == "lower_right" or "window" in options
    return is_bounded and not options.get("packed") and not options.get("few_queries")


def _beside(turn: int, block: int) -> int:
    """Return how far the diagonal is from a tile's border: each of these in turn, for a bound that
    is off by one is wrong with one of them alone."""
    return turn // 5 % 2 * block + turn % 5 - 2


def _around(rng: random.Random, block: int, most: int) -> int:
    """Draw a length of one block or several, or beside it."""
    blocks = max(rng.randint(1, max(1, most // block)) for _ in range(2))
    return max(1, blocks * block + rng.choice((-1, 0, 0, 1, rng.randrange(block))))


def _within_reach(case: Case) -> Case:
    """Return the case with fewer heads where a simulation would take long."""
    while True:
        scores = case.batch * case.num_heads_q * case.seqlen_q * case.seqlen_k
        scores = scores * max(64, case.head_dim) // 64
        if scores <= _MAX_SIM_SCORES or case.batch * case.num_heads_q == 1:
            return case
        if case.batch > 1:
            case = dataclasses.replace(case, batch=1)
        else:
            case = dataclasses.replace(case, num_heads_kv=1, num_heads_q=case.num_heads_q // 2 or 1)


def _draw_packed(
    rng: random.Random, options: dict[str, Any], block_m: int, block_n: int
) -> VarlenCase:
    lengths = (0, 1, 17, block_n, block_n + 1, 2 * block_n - 1, block_m, block_m + 1, 200, 333)
    return draw_varlen_case(rng.randrange(2**31), lengths=lengths, **options)
