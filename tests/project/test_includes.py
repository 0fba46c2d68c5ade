"""Test that a kernel header includes the headers of the names that it uses, and no others: so the
order of includes does not matter, and the top of a header says what it is made of."""

from __future__ import annotations

import re
import subprocess
from functools import cache

import pytest

from flashcore.compile.codegen import KERNELS_DIR, flatten, kernel_file
from flashcore.compile.cxx import find_compiler
from flashcore.kernels import registry
from flashcore.kernels.bwd_mask_sm90.plan import select_mask_plan
from flashcore.kernels.bwd_sm90.plan import select_plans
from flashcore.kernels.bwd_sm90.plan_one import select_one_kernel_plans
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.selection.configurations import VARIANTS, problem_of
from flashcore.selection.select import candidates
from flashcore.sim.build import COMMON_FLAGS

INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
SIDES = ("ptx", "host")  # what `@target` stands for
# Folders whose headers a folder's may include, besides its own and the primitives.
BELOW = {
    "tile": (),
    "bwd_sm90": ("tile", "fwd_sm90"),
    "bwd_mask_sm90": ("tile", "fwd_sm90", "bwd_sm90"),
}
PRIMITIVES = ("prims.cuh", "prims_sm90.cuh")
# Names at the file's own level, by the way they are declared there.
DECLARED = (
    r"\b(?:struct|class|enum)\s+(?:alignas\([^)]*\)\s*)?(\w+)",
    r"\busing\s+(\w+)\s*=",
    r"\bconstexpr\s+[\w:<>]+\s+(\w+)\s*(?:<[^>]*>)?\s*=",
)
FUNCTION = re.compile(r"\bFC_DEVICE\b(?:(?!\bFC_DEVICE\b)[^;{}])*?\b(\w+)\s*(?:<[^<>]*>\s*)?\(")
NO_FUNCTIONS = {"decltype", "alignas", "sizeof"}
ENUM = re.compile(r"\benum\s+\w+\s*\{([^}]*)\}")
MACRO = re.compile(r"^\s*#\s*define\s+(\w+)", re.MULTILINE)


@cache
def headers() -> list[str]:
    """Return the headers of the kernels and their parts, by their path below `kernels/`."""
    return sorted(
        path.relative_to(KERNELS_DIR).as_posix()
        for path in KERNELS_DIR.rglob("*.cuh")
        if path.relative_to(KERNELS_DIR).parts[0] not in SIDES and path.parent != KERNELS_DIR
    )


@cache
def text_of(header: str) -> str:
    """Return a header's code: no comments, no strings."""
    text = (KERNELS_DIR / header).read_text(encoding="utf-8")
    text = re.sub(r"//.*|/\*.*?\*/", "", text)
    return re.sub(
        r"^(?!\s*#\s*include)(.*)$", lambda m: re.sub(r'"[^"]*"', '""', m[0]), text, flags=re.M
    )


def outside_of_braces(text: str) -> str:
    """Return what stands at the file's own level."""
    depth = 0
    kept = []
    for char in text:
        depth -= char == "}"
        if depth == 0:
            kept.append(char)
        depth += char == "{"
    return "".join(kept)


def declared_in(text: str) -> set[str]:
    """Return the names that a header's text defines for others."""
    own = outside_of_braces(text)
    names = {name for pattern in DECLARED for name in re.findall(pattern, own)}
    names |= set(FUNCTION.findall(own.replace("decltype(auto)", "auto")))
    names |= set(MACRO.findall(text))
    for body in ENUM.findall(text):
        names |= set(re.findall(r"(\w+)\s*(?:=[^,}]*)?(?:,|$)", body.strip()))
    return names - NO_FUNCTIONS


@cache
def given_by(header: str) -> frozenset[str]:
    """Return the names that an include of a header gives: its own, and for the contract of
    primitives, which only collects headers, those that both sides have."""
    names = declared_in(text_of(header))
    for include in INCLUDE.findall(text_of(header)):
        if "@target" in include:
            sides = [declared_in(text_of(include.replace("@target", side))) for side in SIDES]
            names |= set.intersection(*sides)
        elif "/" not in header:
            names |= given_by(include)
    return frozenset(names)


def used_in(text: str) -> set[str]:
    """Return the names that a text uses and does not define: not members, and functions only where
    they are called."""
    code = re.sub(INCLUDE, "", text)
    names = set()
    for found in re.finditer(r"(?<![\w.])(?<!->)(?<!::)([A-Za-z_]\w*)\s*(\(|<|)", code):
        name, call = found.groups()
        if call or name[0].isupper():
            names.add(name)
    local = {
        name
        for pattern in (*DECLARED, r"\bauto&?\s+(\w+)\s*=")
        for name in re.findall(pattern, text)
    }
    return names - local - declared_in(text)


@cache
def may_include(header: str) -> list[str]:
    """Return the headers that one may include: no kernel, and nothing of another kernel's."""
    folder = header.partition("/")[0]
    folders = (folder, *BELOW.get(folder, ("tile",)))
    parts = [
        other
        for other in headers()
        if other != header
        and other.partition("/")[0] in folders
        and "FC_KERNEL" not in text_of(other)
    ]
    return [*PRIMITIVES, *parts]


def faults(header: str, text: str) -> list[str]:
    """Return what a header's includes lack, and what they have too much."""
    includes = INCLUDE.findall(text)
    used = used_in(text)
    given = {include: given_by(include) for include in includes}
    found = [f"{header} does not use {i}" for i in includes if not used & given[i]]
    found += [f"{header} may not include {i}" for i in includes if i not in may_include(header)]
    for name in sorted(used - set().union(*given.values())):
        homes = [other for other in may_include(header) if name in given_by(other)]
        if homes:
            found.append(f"{header} uses {name} without {' or '.join(homes)}")
    return found


@pytest.mark.parametrize("header", headers())
def test_a_header_includes_what_it_uses(header: str) -> None:
    assert faults(header, text_of(header)) == []


@pytest.mark.parametrize("header", [h for h in headers() if len(INCLUDE.findall(text_of(h))) > 1])
def test_a_lacking_and_a_needless_include_are_seen(header: str) -> None:
    text = text_of(header)
    for include in INCLUDE.findall(text):
        assert faults(header, text.replace(f'#include "{include}"', "")), include
    assert faults(header, '#include "fwd_wmma/totals_wmma.cuh"\n' + text) or "Totals" in text


def plans() -> dict[str, Plan]:
    """Return a plan of each attention kernel, by its name."""
    problem = problem_of(64, "bfloat16", VARIANTS["causal"])
    forward = [candidates(problem, 90, kernel=kernel.name)[0] for kernel in registry.FORWARD]
    found = [*forward, *select_plans(problem), *select_one_kernel_plans(problem)]
    masked = problem_of(64, "bfloat16", VARIANTS["bias"])
    found.append(select_mask_plan(masked, (1, 1, 512, masked.seqlen_k)))
    return {plan.kernel: plan for plan in found}


def included_by(header: str) -> list[str]:
    """Return the headers below a header, primitives aside, that are no debug gates."""
    found: dict[str, None] = {}
    for include in INCLUDE.findall(text_of(header)):
        if "/" in include and include != "tile/gates.cuh":
            found.update(dict.fromkeys([*included_by(include), include]))
    return list(found)


@pytest.mark.thorough
@pytest.mark.parametrize("kernel", registry.BY_NAME)
def test_a_header_compiles_alone(kernel: str) -> None:
    plan = plans()[kernel]
    command = [*find_compiler("a test").command, *COMMON_FLAGS, "-fsyntax-only", "-xc++", "-"]
    for header in included_by(kernel_file(kernel).relative_to(KERNELS_DIR).as_posix()):
        text = flatten(header, "host", constants=plan.constants(), params="none")
        alone = text.partition("#define FC_HOST_KERNEL")[0]
        done = subprocess.run(command, input=alone, text=True, capture_output=True, check=False)
        assert done.returncode == 0, f"{header} of {kernel}: {done.stderr}"
