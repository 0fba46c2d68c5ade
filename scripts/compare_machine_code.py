"""Say which kernels' machine code a change leaves as it was, and how that of others differs.

    python scripts/compare_machine_code.py main              # the gate's sample, against main
    python scripts/compare_machine_code.py HEAD~3 --all --kernel bwd
    python scripts/compare_machine_code.py main --kernel fwd_sm90 --head-dim 128 --variant causal

Needs NVRTC and no GPU. BASE is a revision of git, or a folder with another checkout. Each
configuration's source text comes from its own tree. Where the two differ in more than comments,
both are compiled by this tree's compiler; where the code differs, nvdisasm (pip package
nvidia-cuda-nvdisasm) reads it, and what is found is one of

    same code              byte for byte, or but for where in the constant bank parameters lie
    other waits            the same instructions, which wait otherwise for each other
    other numbers          the same instructions but for numbers in them, such as addresses
    other registers        the same instructions in the same order
    other order            as many of each instruction
    other instructions     with how many there were and are of those that changed most: in all, and
                           of those that run whenever an innermost loop with matrix products goes
                           round once

Exit status: 0 when all have the same code, 1 when some have not, 2 when it could not be found out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from machine_code import SAME_CODE, difference, read_code

ROOT = Path(__file__).resolve().parents[1]
SAME_TEXT = "same text"
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


class Unit(NamedTuple):
    """A unit is what a compiler is told: source text, architecture, entry point and suffix."""

    source: str
    arch: int
    kernel: str
    suffix: str


def text_of(source: str) -> str:
    """Return source text without what no machine code depends on: comments, `#line`, spaces."""
    lines = (line for line in source.splitlines() if not line.startswith("#line"))
    return " ".join(_COMMENT.sub(" ", "\n".join(lines)).split())


# --- what is compiled ----------------------------------------------------------------------------


def configurations(options: argparse.Namespace, names: set[str] | None) -> dict[str, Unit]:
    """Return this process's configurations by name: those of `names`, else what is asked for."""
    from flashcore.compile.codegen import generate_source
    from flashcore.kernels.registry import FORWARD
    from flashcore.selection import compile_gate
    from flashcore.selection.backward_configurations import backward_configurations
    from flashcore.selection.configurations import VARIANTS
    from flashcore.selection.configurations import configurations as forward_configurations

    asked = {"head_dims": options.head_dim, "variants": options.variant}
    kinds: dict[str, Any] = {name: (one,) for name, one in asked.items() if one is not None}
    listed = backward_configurations(**kinds)
    has_forward = options.variant is None or options.variant in VARIANTS
    if has_forward and any(options.kernel in kernel.name for kernel in FORWARD):  # there are many
        listed += forward_configurations(**kinds)
    found = [entry for entry in listed if options.kernel in entry.plan.kernel]
    sample = {entry.plan for entry in (found if options.all else compile_gate.sample(found))}
    units: dict[str, Unit] = {}
    seen: Counter[str] = Counter()
    for entry in found:
        plan = entry.plan
        dims = dict.fromkeys((plan.head_dim, plan.head_dim_v))
        name = (
            f"{plan.kernel} sm_{plan.arch} {plan.dtype} head_dim {'/'.join(map(str, dims))} "
            f"{entry.variant} {plan.block_m}x{plan.block_n} stages {plan.num_stages}"
        )
        seen[name] += 1
        if seen[name] > 1:
            name += f" ({seen[name]})"
        if plan in sample if names is None else name in names:
            units[name] = Unit(generate_source(plan), plan.arch, plan.kernel, plan.arch_suffix)
    return units


def units_of(tree: Path, arguments: Sequence[str], names: set[str] | None) -> dict[str, Unit]:
    """Return the configurations of a tree, which a process of its own lists.

    Raises:
        RuntimeError: the tree's package lists none, for example as it is from another age.
    """
    command = [sys.executable, __file__, "--list", *arguments]
    asked = json.dumps(None if names is None else sorted(names))
    environment = os.environ | {"PYTHONPATH": str(tree / "src")}
    done = subprocess.run(
        command, input=asked, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{tree}: its configurations cannot be listed:\n{done.stderr}")
    return {name: Unit(*fields) for name, fields in json.loads(done.stdout).items()}


def unpack_revision(revision: str, folder: Path) -> None:
    """Unpack the package of a revision of git into a folder.

    Raises:
        subprocess.CalledProcessError: git does not know the revision.
    """
    command = ["git", "-C", str(ROOT), "archive", revision, "src"]
    packed = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")


# --- comparing -----------------------------------------------------------------------------------


def find_nvdisasm() -> str:
    """Return the path of nvdisasm: in PATH, or that of the pip package.

    Raises:
        FileNotFoundError: there is none.
    """
    if found := shutil.which("nvdisasm"):
        return found
    for package in ("nvidia-cuda-nvdisasm", "triton"):
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == "nvdisasm":
                return str(file.locate())
    raise FileNotFoundError("no nvdisasm: pip install nvidia-cuda-nvdisasm, or name it in PATH")


def section(elf: bytes, name: str) -> bytes:
    """Return a section of a cubin (ELF64).

    Raises:
        ValueError: it has none of that name.
    """
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_bytes, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQ", elf, table + index * entry_bytes) for index in range(count)
    ]
    for header in headers:
        if elf.startswith(name.encode() + b"\0", headers[names_index][4] + header[0]):
            return elf[header[4] : header[4] + header[5]]
    raise ValueError(f"the compiled image has no section {name}")


def compare(units: tuple[Unit, Unit]) -> tuple[str, str]:
    """Compile the base's unit and this tree's where they differ, and return the kind of difference
    and its details."""
    from flashcore.compile.jit import compile_source

    if text_of(units[0].source) == text_of(units[1].source):
        return SAME_TEXT, ""
    kernels = [compile_source(*unit) for unit in units]
    sections = [
        section(kernel.code, f".text.{unit.kernel}")
        for kernel, unit in zip(kernels, units, strict=True)
    ]
    registers = [kernel.registers for kernel in kernels]
    kind, details = SAME_CODE, ""
    if sections[0] != sections[1]:
        codes = [
            read_code(disassemble(kernel.code), text)
            for kernel, text in zip(kernels, sections, strict=True)
        ]
        kind, details = difference(*codes)
    if registers[0] != registers[1]:
        details = f"registers {registers[0]} -> {registers[1]} {details}"
        kind = "other registers" if kind == SAME_CODE else kind
    return kind, details.strip()


def disassemble(image: bytes) -> str:
    """Return what `nvdisasm -c` says of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        command = [find_nvdisasm(), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compare_all(
    base: dict[str, Unit], now: dict[str, Unit], jobs: int
) -> Iterator[tuple[str, str, str]]:
    """Return name, kind and details of each configuration of both trees, in this one's order."""
    both = [name for name in now if name in base]
    pairs = [(base[name], now[name]) for name in both]
    with ProcessPoolExecutor(max_workers=jobs) as pool:
        for name, (kind, details) in zip(both, pool.map(compare, pairs), strict=True):
            yield name, kind, details


def report(results: Iterator[tuple[str, str, str]]) -> bool:
    """Print what differs as it is found, then a line for each kernel; return whether nothing
    does."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for name, kind, details in results:
        kinds[name.split(" ")[0]][kind] += 1
        if kind not in (SAME_TEXT, SAME_CODE):
            print(f"{name}: {kind}{': ' if details else ''}{details}", flush=True)
    for kernel, counts in sorted(kinds.items()):
        print(f"{kernel}: " + ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())))
    return all(kind in (SAME_TEXT, SAME_CODE) for counts in kinds.values() for kind in counts)


def main() -> int:
    """Compare this tree with another one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("base", nargs="?", help="revision of git, or folder of a checkout")
    parser.add_argument("--all", action="store_true", help="every configuration, not the sample")
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--variant", help="only this variant, as in `flashcore resources`")
    parser.add_argument("--head-dim", type=int, help="only this head_dim")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--list", action="store_true", help=argparse.SUPPRESS)  # of this process
    options = parser.parse_args()
    if options.list:
        names = json.load(sys.stdin)
        json.dump(configurations(options, None if names is None else set(names)), sys.stdout)
        return 0
    if options.base is None:
        parser.error("BASE is missing: a revision of git, or a folder")
    asked = [argument for argument in sys.argv[1:] if argument != options.base]
    try:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(options.base)
            if not (tree / "src").is_dir():
                tree = Path(folder)
                unpack_revision(options.base, tree)
            now = units_of(ROOT, asked, None)
            base = units_of(tree, asked, set(now))
        for name in now:
            if name not in base:
                print(f"{name}: the base has no such configuration")
        return 0 if report(compare_all(base, now, options.jobs)) else 1
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        print(f"{error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
