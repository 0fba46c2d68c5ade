"""Measure a release on the GPU at hand, in parts that each end within a given time.

    python scripts/measure_release.py --list
    python scripts/measure_release.py --part forward --part host --seconds 500
    python scripts/measure_release.py --part all --seconds 900

Each part makes files in --json-dir, which the pages of this project quote; --list names both. A
part that came to its end leaves its files, whatever becomes of the others. At the end the tables
that are drawn from files are drawn again (`scripts/readme_results.py`), where the files are those
that the pages quote.

Exit status: 0 all parts ended well, 1 one failed or ran out of time.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
_RESERVE_S = 60.0  # of a part's time, for what a tool does after the last shape that it begins
FORWARD = "seed,sweep,masked,gqa,window,decode,decode-more,varlen,small"
BACKWARD = "sweep,gqa,small,window,masked,varlen"


@dataclasses.dataclass(frozen=True)
class Part:
    """A part is a command that measures something.

    Args:
        about: what it measures.
        command: returns the arguments behind `python`, given the seconds that it may take and the
            file that it writes.
        file: the name of that file behind the GPU's; "" where it writes none.
        pages: those that quote the file.
        num_gpus: that it needs.
        prints: whether it prints the results, as JSON, instead of writing the file.
    """

    about: str
    command: Callable[[float, str], list[str]]
    file: str = ""
    pages: tuple[str, ...] = ()
    num_gpus: int = 1
    prints: bool = False


def _flashcore(*arguments: str) -> list[str]:
    return ["-m", "flashcore", *arguments]


def _minutes(seconds: float) -> str:
    """Return the minutes after which a tool may begin nothing new."""
    return f"{max(0.0, seconds - _RESERVE_S) / 60:.2f}"


def _limit(seconds: float, of: int = 1) -> str:
    """Return the same in seconds."""
    return f"{max(0.0, seconds - _RESERVE_S) / of:.0f}"


def _rings(ranks: int) -> Part:
    return Part(
        f"context parallelism over {ranks} GPUs",
        lambda seconds, path: [
            "scripts/bench_context_parallel.py", "--ranks", str(ranks),
            "--limit-s", _limit(seconds), "--json", path,
        ],
        f"rings-{ranks}.json",
        num_gpus=ranks,
    )  # fmt: skip


# In the order of `--part all`: what is wrong is not worth being timed, and tiles come before times.
PARTS: dict[str, Part] = {
    "suite": Part(
        "the test suite on the GPU",
        lambda seconds, path: ["-m", "pytest", "-q", "--require-gpu", "-m", "gpu"],
    ),
    "tune": Part(
        "the forward's tiles that ship, as a table to be put into src/flashcore/data",
        lambda seconds, path: _flashcore(
            "tune", "--grid", "--minutes", _minutes(seconds), "--output", path
        ),
        "tiles.json",
    ),
    "tune-backward": Part(
        "the backward's tiles, into this machine's cache, which the times behind it take",
        lambda seconds, path: _flashcore(
            "tune", "--backward", "--grid", "--minutes", _minutes(seconds), "--json"
        ),
        "tune-backward.json",
        prints=True,
    ),
    "forward": Part(
        "the forward pass beside its peers",
        lambda seconds, path: _flashcore(
            "bench", "--groups", FORWARD, "--random", "20", "--seed", "3",
            "--without", "flex,sdpa-math", "--minutes", _minutes(seconds), "--output", path,
        ),
        ".json",
        ("README.md", "docs/performance.md", "docs/numerics.md"),
    ),
    "backward": Part(
        "gradients beside their peers",
        lambda seconds, path: _flashcore(
            "bench", "--backward", "--groups", BACKWARD, "--without", "flex", "--rounds", "3",
            "--minutes", _minutes(seconds), "--output", path,
        ),
        "gradients.json",
        ("README.md", "docs/backward-speed.md"),
    ),
    "decode": Part(
        "decoding over caches of true lengths",
        lambda seconds, path: [
            "scripts/bench_decode.py", "--seed", "7", "--limit-s", _limit(seconds), "--json", path
        ],
        "decode.json",
        ("docs/serving-kernels.md",),
    ),
    "masks": Part(
        "calls with masks, and masks' gradients",
        lambda seconds, path: ["scripts/time_masks.py", "--json", path],
        "masks.json",
        ("docs/backward.md",),
    ),
    "packed-decode": Part(
        "packed queries of which most are few",
        lambda seconds, path: ["scripts/time_packed_decode.py", "--json", path],
        "packed-decode.json",
        ("docs/serving-kernels.md",),
    ),
    "steps": Part(
        "what surrounds attention in a step of a decoder",
        lambda seconds, path: ["scripts/time_steps.py", "--json", path],
        "steps.json",
        ("docs/serving-kernels.md",),
    ),
    "host": Part(
        "the host's time of eager calls",
        lambda seconds, path: _flashcore("bench-host", "--output", path),
        "host.json",
        ("docs/host-overhead.md",),
    ),
    "training-llama": Part(
        "training steps of a Llama in Transformers",
        lambda seconds, path: [
            "scripts/bench_training.py", "llama", "--limit-s", _limit(seconds), "--json", path
        ],
        "training-llama.json",
    ),
    "training-gpt": Part(
        "training steps of a compiled GPT",
        lambda seconds, path: [
            "scripts/bench_training.py", "gpt", "--limit-s", _limit(seconds), "--json", path
        ],
        "training-gpt.json",
    ),
    "rings-2": _rings(2),
    "rings-4": _rings(4),
}  # fmt: skip
# Several parts by one name.
GROUPS = {
    "all": tuple(PARTS),
    "training": ("training-llama", "training-gpt"),
    "rings": ("rings-2", "rings-4"),
}


def file_of(part: Part, gpu: str, folder: Path) -> Path | None:
    """Return where a part's results go; None where it has none."""
    if not part.file:
        return None
    return folder / (gpu + part.file if part.file.startswith(".") else f"{gpu}-{part.file}")


def listing(gpu: str, folder: Path) -> str:
    """Return the parts, the file that each makes, and the pages that quote it."""
    lines = []
    for name, part in PARTS.items():
        path = file_of(part, gpu, folder)
        pages = f", quoted by {', '.join(part.pages)}" if part.pages else ""
        needs = f" ({part.num_gpus} GPUs)" if part.num_gpus > 1 else ""
        lines.append(f"{name}: {part.about}{needs}")
        lines.append(f"    {path}{pages}" if path else "    no file")
    return "\n".join(lines)


def measure(name: str, seconds: float, gpu: str, folder: Path, num_gpus: int) -> str | None:
    """Run a part.

    Args:
        name: of the part.
        seconds: that it may take; what runs longer is ended.
        gpu: with which names of files begin.
        folder: of the files.
        num_gpus: that are here.

    Returns:
        None, or what went wrong, in words.
    """
    part = PARTS[name]
    if num_gpus < part.num_gpus:
        return f"needs {part.num_gpus} GPUs, and {num_gpus} are here"
    path = file_of(part, gpu, folder)
    before = None if path is None or not path.is_file() else path.stat().st_mtime_ns
    command = [sys.executable, *part.command(seconds, "" if path is None else str(path))]
    print(f"{name}: {shlex.join(command)}", flush=True)
    printed = subprocess.PIPE if part.prints else None
    try:
        done = subprocess.run(
            command, cwd=ROOT, timeout=seconds, check=False, stdout=printed, text=True
        )
    except subprocess.TimeoutExpired:
        return f"not done within {seconds:g} seconds"
    if part.prints and path is not None and done.stdout:
        path.write_text(done.stdout, encoding="utf-8")  # of a part that failed it says why
    if done.returncode:
        return f"exit status {done.returncode}"
    if path is not None and (not path.is_file() or path.stat().st_mtime_ns == before):
        return f"wrote no {path}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", action="append", choices=[*PARTS, *GROUPS], default=[])
    parser.add_argument("--seconds", type=float, default=600, help="that each part may take")
    parser.add_argument("--json-dir", type=Path, default=ROOT / RESULTS, help="for the files")
    parser.add_argument("--gpu", default="h200", help="with which names of files begin")
    parser.add_argument("--list", action="store_true", help="name parts, files and pages")
    options = parser.parse_args(arguments)
    folder = options.json_dir.resolve()
    if options.list:
        is_default = options.json_dir == ROOT / RESULTS
        print(listing(options.gpu, RESULTS if is_default else options.json_dir))
        return 0
    if not options.part:
        parser.error(f"name a --part: {', '.join([*PARTS, *GROUPS])}; --list explains them")
    if not options.seconds > _RESERVE_S:
        parser.error(f"--seconds {options.seconds:g} leaves nothing: pass more than {_RESERVE_S:g}")
    num_gpus = torch.cuda.device_count()
    if not num_gpus:
        parser.error("torch sees no GPU here, and there is nothing to measure without one")
    names = [name for part in options.part for name in GROUPS.get(part, (part,))]
    folder.mkdir(parents=True, exist_ok=True)
    failed = {}
    for name in dict.fromkeys(names):
        started = time.monotonic()
        problem = measure(name, options.seconds, options.gpu, folder, num_gpus)
        print(f"{name}: {problem or 'done'} after {time.monotonic() - started:.0f} s", flush=True)
        if problem is not None:
            failed[name] = problem
    if folder == ROOT / RESULTS:
        subprocess.run([sys.executable, "scripts/readme_results.py"], cwd=ROOT, check=False)
    for name, problem in failed.items():
        print(f"{name} FAILED: {problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
