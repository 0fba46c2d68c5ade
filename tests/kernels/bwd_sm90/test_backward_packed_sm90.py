"""Test the backward kernels for Hopper with packed sequences, in the simulator: no alarm and right
gradients whatever the lengths are, and 0 in the rows behind the last sequence."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from packed_gradients import PackedCase, make_packed, wrong_packed_gradients
from parameters import thorough_but
from test_backward_sm90 import SIMPLE, SMALL, TWO, WIDE, plans_of

import flashcore
from flashcore.backends import gradients, packed
from flashcore.backends.backward_sm90 import fused_backward
from flashcore.backends.gradients import choose_backward
from flashcore.errors import BackendUnavailableError, FallbackWarning
from flashcore.kernels.bwd_sm90.tiles import BwdTile
from flashcore.problem.memory_layout import as_batch, as_rows
from flashcore.problem.options import Inputs, Results
from flashcore.sim.run_bwd import simulate_backward

SEEDS_OF_A_FAMILY = 4
# Nothing, one, around 64 rows and keys, primes, and a few tiles.
LENGTHS = (0, 0, 1, 2, 17, 63, 64, 65, 97, 127, 131)

# name -> (tiles of dq and of dk and dv, None for the selected ones; what is fixed).
FAMILIES: dict[str, tuple[tuple[BwdTile, BwdTile] | None, dict[str, Any]]] = {
    "plain": (SMALL, {}),
    "selected": (None, {"causal": True}),
    "two-groups-of-keys": (TWO, {"causal": "upper_left", "group": 2}),
    "three-groups-of-keys": (WIDE, {"head_dim": 32, "window": (40, 20), "softcap": 5.0}),
    "one-stage": (SIMPLE, {"head_dim": 40, "causal": True, "window": (30, 0), "group": 3}),
    "narrow-values": (SMALL, {"head_dim": 96, "head_dim_v": 40, "causal": True}),
    "shared-keys": ((BwdTile(64, 32, 2, 2), BwdTile(32, 64, 2, 2)), {"head_dim": 144}),
    "shared-keys-window": (
        (BwdTile(64, 16, 2, 1, False), BwdTile(16, 64, 3, 2)),
        {"head_dim": 136, "causal": "upper_left", "window": (50, 9)},
    ),
}


def check(case: PackedCase, tiles: tuple[BwdTile, BwdTile] | None, seed: int = 0) -> None:
    """Check that there is neither an alarm nor a wrong result."""
    x = make_packed(case)

    def run(problem, plan, tensors) -> None:
        simulate_backward(problem, plan, tensors, seed=seed)

    found = fused_backward(
        x.problem, as_batch(x.q), as_batch(x.k), as_batch(x.v), None, as_batch(x.out), x.lse,
        as_batch(x.dout), x.dlse, run, plans_of(x.problem, tiles), x.lengths(),
    )  # fmt: skip
    wrong = wrong_packed_gradients(case, x, tuple(map(as_rows, found)))
    assert not wrong, f"{case}: {wrong}"


@pytest.mark.parametrize("name", thorough_but(("three-groups-of-keys",), FAMILIES))
def test_gradients_of_wild_lengths(name: str) -> None:
    tiles, fixed = FAMILIES[name]
    for seed in range(SEEDS_OF_A_FAMILY):
        rng = random.Random(seed)
        batch = rng.choice((1, 2, 3, 5))
        lengths_q = tuple(rng.choice(LENGTHS) for _ in range(batch))
        lengths_k = tuple(rng.choice(LENGTHS) for _ in range(batch))
        case = PackedCase(
            lengths_q=(*lengths_q, 33),  # so that there are some
            lengths_k=(*lengths_k, 70),
            tails=(rng.choice((0, 5, 70)), rng.choice((0, 5, 70))),
            **({"group": rng.choice((1, 2))} | fixed),
            through_lse=seed % 2 == 1,
            seed=seed,
        )
        check(case, tiles, seed)


@pytest.mark.parametrize("head_dim", thorough_but((192,), (32, 64, 96, 128, 192, 256)))
def test_every_head_dim_with_the_tiles_that_are_selected(head_dim: int) -> None:
    check(PackedCase(lengths_q=(70, 0, 9), lengths_k=(130, 20, 9), head_dim=head_dim), None)


def test_more_sequences_than_a_warp_looks_at_once() -> None:
    """Most of 40 sequences are empty, and the tiles of the others are found."""
    lengths = tuple(19 if i in (0, 31, 32, 39) else 0 for i in range(40))
    check(PackedCase(lengths_q=lengths, lengths_k=lengths, causal=True), SMALL)


def test_slices_of_one_projection_and_an_expanded_gradient() -> None:
    case = PackedCase(lengths_q=(40, 33), lengths_k=(40, 33), causal=True, layout="qkv")
    x = make_packed(case)
    dout = torch.ones((), dtype=x.out.dtype).expand(x.out.shape)
    x = x._replace(dout=dout)

    def run(problem, plan, tensors) -> None:
        simulate_backward(problem, plan, tensors)

    found = fused_backward(
        x.problem, as_batch(x.q), as_batch(x.k), as_batch(x.v), None, as_batch(x.out), x.lse,
        as_batch(dout), None, run, None, x.lengths(),
    )  # fmt: skip
    assert not wrong_packed_gradients(case, x, tuple(map(as_rows, found)))


def test_a_call_in_the_simulator_has_its_gradient_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches for all sequences, of tensors that TMA cannot read as they are: head_dim 20."""
    monkeypatch.setenv("FLASHCORE_SIM_ARCH", "90")
    launched: list[str] = []

    def record(problem, plan, tensors, **options) -> None:
        launched.append(plan.kernel)
        simulate_backward(problem, plan, tensors, **options)

    monkeypatch.setattr("flashcore.sim.run_bwd.simulate_backward", record)
    case = PackedCase(lengths_q=(40, 0, 7), lengths_k=(33, 9, 0), head_dim=20, causal=True)
    x = make_packed(case)
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
    cu_seqlens = x.cu_seqlens_q, x.cu_seqlens_k
    out = flashcore.attention_varlen(*leaves, *cu_seqlens, 40, 33, causal=True, backend="sim")
    found = torch.autograd.grad(out, leaves, x.dout.nan_to_num())
    assert launched == ["attn_bwd_dq_sm90", "attn_bwd_dkdv_sm90"]
    assert not wrong_packed_gradients(case, x, found)
    for gradient, leaf in zip(found, leaves, strict=True):
        assert gradient.stride() == torch.empty_like(leaf).stride()


def test_the_longest_sequences_make_no_difference_to_what_is_prepared() -> None:
    """They change from step to step in training, and a launch is prepared for a description."""
    x = make_packed(PackedCase(lengths_q=(40, 33), lengths_k=(40, 33)))
    described = []

    def run(problem, plan, tensors) -> None:
        described.append(problem)

    for longest in (40, 73):
        problem = dataclasses.replace(x.problem, seqlen_q=longest, seqlen_k=longest)
        fused_backward(
            problem, as_batch(x.q), as_batch(x.k), as_batch(x.v), None, as_batch(x.out), x.lse,
            as_batch(x.dout), None, run, None, x.lengths(),
        )  # fmt: skip
    assert len(described) == 4
    assert len(set(described)) == 1


def test_without_a_compiler_torch_computes_all_sequences_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bundle may hold the kernels of the forward alone. The host reads no length then either."""
    x = make_packed(PackedCase(lengths_q=(40, 33), lengths_k=(40, 33)))
    hopper = dataclasses.replace(x.problem, device="cuda", arch=90)
    assert choose_backward(hopper).code == "sm90"

    def unavailable(*_, **__) -> None:
        raise BackendUnavailableError("no NVRTC here")

    monkeypatch.setattr(gradients, "fused_backward", unavailable)
    monkeypatch.setattr(packed, "packed_flash_gradients", lambda *_: (x.q, x.k, x.v))
    inputs = Inputs(
        x.q, x.k, x.v, cu_seqlens_q=x.cu_seqlens_q, cu_seqlens_k=x.cu_seqlens_k, max_seqlen_q=40,
        max_seqlen_k=40,
    )  # fmt: skip
    with pytest.warns(FallbackWarning, match="no NVRTC here"):
        found = packed.packed_backward(hopper, Results(x.dout, None), inputs, Results(x.out, x.lse))
    assert found[0] is x.q
