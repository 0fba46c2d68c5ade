"""aten's flash operators on flashcore, through torch's own door: what they compute, what falls
back, and that all is as before afterwards.

On the CPU torch has no such kernels, so there the operators themselves are called, with backend
"sim" or "torch"; their schemas, autograd formulas and fakes are torch's as on a GPU.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from door_inputs import by_varlen_attn, check, check_packed, dense, packed, randn
from gradient_rule import wrong_gradients
from torch import Tensor

import flashcore
import flashcore.integrations.torch as door
from backends import SIM
from flashcore.backends import torch_own
from flashcore.dropins import aten_fallback, aten_flash

attention_module = pytest.importorskip("torch.nn.attention")
if not hasattr(attention_module, "register_flash_attention_impl"):
    pytest.skip("this torch has no door for flash attention", allow_module_level=True)

aten = torch.ops.aten
on_cpu = pytest.mark.parametrize("backend", ["torch", SIM])


@pytest.fixture(autouse=True)
def _torchs_own_again() -> Iterator[None]:
    aten_fallback._warned.clear()
    yield
    assert attention_module.current_flash_attention_impl() is None
    assert not torch_own._kept
    assert not has_kernel(aten_flash.FORWARD, "CPU")


def has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)


@on_cpu
@pytest.mark.parametrize("causal", [False, True])
def test_sdpas_operator_forward_and_backward(backend: str, causal: bool) -> None:
    q, k, v, dout = dense()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with door.activate(backend=backend):
        result = aten._scaled_dot_product_flash_attention(*leaves, 0.0, causal, scale=0.3)
        gradients = torch.autograd.grad(result[0], leaves, dout)
    options: dict[str, Any] = {"causal": causal, "scale": 0.3}
    q, k, v = (x.detach() for x in leaves)
    check(result[0].detach(), result[1].detach(), q, k, v, **options)
    assert wrong_gradients(gradients, q, k, v, None, dout, None, options) == []
    assert result[2:6] == (None, None, 20, 35)


@on_cpu
@pytest.mark.parametrize(
    ("causal", "left", "right"), [(False, None, None), (True, -1, 0), (True, 9, 0), (False, 4, 6)]
)
def test_rows_forward_and_backward(
    backend: str, causal: bool, left: int | None, right: int | None
) -> None:
    q, k, v, dout = dense(rows=True)
    options: dict[str, Any] = {"window_size_left": left, "window_size_right": right}
    with door.activate(backend=backend):
        out, lse, *random = aten._flash_attention_forward(
            q, k, v, None, None, 20, 35, 0.0, causal, False, **options
        )
        gradients = aten._flash_attention_backward(
            dout, q, k, v, out, lse, None, None, 20, 35, 0.0, causal, *random[:2], **options
        )
    q, k, v, dout, out = (x.transpose(1, 2) for x in (q, k, v, dout, out))
    window = None if left is None else (left, right)
    meant: dict[str, Any] = {"causal": causal, "window": window}
    check(out, lse, q, k, v, **meant)
    gradients = tuple(x.transpose(1, 2) for x in gradients)
    assert wrong_gradients(gradients, q, k, v, None, dout, None, meant) == []


@on_cpu
@pytest.mark.parametrize("compiled", [None, "aot_eager"])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (5, 0)])
def test_varlen_attn_forward_and_backward(
    backend: str, window: tuple[int, int], compiled: str | None
) -> None:
    x, cu, ends = packed()
    x[1:3] = (t.repeat_interleave(2, 1) for t in x[1:3])
    with door.activate(backend=backend):
        out, lse, gradients = by_varlen_attn(x, cu, window, compiled)
    check_packed(out, gradients, lse, x, ends, window=window)


@on_cpu
def test_packed_rows_with_grouped_heads(backend: str) -> None:
    x, cu, ends = packed()
    with door.activate(backend=backend):
        out, lse, *random = aten._flash_attention_forward(*x[:3], cu, cu, 23, 23, 0.0, True, False)
        gradients = aten._flash_attention_backward(
            x[3], *x[:3], out, lse, cu, cu, 23, 23, 0.0, True, *random[:2]
        )
    check_packed(out, gradients, lse, x, ends, causal=True)


@pytest.mark.skipif(not hasattr(aten, aten_flash.IN_PLACE), reason="newer than this torch")
def test_in_place() -> None:
    x, cu, _ = packed()
    out = torch.empty_like(x[0])
    with door.activate(backend="torch"):
        want, lse, *_ = aten._flash_attention_forward(*x[:3], cu, cu, 23, 23, 0.0, True, False)
        given = aten._flash_attention_forward_no_dropout_inplace(
            out, *x[:3], cu, cu, 23, 23, 0.0, True, False
        )
    assert torch.equal(out, want)
    assert torch.equal(given, lse)


def test_used_keys_of_a_padded_batch() -> None:
    q, k, v, _ = dense(rows=True)
    used = torch.tensor([35, 12], dtype=torch.int32)
    with door.activate(backend="torch"):
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, None, None, 20, 35, 0.0, True, False, seqused_k=used
        )
    for b, n in enumerate(used.tolist()):
        parts = (t[b : b + 1, :rows].transpose(1, 2) for t, rows in ((q, 20), (k, n), (v, n)))
        check(out[b : b + 1].transpose(1, 2), lse[b : b + 1], *parts, causal=True)


@pytest.mark.parametrize("kind", ["pages", "pages by cum_seq_k", "a part of packed keys"])
@pytest.mark.parametrize(
    ("backend", "device"),
    [("torch", "cpu"), ("sim", "cpu"), pytest.param("auto", "cuda", marks=pytest.mark.gpu)],
)
@pytest.mark.filterwarnings("ignore:flashcore.attention_with_kvcache copies")
def test_packed_queries_over_a_cache(backend: str, device: str, kind: str) -> None:
    """varlen_attn passes these on: keys in pages, with wild entries behind the end; seqused_k."""
    known = {a.name for a in aten._flash_attention_forward.default._schema.arguments}
    if kind != "a part of packed keys" and "block_table" not in known:
        pytest.skip("newer than this torch")
    counts, used = [3, 1], [20, 9]
    q = randn(4, 4, 16).to(device)
    k, v = randn(6, 8, 2, 16).to(device), randn(6, 8, 2, 16).to(device) + 1
    table = torch.tensor([[4, 0, 5], [2, 1, -1]], dtype=torch.int32, device=device)
    cu_q = torch.tensor([0, 3, 4], dtype=torch.int32, device=device)
    cu_k = torch.tensor([0, *used], device=device).cumsum(0).int()
    lengths = torch.tensor(used, dtype=torch.int32, device=device)
    tokens = [torch.stack([k, v])[:, table[b].clamp(min=0)].flatten(1, 2) for b in range(2)]
    options: dict[str, Any] = {"block_table": table, "seqused_k": lengths}
    arguments = [q, k, v, cu_q, None, 3, 24, 0.0, True, False]
    if kind == "pages by cum_seq_k":
        del options["seqused_k"]
        arguments[4] = cu_k
    elif kind == "a part of packed keys":
        rows = torch.cat([tokens[0][:, :22], tokens[1][:, :11]], dim=1)
        rows[:, 20:22], rows[:, 31:] = torch.nan, torch.nan
        cu_k = torch.tensor([0, 22, 33], dtype=torch.int32, device=device)
        arguments = [q, *rows, cu_q, cu_k, 3, 22, 0.0, True, False]
        options = {"seqused_k": lengths}
    with door.activate(backend=backend):
        out, lse, *_ = aten._flash_attention_forward(*arguments, **options)
    assert out.stride() == q.stride()
    begin = 0
    for b, (count, n) in enumerate(zip(counts, used, strict=True)):
        own = slice(begin, begin + count)
        parts = (x.transpose(0, 1)[None] for x in (q[own], *tokens[b][:, :n]))
        check(out[own].transpose(0, 1)[None], lse[None, :, own], *parts, causal=True)
        begin += count


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_as_torchs_fakes_say(layout: str) -> None:
    """Shapes, strides and dtypes: code that torch.compile generates relies on them."""
    q, k, v, dout = (LAYOUTS[layout](x) for x in dense())
    packed_x, cu, _ = packed()
    rows = [x.transpose(1, 2) for x in (q, k, v, dout)]

    def everything(q, k, v, dout, rows, packed_x, cu):
        a = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
        b = aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, a[0], a[1], None, None, 20, 35, 0.0, True, a[6], a[7]
        )
        c = aten._flash_attention_forward(*rows[:3], None, None, 20, 35, 0.0, True, False)
        d = aten._flash_attention_forward(*packed_x[:3], cu, cu, 23, 23, 0.0, True, False)
        return (*a, *b, *c, *d)

    with door.activate(backend="torch"):
        have = everything(q, k, v, dout, rows, packed_x, cu)
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = torch.utils._pytree.tree_map(
                mode.from_tensor, (q, k, v, dout, rows, packed_x, cu)
            )
            said = everything(*fakes)
    for i, (x, fake) in enumerate(zip(have, said, strict=True)):
        if not isinstance(x, Tensor):
            assert x == fake
            continue
        assert (x.shape, x.dtype) == (fake.shape, fake.dtype), i
        assert x.stride() == fake.stride(), i


def test_compiled_code() -> None:
    q, k, v, dout = dense()
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return aten._scaled_dot_product_flash_attention(q * 1.0, k, v, 0.0, True)[0]

    with door.activate(backend="torch"):
        out = torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves)
        gradients = torch.autograd.grad(out, leaves, dout)
    q, k, v = (x.detach() for x in leaves)
    check(out.detach(), None, q, k, v, causal=True)
    assert wrong_gradients(gradients, q, k, v, None, dout, None, {"causal": True}) == []


@contextlib.contextmanager
def torchs_own_on_cpu(calls: list[tuple[str, tuple[Any, ...]]]) -> Iterator[None]:
    """Put functions in the place of torch's kernels, which write down that they were called."""
    library = torch.library.Library("aten", "IMPL")

    def forward(*arguments: Any, **options: Any) -> tuple[Any, ...]:
        calls.append((aten_flash.FORWARD, arguments))
        q = arguments[0]
        lse = torch.zeros(q.shape[0], q.shape[-2], q.shape[1])
        return torch.zeros_like(q), lse, *aten_flash._auxiliary(q)

    def backward(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        calls.append((aten_flash.BACKWARD, arguments))
        return tuple(torch.zeros_like(x) for x in arguments[1:4])

    library.impl(aten_flash.FORWARD, forward, "CPU")
    library.impl(aten_flash.BACKWARD, backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


@pytest.mark.parametrize(
    ("changes", "options", "text"),
    [
        ({7: 0.5}, {}, "dropout_p=0.5"),
        ({9: True}, {}, "return_debug_mask"),
        ({}, {"alibi_slopes": torch.ones(4)}, "alibi_slopes"),
        ({}, {"block_table": torch.zeros(2, 1, dtype=torch.int32)}, "block_table without"),
        ({}, {"num_splits": 1}, "num_splits=1"),
        ({}, {"scale": -1.0}, "scale=-1.0"),
        ({3: torch.zeros(3, dtype=torch.int32)}, {}, "one of cum_seq_q and cum_seq_k"),
        ({2: randn(2, 35, 2, 8)}, {}, "head_dim 16, 16 and 8"),
    ],
)
def test_what_flashcore_does_not_compute_goes_to_torchs_kernel(
    changes: dict[int, Any], options: dict[str, Any], text: str
) -> None:
    known = {a.name for a in aten._flash_attention_forward.default._schema.arguments}
    if not options.keys() <= known:
        pytest.skip("newer than this torch")
    q, k, v, _ = dense(rows=True)
    arguments = [q, k, v, None, None, 20, 35, 0.0, False, False]
    for i, value in changes.items():
        arguments[i] = value
    calls: list[tuple[str, tuple[Any, ...]]] = []
    with torchs_own_on_cpu(calls), door.activate(backend="torch"):
        with pytest.warns(flashcore.FallbackWarning, match=text):
            aten._flash_attention_forward(*arguments, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            aten._flash_attention_forward(*arguments, **options)
    assert [name for name, _ in calls] == [aten_flash.FORWARD] * 2


def test_dropouts_backward_goes_to_torchs_kernel() -> None:
    q, k, v, dout = dense(rows=True)
    lse, state = torch.zeros(2, 4, 20), torch.zeros(2, dtype=torch.uint64)
    calls: list[tuple[str, tuple[Any, ...]]] = []
    with torchs_own_on_cpu(calls), door.activate(backend="torch"):
        with pytest.warns(flashcore.FallbackWarning, match=r"dropout_p=0\.1"):
            aten._flash_attention_backward(
                dout, q, k, v, q, lse, None, None, 20, 35, 0.1, False, state, state
            )
    assert [name for name, _ in calls] == [aten_flash.BACKWARD]


def test_flashcores_own_fallback_is_torchs_kernel() -> None:
    """It would be called without end if it found itself in the operator."""
    q, k, v, dout = dense(rows=True)
    lse, state = torch.zeros(2, 4, 20), torch.zeros(2, dtype=torch.uint64)
    arguments = dout, q, k, v, q, lse, None, None, 20, 35, 0.0, False, state, state
    calls: list[tuple[str, tuple[Any, ...]]] = []
    with torchs_own_on_cpu(calls), door.activate(backend="torch"):
        torch_own.call_own(aten_flash.BACKWARD, "CPU", *arguments)
    assert [name for name, _ in calls] == [aten_flash.BACKWARD]


def test_without_a_kernel_of_torchs_own_the_error_says_why() -> None:
    q, k, v, _ = dense()
    with (
        door.activate(backend="torch"),
        pytest.raises(flashcore.BackendUnavailableError, match=r"dropout_p=0\.5"),
    ):
        aten._scaled_dot_product_flash_attention(q, k, v, 0.5)


def test_activate_takes_effect_at_once_and_ends() -> None:
    assert not has_kernel(aten_flash.FORWARD, "CPU")
    door.activate(backend="torch")
    assert attention_module.current_flash_attention_impl() == "flashcore"
    assert has_kernel(aten_flash.FORWARD, "CPU")
    door.activate(backend="sim")  # again, another backend
    door.deactivate()
    door.deactivate()  # nothing happens


def test_torchs_own_functions_activate_and_restore_it() -> None:
    door.register(backend="torch")
    assert "flashcore" in attention_module.list_flash_attention_impls()
    attention_module.activate_flash_attention_impl("flashcore")
    assert has_kernel(aten_flash.SDPA_BACKWARD, "CPU")
    attention_module.restore_flash_attention_impl()


def test_the_one_that_was_active_before_is_back() -> None:
    class Handle:
        removed = False

        def remove(self) -> None:
            self.removed = True

    handles: list[Handle] = []

    def make() -> Handle:
        handles.append(Handle())
        return handles[-1]

    attention_module.register_flash_attention_impl("other", register_fn=make)
    attention_module.activate_flash_attention_impl("other")
    with contextlib.suppress(KeyError), door.activate(backend="torch"):
        assert handles[0].removed
        raise KeyError  # the block ends by an exception too
    assert attention_module.current_flash_attention_impl() == "other"
    door.deactivate()  # not ours
    assert attention_module.current_flash_attention_impl() == "other"
    attention_module.restore_flash_attention_impl()


def test_a_torch_without_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(attention_module, "register_flash_attention_impl")
    with pytest.raises(flashcore.BackendUnavailableError, match=torch.__version__.split("+")[0]):
        door.activate()


@pytest.mark.parametrize(
    ("options", "error"), [({"backend": "cuda"}, ValueError), ({"prefer": 1}, TypeError)]
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        door.activate(**options)


def test_autocast_leaves_the_operators_alone() -> None:
    """A kernel below the dispatcher gets what the operator was given, and returns its dtype."""
    x, cu, _ = packed()
    with door.activate(backend="torch"), torch.autocast("cpu", dtype=torch.bfloat16):
        out, *_ = aten._flash_attention_forward(*x[:3], cu, cu, 23, 23, 0.0, False, False)
        rows = dense(rows=True)
        other, *_ = aten._flash_attention_forward(*rows[:3], None, None, 20, 35, 0.0, False, False)
    assert out.dtype == other.dtype == torch.float16
