"""`prepare` compiles what a call needs, from tensors or from shapes, and launches nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashcore
from flashcore import sim
from flashcore.launch import kernel_call as launch
from flashcore.sim import build

Q, KV = (1, 4, 40, 32), (1, 2, 50, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return sources that the simulator would compile; nothing is compiled or run."""
    sources: list[str] = []
    monkeypatch.setattr(build, "load_kernel", sources.append)
    return sources


def simulated(monkeypatch: pytest.MonkeyPatch, call: Any) -> str:
    """Return the source that a call runs in the simulator."""
    from flashcore.compile.codegen import generate_source

    plans: list[Any] = []
    monkeypatch.setattr(sim, "simulate", lambda problem, plan, *rest, **more: plans.append(plan))
    call()
    (plan,) = plans
    return generate_source(plan, "host")


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=torch.float16) for shape in shapes]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "softcap": 9.0},
        {"window": (8, 0), "return_lse": True},
        {"mask": (1, 1, 1, 50)},
        {"seqlens_k": (1,)},
        {"seqlens_k": (1,), "causal": True},
    ],
)
def test_what_is_compiled_is_what_the_call_runs(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    plan = flashcore.prepare(Q, KV, KV, backend="sim", **options)
    assert plan is not None
    given = dict(options)
    if "mask" in given:
        given["mask"] = torch.ones(given["mask"], dtype=torch.bool)
    if "seqlens_k" in given:
        given["seqlens_k"] = torch.tensor([50]).int()
    q, k, v = tensors(Q, KV, KV)
    own = flashcore.prepare(q, k, v, backend="sim", **given)
    assert own == plan
    expected = simulated(monkeypatch, lambda: flashcore.attention(q, k, v, backend="sim", **given))
    assert compiled == [expected, expected]


def test_shapes_are_of_the_cpu_for_the_simulator(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is a GPU, too."""
    expected = flashcore.prepare(Q, KV, KV, backend="sim")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert flashcore.prepare(Q, KV, KV, backend="sim") == expected


def test_packed_sequences(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors((60, 4, 32), (70, 2, 32), (70, 2, 32))
    cu_q, cu_k = torch.tensor([0, 20, 60]).int(), torch.tensor([0, 30, 70]).int()
    flashcore.prepare(
        q.shape,
        k.shape,
        v.shape,
        cu_seqlens_q=(3,),
        cu_seqlens_k=cu_k,
        max_seqlen_q=40,
        max_seqlen_k=40,
        causal=True,
        backend="sim",
    )
    expected = simulated(
        monkeypatch,
        lambda: flashcore.attention_varlen(q, k, v, cu_q, cu_k, 40, 40, causal=True, backend="sim"),
    )
    assert compiled == [expected]


def test_where_pytorch_serves_there_is_nothing_to_do(compiled: list[str]) -> None:
    x = torch.zeros(Q)
    assert flashcore.prepare(x, x, x) is None
    assert flashcore.prepare((0, 4, 8, 32), (0, 4, 8, 32), (0, 4, 8, 32), backend="sim") is None
    assert compiled == []


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Q, (1, 3, 50, 32), (1, 3, 50, 32)), {}, ValueError, "num_heads"),
        ((Q, KV, "KV"), {}, TypeError, "v must be a tensor or a shape"),
        ((Q, KV, (1, 2, -1, 32)), {}, TypeError, "v must be a tensor or a shape"),
        ((Q, KV, KV), {"softcap": -1.0}, ValueError, "softcap"),
        ((Q, KV, KV), {"max_seqlen_q": 3}, ValueError, "cu_seqlens_q, cu_seqlens_k"),
        ((Q, KV, KV), {"backend": "fast"}, ValueError, "fast"),
    ],
)
def test_wrong_arguments_are_refused(
    compiled: list[str], arguments: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        flashcore.prepare(*arguments, **options)
    assert compiled == []


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["shapes", "tensors"])
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 13.0}], ids=str)
def test_the_first_call_on_the_gpu_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch, how: str, options: dict[str, Any]
) -> None:
    shapes = ((2, 4, 333, 88), (2, 2, 444, 88), (2, 2, 444, 88))
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)
    launch._compile.cache_clear()
    launch._launch.cache_clear()
    if how == "shapes":
        plan = flashcore.prepare(*shapes, dtype=torch.bfloat16, device="cuda", **options)
    else:
        plan = flashcore.prepare(q, k, v, **options)
    assert plan is not None
    monkeypatch.setattr(launch, "compile_plan", lambda plan: pytest.fail("compiled"))
    out = flashcore.attention(q, k, v, **options)
    expected = flashcore.attention(q.cpu(), k.cpu(), v.cpu(), **options)
    torch.testing.assert_close(out.cpu(), expected, atol=2e-2, rtol=2e-2)
