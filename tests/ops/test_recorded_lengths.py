"""Test calls with lengths that autograd records around the dispatcher: see standin.py."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import standin
import torch

import flashcore
from flashcore.backends import gradients
from flashcore.launch import backward_call
from flashcore.ops import eager, padded, varlen

Tensor = torch.Tensor
MASK = torch.ones(1, 1, 40, 40, dtype=torch.bool)


def half(*shape: int) -> Tensor:
    return torch.randn(shape).half()


def padded_call(q: Tensor, k: Tensor, v: Tensor, seqlens_k: Tensor, **options: Any) -> Any:
    return flashcore.attention(q, k, v, seqlens_k=seqlens_k, **options)


def packed_call(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, **options: Any) -> Any:
    return flashcore.attention_varlen(q, k, v, ends, ends, 50, 50, **options)


# A call, the shape of q, k and v, its lengths, and its options.
CALLS: dict[str, tuple[Callable[..., Any], tuple[int, ...], list[int], dict[str, Any]]] = {
    "padded": (padded_call, (2, 4, 40, 64), [30, 40], {}),
    "padded, causal": (padded_call, (2, 4, 40, 64), [30, 40], {"causal": True}),
    "padded, mask": (padded_call, (2, 4, 40, 64), [30, 40], {"mask": MASK}),
    "packed": (packed_call, (80, 4, 64), [0, 30, 80], {}),
    "packed, causal": (packed_call, (80, 4, 64), [0, 30, 80], {"causal": True, "window": (9, 0)}),
}


def leaves(shape: tuple[int, ...]) -> list[Tensor]:
    return [half(*shape).requires_grad_() for _ in range(3)]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> standin.Machine:
    machine = standin.install(monkeypatch)
    monkeypatch.setattr(gradients, "obstacle_to_sm90", lambda *arguments: None)
    monkeypatch.setattr(eager, "is_current", lambda x: True)
    return machine


@pytest.mark.parametrize("name", CALLS)
def test_a_step_is_prepared_once(
    machine: standin.Machine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    call, shape, lengths, options = CALLS[name]
    encodings, shifts = [], set()
    for i in range(3):
        if i:  # nobody asks for an operator, nor for what is known
            monkeypatch.setattr(eager, "prepare_gradients", None)
            for module in (padded, varlen):
                monkeypatch.setattr(module.OPERATORS, "gradients", None)
                monkeypatch.setattr(module.OPERATORS, "attend", None)
        q, k, v = leaves(shape)
        lengths_tensor = torch.tensor(lengths, dtype=torch.int32)
        out = call(q, k, v, lengths_tensor, **options)
        dout = torch.ones_like(out)
        out.backward(dout)
        for x in (q, k, v):
            assert x.grad is not None
            assert x.grad.shape == x.shape
            assert x.grad.stride() == x.stride()
        of_dq, of_dkdv = (x.params for x in machine.driver.launches[-2:])
        for params in (of_dq, of_dkdv):
            assert params.attn.q == q.data_ptr()
            assert params.attn.out == out.data_ptr()
            shifts.add(dout.data_ptr() - params.dout_map.base)  # a packed box begins before
            if call is padded_call:
                assert params.attn.lengths.seqlens_k == lengths_tensor.data_ptr()
            else:
                assert params.attn.lengths.cu_seqlens_q == lengths_tensor.data_ptr()
                assert params.attn.lengths.cu_seqlens_k == lengths_tensor.data_ptr()
            assert bool(params.attn.mask) == ("mask" in options)
        assert of_dq.delta == of_dkdv.delta
        encodings.append(machine.driver.encodings)
    assert encodings[0] == encodings[1] == encodings[2]
    assert len(machine.driver.launches) == 9
    assert len(shifts) == 1
    assert (call is packed_call) or shifts == {0}


@pytest.mark.parametrize("name", CALLS)
def test_other_gradients_come_from_the_operator(machine: standin.Machine, name: str) -> None:
    """Test one that arrives through lse, and one that is differentiated again."""
    call, shape, lengths, options = CALLS[name]
    forwards = 0

    def zeros(params: Any) -> None:
        nonlocal forwards
        if isinstance(params, standin.params_sm90.AttnSm90Params):  # out and lse hold anything
            forwards += 1
            ctypes.memset(params.attn.out, 0, 2 * torch.Size(shape).numel())
            ctypes.memset(params.attn.lse, 0, 4 * torch.Size(shape[:-1]).numel())

    machine.driver.on_params = zeros
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        q, k, v = leaves(shape)
        ends = torch.tensor(lengths, dtype=torch.int32)
        context = torch.overrides.BaseTorchFunctionMode if watched else torch.enable_grad
        with context():  # a mode has the operator record the call
            out, lse = call(q, k, v, ends, **options, return_lse=True)
        assert out.requires_grad
        assert lse.requires_grad
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gradients, "obstacle_to_sm90", lambda *arguments: "a stand-in")
            through_lse = torch.autograd.grad(lse.sum(), (q, k), retain_graph=True)
            (dq,) = torch.autograd.grad(out.float().sum(), q, create_graph=True)
            results.append((*through_lse, dq, *torch.autograd.grad(dq.float().sum(), (q, k, v))))
    assert forwards == 2
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("name", CALLS)
def test_what_was_saved_must_not_change(machine: standin.Machine, name: str) -> None:
    """A decoder's lengths grow in place: the gradient of an earlier step would be another one."""
    call, shape, lengths, options = CALLS[name]
    ends = torch.tensor(lengths, dtype=torch.int32)
    out = call(*leaves(shape), ends, **options)
    ends += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("name", CALLS)
def test_hooks_see_what_is_saved_and_may_give_something_else_back(
    machine: standin.Machine, name: str
) -> None:
    """Activations may be kept in another memory, and come back in other places and strides."""
    call, shape, lengths, options = CALLS[name]
    ends = torch.tensor(lengths, dtype=torch.int32)
    q, k, v = leaves(shape)
    given: dict[int, Tensor] = {}

    def unpack(packed: tuple[int, Tensor]) -> Tensor:
        number, x = packed
        given[number] = x.mT.contiguous().mT if number == 1 else x.clone()
        return given[number]

    order: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (order.append(len(order)) or order[-1], x), unpack
    ):
        out = call(q, k, v, ends, **options)
    dense = call(q, k, v, ends, **options)
    for result in (dense, out, dense):
        torch.autograd.grad(result.sum(), (q, k, v), retain_graph=True)
        params = machine.driver.launches[-1].params
        told = params.attn.q, params.attn.lse
        if result is dense:
            assert told[0] == q.data_ptr()
        else:  # k is copied for the kernels, and so the operator does it
            assert told == (given[0].data_ptr(), given[4].data_ptr())
            assert params.k_map.base not in (k.data_ptr(), given[1].data_ptr())


def test_a_mask_that_wants_a_gradient_is_refused_as_ever(machine: standin.Machine) -> None:
    mask = torch.zeros(1, 1, 40, 40).half().requires_grad_()
    n = torch.tensor([30, 40], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"pass mask\.detach"):
        flashcore.attention(*leaves((2, 4, 40, 64)), seqlens_k=n, mask=mask)


def test_few_sets_of_addresses_are_kept(
    machine: standin.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[backward_call.BackwardPass] = []
    make = backward_call.BackwardPass.__init__
    monkeypatch.setattr(
        backward_call.BackwardPass,
        "__init__",
        lambda self, *given: passes.append(self) or make(self, *given),
    )
    monkeypatch.setattr(backward_call, "ARGUMENTS_MAX", 3)
    kept = []
    for _ in range(6):
        q, k, v = leaves((2, 4, 40, 64))
        out = flashcore.attention(q, k, v)
        dout = torch.ones_like(out)
        out.backward(dout)
        kept.append((q, k, v, out, dout))
    assert len(passes) == 1
    assert len(passes[0]._known) == 3
