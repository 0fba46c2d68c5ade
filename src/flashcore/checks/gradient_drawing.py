"""Draw what `verify --backward` runs: calls with gradients, from a seed and an index alone.

Calls are those of the forward's `verify` (checks/drawing.py), as dense tensors, as padded batches
with seqlens_k and as packed sequences. Gradients arrive through out, through lse or through both.
In the simulator tiles are drawn as well, of both kernels for Hopper: small ones, which go round
their loops more often.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashcore.backends.obstacles import SM90_ARCH
from flashcore.checks.drawing import draw
from flashcore.checks.varlen_cases import VarlenCase, draw_varlen_case
from flashcore.kernels.bwd_sm90.tiles import BwdTile
from flashcore.problem.case import Case

ARRIVALS = ("out", "both", "lse")
_KINDS = ("dense", "dense", "keys", "packed")
_MAX_KEYS = 1500  # all scores are stored several times over, in float64
_SHORT = (1, 2, 7, 15, 16, 17, 31, 47, 63, 64, 65, 97, 127, 128, 129, 130, 191, 200)
_MAX_SIM_SCORES = 150_000

_SMALL = BwdTile(64, 32, 3, 2), BwdTile(32, 64, 3, 2)
_SIMPLE = BwdTile(64, 48, 1, 1, False), BwdTile(48, 64, 1, 1, False, False, False)
_WIDE = BwdTile(192, 32, 2, 2), BwdTile(16, 192, 3, 2, True, False, False)
_TWO = BwdTile(128, 16, 2, 1), BwdTile(32, 128, 3, 3, True, True, False)
_SHARED = BwdTile(64, 32, 2, 2), BwdTile(32, 64, 2, 2)
Tiles = tuple[BwdTile, BwdTile]


def _dims(head_dim: int, head_dim_v: int | None = None) -> dict[str, Any]:
    return {"head_dim": head_dim, "head_dim_v": head_dim_v or head_dim}


# The simulator compiles every configuration, two kernels each, so its cases share these: a kind,
# options, and the tiles, None for those that are chosen. Between them: one to three consumers and
# two that share keys, every schedule of the products, bounds on either side, every kind of mask.
_SIM: tuple[tuple[str, Mapping[str, Any], Tiles | None], ...] = (
    ("dense", {}, None),
    ("dense", {"causal": "lower_right", "dtype": "bfloat16"}, _TWO),
    ("keys", {"causal": "lower_right"}, _SMALL),
    ("dense", {"mask": "bool", "causal": "upper_left"}, _SIMPLE),
    ("dense", {"window": (40, 20), "softcap": 5.0}, _WIDE),
    ("packed", {"causal": "lower_right", "dtype": "bfloat16"}, None),
    ("dense", _dims(40, 48) | {"mask": "additive", "softcap": 3.0}, _SMALL),
    ("dense", _dims(96, 80) | {"causal": "lower_right"}, _TWO),
    ("keys", {"window": (30, 9), "dtype": "bfloat16"}, _WIDE),
    ("dense", _dims(144, 72) | {"window": (50, 9), "dtype": "bfloat16"}, _SHARED),
    ("packed", {"window": (33, 20)}, _WIDE),
    ("keys", _dims(136), _SHARED),
    ("dense", {"mask": "padding", "offset": 1}, _SMALL),
    ("dense", _dims(104) | {"causal": "upper_left", "sinks": True}, None),
    ("packed", _dims(136) | {"dtype": "bfloat16"}, _SHARED),
    ("packed", {"causal": "upper_left", "softcap": 5.0}, _TWO),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientCase:
    """A case is one call whose gradients are computed.

    Args:
        call: the call in numbers.
        seqlens_k: how many keys each sequence of a padded batch has, or None.
        arrives: where a gradient arrives: "out", "lse" or "both".
        tiles: those of the kernel of dq and of the kernel of dk and dv; None for those that are
            chosen.
    """

    call: Case | VarlenCase
    seqlens_k: tuple[int, ...] | None = None
    arrives: str = "out"
    tiles: Tiles | None = None

    @property
    def seed(self) -> int:
        """Return the seed of the call's values."""
        return self.call.seed

    def describe(self) -> str:
        """Return one line with what is not the default."""
        words = [self.call.describe()]
        if self.seqlens_k is not None:
            words.append(f"seqlens_k={self.seqlens_k}")
        if self.arrives != "out":
            words.append(f"gradients through {self.arrives}")
        if self.tiles is not None:
            dq, dkdv = (f"{tile.block_m}x{tile.block_n}" for tile in self.tiles)
            words.append(f"tiles {dq} and {dkdv}")
        return " ".join(words)


def num_configurations() -> int:
    """Return how many cases in a row of the simulator have configurations of their own."""
    return len(_SIM)


def draw_gradients(seed: int, index: int, backend: str) -> GradientCase:
    """Return the case of a seed and an index. It does not depend on the machine.

    Args:
        seed: of the whole run.
        index: of the case in the run.
        backend: "sm90", "wmma", "sim" or "torch".
    """
    rng = random.Random(f"backward:{seed}:{index}:{backend}")
    tiles: Tiles | None = None
    if backend == "sim":
        kind, options, tiles = _SIM[index % len(_SIM)]
        call: Case | VarlenCase = _draw_for_sim(rng, kind, options)
    else:
        kind = rng.choice(_KINDS)
        call = _draw(rng, seed, index, kind, backend)
    seqlens_k = None
    if kind == "keys":
        assert isinstance(call, Case)
        keys = call.seqlen_k
        wild = (0, 1, keys // 2, keys - 1, keys, rng.randint(0, keys))
        seqlens_k = tuple(min(keys, max(0, rng.choice(wild))) for _ in range(call.batch))
    arrives = rng.choice(("out", "out", *ARRIVALS))
    return GradientCase(call=call, seqlens_k=seqlens_k, arrives=arrives, tiles=tiles)


def _draw(rng: random.Random, seed: int, index: int, kind: str, backend: str) -> Case | VarlenCase:
    """Draw what the forward's `verify` draws, within reach of an oracle of gradients."""
    case = draw(seed, index, backend, SM90_ARCH).case
    assert isinstance(case, Case)
    if kind == "packed":
        shared = ("head_dim", "head_dim_v", "dtype", "causal", "window", "softcap", "sinks")
        fixed = {name: getattr(case, name) for name in shared}
        return draw_varlen_case(rng.randrange(2**31), **fixed)
    case = dataclasses.replace(case, seqlen_k=min(case.seqlen_k, _MAX_KEYS))
    sees_few = case.causal != "none" or case.window or case.mask != "none" or case.seqlen_k < 200
    if kind == "keys" or sees_few or case.dtype in ("float32", "float64"):
        # Where a row sees few keys dq is plainly 0, or nearly, and otherwise the rounding error of
        # a sum in float32 times keys that are as large as the scores.
        return dataclasses.replace(case, growth="none")
    return case


def _draw_for_sim(rng: random.Random, kind: str, options: Mapping[str, Any]) -> Case | VarlenCase:
    if kind == "packed":
        lengths = (0, 1, 17, 63, 64, 65, 100)
        return draw_varlen_case(rng.randrange(2**31), lengths=lengths, **options)
    heads_kv = rng.choice((1, 1, 2))
    seqlen_k = rng.choice(_SHORT)
    case = Case(
        batch=rng.choice((1, 1, 2, 3)),
        num_heads_kv=heads_kv,
        num_heads_q=heads_kv * rng.choice((1, 2)),
        seqlen_q=seqlen_k if rng.random() < 0.4 else rng.choice(_SHORT),
        seqlen_k=seqlen_k,
        layout=rng.choice(("bhsd", "bshd")),
        tail=rng.choice((0, 1, 7)),
        scale=rng.choice((None, None, 0.5)),
        seed=rng.randrange(2**31),
        **options,
    )
    while case.batch * case.num_heads_q * case.seqlen_q * case.seqlen_k > _MAX_SIM_SCORES:
        if case.batch > 1:
            case = dataclasses.replace(case, batch=1)
        else:
            case = dataclasses.replace(case, seqlen_q=max(1, case.seqlen_q // 2))
    return case
