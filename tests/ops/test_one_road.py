"""Test that drop-in functions and backward passes look up what was prepared: see standin.py."""

from __future__ import annotations

import pytest
import standin
import torch

import flashcore
from flashcore.backends import gradients
from flashcore.compat.flash_attn import flash_attn_func
from flashcore.dropins import rows_first
from flashcore.dropins.sdpa import attention as sdpa
from flashcore.dropins.sdpa import obstacles as sdpa_obstacles
from flashcore.ops import eager

_SCALARS = 6 * 8  # behind the addresses, with which AttnParams begins


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> standin.Machine:
    monkeypatch.setattr(sdpa, "_left_to_torch", lambda query, backend: False)
    monkeypatch.setattr(sdpa_obstacles, "_unserved_dtype", lambda query, backend: None)
    return standin.install(monkeypatch)


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape).half()


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.5}, {"attn_mask": torch.ones(1, 1, 40, 40).bool()}],
)
def test_sdpa_is_looked_at_closely_once(
    machine: standin.Machine, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    q, k, v = (half(2, 4, 40, 64) for _ in range(3))
    flashcore.scaled_dot_product_attention(q, k, v, **options)
    monkeypatch.setattr(sdpa, "obstacle", None)
    monkeypatch.setattr(sdpa, "route", None)
    other = [half(2, 4, 40, 64) for _ in range(3)]
    out = flashcore.scaled_dot_product_attention(*other, **options)
    first, second = (x.params.attn for x in machine.driver.launches)
    assert bytes(first)[_SCALARS:] == bytes(second)[_SCALARS:]
    assert [second.q, second.k, second.v] == [x.data_ptr() for x in other]
    assert second.out == out.data_ptr()


def test_what_torch_refuses_is_refused_after_calls_that_are_known(
    machine: standin.Machine,
) -> None:
    q, k = half(2, 4, 40, 64), half(2, 2, 40, 64)
    for _ in range(2):
        flashcore.scaled_dot_product_attention(q, k, k, enable_gqa=True)
        with pytest.raises(RuntimeError, match="must match"):
            flashcore.scaled_dot_product_attention(q, k, k)
        with pytest.raises(TypeError):
            flashcore.scaled_dot_product_attention(q, k, k, enable_gqa=True, is_causal="yes")
    assert len(machine.driver.launches) == 2


def test_dropout_and_autocast_are_seen_after_calls_that_are_known(
    machine: standin.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = half(2, 4, 40, 64)
    flashcore.scaled_dot_product_attention(q, q, q)
    seen = []
    monkeypatch.setattr(sdpa, "route", lambda call, backend: seen.append(call.dropout_p) or q)
    flashcore.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        flashcore.scaled_dot_product_attention(q, q, q)
    assert seen == [0.5, 0.0]
    assert len(machine.driver.launches) == 1


@pytest.mark.parametrize("arch", [80, 90])
def test_flash_attn_func_launches_on_its_tensors_as_they_are(
    monkeypatch: pytest.MonkeyPatch, arch: int
) -> None:
    machine = standin.install(monkeypatch, arch)
    for i in range(3):
        if i:
            monkeypatch.setattr(rows_first, "find", None)  # it is known
        q, k, v = (half(2, 300, 8, 64) for _ in range(3))
        out = flash_attn_func(q, k, v)
        assert out.shape == q.shape
        assert out.is_contiguous()
    params = machine.driver.launches[-1].params
    if arch == 90:
        assert params.attn.out == params.o_map.base == out.data_ptr()
        params = params.attn
    assert [params.q, params.k, params.v] == [x.data_ptr() for x in (q, k, v)]


def test_a_descriptor_of_rows_first_has_their_strides(
    machine: standin.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashcore.launch import descriptors

    maps = []
    encode = descriptors.encode_kind
    monkeypatch.setattr(
        descriptors, "encode_kind", lambda m, dtype: maps.append(bytes(m)) or encode(m, dtype)
    )
    q = half(2, 300, 8, 64)
    flash_attn_func(q, q.clone(), q.clone())
    of_out = descriptors.TensorMap.from_buffer_copy(maps[-1])
    strides = of_out.batch_stride_bytes, of_out.row_stride_bytes, of_out.head_stride_bytes
    assert strides == (2 * 300 * 8 * 64, 2 * 8 * 64, 2 * 64)


@pytest.mark.parametrize("causal", [False, True])
def test_a_backward_pass_is_prepared_once(
    machine: standin.Machine, monkeypatch: pytest.MonkeyPatch, causal: bool
) -> None:
    monkeypatch.setattr(gradients, "obstacle_to_sm90", lambda *arguments: None)
    monkeypatch.setattr(eager, "is_current", lambda x: True)
    encodings = []
    for _ in range(3):
        q, k, v = (half(2, 4, 40, 64).requires_grad_() for _ in range(3))
        out = flashcore.attention(q, k, v, causal=causal)
        dout = torch.ones_like(out)
        out.backward(dout)
        assert q.grad is not None
        assert q.grad.shape == q.shape
        of_dq, of_dkdv = (x.params for x in machine.driver.launches[-2:])
        assert of_dq.attn.q == of_dkdv.q_map.base == q.data_ptr()
        assert of_dq.attn.out == out.data_ptr()
        assert of_dq.dout_map.base == of_dkdv.dout_map.base == dout.data_ptr()
        assert of_dq.delta == of_dkdv.delta
        assert not of_dq.dlse
        assert bool(of_dq.attn.tile_counter) == causal
        encodings.append(machine.driver.encodings)
    assert encodings[0] == encodings[1] == encodings[2]
    assert len(machine.driver.launches) == 9
