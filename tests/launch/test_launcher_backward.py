"""Test that a call which the compiled launcher recorded takes a prepared backward pass."""

from __future__ import annotations

import gc
import weakref

import pytest
import standin
import torch
from test_launcher import installed, tensors

import flashcore
from flashcore.backends import gradients
from flashcore.ops import eager

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
            monkeypatch.setattr(eager, "prepare_gradients", None)
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
    machine.driver.statuses = [719]
    with pytest.raises(flashcore.FlashCoreError, match="failed: 719"):
        out.backward(torch.ones_like(out))


def test_nothing_is_kept_alive(machine: standin.Machine) -> None:
    """A node lets go of what found the call, and that of no tensor's memory."""
    q, k, v = (x.requires_grad_() for x in tensors())
    out = flashcore.attention(q, k, v)
    out.backward(torch.ones_like(out))
    gone = [weakref.ref(x) for x in (q, k, v, out)]
    del q, k, v, out
    gc.collect()
    assert [x() for x in gone] == [None] * 4
