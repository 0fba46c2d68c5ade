"""Test torch.compile(fullgraph=True) where it takes numbers for variables: every option, every
function.

A number becomes symbolic when it changes from call to call, when it is computed from sizes, or when
it is read from a tensor as the code runs (`item()`, with capture_scalar_outputs).
"""

from __future__ import annotations

import types

import pytest
import torch
import torch._dynamo.config
from op_inputs import compiled, gradients
from parameters import thorough_but
from roads import dense_inputs, lengths, packed_inputs, padded, varlen

import flashcore
from flashcore.compat.flash_attn import flash_attn_func, flash_attn_varlen_func


def _compat(q, k, v, *, scale=None, softcap=0.0, window=(-1, -1), causal=False):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flash_attn_func(q, k, v, 0.0, scale, causal, window, softcap)


def _compat_varlen(q, k, v, *, scale=None, softcap=0.0, window=(-1, -1), causal=False):
    ends = lengths(q.device)
    return flash_attn_varlen_func(q, k, v, *ends, 3, 4, 0.0, scale, causal, window, softcap)


FUNCTIONS = {
    "dense": (flashcore.attention, dense_inputs),
    "padded": (padded, dense_inputs),
    "packed": (varlen, packed_inputs),
    "compat": (_compat, dense_inputs),
    "compat, packed": (_compat_varlen, packed_inputs),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)
FEW = ("dense", "compat, packed")  # about a second each


def _float32(inputs, requires_grad=False):
    return inputs(dtype=torch.float32, requires_grad=requires_grad)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(
            name, backend,
            marks=() if name in FEW and backend == "aot_eager" else pytest.mark.thorough,
        )
        for name, backend in (*((name, "aot_eager") for name in FUNCTIONS), ("dense", "inductor"))
    ],
)  # fmt: skip
def test_options_computed_from_sizes(name, backend):
    """The scale may be head_dim ** -0.5 of a dimension that is dynamic."""
    function, inputs = FUNCTIONS[name]

    def call(q, k, v, like):
        n = like.shape[0]
        return function(
            q, k, v, scale=like.shape[1] ** -0.5, softcap=n * 0.5, window=(n // 2, n - 3)
        )

    fast, counter = compiled(call, backend, dynamic=True)
    for n in (11, 13, 9, 30):  # no size of another tensor, which dynamo would take for the same
        tensors = _float32(inputs, requires_grad=True)
        like = torch.empty(n, 2 * n)
        torch.testing.assert_close(fast(*tensors, like), call(*tensors, like))
    torch.testing.assert_close(
        gradients(lambda *x: fast(*x, like), *tensors),
        gradients(lambda *x: call(*x, like), *tensors),
    )
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", thorough_but(FEW, FUNCTIONS))
def test_options_that_are_attributes_of_several_modules(name):
    """Dynamo makes a float symbolic when it sees a second one."""
    function, inputs = FUNCTIONS[name]

    def call(module, q, k, v):
        return function(q, k, v, scale=module.scaling, softcap=module.cap, window=module.window)

    fast, counter = compiled(call)
    for i in range(1, 4):
        module = types.SimpleNamespace(scaling=0.5 / i, cap=3.0 * i, window=(i, i + 1))
        tensors = _float32(inputs)
        torch.testing.assert_close(fast(module, *tensors), call(module, *tensors))
    assert counter.frame_count <= 4


@every_function
def test_options_read_while_the_code_runs(name):
    """A size or factor that nothing is known of, when the graph is made."""
    function, inputs = FUNCTIONS[name]

    def call(q, k, v, factor, size):
        n = size.item()
        return function(q, k, v, scale=factor.item(), window=(n, n + 1), softcap=2 * factor.item())

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        fast, counter = compiled(call)
        for i in range(1, 4):
            tensors = _float32(inputs)
            numbers = torch.tensor(0.4 * i), torch.tensor(i)
            torch.testing.assert_close(fast(*tensors, *numbers), call(*tensors, *numbers))
        assert counter.frame_count == 1
        bad = [
            ((torch.tensor(-1.0), torch.tensor(1)), "scale=-1.0"),
            ((torch.tensor(torch.nan), torch.tensor(1)), "scale=nan"),
            ((torch.tensor(0.5), torch.tensor(-5)), "window"),
        ]
        for numbers, text in bad[:2] if "compat" in name else bad:  # there -5 is unbounded
            with pytest.raises(ValueError, match=text):
                fast(*_float32(inputs), *numbers)


@pytest.mark.thorough  # five seconds
def test_the_drop_in_with_a_symbolic_scale():
    def call(module, q, k, v):
        return flashcore.scaled_dot_product_attention(
            q, k, v, scale=module.scaling, dropout_p=module.dropout, enable_gqa=True
        )

    def of_sizes(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, scale=q.shape[-1] ** -0.5, enable_gqa=True
        )

    fast, _ = compiled(call)
    tensors = _float32(dense_inputs)
    for scaling in (0.5, 0.25, 0.1):
        module = types.SimpleNamespace(scaling=scaling, dropout=0.0)
        torch.testing.assert_close(fast(module, *tensors), call(module, *tensors))
    with flashcore.enable():
        fast, _ = compiled(of_sizes, dynamic=True)
        torch.testing.assert_close(fast(*tensors), of_sizes(*tensors))


@pytest.mark.parametrize(
    ("function", "how"),
    [
        (flashcore.attention_varlen, "item"),
        (flash_attn_varlen_func, "tensor"),
        *(
            pytest.param(function, how, marks=pytest.mark.thorough)
            for function, hows in (
                (flashcore.attention_varlen, ("tensor", "one element")),
                (flash_attn_varlen_func, ("item", "one element")),
            )
            for how in hows
        ),
    ],
)
def test_the_longest_length_of_this_step(function, how):
    """No recompile a step, and no look at a value where the code is compiled."""

    def call(q, k, v, cu_q, cu_k):
        longest = [ends.diff().max() for ends in (cu_q, cu_k)]
        if how == "item":
            longest = [x.item() for x in longest]
        elif how == "one element":
            longest = [x[None] for x in longest]
        return function(q, k, v, cu_q, cu_k, *longest, causal=True)

    with torch._dynamo.config.patch(capture_scalar_outputs=how == "item"):
        fast, counter = compiled(call, dynamic=True)
        tensors = _float32(packed_inputs, requires_grad=True)
        graphs = 0
        for ends in ([0, 3, 6], [0, 1, 5], [0, 0, 2], [2, 2, 2]):
            cu = torch.tensor(ends, dtype=torch.int32)
            torch.testing.assert_close(fast(*tensors, cu, cu), call(*tensors, cu, cu))
            graphs = graphs or counter.frame_count  # dynamo may begin again with fewer variables
        got, want = (gradients(lambda *x, f=f: f(*x, cu, cu), *tensors) for f in (fast, call))
        torch.testing.assert_close(got, want)
        assert counter.frame_count == graphs


def test_an_int_that_changes_is_compiled_twice_at_most():
    def call(q, k, v, cu, longest):
        return flashcore.attention_varlen(q, k, v, cu, cu, longest, longest)

    fast, counter = compiled(call)
    tensors = _float32(packed_inputs)
    for n in (3, 4, 5, 6, 2):
        cu = torch.tensor([0, n], dtype=torch.int32)
        torch.testing.assert_close(fast(*tensors, cu, n), call(*tensors, cu, n))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("value", [torch.tensor(4), torch.tensor([4]), torch.tensor(4).int()])
def test_a_tensor_for_the_longest_length_in_eager_code(value):
    q, k, v = _float32(packed_inputs)
    cu_q, cu_k = lengths("cpu")
    want = flashcore.attention_varlen(q, k, v, cu_q, cu_k, 4, 4)
    for function in (flashcore.attention_varlen, flash_attn_varlen_func):
        assert torch.equal(function(q, k, v, cu_q, cu_k, value, value), want)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.tensor(4.0), "integer tensor with one element"),
        (torch.tensor([4, 4]), "integer tensor with one element"),
        (torch.tensor(True), "integer tensor with one element"),
        (4.0, "must be an int"),
    ],
)
def test_what_is_no_length_is_refused(value, text):
    q, k, v = _float32(packed_inputs)
    with pytest.raises(TypeError, match=f"max_seqlen_k .*{text}"):
        flashcore.attention_varlen(q, k, v, *lengths("cpu"), 4, value)
    with pytest.raises(ValueError, match="max_seqlen_q=-1 must not be negative"):
        flashcore.attention_varlen(q, k, v, *lengths("cpu"), torch.tensor(-1), 4)


@pytest.mark.gpu
def test_a_tensor_on_the_gpu_is_not_waited_for():
    q, k, v = packed_inputs(torch.float16, "cuda")
    ends = lengths("cuda")
    want = flashcore.attention_varlen(q, k, v, *ends, 3, 4)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        longest = [x.diff().max() for x in ends]
        found = flashcore.attention_varlen(q, k, v, *ends, *longest)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, want, atol=1e-3, rtol=1e-2)


@pytest.mark.gpu
@every_function
def test_symbolic_options_on_a_gpu(name):
    function, inputs = FUNCTIONS[name]

    def call(q, k, v, like):
        n = like.shape[0]
        return function(q, k, v, scale=like.shape[1] ** -0.5, softcap=n * 0.5, window=(n // 2, 1))

    fast, counter = compiled(call, "inductor", dynamic=True)
    for n in (11, 13, 9):
        tensors = inputs(torch.float16, "cuda")
        like = torch.empty(n, 2 * n)
        torch.testing.assert_close(fast(*tensors, like), call(*tensors, like))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["padded", "packed", "dense"])
def test_export_with_symbolic_options(name, strict):
    function, inputs = FUNCTIONS[name]

    class Module(torch.nn.Module):
        def forward(self, q, k, v, like):
            n = like.shape[0]
            return function(q, k, v, scale=n**-0.5, softcap=0.5 * n, window=(n // 2, n))

    n = torch.export.Dim("n", min=2, max=100)
    shapes = ({}, {}, {}, {0: n})
    tensors = _float32(inputs)
    program = torch.export.export(
        Module(), (*tensors, torch.empty(8)), dynamic_shapes=shapes, strict=strict
    )
    assert sum("flashcore" in str(node.target) for node in program.graph.nodes) == 1
    for size in (4, 11):
        like = torch.empty(size)
        torch.testing.assert_close(program.module()(*tensors, like), Module()(*tensors, like))
