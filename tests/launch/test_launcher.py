"""Test the compiled launcher, with a driver that records: what it launches, what it leaves to
Python."""

from __future__ import annotations

import ctypes

import pytest
import standin
import torch
from op_inputs import additive_mask

# The same tests as for the launcher in Python, with this module's `machine`.
from test_eager import (
    test_a_growing_number_of_keys_shares_one_launch,  # noqa: F401
    test_a_launch_gets_the_addresses_of_its_tensors,  # noqa: F401
    test_few_streams_keep_what_they_were_told,  # noqa: F401
    test_threads_do_not_see_each_others_arguments,  # noqa: F401
)

import flashcore
from flashcore.dropins.sdpa import attention as sdpa
from flashcore.dropins.sdpa import obstacles as sdpa_obstacles
from flashcore.launch import driver_launch, launcher
from flashcore.launch.driver import INVALID_CONTEXT
from flashcore.ops import calls

pytestmark = pytest.mark.thorough  # the launcher's build takes half a minute

HALF = torch.float16


def installed(monkeypatch, arch=90):
    """Put a stand-in's machine, and the launcher's module, in the way of its calls."""
    machine = standin.install(monkeypatch, arch)
    try:
        module = launcher.configured()
    except flashcore.FlashCoreError as error:
        pytest.skip(f"no launcher: {error}")
    monkeypatch.setattr(launcher, "attend", module.attend)
    return machine, module


@pytest.fixture
def machine(monkeypatch):
    return installed(monkeypatch)[0]


def tensors(dtype=HALF, heads_kv=4, dim_v=64):
    return (
        torch.randn(2, 4, 40, 64).to(dtype),
        torch.randn(2, heads_kv, 50, 64).to(dtype),
        torch.randn(2, heads_kv, 50, dim_v).to(dtype),
    )


def strided():
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors())


def misaligned():
    return tuple(
        torch.zeros(x.numel() + 1, dtype=HALF)[1:].view(x.shape) for x in tensors()
    )  # for the portable kernel


# Each is another description, so each is another entry.
SERVED = {
    "plain": (tensors(), {}),
    "bfloat16": (tensors(torch.bfloat16), {}),
    "strided": (strided(), {}),
    "misaligned": (misaligned(), {}),
    "grouped": (tensors(heads_kv=2), {}),
    "dim_v": (tensors(dim_v=32), {}),
    "fewer queries": ((tensors()[0][:, :, :30], *tensors()[1:]), {}),
    "expanded": ((tensors()[0], *(x[:, :1].expand(-1, 4, -1, -1) for x in tensors()[1:])), {}),
    "lse": (tensors(), {"return_lse": True}),
    "causal": (tensors(), {"causal": True}),
    "upper_left": (tensors(), {"causal": "upper_left"}),
    "window": (tensors(), {"window": (3, 1)}),
    "another window": (tensors(), {"window": (1, 3)}),
    "the diagonal": (tensors(), {"window": (0, 0)}),
    "scale": (tensors(), {"scale": 0.5}),
    "softcap": (tensors(), {"softcap": 0.5}),
    "wmma": (tensors(), {"backend": "wmma"}),
}


def last_launch(machine):
    """Return what was launched, but for the addresses of results."""
    entry = machine.driver.launches[-1]
    params = entry.params
    attn = getattr(params, "attn", params)
    attn.out = 0
    attn.lse = bool(attn.lse)
    if hasattr(params, "o_map"):
        params.o_map.base = 0
    return entry.grid, entry.threads, entry.stream, entry.starts_early, bytes(params)


@pytest.mark.parametrize("arch", [80, 90])
def test_launches_are_those_of_python(monkeypatch, arch):
    machine, module = installed(monkeypatch, arch)
    for number, (name, (qkv, options)) in enumerate(SERVED.items(), 1):
        for _ in range(2):
            got = flashcore.attention(*qkv, **options)
            ours = last_launch(machine)
        assert module.counts() == (number, 2 * number), name
        with monkeypatch.context() as patch:
            patch.setattr(launcher, "attend", None)
            want = flashcore.attention(*qkv, **options)
        assert ours == last_launch(machine), name
        for x, y in zip(
            got if isinstance(got, tuple) else (got,),
            want if isinstance(want, tuple) else (want,),
            strict=True,
        ):
            assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype), name


@pytest.mark.parametrize("recorded", [False, True])
def test_the_drop_in_function_is_served(monkeypatch, recorded):
    """With what it decides for itself: torch refuses what it has always refused."""
    monkeypatch.setattr(sdpa, "_left_to_torch", lambda query, backend: False)
    monkeypatch.setattr(sdpa_obstacles, "_unserved_dtype", lambda query, backend: None)
    machine, module = installed(monkeypatch)
    q, k, v = (x.requires_grad_(recorded) for x in tensors(heads_kv=2))
    asked = {"enable_gqa": True}, {"enable_gqa": True, "is_causal": True, "scale": 0.5}
    for options in asked * 2:
        got = flashcore.scaled_dot_product_attention(q, k, v, **options)
        ours = last_launch(machine)
        with monkeypatch.context() as patch:
            patch.setattr(launcher, "attend", None)
            flashcore.scaled_dot_product_attention(q, k, v, **options)
        assert ours == last_launch(machine)
        assert (got.grad_fn is not None) is recorded
    assert module.counts()[1] == 4
    with pytest.raises(RuntimeError, match="must match"):
        flashcore.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flashcore.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert module.counts()[1] == 4


def test_inference_mode_is_served(monkeypatch):
    machine, module = installed(monkeypatch)
    q, k, v = tensors()
    with torch.inference_mode():
        assert flashcore.attention(q, k, v).is_inference()
        inner = q * 2
        flashcore.attention(inner, k, v)
    with torch.no_grad():
        flashcore.attention(torch.nn.Parameter(q), k, v)
    assert module.counts()[1] == len(machine.driver.launches) == 3


def computing(machine):
    """Make the stand-in compute what it is asked to launch, by PyTorch, from and to the addresses
    that it got."""

    def launch(params):
        attn = params.attn
        q, k, v, out = (
            torch.frombuffer(
                (ctypes.c_char * (2 * 4 * rows * 64 * 2)).from_address(address), dtype=HALF
            ).view(2, 4, rows, 64)
            for address, rows in ((attn.q, 40), (attn.k, 50), (attn.v, 50), (attn.out, 40))
        )
        scores = q.float() @ k.float().mT * attn.softmax_scale
        out.copy_(scores.softmax(-1) @ v.float())
        if attn.lse:
            memory = (ctypes.c_char * (2 * 4 * 40 * 4)).from_address(attn.lse)
            torch.frombuffer(memory, dtype=torch.float32).view(2, 4, 40).copy_(scores.logsumexp(-1))

    machine.driver.on_params = launch


RECORDED = {
    "all": ("qkv", {}),
    "q": ("q", {}),
    "k and v": ("kv", {}),
    "with lse": ("qkv", {"return_lse": True}),
    "lse, and v": ("v", {"return_lse": True}),
}


@pytest.mark.parametrize("name", RECORDED)
def test_gradients_are_those_of_python(monkeypatch, name):
    machine, module = installed(monkeypatch)
    computing(machine)
    which, options = RECORDED[name]
    results = []
    for attend in (module.attend, None):
        monkeypatch.setattr(launcher, "attend", attend)
        torch.manual_seed(0)
        q, k, v = tensors()
        leaves = [
            x.requires_grad_()
            for x, letter in zip((q, k, v), "qkv", strict=True)
            if letter in which
        ]
        with torch.no_grad():
            flashcore.attention(q, k, v, **options)  # another key
        outputs = flashcore.attention(q, k, v, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert all(x.requires_grad for x in outputs)
        loss = sum((x.float() ** 2).sum() for x in outputs)
        results.append((*outputs, *torch.autograd.grad(loss, leaves)))
    assert module.counts() == (2, 2)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_gradient_can_be_differentiated_and_its_tensors_packed(monkeypatch):
    """Second derivatives, and hooks that see what is saved."""
    machine, module = installed(monkeypatch)
    computing(machine)
    results = []
    for attend in (module.attend, None):
        monkeypatch.setattr(launcher, "attend", attend)
        torch.manual_seed(0)
        q, k, v = (x.requires_grad_() for x in tensors())
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, seen=packed: seen.append(x.shape) or x.clone(), lambda x: x
        ):
            out = flashcore.attention(q, k, v)
        (dq,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
        results.append((dq, *torch.autograd.grad(dq.float().square().sum(), (q, k, v))))
        assert sorted(packed) == sorted([q.shape, k.shape, v.shape, out.shape, out.shape[:3]])
    assert module.counts()[1] == 1
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_what_was_saved_must_not_change(monkeypatch):
    installed(monkeypatch)
    q, k, v = (x.requires_grad_() for x in tensors())
    out = flashcore.attention(q, k, v)
    with torch.no_grad():
        k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Subclass(torch.Tensor):
    pass


class Mode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class DispatchMode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = func
        return func(*args, **(kwargs or {}))


def under(context):
    def call(q, k, v):
        with context:
            return flashcore.attention(q, k, v)

    return call


UNUSUAL = {
    "mask": lambda q, k, v: flashcore.attention(q, k, v, mask=additive_mask(40, 50)),
    "lower_right": lambda q, k, v: flashcore.attention(q, k, v, causal="lower_right"),
    "window of a list": lambda q, k, v: flashcore.attention(q, k, v, window=[3, 1]),
    "scale of an int": lambda q, k, v: flashcore.attention(q, k, v, scale=1),
    "subclass": lambda q, k, v: flashcore.attention(q.as_subclass(Subclass), k, v),
    "function mode": under(Mode()),
    "dispatch mode": under(DispatchMode()),
    "autocast": under(torch.autocast("cpu", dtype=torch.bfloat16)),
    "vmap": lambda q, k, v: torch.func.vmap(flashcore.attention)(q[None], k[None], v[None]),
    "seqlens_k": lambda q, k, v: flashcore.attention(
        q, k, v, seqlens_k=torch.tensor([3, 4], dtype=torch.int32)
    ),
    "torch": lambda q, k, v: flashcore.attention(q, k, v, backend="torch"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_is_left_to_python(monkeypatch, name):
    """After an ordinary call of the same tensors."""
    _, module = installed(monkeypatch)
    q, k, v = tensors()
    flashcore.attention(q, k, v)
    assert module.counts()[1] == 1
    result = UNUSUAL[name](q, k, v)
    assert isinstance(result, torch.Tensor)
    assert module.counts()[1] == 1


def test_wrong_arguments_are_errors_still(monkeypatch):
    """After right ones that equal them, and the first time."""
    _, module = installed(monkeypatch)
    q, k, v = tensors()
    flashcore.attention(q, k, v, causal=True, scale=1.0, window=(1, 0), return_lse=True)
    for wrong in (
        {"causal": 1}, {"scale": True}, {"window": (True, 0)}, {"return_lse": 1}, {"backend": 3},
    ):  # fmt: skip
        options = {"causal": True, "scale": 1.0, "window": (1, 0), "return_lse": True, **wrong}
        with pytest.raises(TypeError, match=next(iter(wrong))):
            flashcore.attention(q, k, v, **options)
    flashcore.attention(q, k, v)
    with pytest.raises(NotImplementedError, match="lazily negated"):
        flashcore.attention(torch._neg_view(q), k, v)
    with pytest.raises(NotImplementedError, match="v is a nested tensor"):
        flashcore.attention(q, k, torch.nested.nested_tensor(list(v)))
    for wrong in ({"scale": 0.0}, {"softcap": 0.0}, {"scale": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            flashcore.attention(q, k, v, **wrong)
    with pytest.raises(ValueError, match="k has batch 1"):
        flashcore.attention(q, k[:1], v)
    with pytest.raises(TypeError, match=r"q must be a torch\.Tensor"):
        flashcore.attention("q", k, v)
    with pytest.raises(NotImplementedError, match="no memory"):
        flashcore.attention(torch._efficientzerotensor(q.shape, dtype=HALF), k, v)
    freed = q.clone()
    freed.untyped_storage().resize_(0)  # as FSDP does with what it gathers again later
    with pytest.raises(NotImplementedError, match="no memory"):
        flashcore.attention(freed, k, v)
    assert module.counts()[1] == 2


@pytest.mark.filterwarnings("ignore::flashcore.FallbackWarning")
def test_dual_numbers_are_left_to_python(monkeypatch):
    """Python gives their tangents; the launcher would drop them."""
    machine, _ = installed(monkeypatch)
    q, k, v = tensors()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        out = flashcore.attention(dual, k, v)
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None
    assert not machine.driver.launches


def test_another_current_device_is_left_to_python(monkeypatch):
    machine, module = installed(monkeypatch)
    q, k, v = tensors()
    flashcore.attention(q, k, v)
    machine.device = 1
    flashcore.attention(q, k, v)
    assert (len(machine.driver.launches), module.counts()[1]) == (2, 1)


def test_a_launch_that_fails_is_tried_again_by_python(monkeypatch):
    """Python binds a context, or says what is wrong."""
    machine, module = installed(monkeypatch)
    bound = []
    monkeypatch.setattr(driver_launch, "bind_context", bound.append)
    q, k, v = tensors()
    flashcore.attention(q, k, v)
    assert bound == [0]  # to load the kernel
    machine.driver.statuses = [INVALID_CONTEXT] * 2
    flashcore.attention(q, k, v)
    assert bound == [0, 0]
    machine.driver.statuses = [719] * 2
    with pytest.raises(flashcore.FlashCoreError, match="launching attn_fwd_sm90 failed: 719"):
        flashcore.attention(q, k, v)
    flashcore.attention(q, k, v)
    assert module.counts()[1] == 2


def test_an_address_that_the_driver_refuses_is_left_to_python(monkeypatch):
    machine, module = installed(monkeypatch)
    q, k, v = tensors()
    flashcore.attention(q, k, v)
    machine.driver.encode_statuses = [1] * 2
    with pytest.raises(flashcore.FlashCoreError, match="failed: 1"):
        flashcore.attention(q, k, v)
    assert (len(machine.driver.launches), module.counts()[1]) == (1, 1)


def test_what_it_remembers_is_bounded(monkeypatch):
    monkeypatch.setattr(calls, "CALLS_MAX", 3)
    monkeypatch.setattr(launcher, "lookup", launcher.lookup._replace(calls_max=3))
    machine, module = installed(monkeypatch)
    q, keys = torch.zeros(1, 4, 1, 64).half(), torch.zeros(1, 4, 64, 64).half()
    for length in (9, 10, 11, 12, 13, 9, 13):
        flashcore.attention(q, keys[:, :, :length], keys[:, :, :length])
    assert module.counts() == (3, 7)
    assert [x.params.attn.seqlen_k for x in machine.driver.launches] == [9, 10, 11, 12, 13, 9, 13]


def test_what_launches_may_be_chosen_for_a_while(monkeypatch):
    _, module = installed(monkeypatch)
    for name, attend in (("python", None), ("compiled", module.attend), ("python", None)):
        with launcher.using(name):
            assert launcher.attend == attend
        assert launcher.attend == module.attend
