"""Read what a tool of compute-sanitizer and its child process printed, as verdicts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# Lines that begin like a finding and are none.
NO_FINDING = "COMPUTE-SANITIZER|Target application|Error: Device not supported"
# What the child says of a row -> verdict; errors stay as they are.
VERDICTS = {"ok": "clean", "late": "not run"}
FOUND = 86  # exit status that compute-sanitizer is told to use for a finding


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


def read_log(log: list[str], status: int, num_cases: int) -> Outcome:
    """Turn a tool's output into one verdict a case.

    Args:
        log: lines of the tool and of the child process, in order; the child ends each case with
            an `@case` line.
        status: exit status of the tool.
        num_cases: how many cases were asked for.

    Returns:
        Verdicts "clean", "wrong" (of a result), "error: ...", "N findings" or "not run".
    """
    verdicts: list[str] = []
    findings, total = 0, None
    for line in log:
        case = re.match(r"@case \d+ (.+)", line)
        summary = re.search(r"SUMMARY: (\d+) (?:errors?|hazards?)", line)
        if case:
            verdict = VERDICTS.get(case.group(1), case.group(1))
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
