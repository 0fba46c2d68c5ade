"""Draw shapes at random, which nobody has tuned for."""

from __future__ import annotations

import dataclasses
import random

from flashcore.bench.workloads import Workload

_HEAD_DIMS = (64, 64, 72, 80, 96, 112, 128, 128, 160, 192, 256)
_HEADS_KV = (1, 2, 4, 8, 16)
_GROUPS = (1, 1, 2, 4, 8)
_KINDS = ("full", "causal", "causal", "window")
_LOG2_SEQLEN = (6.0, 14.0)
_LOG2_TOKENS = 16.0
_MAX_BATCH = 64
# The slowest peers do as much in some tens of milliseconds, and a GPU has memory for it.
_MAX_FLOPS, _MAX_BYTES = 2e12, 2**30
_NUM_COMPILED = 3


def random_shapes(count: int, seed: int = 0) -> list[Workload]:
    """Draw self-attention of the group "random": lengths of any remainder, grouped queries,
    head_dims 64 to 256, full, causal or with a window, small and large, half of them float16.

    Args:
        count: how many, all different.
        seed: the same seed gives the same shapes.
    """
    rng = random.Random(seed)
    found: dict[str, Workload] = {}
    while len(found) < count:
        workload = _draw(rng)
        compiles = len(found) < _NUM_COMPILED  # peers that compile for seconds take only these
        found.setdefault(workload.name, dataclasses.replace(workload, compiles=compiles))
    return list(found.values())


def _draw(rng: random.Random) -> Workload:
    seqlen = int(2 ** rng.uniform(*_LOG2_SEQLEN))
    heads_kv, group = rng.choice(_HEADS_KV), rng.choice(_GROUPS)
    room = max(1, int(2**_LOG2_TOKENS / seqlen))
    batch = min(_MAX_BATCH, int(2 ** rng.uniform(0.0, max(0.0, room.bit_length() - 1.0))))
    kind = rng.choice(_KINDS)
    left = int(2 ** rng.uniform(5.0, _LOG2_SEQLEN[1]))
    workload = Workload(
        "random",
        batch,
        heads_kv * group,
        seqlen,
        rng.choice(_HEAD_DIMS),
        kind != "full",
        rng.choice(("float16", "bfloat16")),
        None if group == 1 else heads_kv,
        window=(left, 0) if kind == "window" and left < seqlen else None,
    )
    while workload.heads_kv > 1 and _is_large(workload):
        workload = dataclasses.replace(
            workload,
            num_heads=workload.num_heads // 2,
            num_heads_kv=None if group == 1 else workload.heads_kv // 2,
        )
    while workload.batch > 1 and _is_large(workload):
        workload = dataclasses.replace(workload, batch=workload.batch // 2)
    return workload


def _is_large(workload: Workload) -> bool:
    return workload.flops > _MAX_FLOPS or workload.num_bytes > _MAX_BYTES
