"""Caches of float8_e4m3fn in the portable kernel: every way to widen an element, and what it serves
that the Hopper kernel does not. See test_float8_caches.py."""

from __future__ import annotations

import pytest
import torch
from pages import make_cache
from parameters import thorough_but
from test_float8_caches import attend

from flashcore.base import env
from flashcore.checks.paged_cases import PagedCase, paged_error_report


@pytest.mark.parametrize("arch", thorough_but(("89",), ("75", "89")))
def test_elements_are_widened_on_every_architecture(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By integers and without asynchronous copies, and by the hardware's conversion."""
    monkeypatch.setenv(env.SIM_ARCH.name, arch)
    case = PagedCase(lengths=(40, 9), cache_dtype="float8_e4m3fn", head_dim=72, head_dim_v=40)
    x = make_cache(16, (40, 9), head_dim=72, head_dim_v=40, cache_dtype="float8_e4m3fn")
    out, lse = attend(x, "sim")
    assert paged_error_report(out, lse, case, x).ok


def test_the_portable_kernel_leaves_odd_rows_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.SIM_ARCH.name, "80")
    x = make_cache(16, (40,), head_dim=20, cache_dtype="float8_e4m3fn")
    with pytest.raises(NotImplementedError, match=r"a multiple of 8 elements.*; pass backend=.tor"):
        attend(x, "sim")


def test_a_batch_invariant_call_has_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hopper kernel has no batch-invariant form for 8 bits; the portable one serves."""
    monkeypatch.setenv(env.SIM_ARCH.name, "90")
    x = make_cache(16, (70, 9, 33), seqlen_q=1, cache_dtype="float8_e4m3fn", seed=2)
    out, _ = attend(x, "sim", batch_invariant=True)
    for b in range(3):
        own = x._replace(
            q=x.q[b : b + 1], page_table=x.page_table[b : b + 1], seqlens_k=x.seqlens_k[b : b + 1],
            k_scale=x.k_scale[b : b + 1], v_scale=x.v_scale[b : b + 1],
        )  # fmt: skip
        alone, _ = attend(own, "sim", batch_invariant=True)
        assert torch.equal(alone[0], out[b])
