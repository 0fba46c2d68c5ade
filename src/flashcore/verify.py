"""Random attention calls against the float64 oracle, each replayable from (seed, index) alone.

Cases aim at what breaks kernels: lengths of 0, 1, primes and tile borders, strided and offset
tensors, NaN behind every sequence, masks with rows that see nothing, windows, softcap, sharp
softmaxes. The judge is the error rule of accuracy.py.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from flashcore import env
from flashcore.accuracy import ErrorReport, error_report
from flashcore.cases import Case, make_inputs
from flashcore.obstacles import SM90_ARCH
from flashcore.plan import SIM_ARCH

BACKENDS = ("auto", "sm90", "wmma", "sim", "torch")
GPU_BACKENDS = ("sm90", "wmma")

# One of a kind each of what goes wrong: nothing, one, primes, a tile less, exactly, and more by
# one.
_SHORT = (1, 2, 15, 16, 17, 31, 63, 64, 65, 97, 127, 128, 129)
_LONG = (*_SHORT, 191, 255, 257, 300, 511, 513, 1000, 1500)

# The simulator compiles every configuration once (seconds), so its cases share these. Lengths,
# heads, layout, tail and values stay random.
_SIM_CONFIGURATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": "lower_right"},
    {"head_dim": 32, "head_dim_v": 32, "mask": "bool"},
    {"head_dim": 40, "head_dim_v": 72, "dtype": "bfloat16", "mask": "additive"},
    {"head_dim": 128, "head_dim_v": 128, "window": (40, 3), "softcap": 20.0},
    {"head_dim": 64, "head_dim_v": 64, "causal": "upper_left", "mask": "padding", "offset": 1},
)


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One verified case. `error` is the exception's text when the call failed."""

    index: int
    case: Case
    ok: bool
    replay: str
    report: ErrorReport | None = None
    error: str | None = None

    def describe(self) -> str:
        """What went wrong, or how large the errors are."""
        return self.error if self.error is not None else str(self.report)


def resolve_backend(name: str) -> str:
    """The backend that "auto" stands for here: wmma on a GPU, else torch.

    Raises:
        ValueError: unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is not one of {', '.join(BACKENDS)}")
    if name != "auto":
        return name
    if not torch.cuda.is_available():
        return "torch"
    return "sm90" if torch.cuda.get_device_capability() == (9, 0) else "wmma"


def draw_case(seed: int, index: int, backend: str, arch: int | None = None) -> Case:
    """The case of a seed and an index. It does not depend on the machine.

    Args:
        seed: of the whole run.
        index: of the case in the run.
        backend: "sm90", "wmma", "sim" or "torch".
        arch: architecture that is simulated.
    """
    rng = random.Random(f"{seed}:{index}:{backend}")
    options: dict[str, Any] = {}
    if backend == "sim":
        options |= _SIM_CONFIGURATIONS[index % len(_SIM_CONFIGURATIONS)]
        if arch == SM90_ARCH and "offset" in options:
            options["offset"] = 8  # TMA reads 16-byte aligned rows only
    else:
        options |= _draw_configuration(rng, backend)
    lengths = _SHORT if backend == "sim" else _LONG
    heads_kv = rng.choice((1, 1, 2, 3))
    seqlen_q = _draw_length(rng, lengths, zero=backend != "sim")
    # Half of the cases are self-attention; the rest has one length independent of the other.
    seqlen_k = seqlen_q if rng.random() < 0.5 else _draw_length(rng, lengths, backend != "sim")
    if backend != "sim" and rng.random() < 0.2:  # a few queries for a long cache
        seqlen_q, seqlen_k = rng.choice((1, 1, 2, 5, 16, 100)), rng.randint(1000, 9000)
    return Case(
        **{
            "batch": rng.choice((1, 1, 2, 3)),
            "num_heads_q": heads_kv * rng.choice((1, 1, 2, 4)),
            "num_heads_kv": heads_kv,
            "seqlen_q": seqlen_q,
            "seqlen_k": seqlen_k,
            "layout": rng.choice(("bhsd", "bshd")),
            "tail": rng.choice((0, 1, 7)),
            "scale": rng.choice((None, None, 0.5, 0.01)),
            "spread": rng.choice((1.0, 1.0, 1.0, 8.0)),
            "seed": rng.randrange(2**31),
            **options,
        }
    )


def _draw_length(rng: random.Random, lengths: Sequence[int], zero: bool) -> int:
    if zero and rng.random() < 0.04:
        return 0
    return rng.choice(lengths) if rng.random() < 0.7 else rng.randint(1, lengths[-1] // 2)


def _draw_configuration(rng: random.Random, backend: str) -> dict[str, Any]:
    """The options that change the compiled kernel."""
    dtypes = ["float16", "float16", "bfloat16"]
    if backend == "torch":
        dtypes += ["float32", "float64"]
    head_dim = rng.choice((8, 16, 24, 32, 40, 64, 64, 64, 80, 96, 128, 128, 192, 256))
    same = rng.random() < 0.8
    window = None
    if rng.random() < 0.3:
        window = (rng.choice((-1, 0, 1, 17, 64, 200)), rng.choice((-1, 0, 3, 64)))
    return {
        "head_dim": head_dim,
        "head_dim_v": head_dim if same else rng.choice((8, 32, 64, 72, 128)),
        "dtype": rng.choice(dtypes),
        "causal": rng.choice(("none", "none", "lower_right", "upper_left")),
        "window": window,
        "softcap": rng.choice((None, None, None, 20.0)),
        "mask": rng.choice(("none", "none", "bool", "padding", "additive")),
        # TMA reads 16-byte aligned rows only.
        "offset": rng.choice((0, 0, 0, 8) if backend == "sm90" else (0, 0, 0, 1, 2, 8)),
    }


def verify(
    backend: str,
    *,
    seed: int = 0,
    indices: Sequence[int] = range(20),
    arch: int | None = None,
    on_case: Callable[[CaseResult], None] = lambda result: None,
) -> list[CaseResult]:
    """Verify cases one after the other.

    Args:
        backend: "auto", "sm90", "wmma", "sim" or "torch".
        seed: of the run.
        indices: which cases of the run.
        arch: architecture whose kernel "sim" runs, by default FLASHCORE_SIM_ARCH.
        on_case: called after each case.

    Returns:
        One result a case.
    """
    backend = resolve_backend(backend)
    arch = arch or env.sim_arch()
    results = []
    for index in indices:
        result = _verify_one(backend, seed, index, arch)
        on_case(result)
        results.append(result)
    return results


def _verify_one(backend: str, seed: int, index: int, arch: int) -> CaseResult:
    from flashcore import attention

    case = draw_case(seed, index, backend, arch)
    replay = f"flashcore verify --backend {backend} --seed {seed} --case {index}"
    if backend == "sim" and arch != SIM_ARCH:
        replay += f" --arch sm_{arch}"
    try:
        inputs = make_inputs(case, "cuda" if backend in GPU_BACKENDS else "cpu")
        with _simulator(case.seed, arch):
            out, lse = attention(
                inputs.q,
                inputs.k,
                inputs.v,
                mask=inputs.mask,
                return_lse=True,
                backend=backend,
                **case.options(),
            )
        report = error_report(
            out, inputs.q, inputs.k, inputs.v, lse=lse, mask=inputs.mask, **case.options()
        )
    except Exception as error:  # whatever a drawn case raises is a failure to report and to replay
        return CaseResult(index, case, False, replay, error=f"{type(error).__name__}: {error}")
    return CaseResult(index, case, report.ok, replay, report=report)


@contextmanager
def _simulator(seed: int, arch: int) -> Iterator[None]:
    """The simulator's scheduler gets the case's seed, so that replaying a case replays the run."""
    wanted = {env.SIM_SEED.name: str(seed), env.SIM_ARCH.name: str(arch)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
