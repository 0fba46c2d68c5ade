"""Test plans of the Hopper kernel: which problems it takes, and that its tiles fit the machine."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import pytest
import torch

from flashcore.backends.adapting import adapt
from flashcore.backends.dispatch import choose_backend
from flashcore.checks import planned
from flashcore.kernels.fwd_sm90 import candidates as candidates_sm90
from flashcore.kernels.fwd_sm90 import params as params_sm90
from flashcore.kernels.fwd_sm90 import plan as plan_sm90
from flashcore.kernels.fwd_sm90 import tiles as tiles_sm90
from flashcore.kernels.fwd_sm90.kernel import SM90
from flashcore.kernels.fwd_sm90.plan import Sm90Plan
from flashcore.kernels.fwd_wmma.params import AttnParams
from flashcore.problem import Problem
from flashcore.selection.select import select_plan


def problem(
    head_dim: int = 64,
    *,
    heads: int = 4,
    seqlen: int = 256,
    head_dim_v: int | None = None,
    **options: object,
) -> Problem:
    q = torch.empty(1, heads, seqlen, head_dim, dtype=torch.float16)
    v = torch.empty(1, heads, seqlen, head_dim_v or head_dim, dtype=torch.float16)
    described = Problem.from_tensors(q, q, v, **options)  # type: ignore[arg-type]
    return dataclasses.replace(described, device="cuda", arch=90)


def test_hopper_gets_the_hopper_kernel() -> None:
    assert select_plan(problem()).kernel == "attn_fwd_sm90"
    assert select_plan(problem(), 80).kernel == "attn_fwd_wmma"
    assert select_plan(problem(), kernel="attn_fwd_wmma").kernel == "attn_fwd_wmma"


@pytest.mark.parametrize("gate", plan_sm90.GATES)
def test_a_gate_changes_the_plan_only_in_what_it_says(gate: str) -> None:
    asked = problem(128, heads=64, seqlen=4096)
    plain, gated = candidates_sm90.candidates(asked)[0], select_plan(asked, gate=gate)
    assert plain == dataclasses.replace(plain, ping_pong=True, lazy_rescale=True)
    assert gated == dataclasses.replace(plain, gate=gate, ping_pong=False, lazy_rescale=False)


def test_the_portable_kernels_own_gate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gate='pv_serial'.*qk, softmax, pv, tile"):
        select_plan(problem(), gate="pv_serial")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"load_bytes": 8, "misaligned": "q"}, "16-byte aligned"),
        ({"k_strides": (0, 0, 0)}, "k is one row, expanded"),
        ({"v_strides": (2**39, 64, 64)}, "v has"),
    ],
)
def test_what_tma_cannot_read_falls_to_the_portable_kernel(
    changes: dict[str, object], words: str
) -> None:
    awkward = dataclasses.replace(problem(), **changes)  # type: ignore[arg-type]
    assert words in str(SM90.obstacle(awkward))
    assert select_plan(awkward).kernel == "attn_fwd_wmma"
    choice = choose_backend(awkward, "auto")
    assert choice.backend == "wmma"
    assert not choice.is_fallback
    assert words in choice.reason
    assert "would take longer than it saves" in choice.reason
    assert choose_backend(awkward, "sm90").backend == "sm90"  # by a copy
    adapted = adapt(awkward, "sm90").problem
    assert SM90.obstacle(adapted) is None
    assert select_plan(adapted).kernel == "attn_fwd_sm90"


def test_packed_sequences_have_a_number_of_rows_that_is_too_many() -> None:
    packed = {"varlen": "packed", "total_q": 2**28, "total_k": 256}
    awkward = dataclasses.replace(problem(), **packed)  # type: ignore[arg-type]
    assert choose_backend(awkward, "auto").backend == "wmma"
    with pytest.raises(NotImplementedError, match=r'row tiles.*backend="wmma"'):
        choose_backend(awkward, "sm90")


def test_older_gpu_is_told_so() -> None:
    ampere = dataclasses.replace(problem(), arch=80)
    with pytest.raises(RuntimeError, match="sm_80"):
        choose_backend(ampere, "sm90")


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
@pytest.mark.parametrize("heads", [1, 256])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 9.0}])
def test_every_head_dim_fits(head_dim: int, heads: int, options: dict[str, object]) -> None:
    for head_dim_v in {head_dim, 64, 256}:
        asked = problem(head_dim, heads=heads, head_dim_v=head_dim_v, **options)
        for plan in candidates_sm90.candidates(asked):
            assert isinstance(plan, Sm90Plan)
            assert plan.smem_bytes <= 232448
            consumer, producer = plan.role_registers
            asked_for = 128 * (plan.num_consumers * consumer + producer)
            assert asked_for <= plan.max_registers * plan.num_threads
            assert plan.max_registers * plan.num_threads * plan.min_blocks <= 65536
            assert not plan.ping_pong or plan.num_consumers > 1
        assert select_plan(asked).kernel in ("attn_fwd_sm90", "attn_fwd_wmma")


@pytest.mark.parametrize(("head_dim", "parts"), [(64, 1), (128, 1), (192, 2), (256, 2)])
def test_o_leaves_in_as_few_parts_as_fit(head_dim: int, parts: int) -> None:
    plan = candidates_sm90.candidates(problem(head_dim, heads=256, seqlen=1024))[0]
    assert isinstance(plan, Sm90Plan)
    assert plan.o_parts == parts
    whole = dataclasses.replace(plan, o_parts=1)
    assert (whole.smem_bytes <= 232448) == (parts == 1)
    in_any = candidates_sm90.fitted(dataclasses.replace(plan, o_parts=4))
    assert in_any == plan
    too_large = dataclasses.replace(plan, num_stages=99)
    assert candidates_sm90.fitted(too_large).o_parts == plan_sm90.O_PARTS[-1]


def test_heads_are_drawn_in_groups_that_fit_l2_and_fill_the_gpu() -> None:
    full, causal = problem(seqlen=640), problem(seqlen=640, causal=True)
    plan = dataclasses.replace(candidates_sm90.candidates(full)[0], block_m=64)
    assert params_sm90.num_row_tiles(full, plan) == 4 * 10
    assert SM90.num_blocks(full, plan, 1000) == 4 * 10
    assert SM90.num_blocks(full, plan, 3) == 3
    for heads, seqlen, block_m, num_blocks, in_a_group in (
        (4, 640, 64, 5, 4),  # all K and V fit
        (64, 512, 64, 132, 64),  # as many as fit
        (1024, 512, 64, 132, 32),  # half as many in a long run
        (16, 4096, 64, 396, 8),
        (16, 4096, 128, 396, 12),  # more, for every block to have a row tile
        (64, 4096, 128, 132, 4),
        (64, 4096, 128, 300, 6),  # 0.6 row tiles a block
        (64, 4096, 192, 132, 8),
        (4, 64 * 1024, 128, 132, 1),  # one alone is too much
    ):
        long = dataclasses.replace(causal, batch=1, num_heads_q=heads, num_heads_kv=heads)
        long = dataclasses.replace(long, seqlen_q=seqlen, seqlen_k=seqlen)
        plan = dataclasses.replace(candidates_sm90.candidates(causal)[0], block_m=block_m)
        assert params_sm90.heads_per_section(long, plan, num_blocks) == in_a_group
        few_kv = dataclasses.replace(long, num_heads_kv=heads // 4)
        assert params_sm90.heads_per_section(few_kv, plan, num_blocks) % 4 == 0


# What the forward pass reads of plain calls: each further line of constant memory takes time.
_READ_BY_ALL = (
    *("lse", "num_heads_q", "num_heads_kv", "seqlen_q", "seqlen_k", "num_m_blocks"),
    *("softmax_scale", "softmax_scale_log2", "diag_offset", "window_left", "window_right"),
)


def test_parameters_describe_the_tensors() -> None:
    asked = problem(seqlen=200)
    plan = select_plan(asked)
    assert isinstance(plan, Sm90Plan)
    pointers = {"q": 1024, "k": 2048, "v": 4096, "out": 8192}
    params = params_sm90.build_params_sm90(asked, plan, pointers, 8)
    assert ctypes.sizeof(params) % 64 == 0
    attn = params_sm90.AttnSm90Params.attn.offset
    lines = {(attn + getattr(AttnParams, name).offset) // 64 for name in _READ_BY_ALL}
    assert attn == 512 + 8
    assert lines == {8, 9}  # of 64 bytes, which a block has to wait for
    assert [getattr(params, f"{name}_map").base for name in "qkvo"] == [1024, 2048, 4096, 8192]
    assert (params.q_map.box_rows, params.k_map.box_rows) == (64, plan.block_n)
    assert (params.o_map.rows, params.o_map.row_stride_bytes) == (200, 128)
    assert (params.num_heads, params.heads_per_section) == (4, 4)


def test_rows_are_fetched_in_few_pieces() -> None:
    of = {dim: tiles_sm90.chunk_of(dim, dim) for dim in range(8, 257, 8)}
    assert of[32] == of[80] == of[96] == 32  # 64 would pad them further
    assert of[40] == of[64] == of[112] == of[176] == 64
    assert (of[72], of[136]) == (64, 32)  # rows of 144 bytes: worth the padding, if there is room
    assert tiles_sm90.chunk_of(40, 72) == tiles_sm90.chunk_of(96, 104) == 64
    many = problem(heads=64, seqlen=1024, head_dim=72, head_dim_v=72)
    assert (select_plan(many).block_m, select_plan(many).block_n) == (192, 96)


def masked(
    rows: int, dtype: torch.dtype = torch.bool, width: int = 4096, **options: object
) -> Sm90Plan:
    """Return the plan of a call that fills the GPU, with a mask of 1 or 4096 rows."""
    mask = torch.empty(1, 1, rows, width, dtype=dtype)[..., :4096]
    asked = problem(heads=64, seqlen=4096, mask=mask, **options)
    plan = select_plan(asked)
    assert isinstance(plan, Sm90Plan)
    return plan


def test_a_mask_row_for_all_queries_leaves_registers_for_wide_tiles() -> None:
    assert masked(1).block_m == 192
    assert masked(1).mask_is_row
    assert masked(4096).mask_load_bytes == 16
    assert masked(4096, width=4097).block_m == 64
    assert masked(4096, width=4097).mask_load_bytes == 8
    assert masked(4096, width=4097).mask_is_shifted
    assert masked(4096, width=4100).mask_load_bytes == 4
    assert not masked(4096, width=4100).mask_is_shifted


def test_a_mask_leaves_k_and_v_to_large_tiles() -> None:
    """Other calls have no registers for them."""

    def tile(dtype: torch.dtype = torch.bool, **options: object) -> tuple[int, int]:
        plan = masked(4096, dtype, **options)
        return plan.block_m, plan.block_n

    assert tile() == tile(torch.float16) == tile(torch.float32) == (192, 128)
    assert tile(torch.float16, head_dim=32) == tile(torch.float32, head_dim=32) == (64, 128)
    assert tile(torch.float32, head_dim=128) == (192, 64)
    assert tile(head_dim=128) == tile(torch.float16, head_dim=128) == (128, 128)
    for options in ({"causal": True}, {"softcap": 9.0}, {"return_max_score": True}):
        assert tile(torch.float32, **options) == (64, 128)


def test_long_rows_have_wide_tiles_unless_a_window_makes_them_short() -> None:
    sizes = {}
    for window in (None, (8000, 0), (1024, 0), (1024, -1)):
        long = problem(128, heads=16, seqlen=16384, causal="lower_right", window=window)
        plan = candidates_sm90.candidates(long)[0]
        sizes[window] = plan.block_m, plan.block_n
    assert sizes[None] == sizes[8000, 0] == (192, 80)
    assert sizes[1024, 0] == sizes[1024, -1] == (128, 128)


def test_the_softmax_runs_beside_p_v_where_registers_last() -> None:
    assert masked(4096).overlaps
    assert not masked(4096, softcap=30.0).overlaps
    wide = {"head_dim": 256, "heads": 64, "seqlen": 4096, "softcap": 30.0}
    for window, overlaps in ((None, True), ((512, 0), False)):
        plan = select_plan(problem(window=window, **wide))  # type: ignore[arg-type]
        assert isinstance(plan, Sm90Plan)
        assert plan.overlaps == overlaps
        assert plan.constants()["OVERLAPS"] == overlaps


@pytest.mark.parametrize(
    ("head_dim", "block_n", "options", "fits"),
    [
        (64, 128, {}, True),
        (64, 128, {"window": (100, 50), "sinks": True}, True),
        (64, 128, {"softcap": 20.0}, False),  # with a bound it spills 96 bytes
        (64, 112, {"softcap": 20.0}, False),  # 20
        (80, 96, {"softcap": 20.0}, True),
        (96, 112, {"causal": True}, True),  # it ships
        (96, 112, {"sinks": True}, False),  # with a window 44
        (96, 128, {}, False),  # with sinks 480
    ],
)
def test_tiles_whose_registers_do_not_hold_a_calls_options_are_not_legal(
    head_dim: int, block_n: int, options: dict[str, Any], fits: bool
) -> None:
    if "sinks" in options:
        options = options | {"sinks": torch.zeros(4)}
    tile = {"block_m": 192, "block_n": block_n, "ping_pong": True}
    assert planned.fits(select_plan(problem(head_dim, **options)), tile) is fits
