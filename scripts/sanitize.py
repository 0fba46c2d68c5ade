"""Run compute-sanitizer over a list of attention calls on the GPU.

    python scripts/sanitize.py                    # memcheck, racecheck, synccheck
    python scripts/sanitize.py --tool racecheck
    python scripts/sanitize.py --self-test        # plant bugs, and fail unless the tools find them

Exit status: 0 no finding, 1 a finding (or a wrong result), 2 could not run (no GPU, no tool, or a
GPU that the tool refuses). Every call's output is also judged against the float64 oracle, so that a
kernel that does nothing is not called clean. torch's caching allocator is switched off, as its
large blocks would hide accesses past a tensor's end.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from flashcore.checks.cases import Case, Inputs, make_inputs

TOOLS: dict[str, list[str]] = {
    # The driver's answers to cuda-bindings' search for entry points are no errors of a kernel.
    "memcheck": ["--report-api-errors", "no"],
    "racecheck": ["--racecheck-report", "all"],
    "synccheck": [],
}
# tool -> planted bug that it must find; synccheck has none, as the kernel has no divergent barrier.
SELF_TEST = {"memcheck": "tail-oob", "racecheck": "no-barrier"}
# Lines that begin like a finding and are none.
NO_FINDING = "COMPUTE-SANITIZER|Target application|Error: Device not supported"
FOUND = 86  # exit status that compute-sanitizer is told to use for a finding

# Small, for racecheck is slow. Each line is there for the code that it makes the kernel enter.
CASES = (
    Case(num_heads_q=1, num_heads_kv=1),  # whole tiles
    Case(seqlen_q=67, seqlen_k=67, head_dim=32, head_dim_v=32),  # ragged tail on both sides
    Case(seqlen_q=1, seqlen_k=1, head_dim=8, head_dim_v=8),  # one row, smallest head
    Case(seqlen_q=1, seqlen_k=190),  # decoding
    Case(num_heads_q=6, seqlen_q=3, seqlen_k=1100, head_dim=32, head_dim_v=32),  # folded, split
    Case(seqlen_q=190, seqlen_k=17),  # fewer keys than a tile
    Case(causal="lower_right", seqlen_q=130, seqlen_k=130),
    Case(causal="lower_right", seqlen_q=150, seqlen_k=50),  # rows with no key at all
    Case(causal="upper_left", seqlen_q=50, seqlen_k=150),
    Case(window=(20, 3), seqlen_q=200, seqlen_k=200),  # tiles skipped at both ends
    Case(softcap=20.0, spread=8.0),
    Case(mask="bool", seqlen_q=70, seqlen_k=90),
    Case(mask="padding", batch=2, seqlen_q=70, seqlen_k=70),
    Case(mask="additive", seqlen_q=70, seqlen_k=90, causal="lower_right"),
    Case(mask="bool", seqlen_q=70, seqlen_k=91),  # mask rows that start anywhere
    Case(mask="additive", seqlen_q=70, seqlen_k=93, causal="lower_right"),
    Case(num_heads_q=4, num_heads_kv=1, seqlen_q=70, seqlen_k=70),
    Case(head_dim=40, head_dim_v=24, seqlen_q=70, seqlen_k=70),  # not multiples of 16
    Case(head_dim=96, head_dim_v=64, seqlen_q=70, seqlen_k=70),
    Case(head_dim=72, head_dim_v=72, seqlen_q=130, seqlen_k=130, causal="lower_right"),
    Case(head_dim=128, head_dim_v=128, seqlen_q=100, seqlen_k=100, causal="lower_right"),
    Case(head_dim=256, head_dim_v=256, seqlen_q=70, seqlen_k=70),
    Case(dtype="bfloat16", seqlen_q=100, seqlen_k=100),
    Case(layout="bshd", seqlen_q=100, seqlen_k=100),  # rows apart in memory
    Case(offset=1, seqlen_q=70, seqlen_k=70),  # addresses that only 2-byte loads may read
    Case(offset=4, head_dim=40, head_dim_v=40, seqlen_q=70, seqlen_k=70),  # 8-byte loads
    Case(tail=5, seqlen_q=70, seqlen_k=70),  # NaN behind every sequence
)


@dataclass
class Outcome:
    """An outcome holds what one tool said about the cases.

    Attributes:
        verdicts: one word a case.
        problem: why the tool gave no verdict, or None.
        log: everything that was printed.
    """

    verdicts: list[str]
    problem: str | None
    log: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Return whether every case ran, was right, and no tool complained."""
        return self.problem is None and all(verdict == "clean" for verdict in self.verdicts)


def run_cases(cases: list[Case], plant: str | None) -> None:
    """Run every case on the GPU, in a child process, and print one `@case` line after each."""
    import torch

    for number, case in enumerate(cases):
        verdict = "ok" if run_case(case, plant) else "wrong"
        torch.cuda.synchronize()
        print(f"@case {number} {verdict}", flush=True)


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
    from flashcore.kernels.fwd_wmma.plan import select_plan
    from flashcore.launch.driver_launch import launch_raw
    from flashcore.problem import Problem
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


def run_tool(sanitizer: str, tool: str, indices: list[int], plant: str | None) -> Outcome:
    """Run the cases once under one tool and read what it printed."""
    command = [sanitizer, "--tool", tool, *TOOLS[tool]]
    command += [
        "--error-exitcode",
        str(FOUND),
        "--kernel-regex",
        "kns=attn_",
        "--print-limit",
        "20",
    ]
    command += [sys.executable, __file__, "--child", ",".join(map(str, indices))]
    command += ["--plant", plant] if plant else []
    done = subprocess.run(
        command,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    log = done.stdout.splitlines()
    return read_log(log, done.returncode, len(indices))


def read_log(log: list[str], status: int, num_cases: int) -> Outcome:
    """Turn a tool's output into one verdict a case.

    Args:
        log: lines of the tool and of the child process, in order; the child ends each case with
            an `@case` line.
        status: exit status of the tool.
        num_cases: how many cases were asked for.

    Returns:
        Verdicts "clean", "wrong" (the oracle's word), "N findings" or "not run".
    """
    verdicts: list[str] = []
    findings, total = 0, None
    for line in log:
        case = re.match(r"@case \d+ (\w+)", line)
        summary = re.search(r"SUMMARY: (\d+) (?:errors?|hazards?)", line)
        if case:
            verdict = "clean" if case.group(1) == "ok" else "wrong"
            verdicts.append(f"{findings} findings" if findings else verdict)
            findings = 0
        elif summary:
            total = int(summary.group(1))
        elif re.match(rf"========= (?!{NO_FINDING})\S", line):
            findings += 1  # continuation lines are indented
    done = len(verdicts)
    if findings and done < num_cases:
        verdicts.append(f"{findings} findings")  # memcheck ends the kernel, and with it the run
    problem = None
    if total is None:
        problem = "the tool printed no summary: " + (log[-1] if log else "no output at all")
    elif done < num_cases:
        problem = f"stopped in case {done}, with exit status {status}"
    elif status not in (0, FOUND):
        problem = f"exit status {status}"
    elif (total or status == FOUND) and all(verdict == "clean" for verdict in verdicts):
        problem = f"{total} findings outside the cases"
    return Outcome(verdicts + ["not run"] * (num_cases - len(verdicts)), problem, log)


def report(cases: list[Case], outcomes: dict[str, Outcome]) -> None:
    """Print the table, then the log of every tool that was not content."""
    from rich.console import Console
    from rich.table import Table

    table = Table("case", *outcomes)
    for number, case in enumerate(cases):
        table.add_row(case.describe(), *(o.verdicts[number] for o in outcomes.values()))
    Console().print(table)
    for tool, outcome in outcomes.items():
        if not outcome.clean:
            print(f"\n{tool}: {outcome.problem or 'see the table'}")
            print("\n".join(outcome.log[-200:]))


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
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--plant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_cases([CASES[int(index)] for index in options.child.split(",")], options.plant)
        return 0
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
    cases = list(CASES)
    indices = list(range(len(cases)))
    outcomes = {tool: run_tool(sanitizer, tool, indices, None) for tool in options.tool or TOOLS}
    report(cases, outcomes)
    if any("not supported" in line for outcome in outcomes.values() for line in outcome.log):
        print("sanitize: compute-sanitizer does not support this device or driver")
        return 2
    clean = all(outcome.clean for outcome in outcomes.values())
    print("sanitize: clean" if clean else "sanitize: NOT clean")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
