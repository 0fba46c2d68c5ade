"""Make tables of what scripts measure of one subject: masks, packed decoding, decoder steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashcore.bench.reporting.report import table

Row = Mapping[str, Any]


def masks_table(document: Mapping[str, Any]) -> str:
    """Return milliseconds of calls with a mask, kernel by kernel, and their share of the speed that
    the same call has without one (scripts/time_masks.py)."""
    rows = [row for row in document["results"] if "skipped" not in row]
    plain = {row["shape"]: row for row in rows if row["mask"] is None}
    header = ["mask, gradient wanted", "forward", "dq", "dk and dv", "dmask", "share, forward"]
    header += ["share, dq to dv", "all", "SDPA, efficient", "cuDNN"]
    lines = []
    last_shape = None
    for row in rows:
        own = _mask_kernels(row)
        bare = _mask_kernels(plain[row["shape"]]) if row["shape"] in plain else {}
        is_masked = row["mask"] is not None
        what = (row["mask"] or "none") + ", yes" * row["needs_grad"]
        lines.append(
            [
                what if row["shape"] == last_shape else f"{row['shape']}, {what}",
                *(_ms(own.get(name)) for name in ("forward", "dq", "dkdv", "dmask")),
                *(_share(own, bare, names) if is_masked else "" for names in _SHARES),
                *(_ms(row[name]) for name in ("step_ms", "efficient_ms", "cudnn_ms")),
            ]
        )
        last_shape = row["shape"]
    return table(header, lines)


_SHARES = (("forward",), ("dq", "dkdv"))
# One kernel may compute dq, dk and dv; then there are one before it and one behind.
_KERNELS = {"attn_fwd": "forward", "bwd_dq": "dq", "bwd_dkdv": "dkdv", "bwd_dmask": "dmask"}
_KERNELS |= {"bwd_delta": "dkdv", "bwd_round": "dkdv"}


def _mask_kernels(row: Row) -> dict[str, float]:
    """Return milliseconds by kernel: launches that belong to one are added up."""
    found: dict[str, float] = {}
    for kernel, ms in row["kernel_ms"].items():
        for part, name in _KERNELS.items():
            if part in kernel:
                found[name] = found.get(name, 0.0) + ms
    return found


def _share(own: Mapping[str, float], bare: Mapping[str, float], names: tuple[str, ...]) -> str:
    masked = sum(own.get(name, 0.0) for name in names)
    without = sum(bare.get(name, 0.0) for name in names)
    return f"{without / masked:.2f}" if masked and without else ""


def _ms(value: float | str | None) -> str:
    """Return a time; "no" for a reason why there is none."""
    if value is None:
        return ""
    return "no" if isinstance(value, str) else f"{value:.2f}"


def packed_decode_table(document: Mapping[str, Any]) -> str:
    """Return microseconds of packed queries that are few, by page size
    (scripts/time_packed_decode.py)."""
    sizes = list(dict.fromkeys(row["page_size"] for row in document["results"]))
    found = {(row["batch"], row["page_size"]): row for row in document["results"]}
    names = " / ".join(map(str, sizes))
    lines = []
    for batch in dict.fromkeys(row["batch"] for row in document["results"]):
        of_batch = [found[batch, size] for size in sizes if (batch, size) in found]
        times = (
            " / ".join(_us(row[key]) for row in of_batch if key in row)
            for key in ("packed_us", "padded_us")
        )
        lines.append([batch, f"{of_batch[0]['bound_us']:.0f}", *times])
    return table([f"us, pages of {names}", "bound", "packed", "padded"], lines)


def steps_table(document: Mapping[str, Any]) -> str:
    """Return microseconds of what surrounds attention in a step (scripts/time_steps.py)."""
    rows = document["results"]
    header = [f"{row['drafts']} new, room {row['room']}" for row in rows]
    names = dict.fromkeys(name for row in rows for name in row["us"])
    lines = [[name, *(_us(row["us"].get(name)) for row in rows)] for name in names]
    return table(["us", *header], lines)


def _us(value: float | str | None) -> str:
    if value is None:
        return ""
    return "no" if isinstance(value, str) else f"{value:.1f}"
