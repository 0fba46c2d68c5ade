"""Test float32 and float64 on a GPU: by torch's own attention where it means the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import flashcore
from flashcore.backends import dispatch
from flashcore.backends.by_torch import sdpa_gpu
from flashcore.checks.accuracy import error_report
from flashcore.problem import Problem

DTYPES = [torch.float32, torch.float64]
EMPTY = -float("inf")


def inputs(dtype: torch.dtype, head_dim: int = 8, device: str = "cpu") -> Any:
    generator = torch.Generator().manual_seed(head_dim)
    shapes = (2, 4, 5, head_dim), (2, 2, 7, head_dim), (2, 2, 7, head_dim)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def mask_of(name: str, device: str = "cpu") -> torch.Tensor | None:
    """Return a mask, which may hide all keys from some row."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(2, 1, 5, 7, generator=generator) > 0.8
    masks = {
        "none": None,
        "bool": rows,
        "row": rows[0, 0, :1],
        "keys": rows[0, 0, 0],
        "additive": torch.where(rows, 0.5, EMPTY),
        "everything": torch.tensor(True),
        "nothing": torch.tensor(EMPTY),
    }
    mask = masks[name]
    return None if mask is None else mask.to(device)


MASKS = ["none", "bool", "row", "keys", "additive", "everything", "nothing"]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_means_the_same(dtype: torch.dtype, name: str) -> None:
    """The decision and the meaning, by what torch has on the CPU."""
    q, k, v = inputs(dtype)
    mask = mask_of(name)
    for causal in (False, "upper_left") if mask is None else (False,):
        problem = Problem.from_tensors(q, k, v, mask=mask, causal=causal)
        problem = dataclasses.replace(problem, device="cuda", arch=90)
        assert sdpa_gpu.means_the_same(problem)
        result = sdpa_gpu.attention_by_sdpa(problem, q, k, v, mask)
        assert result is not None
        report = error_report(result[0], q, k, v, mask=mask, causal=causal)
        assert report.ok, report


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"window": (2, 0)},
        {"window": (-1, 2)},
        {"causal": True},  # lower right, of unequal lengths
        {"causal": "upper_left", "mask": mask_of("bool")},
        {"return_lse": True, "mask": mask_of("bool")},
    ],
    ids=str,
)
def test_what_means_something_else(options: dict[str, Any]) -> None:
    problem = Problem.from_tensors(*inputs(torch.float32), **options)
    assert not sdpa_gpu.means_the_same(dataclasses.replace(problem, device="cuda"))


def test_only_for_what_no_kernel_serves() -> None:
    problem = Problem.from_tensors(*inputs(torch.float16))
    assert not sdpa_gpu.means_the_same(dataclasses.replace(problem, device="cuda"))
    assert not sdpa_gpu.means_the_same(Problem.from_tensors(*inputs(torch.float32)))
    q, k, v = inputs(torch.float16, 264)
    wide = dataclasses.replace(Problem.from_tensors(q, k, v), device="cuda")
    assert sdpa_gpu.means_the_same(wide)
    # Its kernels that store the scores round them to float16.
    assert sdpa_gpu.attention_by_sdpa(wide, q, k, v, None) is None


def test_scores_are_not_stored_where_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(torch.float64)
    problem = dataclasses.replace(Problem.from_tensors(q, k, v), device="cuda")
    monkeypatch.setattr(sdpa_gpu, "SCORES_MAX", 2 * 4 * 5 * 7 - 1)
    assert sdpa_gpu.attention_by_sdpa(problem, q, k, v, None) is None


def test_the_operator_that_gives_lse_is_as_it_was() -> None:
    """It is no public one: a change of its arguments should be seen here."""
    schema = torch.ops.aten._scaled_dot_product_efficient_attention.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[3:] == ["attn_bias", "compute_log_sumexp", "dropout_p", "is_causal", "scale"]
    assert schema.returns[1].name == "log_sumexp"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::flashcore.FallbackWarning")
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("head_dim", [5, 8, 64, 320])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head_dim: int, name: str
) -> None:
    def tiled(*_: object) -> None:
        raise AssertionError("computed tile by tile")

    monkeypatch.setattr(dispatch, "attention_tiled", tiled)
    q, k, v = inputs(dtype, head_dim, "cuda")
    mask = mask_of(name, "cuda")
    for causal in (False, "upper_left") if mask is None else (False,):
        out = flashcore.attention(q, k, v, mask=mask, causal=causal)
        assert out.is_contiguous()
        report = error_report(out, q, k, v, mask=mask, causal=causal)
        assert report.ok, report


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::flashcore.FallbackWarning")
@pytest.mark.parametrize("lengths", [(5, 7), (100, 300), (512, 512)], ids=str)
@pytest.mark.parametrize("causal", [False, "upper_left"])
def test_lse_and_gradients_on_a_gpu(causal: bool | str, lengths: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, length, 64, generator=generator).cuda().requires_grad_()
        for heads, length in ((4, lengths[0]), (2, lengths[1]), (2, lengths[1]))
    )
    out, lse = flashcore.attention(q, k, v, causal=causal, return_lse=True)
    report = error_report(out.detach(), q, k, v, lse=lse.detach(), causal=causal)
    assert report.ok, report
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    flashcore.attention(*exact, causal=causal).square().sum().backward()
    flashcore.attention(q, k, v, causal=causal).square().sum().backward()
    for own, want in zip((q, k, v), exact, strict=True):
        torch.testing.assert_close(own.grad, want.grad.float(), atol=1e-4, rtol=1e-4)
