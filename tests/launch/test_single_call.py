"""Launches of kernels that stand alone are prepared once for a description of tensors."""

from __future__ import annotations

import ctypes
import dataclasses

import pytest
from append_calls import CASES, make_call

from flashcore.errors import BackendUnavailableError
from flashcore.kernels.append.params import AppendTensors, build_append_params
from flashcore.kernels.merge.params import MergePlan
from flashcore.launch import append_call, single_call
from flashcore.launch.driver_launch import Argument


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, bytes]]:
    """Return what is launched: the launch that was loaded, and its argument."""
    found: list[tuple[object, bytes]] = []

    def load(*variant: object) -> object:
        def launch(argument: Argument) -> None:
            found.append((launch, ctypes.string_at(argument.address, len(argument.memory))))

        return launch

    monkeypatch.setattr(append_call, "load", load)
    monkeypatch.setattr(append_call, "_prepared", {})
    return found


def argument_of(tensors: AppendTensors, queries: str) -> bytes:
    """Return the kernel's argument, with the addresses of these tensors in front."""
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    in_front = (ctypes.c_uint64 * len(addresses))(*addresses)
    return bytes(in_front) + bytes(build_append_params(tensors, queries))[len(bytes(in_front)) :]


def test_a_description_is_prepared_once_and_each_launch_has_its_own_addresses(launched):
    calls = [make_call(CASES["halves turn"]) for _ in range(2)]
    for call in calls:
        append_call.launch_append(call.plan, 90, call.tensors, call.queries)
        assert launched[-1][1] == argument_of(call.tensors, call.queries)
    (first, content), (second, other) = launched
    assert first is second
    assert content != other


@pytest.mark.parametrize("change", ["queries", "plan", "strides"])
def test_another_description_is_prepared_anew(launched, change):
    call = make_call(CASES["halves turn"])
    append_call.launch_append(call.plan, 90, call.tensors, call.queries)
    plan, tensors, queries = call.plan, call.tensors, call.queries
    if change == "queries":
        queries = "begin"
    elif change == "plan":
        plan = dataclasses.replace(plan, interleaved=not plan.interleaved)
    else:
        k_cache = tensors.k_cache.transpose(0, 1).contiguous().transpose(0, 1)
        tensors = tensors._replace(k_cache=k_cache)
    append_call.launch_append(plan, 90, tensors, queries)
    (first, _), (second, content) = launched
    assert first is not second
    assert content == argument_of(tensors, queries)


def test_more_heads_than_one_launch_moves_are_refused(launched, monkeypatch):
    call = make_call(CASES["halves turn"])
    assert call.tensors.q is not None
    most = call.tensors.q.numel() // call.tensors.q.shape[-1]
    monkeypatch.setattr(append_call, "HEADS_MAX", most)
    append_call.launch_append(call.plan, 90, call.tensors, "end")
    monkeypatch.setattr(append_call, "HEADS_MAX", most - 1)
    with pytest.raises(BackendUnavailableError, match=f"^{most} heads of all tokens"):
        append_call.launch_append(call.plan, 90, call.tensors, "begin")
    assert len(launched) == 1


@pytest.mark.parametrize(("arch", "early"), [(80, False), (90, True), (100, True)])
def test_appending_starts_early_where_the_gpu_can(monkeypatch, arch, early):
    monkeypatch.setattr(single_call, "compile_source", lambda *_: None)
    monkeypatch.setattr(single_call, "Launch", lambda _, **asked: asked)
    plan = make_call(CASES["halves turn"]).plan
    assert single_call.load.__wrapped__(plan, arch, 0, 7)["starts_early"] is early
    merging = MergePlan("merge_results", "float16", "float16", "float16", 8, 16)
    assert single_call.load.__wrapped__(merging, arch, 0, 7)["starts_early"] is False


def test_the_oldest_descriptions_make_room(monkeypatch):
    monkeypatch.setattr(single_call, "PREPARED_MAX", 2)
    prepared: dict[object, str] = {}
    for key in "abc":
        single_call.remember(prepared, key, f"launch {key}")
    assert prepared == {"b": "launch b", "c": "launch c"}
