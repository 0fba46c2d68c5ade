"""Style is a test: what a reviewer would otherwise have to look for in every change."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from sources import parsed

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "flashcore"
KERNELS = SRC / "kernels"

MAX_LINES = {".py": 340, ".cuh": 460, ".md": 300}
MAX_LINES_OF_TESTS = 400  # a list of cases is read by looking things up

# Assembly outside ptx/, each with the reason.
ASSEMBLY = {
    "src/flashcore/sim/runtime/fiber.cpp": "switches stacks between the simulator's threads",
}


@cache
def tracked_files() -> tuple[Path, ...]:
    """Return files of the repository that git would commit, or a skip where there is no git."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return tuple(ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file())


def with_suffix(*suffixes: str) -> list[Path]:
    return [path for path in tracked_files() if path.suffix in suffixes]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def code_blocks(text: str) -> str:
    """Return the fenced blocks and inline code of a Markdown text."""
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))


def test_files_stay_readable_in_one_sitting() -> None:
    long = []
    for path in with_suffix(*MAX_LINES):
        if path.parent == ROOT / "benchmarks" / "results":
            continue  # reports, which nobody writes
        is_test = path.suffix == ".py" and ROOT / "tests" in path.parents
        limit = MAX_LINES_OF_TESTS if is_test else MAX_LINES[path.suffix]
        if (count := len(read(path).splitlines())) > limit:
            long.append(f"{name(path)}: {count} lines, {limit} allowed")
    assert not long, "split these"


def test_kernel_text_is_100_columns_of_ascii_without_tabs() -> None:
    wrong = [
        f"{name(path)}:{number}"
        for path in with_suffix(".cuh", ".cpp", ".hpp", ".h")
        for number, line in enumerate(read(path).splitlines(), 1)
        if len(line) > 100 or "\t" in line or not line.isascii() or line != line.rstrip()
    ]
    assert not wrong


def test_inline_assembly_lives_in_one_folder() -> None:
    outside = {
        name(path)
        for path in with_suffix(".cuh", ".cpp", ".hpp", ".h", ".cu")
        if KERNELS / "ptx" not in path.parents
        and re.search(r"\b(__)?asm(__)?\s*(volatile|__volatile__)?\s*\(", read(path))
    }
    assert outside == set(ASSEMBLY)


def test_gpu_intrinsics_live_in_one_folder() -> None:
    builtin = re.compile(
        r"\b(__(shfl|sync|ballot|nv|ldg|cvta|half|float2)\w*|threadIdx|blockIdx)\b"
    )
    outside = [
        f"{name(path)}: {found.group()}"
        for path in KERNELS.rglob("*.cuh")
        if not {KERNELS / "ptx", KERNELS / "host"} & set(path.parents)
        and (found := builtin.search(read(path)))
    ]
    assert not outside


def test_kernels_need_no_cuda_header() -> None:
    """The claim behind the `cuda` extra: NVRTC without a toolkit is enough."""
    system = [
        f"{name(path)}: {line}"
        for path in KERNELS.rglob("*.cuh")
        if KERNELS / "host" not in path.parents
        for line in re.findall(r"^\s*#\s*include\s*<.*$", read(path), re.MULTILINE)
    ]
    assert not system


def test_every_kernel_file_is_used() -> None:
    """A kernel file is reached from an entry point, from the generator, or by an include."""
    python = "\n".join(read(path) for path in with_suffix(".py"))
    seen: set[Path] = set()
    queue = [
        path
        for path in KERNELS.rglob("*.cuh")
        if path.name in python or (path.parent.parent == KERNELS and path.stem in python)
    ]
    while queue:
        path = queue.pop()
        if path in seen:
            continue
        seen.add(path)
        for target in re.findall(r'^\s*#\s*include\s*"([^"]+)"', read(path), re.MULTILINE):
            for side in ("ptx", "host"):
                resolved = target.replace("@target", side)
                queue += [p for p in (KERNELS / resolved, path.parent / resolved) if p.is_file()]
    assert {name(path) for path in KERNELS.rglob("*.cuh")} == {name(path) for path in seen}


def test_links_in_documents_resolve() -> None:
    broken = []
    for path in with_suffix(".md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", read(path)):
            file, _, anchor = target.partition("#")
            if "://" in target or target.startswith("mailto:"):
                continue
            destination = path.parent / file if file else path
            if not destination.exists():
                broken.append(f"{name(path)}: {target}")
            elif anchor and destination.suffix == ".md" and anchor not in anchors(destination):
                broken.append(f"{name(path)}: {target} (no such heading)")
    assert not broken


def test_source_files_named_in_documents_exist() -> None:
    """A name may leave out folders in front, as `sim/run.py` does."""
    files = [f"/{name(path)}" for path in tracked_files()]
    lost = {
        f"{name(path)}: {named}"
        for path in with_suffix(".md")
        if path.name != "CHANGELOG.md"  # tells of files that are gone, too
        for named in re.findall(r"`([\w./-]+\.(?:py|cuh|cu|cpp|h))`", read(path))
        if not any(file.endswith(f"/{named}") for file in files)
    }
    assert not lost


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+\s+(.*)$", read(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def test_every_page_is_reachable_from_the_readme() -> None:
    seen: set[Path] = set()
    queue = [ROOT / "README.md"]
    while queue:
        path = queue.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        if path.suffix == ".md":
            links = re.findall(r"\]\(([^)\s#]+)", read(path))
            queue += [(path.parent / link).resolve() for link in links if "://" not in link]
    pages = {path for path in with_suffix(".md") if path.parent == ROOT / "docs"}
    assert {name(path) for path in pages - seen} == set()


def test_environment_variables_are_documented_once() -> None:
    from flashcore.base import env

    known = {variable.name for variable in env.VARIABLES}
    used = {
        word: name(path)
        for path in tracked_files()
        if path.suffix in {".py", ".md", ".toml", ".cuh"} or path.name == "Makefile"
        for word in re.findall(r"\bFLASHCORE_[A-Z][A-Z0-9_]*[A-Z0-9]\b", read(path))
    }
    assert {word: where for word, where in used.items() if word not in known} == {}
    outside_env = "\n".join(read(path) for path in with_suffix(".md"))
    assert [variable for variable in known if variable not in outside_env] == []


def test_commands_named_in_documents_exist() -> None:
    import typer

    from flashcore.cli import app

    commands = typer.main.get_command(app).commands
    unknown = []
    for path in with_suffix(".md"):
        for line in re.findall(r"(?:^|[\s`$])flashcore +([a-z][^\n`|#]*)", code_blocks(read(path))):
            words = line.split()
            if words[0] not in commands:
                unknown.append(f"{name(path)}: flashcore {words[0]}")
                continue
            known = {option for p in commands[words[0]].params for option in (*p.opts,)}
            flags = {word.split("=")[0] for word in words[1:] if word.startswith("--")}
            unknown += [f"{name(path)}: {words[0]} {f}" for f in flags - known - {"--help"}]
    assert not unknown


def test_make_targets_named_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    named = {
        target: name(path)
        for path in with_suffix(".md")
        for target in re.findall(r"(?:^|[\s`$])make ([a-z][a-z-]+)", code_blocks(read(path)))
    }
    assert {target: where for target, where in named.items() if target not in targets} == {}


def test_no_machine_specific_paths_hosts_or_unfinished_work() -> None:
    # Spelt in pieces, so that this file does not contain what it looks for.
    forbidden = re.compile(
        "|".join(
            [
                r"(?<![\w.])/(work|root|home|Users)/\w",
                r"\b(" + "py" + r"pi\.org|" + "python" + r"hosted|" + "down" + r"load\.pytorch|"
                "npm" + r"js\.|" + "ana" + r"conda\.org|" + "hugging" + r"face\.co)",
                r"\b(" + "TO" + "DO|" + "FIX" + r"ME)\b",
                r"\.\./" + "shared",
            ]
        )
    )
    found = [
        f"{name(path)}:{number}: {line.strip()[:80]}"
        for path in tracked_files()
        if path.suffix in {".py", ".cuh", ".md", ".toml", ".txt", ".json", ""}
        for number, line in enumerate(read(path).splitlines(), 1)
        if forbidden.search(line)
    ]
    assert not found


def test_sources_parse_on_the_oldest_supported_python() -> None:
    for path in with_suffix(".py"):
        parsed(path)


def test_import_is_light() -> None:
    """Calling attention costs torch and nothing else: no CLI, no plots, no CUDA bindings."""
    code = (
        "import torch, sys; before = set(sys.modules); import flashcore\n"
        "x = torch.ones(1, 1, 2, 8); flashcore.attention(x, x, x)\n"
        "heavy = {'typer', 'rich', 'cuda', 'matplotlib', 'numpy', 'click', 'hypothesis'}\n"
        "print(sorted(heavy & ({m.split('.')[0] for m in set(sys.modules) - before})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_workers_together_have_no_more_threads_than_cores() -> None:
    """Threads that have no core wait in busy loops, and some tests took a hundred times as long."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    assert torch.get_num_threads() * workers <= max(workers, os.cpu_count() or 1)


def test_version_is_the_same_everywhere() -> None:
    import flashcore

    latest = re.search(r"^## \[?(\d[^\] ]*)", read(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert latest
    assert flashcore.__version__ == latest.group(1)
    assert 'dynamic = ["version"]' in read(ROOT / "pyproject.toml")
