"""verify: drawn cases replay, pass on the real thing, and fail on a wrong one."""

from __future__ import annotations

import math

import pytest
import torch

import flashcore
from flashcore.base import env
from flashcore.checks import drawing, verify
from flashcore.checks.cases import make_inputs
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.problem.case import Case
from flashcore.sim import run


@pytest.mark.parametrize("backend", ["torch", "sim", "wmma"])
def test_a_case_depends_on_seed_and_index_alone(backend: str) -> None:
    alone = drawing.draw(3, 17, backend)
    in_a_run = [drawing.draw(3, index, backend) for index in range(18)][-1]
    assert alone == in_a_run
    assert alone != drawing.draw(4, 17, backend)


def test_cases_cover_what_breaks_kernels() -> None:
    cases = [drawing.draw(0, index, "wmma").case for index in range(300)]
    wanted = {
        "GQA": lambda c: c.num_heads_q > c.num_heads_kv,
        "no query": lambda c: c.seqlen_q == 0,
        "no key": lambda c: c.seqlen_k == 0,
        "other v dim": lambda c: c.head_dim_v != c.head_dim,
        "bfloat16": lambda c: c.dtype == "bfloat16",
        "unaligned": lambda c: c.offset % 8,
        "NaN behind": lambda c: c.tail,
        "transposed": lambda c: c.layout == "bshd",
        "window": lambda c: c.window,
        "softcap": lambda c: c.softcap,
        "long": lambda c: c.seqlen_k > 1000,
        "growing scores": lambda c: c.growth != "none",
        "rows that see nothing": lambda c: c.causal == "lower_right" and c.seqlen_q > c.seqlen_k,
    }
    assert [name for name, test in wanted.items() if not any(map(test, cases))] == []
    assert {c.mask for c in cases} == {"none", "bool", "padding", "additive"}


def test_inputs_have_the_layout_that_the_case_names() -> None:
    case = Case(batch=2, seqlen_q=5, layout="bshd", tail=2, offset=3)
    x = make_inputs(case).q
    assert x.shape == (2, 2, 5, 64)
    assert x.stride() == (7 * 2 * 64, 64, 2 * 64, 1)
    assert x.storage_offset() == 3
    assert bool(x.isfinite().all())
    whole = torch.as_strided(x, (2, 7, 2, 64), (7 * 128, 128, 64, 1), 3)
    assert bool(whole[:, 5:].isnan().all())


@pytest.mark.thorough
def test_the_torch_path_passes() -> None:
    results = verify.verify("torch", seed=1, indices=range(6))
    assert [result.describe() for result in results if not result.ok] == []


def test_the_simulated_kernel_passes() -> None:
    results = verify.verify("sim", seed=1, indices=range(6))
    assert [result.describe() for result in results if not result.ok] == []


@pytest.mark.thorough
def test_the_simulated_hopper_kernel_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = []
    right = run.generate_source

    def remember(plan: Plan, *rest: object) -> str:
        kernels.append(plan.kernel)
        return right(plan, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "generate_source", remember)
    results = verify.verify("sim", seed=1, indices=range(6), arch=90)
    assert [result.describe() for result in results if not result.ok] == []
    assert kernels == ["attn_fwd_sm90"] * 6
    assert results[5].replay == "flashcore verify --backend sim --seed 1 --case 5 --arch sm_90"
    assert results[5].isolate == "flashcore isolate --backend sim --seed 1 --case 5 --arch sm_90"
    assert env.sim_arch() == 80


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["wmma", "auto"])  # "auto": sm90 on a Hopper GPU
def test_the_kernel_on_the_gpu_passes(backend: str) -> None:
    results = verify.verify(backend, seed=1, indices=range(60))
    assert [f"{r.replay}: {r.describe()}" for r in results if not r.ok] == []


def test_a_wrong_result_fails_and_says_how_to_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    right = flashcore.attention

    def wrong(*args: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(*args, **options)  # type: ignore[call-overload]
        return out * 1.05, lse

    monkeypatch.setattr(flashcore, "attention", wrong)
    index = next(i for i in range(50) if drawing.draw(0, i, "torch").case.seqlen_q > 10)
    (result,) = verify.verify("torch", seed=0, indices=[index])
    assert not result.ok
    assert result.replay == f"flashcore verify --backend torch --seed 0 --case {index}"


def test_an_exception_is_a_failed_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("the GPU is on fire")

    monkeypatch.setattr(flashcore, "attention", broken)
    (result,) = verify.verify("torch", seed=0, indices=[0])
    assert not result.ok
    assert "RuntimeError: the GPU is on fire" in result.describe()


def test_a_leaked_nan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = flashcore.attention

    def leaking(*args: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(*args, **options)  # type: ignore[call-overload]
        out[..., -1, -1] = math.nan
        return out, lse

    monkeypatch.setattr(flashcore, "attention", leaking)
    index = next(i for i in range(50) if drawing.draw(0, i, "torch").case.seqlen_q > 0)
    (result,) = verify.verify("torch", seed=0, indices=[index])
    assert not result.ok
