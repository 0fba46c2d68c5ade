"""Test that a call which the compiled launcher recorded takes a prepared backward pass."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import standin
import torch
from test_launcher import installed, strided, tensors

import flashcore
from flashcore.backends import gradients
from flashcore.kernels.bwd_sm90 import plan_one
from flashcore.launch import launcher
from flashcore.launch.driver import INVALID_CONTEXT
from flashcore.ops import dense, eager
from flashcore.problem import Problem

pytestmark = pytest.mark.thorough  # the launcher's build takes half a minute


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> standin.Machine:
    machine, _ = installed(monkeypatch)
    monkeypatch.setattr(gradients, "obstacle_to_sm90", lambda *arguments: None)
    monkeypatch.setattr(eager, "is_current", lambda x: True)
    return machine


def test_a_backward_pass_is_prepared_once(
    machine: standin.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    encodings = []
    for i in range(3):
        if i:
            monkeypatch.setattr(eager, "_find_pass", None)  # nobody asks Python
            monkeypatch.setattr(eager.OPERATORS, "gradients", None)
        q, k, v = (x.requires_grad_() for x in tensors())
        out = flashcore.attention(q, k, v, causal=True)
        assert "_Recorded" not in out.grad_fn.name()  # Python's
        dout = torch.ones_like(out)
        out.backward(dout)
        for x in (q, k, v):
            assert x.grad is not None
            assert x.grad.shape == x.shape
        of_dq, of_dkdv = (x.params for x in machine.driver.launches[-2:])
        assert of_dq.attn.q == of_dkdv.q_map.base == q.data_ptr()
        assert of_dq.attn.out == of_dkdv.attn.out == out.data_ptr()
        assert of_dq.dout_map.base == dout.data_ptr()
        encodings.append(machine.driver.encodings)
    assert encodings[0] == encodings[1] == encodings[2]
    assert len(machine.driver.launches) == 9


def test_only_what_is_asked_for_is_given(machine: standin.Machine) -> None:
    q, k, v = tensors()
    out = flashcore.attention(q, k.requires_grad_(), v)
    out.backward(torch.ones_like(out))
    assert (q.grad, v.grad) == (None, None)
    assert k.grad is not None


def test_an_error_of_a_launch_comes_out_of_the_pass(machine: standin.Machine) -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    out = flashcore.attention(q, k, v)
    machine.driver.statuses = [719, 719]  # Python tries again
    with pytest.raises(flashcore.FlashCoreError, match="failed: 719"):
        out.backward(torch.ones_like(out))


def test_what_a_pass_has_counted_that_fails_half_way_is_cleared(machine: standin.Machine) -> None:
    """Blocks of dk and dv would have put back what blocks of dq had counted."""
    q, k, v = (x.requires_grad_() for x in tensors())
    out = flashcore.attention(q, k, v)
    machine.driver.statuses = [719, 0]  # from the last on; then Python tries again
    out.backward(torch.ones_like(out))
    assert (len(machine.driver.launches), len(machine.cleared)) == (5, 1)
    out = flashcore.attention(q, k, v)
    machine.driver.statuses = [719, 0, 719, 0]  # and fails, too
    with pytest.raises(flashcore.FlashCoreError, match="failed: 719"):
        out.backward(torch.ones_like(out))
    assert machine.cleared == [(machine.counters.data_ptr(), 4)] * 3


def test_nothing_is_kept_alive(machine: standin.Machine) -> None:
    """A node lets go of what found the call, and that of no tensor's memory."""
    q, k, v = (x.requires_grad_() for x in tensors())
    out = flashcore.attention(q, k, v)
    out.backward(torch.ones_like(out))
    gone = [weakref.ref(x) for x in (q, k, v, out)]
    del q, k, v, out
    gc.collect()
    assert [x() for x in gone] == [None] * 4


def gradients_of(qkv: tuple[torch.Tensor, ...], **options: Any) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = flashcore.attention(*leaves, **options)
    return torch.autograd.grad(out, leaves, torch.ones_like(out))


def last_pass(
    machine: standin.Machine, gradients: tuple[torch.Tensor, ...]
) -> list[tuple[Any, ...]]:
    """Return what was launched by the last backward pass, but for the addresses of what it made:
    those of the gradients that it returned, among others."""
    of_dq, of_dkdv = (entry.params for entry in machine.driver.launches[-2:])
    bases = of_dq.dq_map.base, of_dkdv.dk_map.base, of_dkdv.dv_map.base
    assert bases == tuple(x.data_ptr() for x in gradients)
    assert of_dq.delta == of_dkdv.delta
    found = []
    for entry in machine.driver.launches[-2:]:
        params = entry.params
        for holder, name in ((params, "delta"), (params.attn, "out"), (params.attn, "lse")):
            setattr(holder, name, bool(getattr(holder, name)))
        for name in ("dout_map", "dq_map", "dk_map", "dv_map"):
            getattr(params, name).base = bool(getattr(params, name).base)
        found.append((entry.grid, entry.threads, entry.stream, entry.starts_early, bytes(params)))
    return found


CASES: dict[str, tuple[tuple[torch.Tensor, ...], dict[str, Any]]] = {
    "plain": (tensors(), {}),
    "causal": (tensors(), {"causal": True}),
    "bfloat16": (tensors(torch.bfloat16), {}),
    "strided": (strided(), {"window": (3, 1)}),
    "grouped": (tensors(heads_kv=2), {"softcap": 2.0}),
    "dim_v": (tensors(dim_v=32), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pass_is_that_of_python(
    machine: standin.Machine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    qkv, options = CASES[name]
    for _ in range(2):  # the second time it is known
        got = gradients_of(qkv, **options)
    ours = last_pass(machine, got)
    monkeypatch.setattr(launcher, "attend", None)
    want = gradients_of(qkv, **options)
    assert ours == last_pass(machine, want)
    for x, y in zip(got, want, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


def test_a_context_is_bound_where_a_thread_has_none(machine: standin.Machine) -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    out = flashcore.attention(q, k, v)
    machine.driver.statuses = [INVALID_CONTEXT]
    out.backward(torch.ones_like(out))
    assert [x.status for x in machine.driver.launches] == [0, INVALID_CONTEXT, 0, 0]


def test_a_saved_tensor_may_come_back_as_another(machine: standin.Machine) -> None:
    """The pass is looked up by what hooks return, not by what the call was given."""
    q, k, v = (x.requires_grad_() for x in tensors())
    kept: list[torch.Tensor] = []

    def unpack(x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 4 and x.shape == k.shape:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        kept.append(x)
        return x

    gradients_of((q, k, v))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        out = flashcore.attention(q, k, v)
    out.backward(torch.ones_like(out))
    of_dkdv = machine.driver.launches[-1].params
    assert of_dkdv.k_map.base == kept[1].data_ptr() != k.data_ptr()
    assert of_dkdv.k_map.row_stride_bytes == kept[1].stride(2) * 2 != k.stride(2) * 2


def test_another_device_is_left_to_the_operator(
    machine: standin.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    gradients_of((q, k, v))
    out = flashcore.attention(q, k, v)
    before = len(machine.driver.launches)
    machine.device = 1
    monkeypatch.setattr(gradients, "obstacle_to_sm90", lambda *arguments: "a stand-in")
    out.backward(torch.ones_like(out))
    assert len(machine.driver.launches) == before
    assert q.grad is not None


def test_each_workspace_has_a_pass_of_its_own(
    machine: standin.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_one, "least_tiles", lambda problem: 1)
    q, k, v = tensors()
    heads = q.shape[0] * k.shape[1]
    try:
        for num_bytes, launches in ((0, 2), (1 << 20, 3), (plan_one_bytes(q, k), 1 + 2 * heads)):
            flashcore.set_gradient_workspace(num_bytes)
            before = len(machine.driver.launches)
            gradients_of((q, k, v))
            assert len(machine.driver.launches) == before + 1 + launches
            assert bool(machine.driver.launches[-1].params.dq_sums) == (num_bytes > 0)
            assert bool(machine.driver.launches[-1].params.dq_turns) == (num_bytes > 0)
    finally:
        flashcore.set_gradient_workspace()


@pytest.mark.parametrize("way", ["compiled", "python"])
def test_sums_in_any_order_have_a_pass_of_their_own(
    machine: standin.Machine, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The option is part of the call's key, what torch says part of the pass's; each is prepared
    once."""
    monkeypatch.setattr(plan_one, "least_tiles", lambda problem: 1)
    monkeypatch.setattr(plan_one, "any_order_pays", lambda problem: True)
    if way == "python":
        monkeypatch.setattr(launcher, "attend", None)
    qkv = tensors()

    def has_turns(**options: bool) -> bool:
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = flashcore.attention(*leaves, **options)
        assert ("_Recorded" in out.grad_fn.name()) == (way == "python")
        before = len(machine.driver.launches)
        out.backward(torch.ones_like(out))
        of_pass = [entry.params for entry in machine.driver.launches[before:]]
        assert len(of_pass) == 3
        assert all(params.dq_sums for params in of_pass)
        assert len({bool(params.dq_turns) for params in of_pass}) == 1
        return bool(of_pass[0].dq_turns)

    try:
        for _ in range(2):  # prepared, and found again
            torch.use_deterministic_algorithms(False)
            assert has_turns()
            assert not has_turns(deterministic=False)
            assert has_turns(deterministic=True)
            torch.use_deterministic_algorithms(True)
            assert has_turns(deterministic=False)
            monkeypatch.setattr(eager, "prepare_gradients", None)  # what is known is found
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_operator_is_told_of_the_option(
    machine: standin.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no pass is prepared for a gradient that is differentiated again."""
    told: list[bool] = []
    real = gradients.attention_gradients

    def seen(problem: Problem, *arguments: Any) -> Any:
        told.append(problem.deterministic)
        return real(problem, *arguments[:-2], "torch", arguments[-1])

    monkeypatch.setattr(dense, "attention_gradients", seen)
    for deterministic in (True, False):
        leaves = [x.detach().requires_grad_() for x in tensors()]
        out = flashcore.attention(*leaves, deterministic=deterministic)
        torch.autograd.grad(out, leaves, torch.ones_like(out), create_graph=True)
    assert told == [True, False]


def plan_one_bytes(q: torch.Tensor, k: torch.Tensor) -> int:
    """Return the bytes of the sums of dq of one head of k."""
    return math.prod(plan_one.sums_shape(Problem.from_tensors(q, k, k), 1)) * 4


def test_a_graph_that_is_kept_is_differentiated_again(machine: standin.Machine) -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    out = flashcore.attention(q, k, v, causal=True)
    dout = torch.ones_like(out)
    for _ in range(2):
        torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    assert len(machine.driver.launches) == 5
    first, second = machine.driver.launches[-4], machine.driver.launches[-2]
    assert first.params.attn.tile_counter == second.params.attn.tile_counter
    assert first.params.attn.tile_counter == machine.counters.data_ptr()
