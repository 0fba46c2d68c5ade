"""List the stages of the backward kernels for Hopper, each with a debug gate (tile/gates.cuh).

Gate `delta` stops before any key tile, `ds` writes out what each kernel has as dS, and `dv`, `dk`
and `dq` take over P or dS, so that a product is judged by itself. At the end all kernels are run as
they are.
"""

from __future__ import annotations

from flashcore.kernels.stage import Stage

STAGES = (
    Stage(
        "delta",
        "delta",
        "delta = sum(dO O) - dlse",
        "delta of every row",
        "load_row_stats in bwd_delta_sm90.cuh: which lanes share a row, dlse, rows without a key",
    ),
    Stage(
        "ds",
        "ds",
        "dS = P (dP - delta)",
        "dS, in each kernel that computes it",
        "probability, score_gradient and what they are given: operands of S and dP and their "
        "stages, the waits around the products, lse and delta of the right rows, what is hidden, "
        "which tiles and heads are visited, P between two warpgroups",
    ),
    Stage(
        "dv",
        "dv",
        "dV = P^T dO",
        "dv of a P that is given",
        "issue_dv in bwd_dkdv_steps_sm90.cuh: which query tiles and heads are summed up, dO's "
        "stage, dO of rows that see nothing, what dV starts from",
    ),
    Stage(
        "dk",
        "dk",
        "dK = scale dS^T Q",
        "dk of a dS that is given",
        "issue_dk in bwd_dkdv_steps_sm90.cuh: Q's stage, which query tiles and heads are summed "
        "up, what dK starts from, the scale",
    ),
    Stage(
        "dq",
        "dq",
        "dQ = scale dS K",
        "dq of a dS that is given",
        "issue_dq in attn_bwd_dq_sm90.cuh: K's stage, rows that see nothing, the scale; of one "
        "kernel for all, issue_dq and add_parts_of_tile in bwd_dkdv_dq_sm90.cuh: dS from two "
        "warpgroups, and which rows it is added to",
    ),
    Stage(
        "full",
        None,
        "whole kernels",
        "delta, dq, dv and dk",
        "what the gates replace: P and dS on their way into the products, and delta on its way "
        "from kernel to kernel",
    ),
)
# Where an alarm can come from besides the stages.
OUTSIDE = {
    "setup": "the initialisation of the mbarriers and its fence, the registers of the roles",
    "schedule": "fwd_sm90/schedule_sm90.cuh, tile/sequence.cuh: which tiles a block takes, and who "
    "has read its coordinates",
    "load": "produce and load_stats: which stage, which parity, how many bytes, who gave the stage "
    "back, whether rows were cleared in sight of the tensor cores, and await_delta",
    "store": "store_rows and store_in_place: what lies in the buffer that a gradient leaves "
    "through, its barrier, proxy fence and the wait for the store before it",
}

# The phase of the kernels that a function belongs to. For one that is not named, a race's other
# side decides.
PHASES = {
    "attn_bwd_dq_sm90": "setup",
    "attn_bwd_dkdv_sm90": "setup",
    "attn_bwd_delta_sm90": "setup",
    "attn_bwd_round_sm90": "store",
    "init_barriers": "setup",
    "await_coord": "schedule",
    "coord_or_end": "schedule",
    "key_tile_coord": "schedule",
    "produce": "load",
    "load_stats": "load",
    "await_delta": "load",
    "clear_rows": "load",
    "load_row_stats": "delta",
    "issue_s": "ds",
    "issue_scores": "ds",
    "issue_dp": "ds",
    "exponentiate": "ds",
    "exponentiate_tile": "ds",
    **dict.fromkeys(("columns_of", "load_columns", "columns_ahead"), "ds"),
    **dict.fromkeys(("take_log2_probs", "hide_keys"), "ds"),
    **dict.fromkeys(("probability", "log2_probability"), "ds"),
    **dict.fromkeys(
        ("mask_strip", "fetch", "fetch_packet", "fetch_rows", "copy", "copy_parts"),
        "ds",
    ),
    **dict.fromkeys(("await", "fragment", "read"), "ds"),
    "score_gradient": "ds",
    "consume_scores": "ds",
    "consume_gradients": "ds",
    "issue_dq": "dq",
    **dict.fromkeys(("await_ds", "issue_own_dq"), "dq"),
    "consume_ds": "dq",
    **dict.fromkeys(("hand_over_dq", "add_parts_of_tile", "add_parts"), "dq"),
    "issue_dv": "dv",
    "issue_dk": "dk",
    "store_rows": "store",
    "store_in_place": "store",
    "await_stores": "store",
}
# Only the kernel says which gradient `issue_gradient` issues.
PHASES_DQ = PHASES | {"issue_gradient": "dq"}
