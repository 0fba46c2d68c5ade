"""Test keys that grow: what a length that was not met before takes over from another one of its
step is what it would have been told had it been met first."""

from __future__ import annotations

import itertools
import threading

import pytest
import standin
import torch

import flashcore
from flashcore.backends import dispatch, growing
from flashcore.backends.growing import planned_as
from flashcore.kernels.fwd_sm90.candidates import traits_sm90
from flashcore.kernels.fwd_sm90.params import AttnSm90Params
from flashcore.kernels.fwd_wmma.plan import traits
from flashcore.launch import kernel_call as launch
from flashcore.launch.kernel_call import KernelCall
from flashcore.launch.templates import make_template
from flashcore.ops import calls
from flashcore.problem import Problem

HALF = torch.float16


@pytest.fixture(params=[90, 80])
def machine(monkeypatch, request):
    return standin.install(monkeypatch, request.param)


def cache(length, *, batch=2, heads=2, dim=64, layout="grown", dtype=HALF):
    """Return k or v: as torch.cat leaves them, the first keys of a longer cache, and others."""
    if layout == "grown":
        return torch.zeros(batch, heads, length, dim, dtype=dtype)
    if layout == "static":
        return torch.zeros(batch, heads, 2048, dim, dtype=dtype)[:, :, :length]
    if layout == "bshd":
        return torch.zeros(batch, length, heads, dim, dtype=dtype).transpose(1, 2)
    if layout == "expanded":
        return torch.zeros(batch, 1, length, dim, dtype=dtype).expand(-1, heads, -1, -1)
    assert layout == "unaligned"
    return torch.zeros(batch, heads, length * dim + 4, dtype=dtype)[..., : length * dim].unflatten(
        -1, (length, dim)
    )


def padding(length, *, batch=2, kind="aligned"):
    """Return a mask, or none."""
    if kind == "none":
        return None
    room = length + (-length % 16 if kind == "aligned" else 0)
    dtype = HALF if kind == "additive" else torch.bool
    return torch.zeros(batch, 1, 1, room, dtype=dtype)[..., :length]


def query(batch=2, heads=8, dim=64, rows=1):
    return torch.zeros(batch, rows, heads, dim, dtype=HALF).transpose(1, 2)


def told(machine):
    """Return what the last launch was told, but for where its results go; and what nobody reads."""
    entry = machine.driver.launches[-1]
    params = entry.params
    attn = getattr(params, "attn", params)
    attn.out, attn.lse = 0, bool(attn.lse)
    attn.split_out, attn.split_stats = bool(attn.split_out), bool(attn.split_stats)
    if isinstance(params, AttnSm90Params):
        params.o_map.base = params.heads_per_section = 0
    return entry.grid, entry.threads, bytes(params)


LENGTHS = (2, 3, 63, 64, 65, 130, 513, 514, 575, 576, 577, 520, 1023, 1024, 1025, 1030, 1900, 515)
# Each length is called in each of these ways, one after the other.
WAYS = [
    {"layout": layout, "mask": mask, **options}
    for (layout, mask), options in itertools.product(
        [
            ("grown", "none"), ("static", "none"), ("bshd", "none"), ("expanded", "none"),
            ("unaligned", "none"), ("grown", "aligned"), ("grown", "any"), ("static", "additive"),
        ],
        [{}, {"causal": True, "scale": 0.5}],
    )
]  # fmt: skip
WAYS += [
    {"layout": "grown", "mask": "none", "causal": True, "window": (600, 0)},
    {"layout": "grown", "mask": "none", "causal": "upper_left"},
    {"layout": "grown", "mask": "none", "return_lse": True, "softcap": 3.0},
    {"layout": "grown", "mask": "none", "causal": True, "rows": 3},
    {"layout": "grown", "mask": "none", "other": "static"},
]


def test_a_launch_is_told_what_the_first_of_its_kind_would_be(machine):
    """Lengths go up and down, ways alternate."""
    for length in LENGTHS:
        for way in WAYS:
            options = dict(way)
            layout, mask = options.pop("layout"), padding(length, kind=options.pop("mask"))
            q = query(rows=options.pop("rows", 1))
            k, v = cache(length, layout=layout), cache(length, layout=options.pop("other", layout))
            for _ in range(2):
                flashcore.attention(q, k, v, mask=mask, **options)
                ours = told(machine)
            with pytest.MonkeyPatch.context() as patch:
                for module, name in ((calls, "_calls"), (calls, "_growing")):
                    patch.setattr(module, name, {})
                patch.setattr(launch, "_arguments", {})
                patch.setattr(dispatch, "kernel_call", dispatch.kernel_call.__wrapped__)
                patch.setattr(KernelCall, "with_keys", prepared_alone)
                flashcore.attention(q, k, v, mask=mask, **options)
            assert ours == told(machine), (length, way)


def prepared_alone(call, problem):
    return KernelCall(problem, call._plan, torch.device("cpu"))


def test_a_length_of_a_step_that_was_met_decides_nothing(machine, monkeypatch):
    """Neither is the call validated, nor a plan chosen, nor more than one descriptor encoded."""
    q = query()
    for kind in ("none", "aligned"):
        flashcore.attention(q, cache(520), cache(520), mask=padding(520, kind=kind))
    monkeypatch.setattr(calls, "choose_backend", None)
    monkeypatch.setattr(calls, "prepare", None)
    for length, kind in itertools.product((513, 514, 576), ("none", "aligned")):
        machine.driver.encodings = 0
        flashcore.attention(q, cache(length), cache(length), mask=padding(length, kind=kind))
        assert machine.driver.encodings <= 1
    with pytest.raises(TypeError):
        flashcore.attention(q, cache(577), cache(577))  # of the next step


def test_a_wrong_call_is_refused_though_its_family_is_known(machine):
    q = query()
    flashcore.attention(q, cache(520), cache(520), mask=padding(520))
    with pytest.raises(ValueError, match="v has seqlen 521 but k has 522"):
        flashcore.attention(q, cache(522), cache(521))
    with pytest.raises(ValueError, match="mask has shape"):
        flashcore.attention(q, cache(522), cache(522), mask=padding(521))
    with pytest.raises(TypeError, match="causal"):
        flashcore.attention(q, cache(522), cache(522), causal=0)
    with pytest.raises(TypeError, match="k has dtype"):
        flashcore.attention(q, cache(522, dtype=torch.bfloat16), cache(522))
    with pytest.raises(ValueError, match="v has 1 heads"):
        flashcore.attention(q, cache(522), cache(522, heads=1))


def test_threads_write_over_no_argument_that_another_is_about_to_launch(machine):
    """All calls have one length, whose arguments are few and written over."""
    sets = [(query(), cache(40), cache(40)) for _ in range(8)]
    flashcore.attention(*sets[0])
    machine.driver.launches.clear()
    start = threading.Barrier(len(sets))

    def work(tensors):
        start.wait()
        for _ in range(100):
            flashcore.attention(*tensors)

    threads = [threading.Thread(target=work, args=(tensors,)) for tensors in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    allowed = {tuple(x.data_ptr() for x in tensors) for tensors in sets}
    assert len(machine.driver.launches) == 800
    for entry in machine.driver.launches:
        attn = getattr(entry.params, "attn", entry.params)
        assert (attn.q, attn.k, attn.v) in allowed
        if isinstance(entry.params, AttnSm90Params):
            bases = (entry.params.q_map.base, entry.params.k_map.base, entry.params.v_map.base)
            assert bases == (attn.q, attn.k, attn.v)
            assert entry.params.o_map.base == attn.out


def test_a_plan_for_more_keys_is_right_for_these(machine):
    """It reads masks and bounds as they are."""
    for length, way in itertools.product(LENGTHS, WAYS):
        options = dict(way)
        layout, mask = options.pop("layout"), padding(length, kind=options.pop("mask"))
        q = query(rows=options.pop("rows", 1))
        k, v = cache(length, layout=layout), cache(length, layout=options.pop("other", layout))
        problem = Problem.from_tensors(q, k, v, mask=mask, **options)
        planned = planned_as(problem)
        assert traits(planned) == traits(problem)
        assert traits_sm90(planned) == traits_sm90(problem)
        assert planned.load_bytes == problem.load_bytes
        assert length <= planned.seqlen_k < max(length + 64, 1.07 * length)
        assert planned_as(planned).seqlen_k == planned.seqlen_k


def test_what_is_remembered_of_families_is_bounded(machine, monkeypatch):
    monkeypatch.setattr(calls, "CALLS_MAX", 3)
    for heads in range(1, 9):
        flashcore.attention(query(heads=heads), cache(9, heads=1), cache(9, heads=1))
    assert len(calls._growing) == 3


def test_a_template_with_other_keys_is_the_one_made_for_them(machine):
    """Byte for byte, whatever the addresses it was made with."""
    q = query()
    pointers = {"q": 1024, "k": 2048, "v": 4096, "out": 8192}
    for first, second in itertools.permutations((513, 530, 576), 2):
        templates = []
        for length in (first, second):
            problem = Problem.from_tensors(q, cache(length), cache(length), mask=padding(length))
            kernel = "attn_fwd_sm90" if problem.arch == 90 else "attn_fwd_wmma"
            plan = dispatch.plan_of(planned_as(problem), problem.arch, kernel)
            templates.append(make_template(problem, plan, pointers, 4))
        changed = templates[0].with_keys(problem, plan, pointers, 4)
        assert changed.content == templates[1].content
        assert changed.map_offsets == templates[1].map_offsets


def test_other_queries_and_lengths_are_planned_as_they_are():
    k = cache(520, dim=8)
    for q in (query(dim=8, rows=33), query(dim=8, rows=520)):
        problem = Problem.from_tensors(q, k, k)
        assert planned_as(problem) is problem
    one = Problem.from_tensors(query(dim=8), k[:, :, :1], k[:, :, :1])
    assert planned_as(one) is one
    assert not growing.Growing.serves(one)
