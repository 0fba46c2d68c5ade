"""explain prints why, and returns what it prints."""

from __future__ import annotations

import io

import pytest
import torch

import flashcore
from flashcore.base import env
from flashcore.selection.select import select_plan


def half(*shape):
    return torch.zeros(shape, dtype=torch.float16)


def explained(*tensors, **options):
    file = io.StringIO()
    explanation = flashcore.explain(*tensors, file=file, **options)
    assert file.getvalue() == f"{explanation}\n"
    return explanation


Q, K, V = half(1, 8, 512, 64), half(1, 2, 512, 64), half(1, 2, 512, 64)


def test_prints_to_standard_output(capsys):
    explanation = flashcore.explain(Q, K, V)
    assert capsys.readouterr().out == f"{explanation}\n"


def test_cpu_tensors_also_show_what_a_gpu_would_run():
    explanation = explained(Q, K, V, causal=True, arch=90)
    assert explanation.backend == "torch"
    assert explanation.plan == select_plan(explanation.problem, arch=90)
    for text in ("B1 H8/2 S512 D64 float16, causal lower_right", "CPU tensors", "sm_90", "chosen"):
        assert text in str(explanation)


@pytest.mark.parametrize("backend", ["auto", "sim"])
def test_gradients_are_those_of_the_same_gpu(backend):
    """Whatever the tensors' device is, and whichever GPU's code the simulator runs."""
    long = half(4, 16, 2048, 64)
    for q, k, count in ((Q, K, 2), (long, long, 3)):
        explanation = explained(q, k, k, causal=True, arch=90, backend=backend)
        assert explanation.gradient.is_fused
        assert len(explanation.gradient_plans) == count
        assert {plan.arch for plan in explanation.gradient_plans} == {90}
    assert not explained(Q, K, V, arch=80, backend=backend).gradient.is_fused


def test_the_plan_is_the_one_that_runs(monkeypatch):
    """The simulator is given the plan that `explain` names."""
    import flashcore.sim

    used = []
    monkeypatch.setattr(
        flashcore.sim, "simulate", lambda problem, plan, *_, **__: used.append(plan)
    )
    for arch in ("75", "80"):
        monkeypatch.setenv(env.SIM_ARCH.name, arch)
        flashcore.attention(Q, K, V, window=(3, 4), backend="sim")
        assert explained(Q, K, V, window=(3, 4), backend="sim").plan == used[-1]
        assert used[-1].arch == int(arch)


def test_names_the_tensor_that_narrows_loads():
    narrow = half(1, 2, 512, 72)[..., 4:68]
    explanation = explained(Q, narrow, V)
    assert explanation.plan.load_bytes == explanation.problem.load_bytes == 8
    assert "loads are 8 bytes wide instead of 16, for alignment: k allows 8" in str(explanation)


def test_names_causality_that_hides_nothing():
    explanation = explained(Q[:, :, :1], K, V, causal=True)
    assert not explanation.plan.has_window_right
    assert "causality hides no key" in str(explanation)


def test_names_heads_that_share_a_row_tile():
    note = "4 heads of q that share one of k and v are rows of one row tile"
    assert note in str(explained(Q[:, :, :1], K, V))
    assert note not in str(explained(Q, K, V))
    assert note not in str(explained(Q[:, :2, :1], K, V))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_kernel_for_wide_dtypes(dtype):
    explanation = explained(Q.to(dtype), K.to(dtype), V.to(dtype))
    assert explanation.plan is None
    assert "tiles" not in str(explanation)


def test_says_which_pytorch_path():
    assert "torch's SDPA" in str(explained(Q, Q, Q))
    assert "tile by tile" in str(explained(Q, Q, Q, softcap=30.0))
    assert "nothing to compute" in str(explained(Q[:, :, :0], K, V))


def test_describes_every_option():
    text = str(
        explained(Q, K[:, :, :400], V[:, :, :400], window=(70, 3), softcap=30.0, mask=half(400))
    )
    assert "S512/400" in text
    assert "window (70, 3), softcap 30, float16 mask" in text


def test_says_when_a_mask_is_slow_to_read():
    def notes(mask):
        return str(explained(Q, K, V, mask=mask, arch=90))

    odd = torch.ones(512, 513, dtype=torch.bool)[:, :512]
    assert "aligned to 1 bytes only" in notes(odd)
    assert "copied one by one" in notes(odd.mT.contiguous().mT)
    aligned = notes(odd.contiguous())
    assert "bytes only" not in aligned
    assert "one by one" not in aligned


@pytest.mark.parametrize("arch", [87, 88, 103, 110, 121, 130])
@pytest.mark.parametrize("seqlen_q", [1, 512])
def test_architectures_of_no_table_are_planned_for(arch, seqlen_q):
    """A Jetson Orin, a B300, a GB10 and what comes: whatever is known by architecture, the number
    of SMs say, counts as that of the last one before it."""
    q, k = half(1, 8, seqlen_q, 64), half(1, 2, 4096, 64)
    explanation = explained(q, k, k, causal=True, arch=arch)
    assert explanation.plan.arch == arch
