"""Run the same cases on every backend: the parametrisation, and the check against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashcore
from flashcore.base import env
from flashcore.checks.accuracy import error_report
from flashcore.checks.cases import make_inputs
from flashcore.problem.case import Case

SIM = pytest.param("sim", id="sim")
SIM90 = pytest.param("sim90", id="sim90")  # the simulated Hopper kernel, see on_sim90
WMMA = pytest.param("wmma", id="wmma", marks=pytest.mark.gpu)
GPU = pytest.param("auto", id="gpu", marks=pytest.mark.gpu)  # the best kernel of the GPU at hand

# "sim" and "wmma" run the same kernel source, on the CPU and on the GPU.
every_backend = pytest.mark.parametrize("backend", ["torch", SIM, WMMA, GPU])
kernel_backends = pytest.mark.parametrize("backend", [SIM, WMMA, GPU])


def on_sim90(backend: str, patch: pytest.MonkeyPatch) -> str:
    """Return the backend to ask for; of "sim90" it is the simulator, which then simulates sm_90."""
    if backend != "sim90":
        return backend
    patch.setenv(env.SIM_ARCH.name, "90")
    return "sim"


def device_of(backend: str) -> str:
    """Return where a backend's tensors live."""
    return "cuda" if backend in ("wmma", "auto") else "cpu"


def check(
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    note: object = "",
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run attention on a backend, hold it to the error rule, and return (out, lse)."""
    out, lse = flashcore.attention(q, k, v, return_lse=True, backend=backend, **options)
    assert out.dtype == q.dtype
    assert out.device == q.device
    report = error_report(out, q, k, v, lse=lse, **options)
    assert report.ok, f"{backend} {note}: {report}"
    return out, lse


def check_case(backend: str, case: Case) -> None:
    """Check a case with and without lse (which may take another path)."""
    inputs = make_inputs(case, device_of(backend))
    q, k, v, mask = inputs.q, inputs.k, inputs.v, inputs.mask
    out, _ = check(backend, q, k, v, case.describe(), mask=mask, **case.options())
    without_lse = flashcore.attention(q, k, v, backend=backend, mask=mask, **case.options())
    report = error_report(without_lse, q, k, v, mask=mask, **case.options())
    assert report.ok, f"{backend} {case.describe()}, without lse: {report}"
    assert out.isfinite().all(), "the NaN around the tensors in memory leaked"
