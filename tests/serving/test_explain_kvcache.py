"""Test that explain_with_kvcache names the kernels that a step really gets, and touches nothing.

Its bad input is tested beside that of the call, in test_with_kvcache_bad_input.py."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import standin
import torch
from decoder_steps import BATCH, DIM, HEADS_KV, HEADS_Q, STEPS, half, int32, step_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flashcore
import flashcore.sim
from flashcore.base import env
from flashcore.launch import append_call
from flashcore.launch import kernel_call as launch
from flashcore.serving import attend

LEFTPAD = {"cache_leftpad": int32([1, 0, 2])}
TREE = {"tree_mask": torch.ones(3, 3, dtype=torch.bool)}
TREES_OF_FEW = {"max_seqlen_q": 3, "tree_mask": torch.ones(BATCH, 1, 3, 3, dtype=torch.bool)}


def at_odd_address(*shape: int) -> Tensor:
    """Return a tensor of 16 bits that begins at a multiple of 8 bytes alone."""
    return half(math.prod(shape) + 4)[4:].view(shape)


# Beside the steps of decoder_steps: changes of one of them.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "padding on the left": ("pages", LEFTPAD),
    "padding on the left, packed": ("pages, packed", LEFTPAD),
    "padding on the left, one piece": ("one piece, several, rotary", LEFTPAD),
    "few packed": ("pages, packed", {"max_seqlen_q": 3}),
    "few packed, invariant": ("pages, packed", {"max_seqlen_q": 3, "batch_invariant": True}),
    "packed, one piece": ("one piece, rows, packed, rotary", {"cache_batch_idx": int32([4, 0, 1])}),
    "a tree": ("pages, several, out", TREE),
    "a tree, one piece": ("one piece, several, rotary", TREE),
    "trees, packed": ("pages, packed", TREE),
    "trees, packed, one piece": ("one piece, rows, packed, rotary", TREE),
    "trees, few packed": ("pages, packed", TREES_OF_FEW),
    "trees, padding on the left, packed": ("pages, packed", TREES_OF_FEW | LEFTPAD),
    "a tree and a mask": ("pages, several, out", TREE | {"mask": half(3, 48)}),
    "a mask of odd rows": ("pages, several, out", {"mask": half(3, 49)[:, 1:]}),
    "a window": ("pages", {"window": (9, 0), "softcap": 3.0}),
    "q of odd rows": ("pages", {"q": half(BATCH, HEADS_Q, 1, DIM + 4)[..., 4:]}),
    "q at an odd address": ("pages, several, out", {"q": at_odd_address(BATCH, HEADS_Q, 3, DIM)}),
    "a mask at an odd address": ("pages, several, out", {"mask": at_odd_address(3, 48)}),
    "a cache at an odd address": ("one piece, new", {"k_cache": at_odd_address(BATCH, 2, 48, DIM)}),
    "small pages": (
        "pages",
        {"k_cache": half(40, HEADS_KV, 5, DIM), "v_cache": half(40, HEADS_KV, 5, DIM)},
    ),
}
ALL = (*STEPS, *OTHERS)


def given_for(name: str) -> dict[str, Any]:
    of, changes = OTHERS.get(name, (name, {}))
    return step_of(of) | changes


def explained(given: dict[str, Any], **options: Any) -> flashcore.Explanation:
    return flashcore.explain_with_kvcache(**given, **options, file=io.StringIO())


@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("name", ALL)
def test_the_plan_is_the_one_that_runs(
    name: str, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simulator is given the plan that is named."""
    monkeypatch.setenv(env.SIM_ARCH.name, arch)
    used: list[Any] = []

    def simulate(problem: Any, plan: Any, *_: Any, **__: Any) -> None:
        used.append((problem, plan))

    monkeypatch.setattr(flashcore.sim, "simulate", simulate)
    given = given_for(name)
    flashcore.attention_with_kvcache(**given, backend="sim")
    ((problem, plan),) = used
    found = explained(given, backend="sim")
    assert found.plan == plan
    assert plan.arch == int(arch)
    assert found.problem.describe() == problem.describe()


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", STEPS)
def test_a_gpu_launches_what_is_said_of_it(
    name: str, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in for a GPU: the kernel that appends, too."""
    found = explained(step_of(name), arch=arch)
    standin.install(monkeypatch, arch)
    attending: list[Any] = []
    appending: list[Any] = []

    def compiled(plan: Any) -> Any:
        attending.append(plan)
        return SimpleNamespace(name=plan.kernel)

    load = append_call.load

    def loaded(plan: Any, *others: Any) -> Any:
        appending.append(plan)
        return load(plan, *others)

    monkeypatch.setattr(launch, "_compile", compiled)
    monkeypatch.setattr(append_call, "load", loaded)
    flashcore.attention_with_kvcache(**step_of(name))
    assert [found.plan] == attending
    assert ([] if found.append is None else [found.append]) == appending
    assert found.append is not None or not {"new", "rotary"} & set(name.split(", "))


class MadeMemory(TorchDispatchMode):
    """A MadeMemory has seen the operations of torch that make a tensor with memory of its own."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in tensors}
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            is_real = isinstance(x, Tensor) and not x.is_meta
            if is_real and x.untyped_storage().data_ptr() not in self.known:
                self.seen.append(str(function))
        return result


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_computed_written_or_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths and tables of no sense are as good as others, and nothing is copied."""
    given = given_for(name)
    tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
    before = {name: x.clone() for name, x in tensors.items()}
    want = explained(given, arch=90)
    for name, x in before.items():
        assert torch.equal(tensors[name], x), name
        if x.dtype == torch.int32:
            tensors[name].fill_(-(2**31))
    monkeypatch.setattr(Tensor, "tolist", lambda self: pytest.fail("read"))
    monkeypatch.setattr(Tensor, "item", lambda self: pytest.fail("read"))
    with MadeMemory(tensors.values()) as made:
        assert explained(given, arch=90) == want
    assert made.seen == []


def test_padding_on_the_left_warns_as_the_call_does(monkeypatch: pytest.MonkeyPatch) -> None:
    given = given_for("padding on the left")
    found = explained(given, arch=90)
    assert found.problem.varlen == "keys"
    assert "copied into one piece" in str(found)
    monkeypatch.setattr(attend, "_warned", set())
    with pytest.warns(flashcore.FallbackWarning) as caught:
        attend._warn_of_copy(SimpleNamespace(is_cuda=True), "auto")  # type: ignore[arg-type]
    assert found.warnings == tuple(str(x.message) for x in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explained(given).warnings == ()
        assert explained(given, arch=90, backend="torch").warnings == ()


def test_a_cpu_pads_few_queries_and_a_gpu_does_not() -> None:
    given = given_for("few packed")
    on_cpu, on_gpu = explained(given), explained(given, arch=90)
    assert "packed" not in on_cpu.problem.describe()
    assert "padded to 3" in str(on_cpu)
    assert on_gpu.problem.varlen == "packed_pages"
    assert on_gpu.plan is not None
    assert on_gpu.plan.varlen == "packed_pages"
    assert on_cpu.plan is not None
    assert on_cpu.plan.varlen == "packed_pages"  # what a GPU would run


def test_warps_that_load_pages_are_told() -> None:
    """Two where boxes of pages are many beside their bytes."""
    small = {"q": half(128, 32, 1, 64), "seqlens_k": int32([0] * 128)}
    small |= {"k_cache": half(64, 32, 16, 64), "page_table": torch.zeros(128, 128).int()}
    text = str(explained({**small, "v_cache": small["k_cache"]}, arch=90))
    assert "two warps load pages" in text
    assert "pages of 16" in text
    assert "one warp loads the pages" in str(explained(step_of("pages"), arch=90))
    assert "the pages" not in str(explained(step_of("one piece"), arch=90))


@pytest.mark.parametrize(
    ("options", "is_by_kernel"),
    [({}, True), ({"backend": "torch"}, False), ({"backend": "sim"}, False)],
)
def test_who_appends_is_told(options: dict[str, Any], is_by_kernel: bool) -> None:
    found = explained(step_of("pages, new"), **options)
    assert (found.append is not None) is is_by_kernel
    assert ("append_kvcache" in str(found)) is is_by_kernel
    assert "PyTorch's operations write new tokens" in str(found)
    assert "new tokens" not in str(explained(step_of("pages"), **options))


def test_there_is_no_gradient() -> None:
    found = explained(step_of("pages"))
    assert found.gradient.code == "none"
    assert found.gradient_plans == ()


def test_meta_tensors_have_no_plan() -> None:
    given = {k: x.to("meta") if isinstance(x, Tensor) else x for k, x in step_of("pages").items()}
    found = explained(given)
    assert (found.backend, found.plan) == ("meta", None)
