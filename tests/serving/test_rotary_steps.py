"""Test rotary embedding within attention_with_kvcache against complex numbers in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_steps import check_step, make_step
from torch import Tensor

import flashcore
from backends import GPU, SIM, device_of

pytestmark = pytest.mark.filterwarnings("ignore::flashcore.FallbackWarning")

every_backend = pytest.mark.parametrize("backend", ["torch", SIM, GPU])


def tables(rows: int, rotary_dim: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    angle = torch.arange(rows)[:, None] * 0.7 ** torch.arange(rotary_dim // 2)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotated(x: Tensor, position: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return [batch, heads, seqlen, dim] rotated at positions [batch, seqlen], by multiplication of
    complex numbers."""
    half = cos.shape[1]
    factor = torch.complex(cos.double(), sin.double())[position][:, None]
    turned = x[..., : 2 * half].double()
    if interleaved:
        pairs = torch.view_as_complex(turned.unflatten(-1, (half, 2)).contiguous())
        turned = torch.view_as_real(pairs * factor).flatten(-2)
    else:
        pairs = torch.complex(turned[..., :half], turned[..., half:]) * factor
        turned = torch.cat([pairs.real, pairs.imag], -1)
    return torch.cat([turned.to(x.dtype), x[..., 2 * half :]], -1)


CASES: dict[str, dict[str, Any]] = {
    "halves": {},
    "interleaved": {"interleaved": True},
    "a part of the dims": {"rotary_dim": 6, "page_size": 8},
    "a part, interleaved": {"rotary_dim": 10, "interleaved": True},
    "tables in float32": {"table_dtype": torch.float32},
    "one token": {"seqlen_q": 1},
    "fewer queries than new tokens": {"seqlen_new": 5, "page_size": 8},
    "no new tokens": {"seqlen_new": 0},
    "beyond the table": {"rows": 16},
}


@pytest.mark.parametrize("name", CASES)
@every_backend
def test_queries_and_new_keys_are_rotated_by_their_positions(backend: str, name: str) -> None:
    case = {"seqlen_q": 3, "rotary_dim": 16, "interleaved": False, "rows": 64} | CASES[name]
    dtype = torch.float64 if backend == "torch" else torch.float16
    device = device_of(backend)
    shape = {key: case[key] for key in ("seqlen_q", "seqlen_new", "page_size") if key in case}
    step = make_step([3, 17, 0], dtype=dtype, device=device, **shape)
    cos, sin = tables(case["rows"], case["rotary_dim"], case.get("table_dtype", dtype), device)
    options = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": case["interleaved"]}
    arguments = step.arguments()
    result = flashcore.attention_with_kvcache(
        **arguments, **options, return_lse=True, backend=backend
    )
    before = step.seqlens_k.long()[:, None]
    number_new = 0 if step.new is None else step.new[0].shape[2]
    last = case["rows"] - 1
    place = before + torch.arange(3 if step.new is None else number_new, device=device)
    k_new = None
    if step.new is not None:
        k_new = rotated(step.new[0], place.clamp(max=last), cos, sin, case["interleaved"])
    seqlen_q = step.q.shape[2]
    place = before + torch.arange(seqlen_q, device=device) + number_new - seqlen_q
    q = rotated(step.q, place.clamp(0, last), cos, sin, case["interleaved"])
    if dtype == torch.float16:
        k_new = None if k_new is None else take(k_new, arguments, step)
    caches = arguments["k_cache"], arguments["v_cache"]
    check_step(step, result, caches, q=q, k_new=k_new, causal=True)


def take(k_new: Tensor, arguments: dict[str, Any], step: Any) -> Tensor:
    """Return the new keys as the cache holds them, which may differ in the last place."""
    from cache_steps import place

    have = k_new.clone()
    for b, n in enumerate(step.lengths):
        for i in range(k_new.shape[2]):
            row, at = place(step, b, n + i)
            have[b, :, i] = arguments["k_cache"][row, :, at]
    torch.testing.assert_close(have, k_new, rtol=2e-3, atol=1e-3)
    return have


def test_offsets_and_positions_take_the_place_of_lengths() -> None:
    step = make_step([3, 17], seqlen_q=3)
    cos, sin = tables(64, 16, torch.float64, "cpu")
    options: dict[str, Any] = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": False}
    offsets = torch.tensor([30, 5], dtype=torch.int32)
    place = offsets.long()[:, None] + torch.arange(3)
    positions = torch.tensor([[9, 10, 10], [4, 5, 5]], dtype=torch.int32)  # a tree
    for given, at in (
        ({"rotary_offsets": offsets}, place),
        ({"rotary_positions": positions}, positions.long()),
    ):
        arguments = step.arguments()
        result = flashcore.attention_with_kvcache(**arguments, **options, **given, return_lse=True)
        q = rotated(step.q, at, cos, sin, False)
        assert step.new is not None
        k_new = rotated(step.new[0], at, cos, sin, False)
        caches = arguments["k_cache"], arguments["v_cache"]
        check_step(step, result, caches, q=q, k_new=k_new, causal=True)


@pytest.mark.parametrize("interleaved", [True, False])
def test_packed_tokens_are_rotated_as_padded_ones(interleaved: bool) -> None:
    step = make_step([3, 17, 9], seqlen_q=4, page_size=8)
    cos, sin = tables(64, 12, torch.float64, "cpu")
    options: dict[str, Any] = {
        "rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved
    }  # fmt: skip
    padded = step.arguments()
    want = flashcore.attention_with_kvcache(**padded, **options)
    packed = step.arguments()
    packed |= {n: packed[n].transpose(1, 2).flatten(0, 1) for n in ("q", "k_new", "v_new")}
    ends = torch.tensor([0, 4, 8, 12], dtype=torch.int32)
    have = flashcore.attention_with_kvcache(**packed, **options, cu_seqlens_q=ends)
    torch.testing.assert_close(have, want.transpose(1, 2).flatten(0, 1))
    assert torch.equal(packed["k_cache"].nan_to_num(), padded["k_cache"].nan_to_num())
