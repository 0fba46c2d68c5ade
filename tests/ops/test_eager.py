"""Test the eager call: what is decided once, what goes around the dispatcher, and what must not."""

from __future__ import annotations

import re
import threading

import pytest
import standin
import torch
from op_inputs import additive_mask, gradients, qkv
from test_bad_input import CASES, K, Q, V

import flashcore
from flashcore.launch import driver, driver_launch
from flashcore.launch import kernel_call as launch
from flashcore.launch.driver import INVALID_CONTEXT
from flashcore.ops import calls, eager
from flashcore.ops import dense as ops
from flashcore.problem.options import Inputs

HALF = torch.float16


@pytest.fixture
def no_calls(monkeypatch):
    """Start with an empty memory of calls."""
    monkeypatch.setattr(calls, "_calls", {})
    return calls._calls


def through_the_operator(q, k, v, **options):
    """Make the same call as a mode makes it."""
    arguments = {
        "causal": False, "window": None, "softcap": None, "scale": None,
        "return_lse": False, "return_max_score": False, "backend": "auto", **options,
    }  # fmt: skip
    inputs = Inputs(q, k, v, arguments.pop("mask", None))
    return ops.attention_dense(inputs, **arguments)


CALLS = {
    "plain": {},
    "causal": {"causal": True, "return_lse": True},
    "window, softcap, scale": {"window": (3, 1), "softcap": 2.0, "scale": 0.3},
    "bool mask": {"mask": additive_mask(2, 1, 6, 9) > 0},
    "additive mask": {"mask": additive_mask(6, 9), "causal": "upper_left"},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_same_result_as_through_the_operator(no_calls, name, requires_grad):
    """First, when it is decided, and again, when it is looked up."""
    q, k, v = qkv(requires_grad=requires_grad)
    options = CALLS[name]
    want = through_the_operator(q, k, v, **options)
    no_calls.clear()
    for _ in range(2):
        got = flashcore.attention(q, k, v, **options)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert len(no_calls) == 1
    if requires_grad:
        ours = gradients(lambda *x: flashcore.attention(*x, **options), q, k, v)
        theirs = gradients(lambda *x: through_the_operator(*x, **options), q, k, v)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_equal_is_not_the_same(no_calls):
    """1 == True == 1.0: what was decided for a valid argument serves no invalid one."""
    flashcore.attention(Q, K, V, causal=True, scale=1.0, window=(1, 0), return_lse=True)
    for wrong in ({"causal": 1}, {"scale": True}, {"window": (True, 0)}, {"return_lse": 1}):
        options = {"causal": True, "scale": 1.0, "window": (1, 0), "return_lse": True, **wrong}
        with pytest.raises(TypeError, match=next(iter(wrong))):
            flashcore.attention(Q, K, V, **options)
    flashcore.attention(Q, K, V)
    flashcore.attention(Q, K, V, causal=True)
    for wrong in ({"causal": 0}, {"causal": 1}, {"return_lse": 0}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            flashcore.attention(Q, K, V, **wrong)


def test_what_was_decided_without_autograd_serves_no_recorded_call(no_calls):
    """A recorded call needs lse."""
    q, k, v = qkv(requires_grad=True)
    with torch.no_grad():
        flashcore.attention(q, k, v)
    flashcore.attention(q, k, v).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("name", CASES)
def test_the_same_error_as_through_the_operator(no_calls, name):
    """After a valid call has been decided."""
    changes, exception, *_ = CASES[name]
    arguments = {"q": Q, "k": K, "v": V, **changes}
    tensors = [arguments.pop(name) for name in "qkv"]
    flashcore.attention(Q, K, V)
    with pytest.raises(exception) as caught:
        flashcore.attention(*tensors, **arguments)
    if "mask is a list" in name or ("mask" in name and "sparse" in name) or "meta" in name:
        return  # the dispatcher itself says so, in its words
    with pytest.raises(exception, match=re.escape(str(caught.value))):
        through_the_operator(*tensors, **arguments)


def test_everything_that_matters_is_in_the_key(no_calls):
    """Each of these calls is another one, though each differs in one thing only."""
    q, k, v = qkv(6, 6, dtype=HALF)
    mask = additive_mask(6, 6)
    shifted = torch.zeros(q.numel() + 1, dtype=HALF)[1:].view(q.shape).copy_(q)
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)
    variants = [
        ((q, k, v), {}),
        ((shifted, k, v), {}),
        ((transposed, k, v), {}),
        ((q.bfloat16(), k.bfloat16(), v.bfloat16()), {}),
        ((q[:, :, 1:], k, v), {}),
        ((q, k[:, :1], v[:, :1]), {}),
        ((q, k, v), {"causal": True}),
        ((q, k, v), {"causal": "upper_left", "window": (2, 0)}),
        ((q, k, v), {"softcap": 2.0}),
        ((q, k, v), {"scale": 2.0}),
        ((q, k, v), {"return_lse": True}),
        ((q, k, v), {"backend": "torch"}),
        ((q, k, v), {"mask": mask}),
        ((q, k, v), {"mask": mask.mT}),
        ((q, k, v), {"mask": mask > 0}),
        ((q, k, v), {"mask": mask[:1]}),
    ]
    for number, (tensors, options) in enumerate(variants, 1):
        got = flashcore.attention(*tensors, **options)
        assert sum(map(len, no_calls.values())) == number
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calls, "_calls", {})
            want = through_the_operator(*(x.double() for x in tensors), **options)
        for ours, theirs in zip(
            got if isinstance(got, tuple) else (got,),
            want if isinstance(want, tuple) else (want,),
            strict=True,
        ):
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-2, atol=2e-2)


def test_what_was_decided_is_bounded(no_calls, monkeypatch):
    monkeypatch.setattr(calls, "CALLS_MAX", 5)
    monkeypatch.setattr(calls, "FOUND_MAX", 3)
    for seqlen in range(1, 20):
        flashcore.attention(*qkv(seqlen, seqlen))
    assert len(no_calls) == 5
    no_calls.clear()
    for padding in range(10):  # shapes are the same, strides are not
        q, k, v = (torch.zeros(2, 2, 5 + padding, 8)[:, :, :5] for _ in range(3))
        flashcore.attention(q, k, v)
    assert [len(founds) for founds in no_calls.values()] == [3]


def test_tensors_without_memory_are_no_tensors_to_a_kernel():
    zero = torch._efficientzerotensor(Q.shape, dtype=HALF)
    flashcore.attention(Q, K, V)
    with pytest.raises(NotImplementedError, match="no memory to read"):
        flashcore.attention(zero, K, V)


def test_a_parameter_is_a_plain_tensor():
    parameter = torch.nn.Parameter(Q)
    assert not eager.needs_dispatcher(parameter, K, V, None)
    flashcore.attention(parameter, K, V).sum().backward()
    assert parameter.grad is not None


# The launch, with a driver that records.


@pytest.fixture
def machine(monkeypatch):
    return standin.install(monkeypatch)


def half(*shape):
    return torch.randn(shape).half()


def pointers_of(params):
    return params.attn.q, params.attn.k, params.attn.v, params.attn.out, params.q_map.base


def test_a_launch_gets_the_addresses_of_its_tensors(machine):
    q, k, v = half(1, 4, 40, 64), half(1, 4, 50, 64), half(1, 4, 50, 64)
    for tensors in ((q, k, v), (k[:, :, :40], k, v), (q, k, v)):
        out = flashcore.attention(*tensors)
        params = machine.driver.launches[-1].params
        addresses = [x.data_ptr() for x in (*tensors, out)]
        assert list(pointers_of(params)) == [*addresses, addresses[0]]
        assert params.attn.lse is None
        assert (params.k_map.base, params.v_map.base, params.o_map.base) == (*addresses[1:],)
        assert (params.attn.seqlen_q, params.attn.seqlen_k) == (40, 50)
        assert machine.driver.launches[-1].stream == 7
    out, lse = flashcore.attention(q, k, v, return_lse=True)
    assert machine.driver.launches[-1].params.attn.lse == lse.data_ptr()


@pytest.mark.parametrize(("arch", "early"), [(80, False), (90, True)])
def test_the_hopper_kernel_starts_before_the_kernels_ahead_have_ended(monkeypatch, arch, early):
    """This holds on every stream: what a launch is told is kept by stream."""
    machine = standin.install(monkeypatch, arch)
    q = half(1, 4, 40, 64)
    for stream in (7, 8, 7):
        machine.stream = stream
        flashcore.attention(q, q, q)
    assert [x.stream for x in machine.driver.launches] == [7, 8, 7]
    assert [x.starts_early for x in machine.driver.launches] == [early] * 3


def test_few_streams_keep_what_they_were_told(machine, monkeypatch):
    monkeypatch.setattr(driver_launch, "STREAMS_MAX", 2)
    q = half(1, 4, 40, 64)
    for stream in (1, 2, 3, 2, 1):
        machine.stream = stream
        flashcore.attention(q, q, q)
    assert [x.stream for x in machine.driver.launches] == [1, 2, 3, 2, 1]


def test_descriptors_are_encoded_once_per_kind_and_placed_once_per_address(machine, monkeypatch):
    q, k, v = half(1, 4, 40, 64), half(1, 4, 50, 64), half(1, 4, 50, 64)
    driver, buffer = machine.driver, torch.empty_like(q)
    # As an allocator in a loop.
    monkeypatch.setattr(launch, "allocator", lambda *description: lambda: buffer)
    for _ in range(5):
        flashcore.attention(q, k, v)
    assert (driver.encodings, driver.replacements) == (3, 4)  # k and v are of one kind
    copy = q.clone()
    for _ in range(5):
        flashcore.attention(copy, k, v)
    assert (driver.encodings, driver.replacements) == (3, 8)
    flashcore.attention(q, k[:, :, 1:], v[:, :, 1:])
    assert driver.encodings == 4
    monkeypatch.setattr(launch, "ARGUMENTS_MAX", 3)
    copies = [q.clone() for _ in range(6)]
    for copy in copies:
        flashcore.attention(copy, k, v)
    assert len(launch._arguments) == 3


@pytest.mark.parametrize("arch", [80, 90])
def test_output_is_contiguous_whatever_the_layout_of_q(monkeypatch, arch):
    standin.install(monkeypatch, arch)
    k = half(2, 4, 50, 64)
    for q in (half(2, 4, 40, 64), half(2, 40, 4, 64).transpose(1, 2), half(1, 1, 1, 64)):
        k_, v_ = k[: q.shape[0], : q.shape[1]], k[: q.shape[0], : q.shape[1]]
        for v in (v_, v_[..., :32]):
            out = flashcore.attention(q, k_, v)
            assert out.shape == (*q.shape[:3], v.shape[3])
            assert out.is_contiguous()


def test_the_tensors_device_is_current_for_the_launch(machine):
    """The device that was current before is current afterwards."""
    seen = []
    machine.driver.on_launch = lambda: seen.append(machine.device)
    call = driver_launch.Launch(
        standin.SimpleNamespace(name="attn_fwd_sm90"),
        grid=1, num_threads=32, smem_bytes=0, device=torch.device("cuda", 1),
    )  # fmt: skip
    call(driver_launch.Argument(standin.params_sm90.AttnSm90Params()))
    assert seen == [1]
    assert machine.device == 0


def test_a_thread_without_a_context_binds_one(machine, monkeypatch):
    core = pytest.importorskip("cuda.core")
    bound = []

    class Device:
        def __init__(self, index):
            self.index = index

        def set_current(self):
            bound.append(self.index)

    monkeypatch.setattr(core, "Device", Device)
    monkeypatch.setattr(driver_launch, "bind_context", driver.bind_context)  # not the stand-in's
    machine.driver.statuses = [INVALID_CONTEXT]
    q = half(1, 4, 40, 64)
    flashcore.attention(q, q, q)
    assert bound == [0, 0]  # to load the kernel, and to launch it
    assert [x.status for x in machine.driver.launches] == [INVALID_CONTEXT, 0]
    machine.driver.encode_statuses = [INVALID_CONTEXT]
    q = half(1, 4, 40, 64)
    flashcore.attention(q, q, q)
    assert bound == [0, 0, 0]
    machine.driver.statuses = [719]
    with pytest.raises(flashcore.FlashCoreError, match="launching attn_fwd_sm90 failed: 719"):
        flashcore.attention(q, q, q)


def test_threads_do_not_see_each_others_arguments(machine):
    """Eight threads of one description: each launch has q, k and v of one thread."""
    sets = [[half(1, 2, 40, 64) for _ in range(3)] for _ in range(8)]
    start = threading.Barrier(len(sets))

    def work(tensors):
        start.wait()
        for _ in range(100):
            flashcore.attention(*tensors)

    threads = [threading.Thread(target=work, args=(x,)) for x in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    allowed = {tuple(x.data_ptr() for x in tensors) for tensors in sets}
    assert len(machine.driver.launches) == 800
    for entry in machine.driver.launches:
        assert pointers_of(entry.params)[:3] in allowed
        assert pointers_of(entry.params)[0] == entry.params.q_map.base


def test_a_growing_number_of_keys_shares_one_launch(machine):
    q, keys = torch.zeros(1, 4, 1, 64).half(), torch.zeros(1, 4, 64, 64).half()
    for length in range(9, 29):
        flashcore.attention(q, keys[:, :, :length], keys[:, :, :length])
    assert [x.params.attn.seqlen_k for x in machine.driver.launches] == list(range(9, 29))
    assert [x.params.k_map.base for x in machine.driver.launches] == [keys.data_ptr()] * 20
    assert launch._launch.cache_info().misses == 1


@pytest.mark.thorough
def test_the_benchmark_of_the_host_measures_and_reports(monkeypatch):
    from flashcore.bench import host

    monkeypatch.setattr(host, "_CALLS", 2)
    document = host.run("cpu", rounds=1)
    text = host.markdown(document)
    assert {(row["library"], row["recorded"]) for row in document["results"]} == {
        (library, recorded) for library in ("flashcore", "sdpa") for recorded in (False, True)
    }
    assert "flashcore's host time over that of torch's SDPA" in text
    assert all(entry["layer"] in text and entry["us"] > 0 for entry in document["layers"])


def test_a_peer_that_fails_does_not_end_the_benchmark_of_the_host(monkeypatch):
    from flashcore.bench import host, peers
    from flashcore.bench.libraries import Library, flashcore_call

    def fails(*_):
        raise RuntimeError("no such shape")

    everybody = [
        Library("good", flashcore_call("torch")),
        Library("torch-varlen", peers._torch_varlen, frozenset({"varlen"}), ("varlen",)),
        Library("flex", fails, compiles_slowly=True),
        Library("raises in prepare", fails),
        Library("raises in the call", lambda *_: fails),
    ]
    workload = host._SMALLEST
    found, failed = host._libraries("cpu", workload, everybody, *workload.tensors("cpu"))
    assert set(found) == {"flashcore", "sdpa", "good"}
    assert failed == {
        "flex": "compiles for seconds",
        "raises in prepare": "no such shape",
        "raises in the call": "no such shape",
    }
