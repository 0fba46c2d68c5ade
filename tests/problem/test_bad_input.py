"""Every wrong argument gives an exception that names the argument, its value and the way out."""

from __future__ import annotations

import dataclasses
import re
import warnings

import pytest
import torch

import flashcore
from flashcore.backends import dispatch
from flashcore.backends.dispatch import choose_backend, warn_once
from flashcore.base import env
from flashcore.problem import Problem

HALF = torch.float16


def quietly(make):
    """Silence the warnings that nested and quantized tensors give on creation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def tensor(*shape, dtype=HALF):
    return torch.zeros(shape, dtype=dtype)


Q, K, V = tensor(2, 4, 6, 16), tensor(2, 2, 10, 16), tensor(2, 2, 10, 24)

# id: (changed arguments, exception, what the message must hold: the name, the value, the way out)
CASES = {
    "q is a list": ({"q": [1.0]}, TypeError, "q must be a torch.Tensor", "list"),
    "k is numpy": ({"k": K.numpy()}, TypeError, "k must be a torch.Tensor", "numpy.ndarray"),
    "v is None": ({"v": None}, TypeError, "v must be a torch.Tensor", "NoneType"),
    "rank 3": ({"q": Q[0]}, ValueError, "q has 3 dim", "[4, 6, 16]", "q[None]"),
    "rank 5": ({"v": V[None]}, ValueError, "v has 5 dim", "[1, 2, 2, 10, 24]"),
    "batch": ({"k": K[:1]}, ValueError, "k has batch 1", "q has 2", "expand"),
    "heads of v": ({"v": V[:, :1]}, ValueError, "v has 1 heads", "k has 2"),
    "heads of q": ({"q": Q[:, :3]}, ValueError, "q has 3 heads", "k has 2", "multiple"),
    "no kv heads": ({"k": K[:, :0], "v": V[:, :0]}, ValueError, "q has 4 heads", "k has 0"),
    "seqlen of v": ({"v": V[:, :, :9]}, ValueError, "v has seqlen 9", "k has 10"),
    "head_dim of k": ({"k": K[..., :8]}, ValueError, "k has head_dim 8", "q has 16"),
    "head_dim 264 in a kernel": (
        {"v": tensor(2, 2, 10, 264), "backend": "sim"},
        NotImplementedError, "no kernel serves head_dim 264", "256", 'backend="torch"',
    ),
    "head_dim 0": ({"v": V[..., :0]}, NotImplementedError, "v has head_dim 0", "at least 1"),
    "long sequence": (
        {"q": tensor(1, 1, 1, 8).expand(2, 4, 2**30, 8), "k": K[..., :8]},
        NotImplementedError, "q has seqlen 1073741824", "split",
    ),
    "dtypes differ": ({"k": K.bfloat16()}, TypeError, "k has dtype torch.bfloat16", ".to(q.dtype)"),
    "integers": ({"q": Q.int()}, TypeError, "q has dtype torch.int32", "q.to(torch.float16)"),
    "float8": (
        {"q": Q.to(torch.float8_e4m3fn)}, TypeError, "q has dtype torch.float8_e4m3fn", "q.to("
    ),
    "complex": ({"v": V.to(torch.complex64)}, TypeError, "v has dtype torch.complex64", "v.to("),
    "meta": ({"q": Q.to("meta")}, ValueError, "k is on cpu but q is on meta", "k.to(q.device)"),
    "sparse": (
        {"k": K.to_sparse()}, NotImplementedError, "k has layout torch.sparse_coo", "k.to_dense()"
    ),
    "nested": (
        {"q": quietly(lambda: torch.nested.nested_tensor([Q[0], Q[0, :, :3]]))},
        NotImplementedError, "q is a nested", "to_padded_tensor",
    ),
    "quantized": (
        {"v": quietly(lambda: torch.quantize_per_tensor(V.float(), 0.1, 0, torch.qint8))},
        NotImplementedError, "v is quantized", "v.dequantize()",
    ),
    "negated view": (
        {"q": torch._neg_view(Q)}, NotImplementedError, "q is a lazily negated", "q.resolve_neg()"
    ),
    "mask of wrong shape": (
        {"mask": torch.ones(6, 9, dtype=torch.bool)},
        ValueError, "mask has shape [6, 9]", "[2, 4, 6, 10]", "mask[:, None, None, :]",
    ),
    "mask per key and sequence": (
        {"mask": torch.ones(2, 10, dtype=torch.bool)},
        ValueError, "mask has shape [2, 10]", "mask[:, None, None, :]",
    ),
    "mask of rank 5": (
        {"mask": tensor(1, 2, 4, 6, 10)}, ValueError, "mask has shape [1, 2, 4, 6, 10]"
    ),
    "mask longer than broadcast": (
        {"mask": tensor(2, 1, 1, 20)}, ValueError, "mask has shape [2, 1, 1, 20]"
    ),
    "integer mask": (
        {"mask": torch.ones(6, 10, dtype=torch.int64)},
        TypeError, "mask has dtype torch.int64", "mask.bool()",
    ),
    "byte mask": (
        {"mask": torch.ones(6, 10, dtype=torch.uint8)},
        TypeError, "mask has dtype torch.uint8", "mask.bool()",
    ),
    "mask of another float": (
        {"mask": tensor(6, 10, dtype=torch.bfloat16)},
        TypeError, "mask has dtype torch.bfloat16", "mask.to(torch.float16)",
    ),
    "float64 mask": (
        {"mask": tensor(6, 10, dtype=torch.float64)},
        TypeError, "mask has dtype torch.float64", "mask.to(torch.float16)",
    ),
    "mask is a list": ({"mask": [[True]]}, TypeError, "mask must be a torch.Tensor", "list"),
    "sparse mask": (
        {"mask": tensor(6, 10).to_sparse()}, NotImplementedError, "mask has layout", "to_dense()"
    ),
    "mask on meta": (
        {"mask": tensor(6, 10).to("meta")}, ValueError, "mask is on meta but q is on cpu", "mask.to"
    ),
    "causal string": ({"causal": "upper"}, ValueError, "causal='upper'", "'upper_left'"),
    "causal int": ({"causal": 1}, TypeError, "causal must be", "1 (int)", "'lower_right'"),
    "causal None": ({"causal": None}, TypeError, "causal must be", "None"),
    "scale 0": ({"scale": 0.0}, ValueError, "scale=0.0", "pass None"),
    "scale negative": ({"scale": -1}, ValueError, "scale=-1", "positive"),
    "scale NaN": ({"scale": float("nan")}, ValueError, "scale=nan", "pass None"),
    "scale inf": ({"scale": float("inf")}, ValueError, "scale=inf", "pass None"),
    "scale huge": ({"scale": 1e30}, ValueError, "scale=1e+30", "1e+18"),
    "scale tiny": ({"scale": 1e-30}, ValueError, "scale=1e-30", "1e-18"),
    "scale of 400 digits": ({"scale": 10**400}, ValueError, "scale=1000", "pass None"),
    "scale bool": ({"scale": True}, TypeError, "scale must be a number", "True (bool)"),
    "scale string": ({"scale": "0.1"}, TypeError, "scale must be a number", "'0.1' (str)"),
    "scale tensor": (
        {"scale": torch.tensor(0.1)}, TypeError, "scale must be a number", "torch.Tensor"
    ),
    "scale complex": ({"scale": 1j}, TypeError, "scale must be a number", "1j (complex)"),
    "softcap 0": ({"softcap": 0}, ValueError, "softcap=0", "None for no softcap"),
    "softcap negative": ({"softcap": -5.0}, ValueError, "softcap=-5.0", "None for no softcap"),
    "softcap NaN": ({"softcap": float("nan")}, ValueError, "softcap=nan", "None"),
    "softcap inf": ({"softcap": float("inf")}, ValueError, "softcap=inf", "None"),
    "softcap bool": ({"softcap": False}, TypeError, "softcap must be a number", "False (bool)"),
    "window int": ({"window": 128}, TypeError, "window must be (left, right)", "128", "(n, 0)"),
    "window string": ({"window": "ab"}, TypeError, "window must be (left, right)", "'ab'"),
    "window of three": ({"window": (1, 2, 3)}, ValueError, "window=(1, 2, 3)", "(left, right)"),
    "window empty": ({"window": ()}, ValueError, "window=()", "(left, right)"),
    "window -2": ({"window": (-2, 0)}, ValueError, "window=(-2, 0)", "left is -2", "-1"),
    "window float": ({"window": (1, 2.0)}, TypeError, "window's right side", "2.0 (float)"),
    "window NaN": ({"window": (float("nan"), 0)}, TypeError, "window's left side", "nan"),
    "window bool": ({"window": (True, 0)}, TypeError, "window's left side", "True (bool)"),
    "window None": ({"window": (None, 0)}, TypeError, "window's left side", "None"),
    "return_lse": ({"return_lse": 1}, TypeError, "return_lse must be True or False", "1"),
    "backend string": ({"backend": "cuda"}, ValueError, "backend='cuda'", "'wmma'"),
    "backend type": ({"backend": 3}, TypeError, "backend must be", "3", "wmma"),
    "sim with float32": (
        {"q": Q.float(), "k": K.float(), "v": V.float(), "backend": "sim"},
        TypeError, "q has dtype float32", 'backend="torch"',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_message_names_argument_value_and_way_out(name):
    changes, exception, *expected = CASES[name]
    arguments = {"q": Q, "k": K, "v": V, **changes}
    tensors = [arguments.pop(name) for name in "qkv"]
    with pytest.raises(exception) as caught:
        flashcore.attention(*tensors, **arguments)
    for text in expected:
        assert text in str(caught.value)
    with pytest.raises(exception, match=re.escape(str(caught.value))):
        flashcore.explain(*tensors, **arguments)


def test_what_looks_odd_but_is_meant_to_work():
    plain = flashcore.attention(Q, K, V)
    for options in (
        {"window": [-1, -1]},
        {"window": (10**30, 10**30)},
        {"scale": 1},
        {"softcap": torch.ones(1).numpy()[0]},
        {"mask": torch.ones(10, dtype=torch.bool)},
        {"mask": torch.zeros(())},
    ):
        assert flashcore.attention(Q, K, V, **options).shape == plain.shape


def on_gpu(arch: int, dtype: str = "float16") -> Problem:
    """Return the problem of these tests as if its tensors were on a GPU."""
    problem = Problem.from_tensors(Q, K, V)
    return dataclasses.replace(problem, device="cuda", arch=arch, dtype=dtype)


def test_wmma_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(flashcore.BackendUnavailableError) as caught:
        flashcore.attention(Q, K, V, backend="wmma")
    for text in ('backend="wmma"', "q is on cpu", 'backend="sim"', 'backend="torch"'):
        assert text in str(caught.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(flashcore.BackendUnavailableError, match=re.escape("q.cuda()")):
        flashcore.attention(Q, K, V, backend="wmma")


@pytest.mark.parametrize("backend", ["auto", "wmma"])
def test_gpu_too_old(backend):
    with pytest.raises(flashcore.BackendUnavailableError, match=r"sm_70.*sm_75.*backend=\"torch\""):
        choose_backend(on_gpu(70), backend)
    assert choose_backend(on_gpu(70), "torch").backend == "torch"


def test_bfloat16_needs_sm_80():
    with pytest.raises(flashcore.BackendUnavailableError, match=r"sm_80.*sm_75.*torch.float16"):
        choose_backend(on_gpu(75, "bfloat16"), "wmma")
    assert choose_backend(on_gpu(80, "bfloat16"), "wmma").backend == "wmma"
    fallback = choose_backend(on_gpu(75, "bfloat16"), "auto")
    assert fallback.backend == "torch"
    assert fallback.is_fallback


def test_unsupported_dtype_on_the_gpu():
    with pytest.raises(TypeError, match=r"float32.*torch.float16.*backend=\"torch\""):
        choose_backend(on_gpu(90, "float32"), "wmma")
    assert choose_backend(on_gpu(90), "auto").backend == "sm90"
    assert choose_backend(on_gpu(80), "auto").backend == "wmma"
    assert not choose_backend(on_gpu(90), "auto").is_fallback


def test_gpu_of_another_maker():
    with pytest.raises(flashcore.BackendUnavailableError, match="NVIDIA"):
        choose_backend(on_gpu(0), "wmma")
    assert choose_backend(on_gpu(0), "auto").backend == "torch"


def test_the_fallback_is_announced_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())
    choice = choose_backend(on_gpu(90, "float32"), "auto")
    with pytest.warns(flashcore.FallbackWarning, match="float32"):
        warn_once(choice)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_once(choice)


def test_no_warning_on_the_cpu():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flashcore.attention(Q.float(), K.float(), V.float())


def test_sim_needs_cpu_tensors():
    with pytest.raises(flashcore.BackendUnavailableError, match=r"q\.cpu\(\)"):
        choose_backend(on_gpu(90), "sim")


def test_sim_of_an_old_gpu_has_no_bfloat16(monkeypatch):
    monkeypatch.setenv(env.SIM_ARCH.name, "75")
    assert choose_backend(Problem.from_tensors(Q, K, V), "sim").backend == "sim"
    bf16 = Problem.from_tensors(Q.bfloat16(), K.bfloat16(), V.bfloat16())
    with pytest.raises(flashcore.BackendUnavailableError, match=env.SIM_ARCH.name):
        choose_backend(bf16, "sim")


@pytest.mark.parametrize("value", ["-1", "1.5", "seven"])
def test_environment_variable_that_is_no_number(monkeypatch, value):
    monkeypatch.setenv(env.SIM_SEED.name, value)
    with pytest.raises(ValueError, match=rf"FLASHCORE_SIM_SEED='{re.escape(value)}'"):
        env.sim_seed()


@pytest.mark.gpu
def test_tensors_on_different_devices():
    with pytest.raises(ValueError, match=r"k is on cpu but q is on cuda:0.*k\.to\(q\.device\)"):
        flashcore.attention(Q.cuda(), K, V)
    with pytest.raises(ValueError, match=r"mask is on cpu but q is on cuda:0"):
        flashcore.attention(Q.cuda(), K.cuda(), V.cuda(), mask=torch.zeros(6, 10))


@pytest.mark.gpu
def test_the_real_fallback_warns_and_computes(monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())
    q, k, v = Q.cuda().float(), K.cuda().float(), V.cuda().float()
    with pytest.warns(flashcore.FallbackWarning, match=r'float32.*backend="torch"') as caught:
        out = flashcore.attention(q, k, v)
    assert caught[0].filename == __file__, "the warning must point at the caller"
    assert (out == 0).all()


def test_compiled_code_may_call_attention():
    compiled = torch.compile(lambda q: flashcore.attention(q, K, V) * 2, backend="eager")
    q = torch.randn_like(Q)
    torch.testing.assert_close(compiled(q), flashcore.attention(q, K, V) * 2)
