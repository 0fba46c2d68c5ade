"""See what the options of flashcore.attention do, on tensors small enough to print.

    python examples/options_tour.py

All scores are made equal (q is 0) and v is the identity, so the output of attention *is* the matrix
of weights: row i shows which keys query i sees. Nothing here is drawn by other means.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import flashcore


def weights(seqlen_q: int, seqlen_k: int, **options: Any) -> Tensor:
    """Return the weights [seqlen_q, seqlen_k] that attention gives to keys of equal score.

    Args:
        seqlen_q: number of queries.
        seqlen_k: number of keys, a multiple of 8 (it is v's head_dim here).
        options: of flashcore.attention.

    Returns:
        float32; a row's visible keys share 1 equally.
    """
    q, k = torch.zeros(1, 1, seqlen_q, 8), torch.zeros(1, 1, seqlen_k, 8)
    v = torch.eye(seqlen_k)[None, None]
    return flashcore.attention(q, k, v, **options)[0, 0]


def picture(seen: Tensor) -> list[str]:
    """Return a line for each query: x for a key that it sees."""
    return ["".join("x" if weight > 0 else "." for weight in row) for row in seen.tolist()]


def show(title: str, **options: Any) -> None:
    """Print what each of 4 queries sees of 8 keys."""
    print(f"\n{title}")
    for line in picture(weights(4, 8, **options)):
        print(f"    {line}")


def masks() -> None:
    """Show causality, windows and masks, and where they are aligned."""
    show("causal=True: the last query sees all (a cache of 4 keys before 4 new ones)", causal=True)
    show('causal="upper_left": as is_causal of torch', causal="upper_left")
    show("window=(2, 0), causal=True: two keys back", causal=True, window=(2, 0))
    show("window=(1, 1): a band", window=(1, 1))
    every_other = torch.arange(8) % 2 == 0
    show("mask=...: every other key", mask=every_other)
    show("both: what all of them allow", mask=every_other, causal=True, window=(4, 0))


def bias() -> None:
    """Show an additive mask, which shifts scores: here by distance, as ALiBi does."""
    distance = (torch.arange(4)[:, None] + 4 - torch.arange(8)).abs()
    print("\nmask=-0.5 * distance, causal=True: weights of the last query")
    last = weights(4, 8, mask=-0.5 * distance, causal=True)[-1]
    print("    " + " ".join(f"{weight:.2f}" for weight in last.tolist()))


def softcap() -> None:
    """Show soft-capping, which bounds scores, so that no key can take everything."""
    q, k = torch.ones(1, 1, 1, 8), torch.arange(8.0).repeat_interleave(8).view(1, 1, 8, 8)
    v = torch.eye(8)[None, None]
    print("\nscores 0, 2.8, 5.7 ... 19.8: weights without and with softcap=2.0")
    for cap in (None, 2.0):
        row = flashcore.attention(q, k, v, softcap=cap)[0, 0, 0]
        print("    " + " ".join(f"{weight:.2f}" for weight in row.tolist()))


def grouped_heads() -> None:
    """Show fewer heads of k and v than of q: head h of q reads head h // 4, nothing is repeated."""
    q = torch.randn(1, 8, 16, 32)
    k, v = torch.randn(2, 1, 2, 16, 32)
    out = flashcore.attention(q, k, v, causal=True)
    repeated = flashcore.attention(q, *(x.repeat_interleave(4, dim=1) for x in (k, v)), causal=True)
    print("\n8 heads of q on 2 of k and v, against k and v repeated 4 times")
    print(f"    largest difference {(out - repeated).abs().max():.1e}, with a quarter of the cache")


def empty_rows() -> None:
    """Show that a query that sees nothing gets 0 and lse -inf, not NaN."""
    q = torch.zeros(1, 1, 4, 8)
    k = v = torch.ones(1, 1, 2, 8)
    out, lse = flashcore.attention(q, k, v, causal=True, return_lse=True)
    print("\n4 queries on 2 keys, causal: the first two see nothing")
    print(f"    out {out[0, 0, :, 0].tolist()}, lse {[round(x, 3) for x in lse[0, 0].tolist()]}")


def which_kernel() -> None:
    """Show `explain`, which says how a call would run, and computes nothing."""
    q = torch.empty(1, 32, 4096, 128, dtype=torch.bfloat16)
    k = torch.empty(1, 8, 4096, 128, dtype=torch.bfloat16)
    print("\nflashcore.explain, for an sm_90 GPU")
    flashcore.explain(q, k, k, causal=True, window=(1024, 0), arch=90)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tour.

    Args:
        arguments: the command line; by default the process's.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.parse_args(arguments)
    torch.manual_seed(0)
    masks()
    bias()
    softcap()
    grouped_heads()
    empty_rows()
    which_kernel()


if __name__ == "__main__":
    main()
