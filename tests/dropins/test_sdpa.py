"""scaled_dot_product_attention is torch's: its samples, shapes, gradients, errors; and what falls
to torch says so once."""

from __future__ import annotations

import importlib
import itertools
import sys
import types
import unittest
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import flashcore
from flashcore import FallbackWarning
from flashcore.dropins.sdpa import attention as sdpa
from flashcore.dropins.sdpa.attention import Call, route

HALF = torch.float16


@pytest.fixture(autouse=True)
def _warn_anew(monkeypatch):
    """Let each test meet its FallbackWarnings for the first time."""
    monkeypatch.setattr(sdpa, "_warned", set())


def on(backend):
    """Return torch's signature on a backend of `attention`."""

    def call(
        q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
    ):
        return route(Call(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa), backend)

    return call


def randn(*shape, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def tolerances(dtype):
    bounds = {torch.float64: 1e-9, torch.float32: 2e-5, HALF: 2e-3, torch.bfloat16: 2e-2}
    return {"atol": bounds[dtype], "rtol": bounds[dtype]}


def opinfo_samples(device, dtype):
    """Return torch's own samples of this function."""
    try:
        importlib.import_module("expecttest")
    except ModuleNotFoundError:  # op_db needs a base class of it, for tests that do not run here
        sys.modules["expecttest"] = stub = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase
    from torch.testing._internal.common_methods_invocations import op_db

    (op,) = [op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention"]
    samples = list(op.sample_inputs(device, dtype, requires_grad=False))
    assert len(samples) > 20
    return [((sample.input, *sample.args), sample.kwargs) for sample in samples]


def with_gradients(function, tensors, options, dtype):
    """Return the output, and the gradients of its sum of squares."""
    torch.manual_seed(5)
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in tensors]
    if isinstance(mask := options.get("attn_mask"), torch.Tensor):
        options = {**options, "attn_mask": mask.to(dtype)}
    out = function(*leaves, **options)
    out.square().sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


def check_opinfo_samples(function, device, dtype):
    """Check that outputs and gradients are at most twice as far from float64 as torch's own, apart
    from roundings; with dropout, which is torch's, they are the same bits."""
    # A rounding of the result, and of scores, which reach 230 here, in what they are computed in.
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32
    roundings = torch.finfo(dtype).eps + 230 * torch.finfo(computed_in).eps
    for tensors, options in opinfo_samples(device, dtype):
        ours = with_gradients(function, tensors, options, dtype)
        torchs = with_gradients(F.scaled_dot_product_attention, tensors, options, dtype)
        if options.get("dropout_p"):
            assert all(map(torch.equal, ours, torchs))
            continue
        exact = with_gradients(F.scaled_dot_product_attention, tensors, options, torch.float64)
        for our, their, right in zip(ours, torchs, exact, strict=True):
            assert our.dtype == dtype
            # Inputs reach 9; what cancels to less leaves roundings of that size.
            scale = max(float(right.abs().max()), 9.0)
            # A gradient takes sum(dout * out) of the rounded output, as all fused backwards do, and
            # multiplies it by q or k: three factors of that size. torch's math backend does not.
            if our is not ours[0] and dtype in (torch.float16, torch.bfloat16):
                scale = scale**3
            bound = 2 * float((their - right).abs().max()) + roundings * scale
            assert float((our - right).abs().max()) <= bound, options


@pytest.mark.filterwarnings("ignore::flashcore.FallbackWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opinfo_samples(dtype):
    check_opinfo_samples(flashcore.scaled_dot_product_attention, "cpu", dtype)


@pytest.mark.filterwarnings("ignore::flashcore.FallbackWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opinfo_samples_by_flashcores_own_code(dtype):
    """ "auto" leaves CPU tensors to torch, so this is what tests the shapes handed to attention."""
    check_opinfo_samples(on("torch"), "cpu", dtype)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::flashcore.FallbackWarning")
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, torch.float32, torch.float64])
def test_opinfo_samples_on_the_gpu(dtype):
    check_opinfo_samples(flashcore.scaled_dot_product_attention, "cuda", dtype)


SHAPES = {
    "4-D": ((2, 4, 5, 16), (2, 4, 7, 16), (2, 4, 7, 24)),
    "3-D": ((6, 5, 16), (6, 7, 16), (6, 7, 16)),
    "2-D": ((5, 16), (7, 16), (7, 8)),
    "5-D": ((2, 3, 4, 5, 16), (2, 3, 4, 7, 16), (2, 3, 4, 7, 16)),
    "one batch of k for all": ((2, 4, 5, 16), (1, 4, 7, 16), (1, 4, 7, 16)),
    "one batch of q for all": ((1, 4, 5, 16), (3, 4, 7, 16), (3, 4, 7, 16)),
    "one head of k for all": ((2, 4, 5, 16), (2, 1, 7, 16), (2, 1, 7, 16)),
    "one head of v alone": ((2, 4, 5, 16), (2, 4, 7, 16), (2, 1, 7, 16)),
    "one head of q": ((2, 1, 5, 16), (2, 4, 7, 16), (2, 4, 7, 16)),
    "3-D q": ((4, 5, 16), (2, 4, 7, 16), (2, 4, 7, 16)),
    "2-D k": ((2, 4, 5, 16), (7, 16), (2, 4, 7, 16)),
    "5-D broadcast": ((2, 1, 4, 5, 16), (3, 4, 7, 16), (1, 3, 1, 7, 16)),
}
GQA = {
    "gqa": ((2, 6, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)),
    "gqa 3-D": ((6, 5, 16), (2, 7, 16), (2, 7, 16)),
    "gqa 5-D, batch broadcast": ((2, 2, 6, 5, 16), (1, 2, 3, 7, 16), (2, 1, 3, 7, 16)),
    "gqa one batch": ((2, 6, 5, 16), (1, 3, 7, 16), (1, 3, 7, 16)),
    "equal heads": ((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)),
}
CASES = [(n, s, False) for n, s in SHAPES.items()] + [(n, s, True) for n, s in GQA.items()]


@pytest.mark.parametrize(("name", "shapes", "gqa"), CASES, ids=[c[0] for c in CASES])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.filterwarnings("error::flashcore.FallbackWarning")  # none of these falls to torch
def test_every_shape_torch_takes(name, shapes, gqa, is_causal):
    q, k, v = (randn(*shape, seed=i) for i, shape in enumerate(shapes))
    options = {"is_causal": is_causal, "scale": 0.3, "enable_gqa": gqa}
    ours = on("torch")(q, k, v, **options)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, **options))


MASKS = [(5, 7), (1, 7), (5, 1), (1, 1), (4, 5, 7), (1, 5, 7), (3, 4, 5, 7), (3, 1, 1, 7),
         (1, 4, 5, 1), (2, 3, 4, 5, 7), (2, 1, 4, 1, 7), (1, 1, 1, 5, 7)]  # fmt: skip


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize(
    ("lead", "shape"),
    [(n, m) for n in [(2, 3, 4), (3, 4), (4,), ()] for m in MASKS if len(m) <= len(n) + 2],
    ids=str,
)
@pytest.mark.filterwarnings("error::flashcore.FallbackWarning")
def test_every_mask_torch_broadcasts(lead, shape, kind):
    q, k, v = randn(*lead, 5, 16), randn(*lead, 7, 16), randn(*lead, 7, 16, seed=1)
    mask = randn(*shape)
    if kind == "bool":
        mask = mask > -0.5
    ours = on("torch")(q, k, v, mask)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, mask))


def test_gradients_reach_an_additive_mask_through_every_view():
    for lead, shape in itertools.product([(2, 3, 4), (3, 4)], [(5, 7), (3, 4, 5, 7), (1, 1, 7)]):
        q, k, v = randn(*lead, 5, 16), randn(*lead, 7, 16), randn(*lead, 7, 16)
        gradients = []
        for function in (on("torch"), F.scaled_dot_product_attention):
            leaves = [x.clone().requires_grad_() for x in (q, k, v, randn(*shape))]
            function(*leaves).square().sum().backward()
            gradients.append([x.grad for x in leaves])
        for ours, torchs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("name", ["4-D", "5-D broadcast", "one head of k for all", "gqa 5-D"])
def test_the_kernel_gets_these_views(name):
    """The simulator reads them through their strides, expanded ones too."""
    shapes, gqa = next((s, g) for n, s, g in CASES if n.startswith(name))
    q, k, v = (randn(*shape, seed=i, dtype=HALF) for i, shape in enumerate(shapes))
    ours = on("sim")(q, k, v, is_causal=True, enable_gqa=gqa)
    torchs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    torch.testing.assert_close(ours, torchs, **tolerances(HALF))


def test_causal_is_upper_left_and_a_causal_bias_keeps_its_corner():
    q, k, v = randn(1, 2, 3, 8), randn(1, 2, 6, 8), randn(1, 2, 6, 8, seed=1)
    own = on("torch")
    upper, lower = causal_upper_left(3, 6), causal_lower_right(3, 6)
    dense = torch.ones(3, 6, dtype=torch.bool)
    for ours, mask in (
        (own(q, k, v, is_causal=True), dense.tril()),
        (own(q, k, v, upper), dense.tril()),
        (own(q, k, v, lower), dense.tril(3)),
        (flashcore.scaled_dot_product_attention(q, k, v, lower), dense.tril(3)),
    ):
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, mask))
    with flashcore.enable():  # torch's class compares the function with the rebound name
        torch.testing.assert_close(
            F.scaled_dot_product_attention(q, k, v, lower), own(q, k, v, lower)
        )
    with pytest.raises((ValueError, RuntimeError)):
        own(q, k, v, lower, is_causal=True)


def test_autocast_casts_as_torch_does():
    q, k, v = (randn(1, 2, 5, 16, dtype=torch.float32, seed=i) for i in range(3))
    mask = randn(5, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = on("torch")(q, k, v, mask)
        assert on("torch")(q.double(), k.double(), v.double()).dtype == torch.float64
        torchs = F.scaled_dot_product_attention(q, k, v, mask)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, torchs, **tolerances(torch.bfloat16))


Q = randn(2, 3, 5, 16, dtype=HALF)
NESTED = "nested"
# id: (positional arguments, options, what the warning says)
FALLBACKS = {
    "dropout": ((Q, Q, Q), {"dropout_p": 0.5}, "dropout_p=0.5"),
    "float32": ((Q.float(),) * 3, {}, "float32"),
    "float64": ((Q.double(),) * 3, {}, "float64"),
    "head_dim 264": ((randn(1, 1, 2, 264, dtype=HALF),) * 3, {}, "264"),
    "heads of k and v": (
        (Q.repeat(1, 2, 1, 1), Q, Q[:, :1]),
        {"enable_gqa": True},
        "only torch combines",
    ),
    "scale": ((Q, Q, Q), {"scale": -1.0}, "scale=-1.0"),
    "scale 0": ((Q, Q, Q), {"scale": 0.0}, "scale=0.0"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_kernels_do_not_do_falls_to_torch_with_one_warning(name):
    tensors, options, message = FALLBACKS[name]
    torch.manual_seed(0)
    with pytest.warns(FallbackWarning, match="falls back to torch") as caught:
        ours = on("sim")(*tensors, **options)
    (warning,) = caught
    assert message in str(warning.message)
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on("sim")(*tensors, **options)
    torch.manual_seed(0)
    assert torch.equal(ours, F.scaled_dot_product_attention(*tensors, **options))


@pytest.mark.filterwarnings("error::flashcore.FallbackWarning")
def test_cpu_tensors_and_empty_ones_go_to_torch_without_a_warning():
    x = randn(2, 3, 5, 12)
    for function, q, k in (
        (flashcore.scaled_dot_product_attention, x, x),
        (on("sim"), Q[:0], Q[:0]),
        (on("sim"), Q[:, :, :0], Q),
        (on("sim"), Q, Q[:, :, :0]),
        (on("sim"), Q[..., :0], Q[..., :0]),
    ):
        ours, torchs = function(q, k, k), F.scaled_dot_product_attention(q, k, k)
        assert ours.shape == torchs.shape
        assert torch.equal(ours, torchs)


def test_subclasses_and_transforms_are_left_to_torch():
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            is_it = func is F.scaled_dot_product_attention
            return "mine" if is_it else super().__torch_function__(func, types, args, kwargs)

    loud = Q.as_subclass(Loud)
    assert flashcore.scaled_dot_product_attention(loud, Q, Q) == "mine"
    with flashcore.enable(backend="sim"):
        assert F.scaled_dot_product_attention(Q, loud, Q) == "mine"

    class Counting(torch.Tensor):
        calls = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.calls += func is F.scaled_dot_product_attention
            return super().__torch_function__(func, types, args, kwargs)  # back into the function

    with flashcore.enable(backend="sim"):
        out = F.scaled_dot_product_attention(Q.as_subclass(Counting), Q, Q)
    assert Counting.calls == 1
    assert torch.equal(out.as_subclass(torch.Tensor), F.scaled_dot_product_attention(Q, Q, Q))
    weight = torch.nn.Parameter(Q)
    assert on("torch")(weight, Q, Q).requires_grad

    x = randn(2, 3, 4, 5, 16, dtype=torch.float32)
    with pytest.warns(FallbackWarning, match="forward-mode"):
        _, tangent = torch.func.jvp(lambda y: on("torch")(y, x, x).sum(), (x,), (x,))
    assert tangent.isfinite()


@pytest.mark.filterwarnings("error::flashcore.FallbackWarning")
def test_vmap_and_tracing_go_to_attention():
    x = randn(2, 3, 4, 5, 16, dtype=torch.float32)
    ours = torch.func.vmap(on("torch"))(x, x, x)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(x, x, x))
    with FakeTensorMode():
        fake = torch.empty(2, 3, 5, 16, dtype=HALF)
        assert on("sim")(fake, fake, fake, is_causal=True).shape == fake.shape


BAD = {
    "list": lambda f: f([1.0], Q, Q),
    "no tensor v": lambda f: f(Q, Q, None),
    "1-D": lambda f: f(Q[0, 0, 0], Q, Q),
    "head_dim of k": lambda f: f(Q, Q[..., :8], Q),
    "batch": lambda f: f(Q, Q.repeat(2, 1, 1, 1)[:3], Q),
    "heads without enable_gqa": lambda f: f(Q.repeat(1, 2, 1, 1), Q, Q),
    "heads with enable_gqa": lambda f: f(Q, Q[:, :2], Q[:, :2], enable_gqa=True),
    "dtype of k": lambda f: f(Q, Q.float(), Q),
    "dropout": lambda f: f(Q, Q, Q, dropout_p=1.5),
    "integer mask": lambda f: f(Q, Q, Q, torch.zeros(5, 5, dtype=torch.int32)),
    "mask's shape": lambda f: f(Q, Q, Q, torch.zeros(4, 5, dtype=torch.bool)),
    "mask with more dimensions": lambda f: f(Q, Q, Q, Q.new_zeros(1, 1, 1, 5, 5)),
    "positional scale": lambda f: f(Q, Q, Q, None, 0.0, False, 0.5),
    "integers": lambda f: f(Q.int(), Q.int(), Q.int()),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("error::flashcore.FallbackWarning")  # an error is not a fallback
def test_wrong_calls_raise_as_in_torch(name):
    call = BAD[name]
    with pytest.raises(Exception) as torchs:
        call(F.scaled_dot_product_attention)
    with pytest.raises(type(torchs.value)):
        call(on("sim"))


@pytest.mark.parametrize("function", [flashcore.scaled_dot_product_attention, on("torch")])
def test_torch_compile_has_no_graph_break_and_one_graph_for_all_lengths(function):
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    counter = torch._dynamo.utils.counters["stats"]
    options = {"is_causal": True, "enable_gqa": True}
    graphs = []
    for seqlen in (5, 6, 7, 8, 9):
        q = randn(2, 4, seqlen, 16, dtype=torch.float32)
        k = randn(2, 2, 2 * seqlen, 16, dtype=torch.float32)
        before = counter["unique_graphs"]
        ours = compiled(q, k, k, **options)
        graphs.append(counter["unique_graphs"] - before)
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, k, **options))
    assert graphs == [1, 1, 0, 0, 0]  # the second makes the length dynamic


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16])
@pytest.mark.parametrize(("name", "shapes", "gqa"), CASES, ids=[c[0] for c in CASES])
@pytest.mark.filterwarnings("error::flashcore.FallbackWarning")
def test_shapes_on_the_gpu(name, shapes, gqa, dtype):
    q, k, v = (randn(*s, seed=i, device="cuda", dtype=dtype) for i, s in enumerate(shapes))
    ours = flashcore.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    exact = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, enable_gqa=gqa
    )
    torch.testing.assert_close(ours.double(), exact, **tolerances(dtype))
