"""Run compute-sanitizer over lists of calls on the GPU: scripts/sanitize_rows.py.

    python scripts/sanitize.py                    # memcheck, racecheck, synccheck
    python scripts/sanitize.py --tool racecheck
    python scripts/sanitize.py --only gradients   # rows with this text
    python scripts/sanitize.py --limit-s 500      # no row begins after so many seconds
    python scripts/sanitize.py --jobs 16          # processes that compile the rows' kernels first
    python scripts/sanitize.py --self-test        # plant bugs, and fail unless the tools find them

Exit status: 0 no finding, 1 a finding (or a wrong result, an error, or a row that was not run), 2
could not run (no GPU, no tool, no row for this GPU, or a GPU that the tool refuses). Every call's
results are also judged, those of dense forward calls by the float64 oracle and others by PyTorch
(scripts/sanitize_calls.py), so that a kernel that does nothing is not called clean. torch's caching
allocator is switched off, as its large blocks would hide accesses past a tensor's end. On GPUs
other than Hopper the rows of its kernels are left out.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flashcore.checks.cases import Inputs, make_inputs
from flashcore.problem.case import Case
from sanitize_calls import Call
from sanitize_log import FOUND, Outcome, read_log
from sanitize_rows import CALLS, CASES

TOOLS: dict[str, list[str]] = {
    # The driver's answers to cuda-bindings' search for entry points are no errors of a kernel.
    "memcheck": ["--report-api-errors", "no"],
    "racecheck": ["--racecheck-report", "all"],
    "synccheck": [],
}
# tool -> planted bug that it must find; synccheck has none, as the kernel has no divergent barrier.
SELF_TEST = {"memcheck": "tail-oob", "racecheck": "no-barrier"}
# What the names of flashcore's kernels begin with; the tools leave out PyTorch's.
KERNELS = ("attn_", "append_kvcache", "merge_results")
ROWS: tuple[Case | Call, ...] = (*CASES, *CALLS)


def run_rows(rows: Iterable[Case | Call], plant: str | None, deadline: float | None) -> None:
    """Run every row on the GPU, in a child process, and print one `@case` line after each.

    Args:
        rows: what to run.
        plant: a planted bug for dense calls, or None.
        deadline: seconds since the epoch after which no row begins, or None.
    """
    import torch

    for number, row in enumerate(rows):
        verdict = "late"
        if deadline is None or time.time() < deadline:
            try:
                verdict = "ok" if run_row(row, plant) else "wrong"
                torch.cuda.synchronize()
            except Exception as error:  # a row must not take the others with it
                lines = str(error).strip().splitlines() or [""]
                verdict = f"error: {type(error).__name__}: {lines[0]}"
        print(f"@case {number} {verdict}", flush=True)


def compile_first(indices: Sequence[int], jobs: int, deadline: float | None) -> None:
    """Run rows once without a tool, in some processes: under a tool their kernels are found
    compiled."""
    with ThreadPoolExecutor(jobs) as pool:
        for own in (indices[start::jobs] for start in range(min(jobs, len(indices)))):
            pool.submit(subprocess.run, child_command(own, deadline), capture_output=True)


def child_command(indices: Sequence[int], deadline: float | None) -> list[str]:
    """Return the command of a process that runs rows."""
    command = [sys.executable, __file__, "--child", ",".join(map(str, indices))]
    return command + (["--deadline", str(deadline)] if deadline is not None else [])


def run_row(row: Case | Call, plant: str | None) -> bool:
    """Run a row; True when its results are right."""
    if isinstance(row, Case):
        return run_case(row, plant)
    wrong = row.judge()
    for line in wrong:
        print(f"{row.name}: {line}")
    return not wrong


def run_case(case: Case, plant: str | None) -> bool:
    """Run one case on the GPU, on every kernel that takes it; True when the results pass the error
    rule (or have a plant)."""
    x, on_gpu = make_inputs(case), make_inputs(case, "cuda")
    if plant is not None:
        launch_planted(case, plant, on_gpu)
        return True
    return all(run_kernel(case, backend, x, on_gpu) for backend in backends_for(case))


def backends_for(case: Case) -> list[str]:
    """Return the kernels of this GPU that take the case."""
    import torch

    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    return ["wmma", "sm90"] if is_hopper and case.offset % 8 == 0 else ["wmma"]


def run_kernel(case: Case, backend: str, x: Inputs, on_gpu: Inputs) -> bool:
    """Run one case on one kernel and judge the result."""
    from flashcore import attention
    from flashcore.checks.accuracy import error_report

    out, lse = attention(
        on_gpu.q,
        on_gpu.k,
        on_gpu.v,
        mask=on_gpu.mask,
        backend=backend,
        return_lse=True,
        **case.options(),
    )
    report = error_report(out.cpu(), x.q, x.k, x.v, lse=lse.cpu(), mask=x.mask, **case.options())
    if not report.ok:
        print(f"{backend} {case.describe()}: {report}")
    return report.ok


def launch_planted(case: Case, plant: str, x: Inputs) -> None:
    """Compile the kernel with a planted bug and launch it once."""
    import torch

    from flashcore.compile.codegen import generate_source
    from flashcore.compile.jit import compile_source
    from flashcore.kernels.fwd_wmma.params import build_params, grid_size
    from flashcore.launch.driver_launch import launch_raw
    from flashcore.problem import Problem
    from flashcore.selection.select import select_plan
    from flashcore.sim.plants.wmma import PLANTS

    options = {"causal": False, "scale": None, "window": None, "softcap": None, **case.options()}
    problem = Problem.from_tensors(x.q, x.k, x.v, mask=x.mask, return_lse=False, **options)
    plan = select_plan(problem, kernel="attn_fwd_wmma")
    out = torch.empty(*x.q.shape[:3], x.v.shape[3], dtype=x.q.dtype, device="cuda")
    tensors = {"q": x.q, "k": x.k, "v": x.v, "mask": x.mask, "out": out}
    pointers = {name: None if t is None else t.data_ptr() for name, t in tensors.items()}
    source = generate_source(plan, "ptx", PLANTS[plant])
    launch_raw(
        compile_source(source, plan.arch, plan.kernel),
        grid=grid_size(problem, plan),
        num_threads=plan.num_threads,
        smem_bytes=plan.smem_bytes,
        params=build_params(problem, plan, pointers),
        device=out.device,
    )


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer, or None."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which("compute-sanitizer") or shutil.which(home / "bin" / "compute-sanitizer")


def chosen(only: str, is_hopper: bool) -> list[int]:
    """Return the numbers of the rows with a text in them that a GPU's kernels can compute."""
    return [
        number
        for number, row in enumerate(ROWS)
        if only in row.describe() and (is_hopper or isinstance(row, Case) or row.backend != "sm90")
    ]


def run_tool(
    sanitizer: str,
    tool: str,
    indices: Sequence[int],
    plant: str | None = None,
    deadline: float | None = None,
) -> Outcome:
    """Run rows once under one tool and read what it printed; `deadline` as for `run_rows`."""
    command = [sanitizer, "--tool", tool, *TOOLS[tool], "--error-exitcode", str(FOUND)]
    for name in KERNELS:  # a kernel is checked if any of them matches
        command += ["--kernel-regex", f"kns={name}"]
    command += ["--print-limit", "20"]
    command += child_command(indices, deadline)
    command += ["--plant", plant] if plant else []
    done = subprocess.run(
        command,
        # What is checked are kernels: nothing is to be built beside them.
        env={
            **os.environ,
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
            "FLASHCORE_LAUNCHER": "python",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    log = done.stdout.splitlines()
    return read_log(log, done.returncode, len(indices))


def report(rows: Sequence[Case | Call], outcomes: dict[str, Outcome]) -> None:
    """Print the table, then the log of every tool that was not content."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("case", *outcomes)
    for number, row in enumerate(rows):
        verdicts = [outcome.verdicts[number] for outcome in outcomes.values()]
        table.add_row(*map(escape, (row.describe(), *verdicts)))
    Console().print(table)
    for tool, outcome in outcomes.items():
        if not outcome.clean:
            print(f"\n{tool}: {outcome.problem or 'see the table'}")
            log = [line for line in outcome.log if not re.match(r"@case \d+ ok", line)]
            print("\n".join(log[-400:]))


def self_test(sanitizer: str) -> bool:
    """Plant one bug for each tool; True when each is found."""
    wanted = [number for number, case in enumerate(CASES) if case.seqlen_q == 67]
    caught = True
    for tool, plant in SELF_TEST.items():
        outcome = run_tool(sanitizer, tool, wanted, plant)
        found = any("findings" in verdict for verdict in outcome.verdicts)
        print(f"{tool}: planted {plant} {'found' if found else 'NOT FOUND'}")
        if not found:
            print("\n".join(outcome.log[-50:]))
        caught &= found
    return caught


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tool", choices=TOOLS, action="append", help="default: all three")
    parser.add_argument(
        "--self-test", action="store_true", help="check that planted bugs are found"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="run the rows with this text")
    parser.add_argument(
        "--limit-s", type=float, metavar="SECONDS", help="after so long no row of any tool begins"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="NUMBER",
        help="processes that compile kernels before a tool runs; default: %(default)s",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--plant", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        rows = [ROWS[int(index)] for index in options.child.split(",")]
        run_rows(rows, options.plant, options.deadline)
        return 0
    deadline = None if options.limit_s is None else time.time() + options.limit_s
    import torch

    sanitizer = find_sanitizer()
    if not torch.cuda.is_available() or sanitizer is None:
        missing = "a CUDA GPU" if sanitizer else "compute-sanitizer (part of the CUDA toolkit)"
        print(
            f"sanitize: nothing was checked, for this machine has no {missing.removeprefix('a ')}"
        )
        return 2
    if options.self_test:
        return 0 if self_test(sanitizer) else 1
    indices = chosen(options.only, torch.cuda.get_device_capability() == (9, 0))
    if not indices:
        print(f"sanitize: nothing was checked, for this GPU has no row with {options.only!r}")
        return 2
    compile_first(indices, max(1, options.jobs), deadline)
    outcomes = {
        tool: run_tool(sanitizer, tool, indices, deadline=deadline)
        for tool in options.tool or TOOLS
    }
    report([ROWS[index] for index in indices], outcomes)
    if any("not supported" in line for outcome in outcomes.values() for line in outcome.log):
        print("sanitize: compute-sanitizer does not support this device or driver")
        return 2
    clean = all(outcome.clean for outcome in outcomes.values())
    print("sanitize: clean" if clean else "sanitize: NOT clean")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
