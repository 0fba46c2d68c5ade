"""Time another version's forward pass and this one's in one run, in turns, on the GPU at hand.

    python scripts/compare_speed.py v0.1.0
    python scripts/compare_speed.py ../older-checkout --groups sweep,gqa --random 20 --seed 7
    python scripts/compare_speed.py HEAD~1 --limit 1.01 --json speed.json

The base is a commit, or a folder that holds a checkout. Each version lives in a process of its own
(scripts/timed_version.py), which captures a CUDA graph of each shape; the two replay theirs in
turns, round after round, so that clocks and temperature are the same for both. Shapes are those of
`flashcore bench`. A ratio is the time of this version over the base's, the median of the rounds'
ratios: above 1 this version is slower.

Exit status: 0, 1 where a ratio is above --limit or a version failed, 2 for a wrong argument.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from flashcore.bench.document import head, write
from flashcore.bench.random_shapes import random_shapes
from flashcore.bench.workloads import GROUPS, Workload, cpu_shapes

ROOT = Path(__file__).resolve().parents[1]
WORKLOADS = ROOT / "src/flashcore/bench/workloads.py"
_WARM_UPS = 1  # replays before each that counts: the other version's tensors are in the cache


@contextmanager
def checked_out(base: str) -> Iterator[Path]:
    """Give the folder of a version: the one that is named, or a commit's files in a temporary one.

    Raises:
        ValueError: it is neither a folder with src/flashcore nor a commit.
    """
    if (Path(base) / "src/flashcore").is_dir():
        yield Path(base).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        command = ["git", "archive", "--format=tar", base, "src"]
        packed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        if packed.returncode:
            raise ValueError(
                f"base {base!r} is no folder with src/flashcore, and no commit: "
                + packed.stderr.decode(errors="replace").strip()
            )
        subprocess.run(["tar", "-x", "-C", folder], input=packed.stdout, check=True)
        yield Path(folder)


class Version:
    """A version is a process that times the calls of one source tree."""

    def __init__(self, tree: Path) -> None:
        """Start the process for the tree whose package is src/flashcore."""
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts/timed_version.py"), str(WORKLOADS)],
            env=os.environ | {"PYTHONPATH": str(tree / "src")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Version:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def _ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer is empty, too
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"its process ended with exit status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def prepare(self, workload: Workload, num_calls: int = 0) -> int:
        """Compile a workload and capture num_calls of it (0: as many as fit); return how many."""
        fields = dataclasses.asdict(workload)
        return int(self._ask(workload=fields, num_calls=num_calls)["num_calls"])

    def seconds(self) -> float:
        """Return what a call of the workload took in one replay."""
        return float(self._ask()["seconds"])


def compile_all(trees: Sequence[Path], workloads: Sequence[Workload], jobs: int) -> None:
    """Have the kernels of all workloads compiled into the cache, by several processes at once. What
    fails here fails again, and is named, where it is timed."""

    def some(tree: Path, first: int) -> None:
        with Version(tree) as version:
            for workload in workloads[first::jobs]:
                try:
                    version.prepare(workload, 1)
                except RuntimeError:
                    return

    with ThreadPoolExecutor(jobs * len(trees)) as pool:
        for done in [pool.submit(some, tree, i) for tree in trees for i in range(jobs)]:
            done.result()


def compare(base: Version, now: Version, workload: Workload, rounds: int) -> dict[str, Any]:
    """Return the times of a workload by both versions, in seconds, and their ratio."""
    row: dict[str, Any] = {"group": workload.group, "workload": workload.name}
    try:
        num_calls = base.prepare(workload)
        now.prepare(workload, num_calls)
        pairs = []
        for number in range(rounds):
            first, second = (base, now) if number % 2 == 0 else (now, base)
            times = {}
            for version in (first, second):
                for _ in range(_WARM_UPS):
                    version.seconds()
                times[version] = version.seconds()
            pairs.append((times[base], times[now]))
    except RuntimeError as error:
        return row | {"error": str(error)}
    return row | {
        "base_seconds": statistics.median(old for old, _ in pairs),
        "seconds": statistics.median(new for _, new in pairs),
        "ratio": statistics.median(new / old for old, new in pairs),
        "rounds_ratios": [new / old for old, new in pairs],
    }


def shapes(groups: str, number: int, seed: int) -> list[Workload]:
    """Return the workloads of groups, and so many random ones.

    Raises:
        ValueError: there is no such group.
    """
    names = [name for name in groups.split(",") if name]
    for name in names:
        if name not in GROUPS:
            raise ValueError(f"--groups {name}: there are {', '.join(GROUPS)}")
    chosen = [workload for name in names for workload in GROUPS[name]()]
    return chosen + random_shapes(number, seed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base", help="a commit, or a folder that holds a checkout")
    parser.add_argument("--groups", default="seed,sweep,gqa,small,window,decode", help="of bench")
    parser.add_argument("--random", type=int, default=0, help="so many random shapes besides")
    parser.add_argument("--seed", type=int, default=0, help="of the random shapes")
    parser.add_argument("--tiny", action="store_true", help="one small shape, as on a CPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--jobs", type=int, default=4, help="that compile for each version")
    parser.add_argument("--limit", type=float, default=1.01, help="for the ratio of each shape")
    parser.add_argument("--limit-s", type=float, default=600, help="no new shape after that")
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("torch sees no GPU here; --tiny rehearses without one")
    started = time.monotonic()
    with ExitStack() as stack:
        try:
            tree = stack.enter_context(checked_out(options.base))
            workloads = shapes(options.groups, options.random, options.seed)
        except ValueError as error:
            parser.error(str(error))
        if options.tiny:
            workloads = [dataclasses.replace(cpu_shapes()[0], seqlen=64)]
        elif options.jobs:
            compile_all((tree, ROOT), workloads, options.jobs)
            print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
        base = stack.enter_context(Version(tree))
        now = stack.enter_context(Version(ROOT))
        rows = []
        for workload in workloads:
            if time.monotonic() - started > options.limit_s:
                print(f"not timed, as {options.limit_s:g} s are over: {workload.name}")
                continue
            row = compare(base, now, workload, options.rounds)
            rows.append(row)
            told = row.get("error") or (
                f"{row['base_seconds'] * 1e6:10.2f} {row['seconds'] * 1e6:10.2f} us"
                f" {row['ratio']:7.3f}"
            )
            print(f"{row['group']:12s} {row['workload']:44s} {told}", flush=True)
    timed = [row for row in rows if "ratio" in row]
    over = [row for row in timed if row["ratio"] > options.limit]
    failed = len(rows) - len(timed)
    mean = statistics.geometric_mean([row["ratio"] for row in timed]) if timed else float("nan")
    print(
        f"{len(timed)} shapes, mean ratio {mean:.3f}, {len(over)} above {options.limit:g}, "
        f"{failed} failed"
    )
    method = "CUDA graph replays in turns; the median of the rounds' ratios"
    about = {"base": options.base, "mean_ratio": mean, "results": rows}
    write(options.json, head("speed of two versions", device, method) | about)
    return 1 if over or failed else 0


if __name__ == "__main__":
    sys.exit(main())
