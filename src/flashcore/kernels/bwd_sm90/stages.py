"""List the stages of the backward kernels for Hopper: one for each tensor that they write.

The kernels have no debug gates: all are run as they are, and the first wrong one of delta, dq, dv
and dk says where to look.
"""

from __future__ import annotations

from flashcore.kernels.stage import Stage

STAGES = (
    Stage(
        "delta",
        None,
        "delta = sum(dO O) - dlse",
        "delta of every row",
        "load_row_stats in bwd_delta_sm90.cuh: which lanes share a row, dlse, rows without a key",
    ),
    Stage(
        "dq",
        None,
        "dQ = scale dS K",
        "dq",
        "score_gradient and issue_dq in attn_bwd_dq_sm90.cuh: delta, what is hidden, K's stage, "
        "rows that see nothing, the scale; of one kernel for all, issue_dq and add_rows in "
        "bwd_dkdv_dq_sm90.cuh: dS from two warpgroups, and which rows it is added to",
    ),
    Stage(
        "dv",
        None,
        "dV = P^T dO",
        "dv",
        "exponentiate_tile and issue_dv in bwd_dkdv_steps_sm90.cuh: lse, what is hidden, which "
        "query tiles and heads are summed up, dO of rows that see nothing",
    ),
    Stage(
        "dk",
        None,
        "dK = scale dS^T Q",
        "dk",
        "issue_dp, score_gradient and issue_dk in bwd_dkdv_steps_sm90.cuh: V as operand, delta, "
        "what dK starts from, the scale",
    ),
)
# Where an alarm can come from besides the stages.
OUTSIDE = {
    "setup": "the initialisation of the mbarriers and its fence, the registers of the roles",
    "schedule": "fwd_sm90/schedule_sm90.cuh, tile/sequence.cuh: which tiles a block takes, and who "
    "has read its coordinates",
    "load": "produce and load_stats: which stage, which parity, how many bytes, who gave the stage "
    "back, and whether rows were cleared in sight of the tensor cores",
    "scores": "S, P and dP: operands and their stages, the waits around the products, lse and "
    "delta of the right rows, masks, and P between two warpgroups",
    "store": "store_rows and store_in_place: what lies in the buffer that a gradient leaves "
    "through, its barrier, proxy fence and the wait for the store before it",
}

# Which phase of the kernels a function belongs to. Of those that are not named a race's other side
# decides.
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
    "clear_rows": "load",
    "load_row_stats": "delta",
    "issue_s": "scores",
    "issue_scores": "scores",
    "issue_dp": "scores",
    "exponentiate": "scores",
    "exponentiate_tile": "scores",
    "column_pair": "scores",
    "probability": "scores",
    **dict.fromkeys(("mask_strip", "fetch", "fetch_packet", "await", "fragment", "read"), "scores"),
    "score_gradient": "scores",
    "consume_scores": "scores",
    "consume_gradients": "scores",
    "issue_dq": "dq",
    "issue_own_dq": "dq",
    "consume_ds": "dq",
    "add_rows": "dq",
    "issue_dv": "dv",
    "issue_dk": "dk",
    "issue_dk_of_ds": "dk",
    "store_rows": "store",
    "store_in_place": "store",
}
# Which gradient it is of, one kernel alone says.
PHASES_DQ = PHASES | {"issue_gradient": "dq"}
