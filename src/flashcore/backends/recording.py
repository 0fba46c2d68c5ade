"""Write the calls of a run down for `flashcore build`, and the kernels that they need.

FLASHCORE_RECORD names the file, a JSON object with a list under "calls". A recorded entry is a
Problem and the backend that was asked for. An entry that somebody writes has the fields of
cases.Case instead, of which those may be left out that have a default.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from flashcore.base import env, store
from flashcore.errors import notice_once
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.problem.memory_layout import MaskSpec

Call = tuple[Problem, str]  # and the backend that was asked for

_lock = threading.Lock()
_seen: dict[Path, set[Call]] = {}
_needed: dict[Path, set[tuple[object, ...]]] = {}


def record_call(problem: Problem, backend: str) -> None:
    """Add a call to the file that FLASHCORE_RECORD names, unless calls that are there need the
    same kernels. Calls on the CPU count as well: a GPU may get them later."""
    path = env.record()
    if path is None or problem.is_empty or problem.dtype not in ("float16", "bfloat16"):
        return
    call = problem, backend
    with _lock:
        seen = _seen.setdefault(path, set())
        if call in seen:
            return
        seen.add(call)
        kernels = tuple(_kernels([call], ()))
        if kernels in _needed.setdefault(path, set()):
            return
        _needed[path].add(kernels)
        which = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
        try:
            with store.lock(f"record-{which}"):  # other processes add theirs
                calls = read_calls(path) if path.exists() else []
                if call not in calls:
                    text = json.dumps({"calls": [*map(_to_json, [*calls, call])]}, indent=1)
                    store.write(path.parent, "", path.name, f"{text}\n".encode())
        except (OSError, ValueError) as error:
            notice_once(
                f"record {path}",
                f"{env.RECORD.name}={path}: a call cannot be recorded ({error}); name a file that "
                "can be written, or unset it",
            )


def _to_json(call: Call) -> dict[str, Any]:
    problem, backend = call
    return {"problem": dataclasses.asdict(problem), "backend": backend}


def read_calls(path: Path) -> list[Call]:
    """Return the calls of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else; the message says which entry.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["calls"]
        assert isinstance(entries, list)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(
            f'{path} is no record of calls ({type(error).__name__}: {error}): {{"calls": [...]}}'
        ) from error
    calls = []
    for number, entry in enumerate(entries, 1):
        try:
            calls.append(_from_json(entry))
        except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
            raise ValueError(f"{path}, call {number}: {error}") from error
    return calls


def _from_json(entry: dict[str, Any]) -> Call:
    if "problem" not in entry:
        return _problem_of_case(_case(entry)), "auto"
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in entry["problem"].items()
    }
    mask = fields["mask"]
    if mask is not None:
        fields["mask"] = MaskSpec(**{**mask, "strides": tuple(mask["strides"])})
    return Problem(**fields), str(entry["backend"])


def _case(entry: dict[str, Any]) -> Case:
    fields = dict(entry)
    if fields.get("window") is not None:
        fields["window"] = tuple(fields["window"])
    # As where an option of a command is left out.
    fields.setdefault("num_heads_kv", fields.get("num_heads_q", Case().num_heads_q))
    fields.setdefault("seqlen_k", fields.get("seqlen_q", Case().seqlen_q))
    fields.setdefault("head_dim_v", fields.get("head_dim", Case().head_dim))
    return Case(**fields)


def _problem_of_case(case: Case) -> Problem:
    """Return the problem of a case, from tensors that nobody fills."""

    def empty(heads: int, seqlen: int, dim: int) -> torch.Tensor:
        return torch.empty(case.batch, heads, seqlen, dim, dtype=case.torch_dtype)

    mask = None
    if case.mask == "padding":
        mask = torch.empty(case.batch, 1, 1, case.seqlen_k, dtype=torch.bool)
    elif case.mask != "none":
        dtype = case.torch_dtype if case.mask == "additive" else torch.bool
        mask = torch.empty(1, 1, case.seqlen_q, case.seqlen_k, dtype=dtype)
    return Problem.from_tensors(
        empty(case.num_heads_q, case.seqlen_q, case.head_dim),
        empty(case.num_heads_kv, case.seqlen_k, case.head_dim),
        empty(case.num_heads_kv, case.seqlen_k, case.head_dim_v),
        mask=mask,
        sinks=torch.empty(case.num_heads_q) if case.sinks else None,
        return_max_score=case.return_max_score,
        **case.options(),
    )


def plans_of(calls: Iterable[Call], archs: Sequence[int]) -> list[Any]:
    """Return the plans that calls need on GPUs of some architectures, 90 for sm_90: by the rules,
    by the table that ships, and by what was tuned here."""
    return list(dict.fromkeys(_kernels(calls, archs)))


def _kernels(calls: Iterable[Call], archs: Sequence[int]) -> Iterable[Any]:
    from flashcore.backends.adapting import adapt, kernel_for
    from flashcore.backends.growing import planned_as
    from flashcore.kernels.fwd_wmma.plan import SUPPORTED_ARCHS
    from flashcore.kernels.registry import PORTABLE
    from flashcore.selection.select import candidates, select_plan

    for asked, backend in calls:
        asked_for = PORTABLE if backend == PORTABLE.backend else None
        kernel = None if asked_for is None else asked_for.name
        for arch in archs or SUPPORTED_ARCHS:
            if asked.dtype == "bfloat16" and arch < 80:
                continue
            served_by = kernel_for(asked, arch) if asked_for is None else asked_for.backend
            problem = planned_as(adapt(asked, served_by).problem)
            elsewhere = dataclasses.replace(problem, device="cpu", arch=0)
            yield candidates(elsewhere, arch, kernel=kernel)[0].machine_code()
            yield select_plan(elsewhere, arch, kernel=kernel).machine_code()
            if problem.device == "cuda":
                yield select_plan(problem, arch, kernel=kernel).machine_code()
