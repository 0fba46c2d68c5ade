"""Test that a step is decided once: later ones launch what was prepared, and nothing else. See
standin.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import standin
import torch
from decoder_steps import (
    BATCH,
    CALLS,
    COLUMNS,
    DIM,
    HALF,
    HEADS_KV,
    HEADS_Q,
    INT32,
    OF_2,
    OF_3,
    PAGE,
    as_flash,
    half,
    int32,
    of_flash_2,
    of_flash_3,
    plainly,
    step_of,
)
from torch import Tensor

from flashcore.kernels.append.params import AppendTensors, build_append_params
from flashcore.serving import attend, known_steps, step


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> standin.Machine:
    return standin.install(monkeypatch)


def addresses_told(params: Any) -> dict[str, int]:
    attn = params.attn
    found = {name: getattr(attn, name) for name in ("q", "k", "v", "out", "lse", "seqlens_k")}
    for name in ("page_table", "cu_seqlens_q", "k_scale", "v_scale", "sinks"):
        found[name] = getattr(attn, name)
    return {name: address or 0 for name, address in found.items()}


def at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


@pytest.mark.parametrize("name", CALLS)
def test_a_step_is_decided_once(
    machine: standin.Machine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Others are launched with their own addresses, and neither checked nor decided again."""
    call, kind = CALLS[name]
    call(step_of(kind))
    for module, function in (
        (step, "check_step"),
        (step, "append"),
        (known_steps, "choose_backend"),
    ):
        monkeypatch.setattr(module, function, None)
    monkeypatch.setattr(step, "attend_pages", None)
    for _ in range(2):
        given = step_of(kind)
        machine.driver.launches.clear()
        result = call(given)
        out, lse = result if isinstance(result, tuple) else (result, None)
        *before, attending = machine.driver.launches
        told = addresses_told(attending.params)
        wanted = {"k": given["k_cache"], "v": given["v_cache"], "lse": lse}
        wanted |= {
            name: given.get(name)
            for name in ("page_table", "cu_seqlens_q", "k_scale", "v_scale", "sinks")
        }
        wanted["page_table"] = given.get("cache_batch_idx", wanted["page_table"])
        assert {x: told[x] for x in wanted} == {x: at(tensor) for x, tensor in wanted.items()}
        if "out" in given:
            assert at(out) == at(given["out"]) == told["out"]
        elif call is plainly or given["q"].shape[-2] == 1 or "packed" in kind:
            assert told["out"] == at(out)
        assert out.is_contiguous() or "out" in given
        assert out.numel() == given["q"].numel()
        if "k_new" not in given:
            assert not before
            assert (told["q"], told["seqlens_k"]) == (at(given["q"]), at(given["seqlens_k"]))
        else:
            check_append(before, given, told, call)


def check_append(
    before: list[Any], given: dict[str, Any], told: dict[str, int], call: object
) -> None:
    """Check what the kernel that appends is told, and that attention reads what it writes."""
    (appending,) = before
    q, cos = given["q"], given.get("rotary_cos")
    turns = cos is not None
    rotated = torch.empty(q.shape) if turns else None
    tensors = AppendTensors(
        q if turns else None, given["k_new"], given["v_new"], rotated,
        given["k_cache"], given["v_cache"], cos, given.get("rotary_sin"), given["seqlens_k"],
        given["seqlens_k"], given.get("page_table"), given.get("cu_seqlens_q"),
        given.get("cu_seqlens_q"), None, None, given.get("k_scale"), given.get("v_scale"),
    )  # fmt: skip
    if "cache_batch_idx" in given:
        tensors = tensors._replace(page_table=given["cache_batch_idx"][:, None])
    params = build_append_params(tensors, "begin" if turns and call is not plainly else "end")
    for name, x in tensors._asdict().items():
        setattr(params, name, at(x) or None)
    params.q_rotated, params.lengths = told["q"] if turns else None, told["seqlens_k"]
    assert bytes(appending.params) == bytes(params)
    assert told["q"] == (appending.params.q_rotated if turns else at(q))
    assert told["seqlens_k"] not in (0, at(given["seqlens_k"]))
    if turns:  # both lie in one piece of memory
        assert told["seqlens_k"] - told["q"] == -(-q.numel() * 2 // 16) * 16
    assert told["q"] % 16 == told["seqlens_k"] % 16 == 0


@pytest.mark.parametrize("of", ["q", "k_cache", "v_cache"])
@pytest.mark.parametrize("shift", [-8, 0, 8])
def test_out_may_lie_in_what_is_read(machine: standin.Machine, of: str, shift: int) -> None:
    """Then it gets a copy, as it does where it is not aligned."""
    kind = "pages, packed, out"
    plainly(step_of(kind))
    given = step_of(kind)
    read, out = given[of], given["out"]
    if of == "q":
        given["q"] = torch.zeros(read.numel() + 16, dtype=HALF)[8:-8].view(read.shape)
        read = given["q"]
    memory = read.untyped_storage()
    at_element = read.storage_offset() + (shift if of == "q" or shift > 0 else -shift)
    given["out"] = torch.empty(0, dtype=HALF).set_(memory, at_element, out.shape, out.stride())
    result = plainly(given)
    assert at(result) == at(given["out"]) != machine.driver.launches[-1].params.attn.out


def test_out_of_other_strides_gets_a_copy(machine: standin.Machine) -> None:
    for _ in range(2):
        given = step_of("pages, several, out")
        given["out"] = torch.zeros(given["out"].mT.shape, dtype=HALF).mT
        result = plainly(given)
        assert at(result) == at(given["out"]) != machine.driver.launches[-1].params.attn.out


def test_out_of_an_odd_address_gets_a_copy(machine: standin.Machine) -> None:
    for shift in (0, 8, 1):
        given = step_of("pages, packed, out")
        memory = torch.zeros(given["out"].numel() + 16, dtype=HALF)
        given["out"] = memory[shift : shift + given["out"].numel()].view(given["out"].shape)
        for _ in range(2):
            told = at(plainly(given)), machine.driver.launches[-1].params.attn.out
        assert (told[0] == told[1]) is (shift != 1)


def test_an_argument_is_one_threads_alone(machine: standin.Machine) -> None:
    """A launch that comes between the writing of an argument and its launch has another."""
    first, second = step_of("pages, new"), step_of("pages, new")
    for _ in range(3):
        plainly(first)
    machine.driver.launches.clear()
    nested = [second]
    machine.driver.on_launch = lambda: plainly(nested.pop()) if nested else None  # type: ignore[assignment]
    plainly(first)
    appended = [x.params.k_new for x in machine.driver.launches if hasattr(x.params, "k_new")]
    assert sorted(appended) == sorted(at(x["k_new"]) for x in (first, second))


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "int64": ("pages", {"page_table": torch.zeros(BATCH, COLUMNS, dtype=torch.int64)}),
    "rows for pages": (
        "one piece, rows",
        {"page_table": int32([1, 0, 2]), "cache_batch_idx": None},
    ),
    "another batch": ("pages", {"seqlens_k": int32([1, 2])}),
    "1 for True": ("pages", {"causal": 1}),
    "True for 1": ("pages, lse", {"return_lse": 1}),
    "0 for False": ("pages, rotary", {"rotary_interleaved": 0}),
    "a bool for a scale": ("pages", {"scale": True}),
    "no scale": ("pages, 8 bits, new", {"v_scale": None}),
    "a scale too many": ("pages", {"k_scale": torch.ones(()), "v_scale": torch.ones(())}),
    "a key alone": ("pages, new", {"v_new": None}),
    "cos alone": ("pages, rotary", {"rotary_sin": None}),
    "a bound": ("pages, packed", {"max_seqlen_q": -1}),
    "a bool for a bound": ("pages, packed", {"max_seqlen_q": True}),
    "a backend": ("pages", {"backend": "sm70"}),
    "out": ("pages, several, out", {"out": half(1, HEADS_Q, 3, DIM)}),
    "a gradient": ("pages", {"q": half(BATCH, HEADS_Q, 1, DIM).requires_grad_()}),
    "invariant": ("pages", {"batch_invariant": 0}),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_known_serves_no_wrong_call(machine: standin.Machine, name: str) -> None:
    kind, changes = WRONG[name]
    for given in (step_of(kind), step_of(kind)):
        plainly({**given, **({"scale": 1.0} if "scale" in changes else {})})
    launches = len(machine.driver.launches)
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        plainly({**step_of(kind), **changes})
    assert len(machine.driver.launches) == launches


def test_flash_attn_takes_no_number_for_a_bool(machine: standin.Machine) -> None:
    for _ in range(2):
        of_flash_2(**{**as_flash(step_of("pages, rotary"), OF_2), "rotary_interleaved": True})
    with pytest.raises(TypeError, match="rotary_interleaved=1"):
        of_flash_2(**{**as_flash(step_of("pages, rotary"), OF_2), "rotary_interleaved": 1})


def test_one_cache_of_keys_and_values_has_no_gradient_either(machine: standin.Machine) -> None:
    """A guard of torch takes no tensor twice; ours, in its place, looks at the same."""
    for grad in (False, False, True):
        given = step_of("pages")
        given |= {"q": given["q"].requires_grad_(grad), "v_cache": given["k_cache"]}
        if grad:
            with pytest.raises(NotImplementedError, match="no backward pass"):
                plainly(given)
        else:
            assert plainly(given).shape == given["q"].shape


def test_steps_that_look_alike_are_told_apart(machine: standin.Machine) -> None:
    """The same shapes and dtypes, in the same order, of other things."""
    q, caches = half(BATCH, HEADS_KV, 1, DIM), half(2, 9, HEADS_KV, PAGE, DIM)
    k, v = caches.to(torch.float8_e4m3fn)
    a, b = torch.ones(HEADS_KV), torch.ones(HEADS_KV)
    given = {"q": q, "k_cache": k, "v_cache": v, "page_table": torch.zeros(3, 2, dtype=INT32)}
    given |= {"seqlens_k": int32([1, 2, 3])}
    alike: list[dict[str, Any]] = [
        {"k_scale": a, "v_scale": b}, {"sinks": a, "k_scale": b, "v_scale": b}
    ]  # fmt: skip
    for others in alike * 2:
        plainly({**given, **others})
        told = addresses_told(machine.driver.launches[-1].params)
        for name in ("sinks", "k_scale", "v_scale"):
            assert told[name] == at(others.get(name))


def test_what_a_call_makes_itself_is_made_in_each(machine: standin.Machine) -> None:
    """Scales that are missing, and the page table of packed queries over a cache in one piece."""
    for _ in range(3):
        given = as_flash(step_of("pages, 8 bits of one scale"), OF_3)
        of_flash_3(**{**given, "k_descale": None, "v_descale": None})
        given = step_of("one piece, packed")
        plainly(given)
        told = addresses_told(machine.driver.launches[-1].params)
        assert (told["q"], told["cu_seqlens_q"]) == (at(given["q"]), at(given["cu_seqlens_q"]))
        assert told["page_table"] != 0


def test_options_are_told_apart(machine: standin.Machine) -> None:
    """Each prepares its own kernel, and finds it again."""
    options: list[dict[str, Any]] = [
        {}, {"causal": False}, {"window": (3, 0)}, {"softcap": 2.0}, {"scale": 0.5},
        {"return_lse": True}, {"batch_invariant": True}, {"backend": "wmma"},
    ]  # fmt: skip
    for asked in options * 2:
        plainly({**step_of("pages, several"), **asked})
    assert len(known_steps._known) == len(options)
    assert {len(entries) for entries in known_steps._known.values()} == {1}


@pytest.mark.parametrize(
    ("backend", "is_cuda", "longest", "is_padded"),
    [
        ("auto", True, 1, False), ("wmma", True, 1, False), ("torch", True, 1, True),
        ("auto", False, 1, True), ("auto", False, 9, False),
    ],
)  # fmt: skip
def test_pytorch_alone_is_given_padded_queries(
    backend: str, is_cuda: bool, longest: int, is_padded: bool
) -> None:
    """Kernels share keys and row tiles of packed ones."""
    q = SimpleNamespace(is_cuda=is_cuda, shape=(8, 4, DIM))
    step: Any = SimpleNamespace(q=q, backend=backend)
    options = {"causal": True, "batch_invariant": False}
    assert attend.pads(step, 4, longest, options) is is_padded


def test_somebody_who_watches_sees_operators(machine: standin.Machine) -> None:
    seen: list[str] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    given = step_of("pages, new")
    for _ in range(2):
        plainly(given)
    with Watch():
        plainly(given)
    for operator in ("append_to_kvcache", "attention_paged_forward"):
        assert [name for name in seen if operator in name]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_what_is_known_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The long way and what it prepared, results and caches."""
    call, kind = CALLS[name]
    monkeypatch.setattr(known_steps, "_known", {})
    given = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in step_of(kind).items()}
    results, caches = [], []
    for _ in range(3):
        mine = {n: x.clone() if isinstance(x, Tensor) else x for n, x in given.items()}
        if mine.get("v_scale") is not None and given["v_scale"] is given["k_scale"]:
            mine["v_scale"] = mine["k_scale"]
        result = call(mine)
        results.append(result if isinstance(result, tuple) else (result,))
        caches.append((mine["k_cache"].view(torch.uint8), mine["v_cache"].view(torch.uint8)))
    for other, cache in zip(results[1:], caches[1:], strict=True):
        assert all(map(torch.equal, results[0], other))
        assert all(map(torch.equal, caches[0], cache))
