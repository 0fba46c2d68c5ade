"""Test the yardstick of the error rule; what it is for is in flashcore/accuracy.py."""

from __future__ import annotations

import math

import pytest
import torch

from flashcore.checks.accuracy import _rounding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rounding_costs_half_a_last_place_at_most(dtype: torch.dtype) -> None:
    exact = torch.tensor([1.0, 1.999, -2.0, 3.0, 0.3], dtype=torch.float64)
    eps = torch.finfo(dtype).eps  # the distance from 1 to the next number
    places = [eps, eps, 2 * eps, 2 * eps, eps / 4]
    assert _rounding(exact, dtype) == (eps, sum(places) / 5 / 4)


def test_what_has_no_last_place_costs_nothing() -> None:
    exact = torch.tensor([0.0, math.nan, math.inf, -math.inf], dtype=torch.float64)
    assert _rounding(exact, torch.float16) == (0.0, 0.0)
    assert _rounding(exact[:0], torch.float16) == (0.0, 0.0)
