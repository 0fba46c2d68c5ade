"""Test explain and explain_varlen of sequences that differ in length: what they name runs."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch

import flashcore
import flashcore.sim
from flashcore.backends import gradients
from flashcore.base import env
from flashcore.selection import tuned
from flashcore.selection.select import select_plan

HALF, INT32 = torch.float16, torch.int32
REFUSED = (TypeError, ValueError, NotImplementedError, flashcore.BackendUnavailableError)


def half(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.zeros(shape, dtype=HALF, requires_grad=grad)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=INT32)


def packed(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], **given: Any) -> dict[str, Any]:
    """Return a call of attention_varlen; lengths that nobody may read are none."""
    ends = torch.full((len(lengths_q) + 1,), 10**9, dtype=INT32)
    usual = {
        "q": half(sum(lengths_q), 8, 64), "k": half(sum(lengths_k), 2, 64),
        "v": half(sum(lengths_k), 2, 64), "cu_seqlens_q": ends, "cu_seqlens_k": ends.clone(),
        "max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k),
    }  # fmt: skip
    return usual | given


def padded(batch: int, seqlen_q: int, seqlen_k: int, **given: Any) -> dict[str, Any]:
    """Return a call of attention with seqlens_k."""
    lengths = torch.full((batch,), -(10**9), dtype=INT32)
    k = half(batch, 2, seqlen_k, 64)
    return {"q": half(batch, 8, seqlen_q, 64), "k": k, "v": k.clone(), "seqlens_k": lengths} | given


EIGHT = torch.zeros(3, 2, 400, 64).to(torch.float8_e4m3fn)
SCALES = {"k_scale": torch.ones(()), "v_scale": torch.ones(3, 2)}
CALLS: dict[str, tuple[Any, Any, dict[str, Any]]] = {}
for _name, _given in {
    "packed": packed((70, 3), (70, 3), causal=True),
    "packed, few queries": packed((1, 1, 2), (3000, 5, 9000)),
    "packed, window, softcap": packed((70, 3), (50, 9), window=(5, 3), softcap=4.0),
    "packed, odd head_dim": packed((70,), (70,), q=half(70, 8, 20), k=half(70, 2, 20)),
    "packed, invariant": packed((1, 1), (3000, 3000), batch_invariant=True),
    "packed, sinks": packed((9,), (9,), sinks=torch.zeros(8), return_max_score=True),
    "packed, a tensor as bound": packed((9, 5), (9, 5), max_seqlen_q=torch.tensor(9)),
}.items():
    CALLS[_name] = flashcore.attention_varlen, flashcore.explain_varlen, _given
for _name, _given in {
    "padded": padded(3, 200, 300, causal=True),
    "padded, decoding": padded(3, 1, 4000),
    "padded, mask": padded(3, 20, 400, mask=half(400)),
    "padded, 8 bits": padded(3, 1, 400, k=EIGHT, v=EIGHT, **SCALES),
    "padded, 8 bits, few": padded(3, 5, 400, k=EIGHT, v=EIGHT, causal=True, **SCALES),
    "padded, invariant": padded(3, 1, 4000, batch_invariant=True),
    "padded, sinks, lse": padded(2, 9, 30, sinks=torch.zeros(8), return_lse=True),
    "padded, no batch dimension": {
        "q": half(8, 9, 64), "k": half(2, 30, 64), "v": half(2, 30, 64), "seqlens_k": int32(5)[0],
    },
    "dense, invariant": {
        "q": half(2, 8, 1, 64), "k": half(2, 2, 9000, 64), "v": half(2, 2, 9000, 64),
        "batch_invariant": True,
    },
}.items():  # fmt: skip
    CALLS[_name] = flashcore.attention, flashcore.explain, _given


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the problems and plans that the simulator is given from now on."""
    used: list[Any] = []

    def simulate(problem: Any, plan: Any, *_: Any, **__: Any) -> None:
        used.append((problem, plan))

    monkeypatch.setattr(flashcore.sim, "simulate", simulate)
    return used


@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("name", CALLS)
def test_the_plan_is_the_one_that_runs(
    name: str, arch: str, simulated: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simulator is given the plan that is named."""
    monkeypatch.setenv(env.SIM_ARCH.name, arch)
    call, explain, given = CALLS[name]
    call(**given, backend="sim")
    found = explain(**given, backend="sim", file=io.StringIO())
    ((_, plan),) = simulated
    assert found.plan == plan
    assert plan.arch == int(arch)
    # Without the simulator the same is said of a GPU.
    preview = explain(**given, arch=int(arch), file=io.StringIO())
    assert preview.backend == "torch"
    assert preview.plan == plan


@pytest.mark.parametrize("name", ["packed", "packed, window, softcap", "padded"])
def test_the_backward_is_the_one_that_runs(
    name: str, simulated: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.SIM_ARCH.name, "90")
    used: list[Any] = []
    monkeypatch.setattr(
        "flashcore.sim.run_bwd.simulate_backward",
        lambda problem, plan, *_, **__: used.append(plan),
    )
    call, explain, given = CALLS[name]
    leaves = {x: given[x].detach().requires_grad_() for x in "qkv"}
    out = call(**given | leaves, backend="sim")
    out.backward(torch.ones_like(out))
    found = explain(**given | leaves, backend="sim", file=io.StringIO())
    assert found.gradient.code == "sim"
    assert found.gradient_plans == tuple(used)
    assert len(used) >= 2
    preview = explain(**given, arch=90, file=io.StringIO())
    assert preview.gradient.code == "sm90"
    assert preview.gradient_plans == tuple(used)


@pytest.mark.parametrize("name", ["packed", "padded"])
def test_gradients_sequence_by_sequence_are_told(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no kernel computes all of them the host reads the lengths, and code is chosen for each
    sequence: that which really computes one is named."""
    call, explain, given = CALLS[name]
    lengths = {"seqlens_k": int32(300, 300, 300)}
    if name == "packed":
        ends = int32(0, 70, 73)
        lengths = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    leaves = {x: given[x].detach().requires_grad_() for x in "qkv"}
    chosen: list[str] = []
    real = gradients.choose_backward

    def choose(*arguments: Any, **options: Any) -> Any:
        chosen.append(real(*arguments, **options).code)
        return real(*arguments, **options)

    monkeypatch.setattr(gradients, "choose_backward", choose)
    out = call(**given | leaves | lengths)
    out.backward(torch.ones_like(out))
    found = explain(**given, file=io.StringIO())
    assert found.gradient.code == chosen[-1]
    assert found.gradient_plans == ()
    assert "the host reads the lengths" in str(found)
    assert "the host reads the lengths" not in "".join(
        explain(**given, arch=90, file=io.StringIO()).gradient_notes
    )


def test_torch_computes_gradients_of_packed_sequences_at_once() -> None:
    """On a GPU older than Hopper, by its FlashAttention-2, unless there is a soft cap."""
    given = packed((70, 3), (70, 3))
    found = flashcore.explain_varlen(**given, arch=80, file=io.StringIO())
    assert (found.gradient.code, found.gradient_notes) == ("flash", ())
    found = flashcore.explain_varlen(**given, softcap=3.0, arch=80, file=io.StringIO())
    assert found.gradient.code == "tiled"
    assert "each is computed by itself" in found.gradient_notes[0]


def test_8_bits_have_no_gradient() -> None:
    given = CALLS["padded, 8 bits"][2]
    found = flashcore.explain(**given, arch=90, file=io.StringIO())
    assert found.gradient.code == "none"
    assert "8 bits" in found.gradient.reason
    assert "cache float8_e4m3fn" in str(found)
    assert found.plan is not None
    assert found.plan.cache_dtype == "float8_e4m3fn"


def test_measured_tiles_are_named_where_a_call_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch-invariant call does not, for measurements depend on the batch."""
    given: dict[str, Any] = {**padded(2, 9, 300), "arch": 90, "file": io.StringIO()}
    usual = {x: flashcore.explain(**given, batch_invariant=x) for x in (False, True)}
    monkeypatch.setattr(
        tuned, "find", lambda problem, plan: tuned.Found(usual[False].alternatives[0], "measured")
    )
    for is_invariant, before in usual.items():
        found = flashcore.explain(**given, batch_invariant=is_invariant)
        assert found.plan == select_plan(found.problem, 90)
        assert (found.plan == before.plan) is is_invariant
        assert ("measured" in found.notes) is not is_invariant


def test_what_decides_is_told() -> None:
    found = str(flashcore.explain(**padded(16, 1, 8000), arch=90, file=io.StringIO()))
    for text in ("seqlens_k", "cut into equal parts", "4 heads of q that share one of k and v"):
        assert text in found
    many = str(flashcore.explain_varlen(**packed((70, 3), (70, 3)), arch=90, file=io.StringIO()))
    assert "packed 73/73 rows" in many
    assert "cut into equal parts" not in many


def test_a_gpu_that_falls_back_is_told() -> None:
    """No kernel reads 8-bit rows that start at odd addresses, which are not copied either."""
    odd = torch.zeros(3, 2, 400, 72).to(torch.float8_e4m3fn)[..., 1:65]
    given = padded(3, 1, 400, k=odd, v=odd, **SCALES)
    found = flashcore.explain(**given, arch=80, file=io.StringIO())
    assert found.plan is None
    assert "on an sm_80 GPU PyTorch computes it, too" in str(found)
    assert "falls back to PyTorch" in found.warnings[0]
    assert flashcore.explain(**given, file=io.StringIO()).warnings == ()


EMPTY: dict[str, tuple[Any, dict[str, Any]]] = {
    "no queries": (flashcore.explain, padded(9, 0, 5000)),
    "no sequences": (flashcore.explain, padded(0, 17, 300)),
    "no rows": (flashcore.explain_varlen, packed((0,), (9,))),
    "no keys": (flashcore.explain_varlen, packed((9,), (0,))),
    "no pages": (
        flashcore.explain_with_kvcache,
        {
            "q": half(3, 8, 1, 64), "k_cache": half(0, 2, 16, 64), "v_cache": half(0, 2, 16, 64),
            "page_table": torch.zeros(3, 0, dtype=INT32), "seqlens_k": int32(0, 0, 0),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("options", [{"arch": 90}, {"backend": "sim"}, {"batch_invariant": True}])
def test_nothing_to_compute_takes_no_kernel(name: str, options: dict[str, Any]) -> None:
    """Rules for tiles need not hold then, and no kernel is launched."""
    explain, given = EMPTY[name]
    found = explain(**given, **options, file=io.StringIO())
    assert found.plan is None
    assert "nothing to compute" in str(found)


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "lengths of another batch": ("padded", {"seqlens_k": int32(1)}),
    "lengths in int64": ("padded", {"seqlens_k": torch.zeros(3, dtype=torch.int64)}),
    "no lengths of 8 bits": ("padded, 8 bits", {"seqlens_k": None}),
    "no scale": ("padded, 8 bits", {"k_scale": None}),
    "a scale of float16": ("padded, 8 bits", {"v_scale": torch.ones((), dtype=HALF)}),
    "scales of 16 bits": ("padded", {"k_scale": torch.ones(()), "v_scale": torch.ones(())}),
    "a gradient of 8 bits": ("padded, 8 bits", {"q": half(3, 8, 1, 64, grad=True)}),
    "a gradient of a mask": ("padded, mask", {"mask": half(400, grad=True)}),
    "invariant": ("padded", {"batch_invariant": 1}),
    "ends in int64": ("packed", {"cu_seqlens_q": torch.zeros(3, dtype=torch.int64)}),
    "ends of another batch": ("packed", {"cu_seqlens_k": int32(0, 70)}),
    "a negative bound": ("packed", {"max_seqlen_k": -1}),
    "a bound that is none": ("packed", {"max_seqlen_q": "long"}),
    "padded tensors": ("packed", {"q": half(1, 8, 9, 64)}),
    "heads": ("packed", {"k": half(73, 3, 64), "v": half(73, 3, 64)}),
    "a mask": ("packed", {"mask": half(9)}),
    "deterministic": ("packed", {"deterministic": None}),
    "return_max_score": ("packed", {"return_max_score": 1}),
    "backend": ("packed", {"backend": "cuda"}),
    "a GPU's kernel": ("packed", {"backend": "sm90"}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_the_call_refuses_is_refused_alike(name: str) -> None:
    of, changes = BAD[name]
    call, explain, given = CALLS[of]
    with pytest.raises(REFUSED) as caught:
        call(**given | changes)
    text = str(caught.value).replace(f"{call.__name__}()", f"{explain.__name__}()")
    with pytest.raises(type(caught.value), match=f"^{re.escape(text)}$"):
        explain(**given | changes, file=io.StringIO())
