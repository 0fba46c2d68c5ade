"""Test the backward kernels for Hopper with seqlens_k, in the simulator: no alarm, right gradients,
and 0 for keys behind a sequence's last one, where q, k, v and the lengths may hold anything."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from gradient_rule import wrong_gradients
from parameters import thorough_but
from test_backward_sm90 import SIMPLE, SMALL, TWO, WIDE, plans_of

from flashcore.backends.backward_sm90 import fused_backward
from flashcore.backends.tiled import attention_tiled
from flashcore.kernels.bwd_sm90.tiles import BwdTile
from flashcore.ops.padded import padded_problem
from flashcore.problem.options import Inputs, Options
from flashcore.sim.run_bwd import simulate_backward

SEEDS_OF_A_FAMILY = 4

FAMILIES: dict[str, tuple[tuple[BwdTile, BwdTile] | None, int, dict[str, Any]]] = {
    "plain": (SMALL, 64, {}),
    "selected": (None, 64, {"causal": True}),
    "two-groups-of-keys": (TWO, 64, {"causal": "upper_left"}),
    "three-groups-of-keys": (WIDE, 32, {"window": (40, 20), "softcap": 5.0}),
    "one-stage": (SIMPLE, 40, {"causal": True, "window": (30, 0)}),
    "shared-keys": ((BwdTile(64, 32, 2, 2), BwdTile(32, 64, 2, 2)), 144, {"causal": True}),
}


@pytest.mark.parametrize("name", thorough_but(("one-stage",), FAMILIES))
def test_gradients_of_wild_lengths(name: str) -> None:
    tiles, head_dim, asked = FAMILIES[name]
    for seed in range(SEEDS_OF_A_FAMILY):
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        queries, keys = rng.choice((1, 63, 64, 100, 130)), rng.choice((1, 64, 65, 150, 200))
        wild = (0, 1, keys // 2, keys - 1, keys, keys + 9, -3, 2**31 - 1, 63, 64, 65)
        given = [rng.choice(wild) for _ in range(3)]
        lengths = [min(max(0, n), keys) for n in given]
        heads_kv, group = rng.choice((1, 2)), rng.choice((1, 2))

        def normal(heads: int, rows: int, generator=generator) -> torch.Tensor:
            made = torch.randn(3, rows, heads, head_dim, generator=generator)
            return made.to(torch.bfloat16).transpose(1, 2)

        q, k, v = (
            normal(heads, n)
            for heads, n in ((heads_kv * group, queries), (heads_kv, keys), (heads_kv, keys))
        )
        dout = torch.randn(q.shape, generator=generator).to(q.dtype)
        dlse = torch.randn(q.shape[:3], generator=generator) if seed % 2 else None
        out, lse = torch.zeros_like(dout), torch.full(q.shape[:3], -math.inf)
        causal, window = asked.get("causal", False), asked.get("window")
        options = Options.checked(causal, window, asked.get("softcap"), None)
        seqlens_k = torch.tensor(given, dtype=torch.int32)
        problem = padded_problem(Inputs(q, k, v, None, seqlens_k), options)
        for b, n in enumerate(lengths):
            k[b, :, n:], v[b, :, n:] = math.nan, math.nan
            if n:
                one = slice(b, b + 1)
                own = problem.of_sequence(queries, n)
                out[one], lse[one] = attention_tiled(
                    own, q[one], k[one, :, :n], v[one, :, :n], None
                )
        empty = lse == -math.inf
        dout = dout.masked_fill(empty[..., None], math.nan)
        dlse = None if dlse is None else dlse.masked_fill(empty, math.nan)

        def run(problem, plan, tensors, seed=seed) -> None:
            simulate_backward(problem, plan, tensors, seed=seed)

        dq, dk, dv = fused_backward(
            problem, q, k, v, None, out, lse, dout, dlse, run, plans_of(problem, tiles),
            {"seqlens_k": seqlens_k},
        )  # fmt: skip
        for b, n in enumerate(lengths):
            assert not dk[b, :, n:].any(), (seed, b, n)
            assert not dv[b, :, n:].any(), (seed, b, n)
            if not n:
                assert not dq[b].any(), (seed, b)
                continue
            one = slice(b, b + 1)
            wrong = wrong_gradients(
                (dq[one], dk[one, :, :n], dv[one, :, :n]),
                q[one], k[one, :, :n], v[one, :, :n], None, dout[one],
                None if dlse is None else dlse[one], asked,
            )  # fmt: skip
            assert not wrong, f"{name} seed {seed} {queries}/{keys} {given}: {wrong}"
