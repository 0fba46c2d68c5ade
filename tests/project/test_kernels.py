"""Test that kernels answer for themselves: all are registered, each answers, and nobody outside of
their folders asks which one it is."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from sources import parsed

from flashcore.compile.codegen import KERNELS_DIR, kernel_file
from flashcore.isolate import plant_stages
from flashcore.kernels import registry
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.kernel import ForwardKernel, Kernel
from flashcore.sim.plants import index

SRC = Path(inspect.getfile(registry)).parents[1]
NAMES = {*registry.BY_NAME, *(kernel.backend for kernel in registry.BY_NAME.values())}


def plan_classes(base: type = Plan) -> set[str]:
    return {base.__name__}.union(*(plan_classes(own) for own in base.__subclasses__()))


PLANS = plan_classes()


def names_in(node: ast.AST) -> set[str]:
    """Return the last words of all names in an expression: of `plan_sm90.Sm90Plan` "Sm90Plan"."""
    return {
        child.id if isinstance(child, ast.Name) else child.attr
        for child in ast.walk(node)
        if isinstance(child, ast.Name | ast.Attribute)
    }


def constants_in(nodes: list[ast.expr]) -> set[object]:
    return {node.value for node in nodes if isinstance(node, ast.Constant)}


def questions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Return the lines of a file that ask which kernel something is of, and how they do."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and names_in(node.func) & {"isinstance", "issubclass"}:
            if len(node.args) == 2 and names_in(node.args[1]) & PLANS:
                yield node.lineno, "isinstance on a plan"
        elif isinstance(node, ast.MatchClass) and names_in(node.cls) & PLANS:
            yield node.lineno, "match on a plan"
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            words = set().union(*(names_in(side) for side in sides))
            if constants_in(sides) & NAMES or any(
                word == "KERNEL" or word.endswith("_KERNEL") for word in words
            ):
                yield node.lineno, "a comparison with a kernel's name"
            elif words & PLANS:
                yield node.lineno, "a comparison with a class of plans"
        elif isinstance(node, ast.Subscript) and constants_in([node.slice]) & NAMES:
            yield node.lineno, "a look-up of a kernel's name"


def test_nobody_asks_which_kernel_it_is() -> None:
    found = [
        f"{path.relative_to(SRC)}:{line}: {how}"
        for path in SRC.rglob("*.py")
        if path.relative_to(SRC).parts[0] != "kernels"
        for line, how in questions(parsed(path))
    ]
    assert found == [], "ask kernels/registry.py's kernel, or the plan, instead"


@pytest.mark.parametrize(
    "text",
    [
        "isinstance(plan, Sm90Plan)",
        "isinstance(plan, (int, plan_wmma.Plan))",
        "type(plan) is BwdSm90Plan",
        "KERNELS['wmma']",
        "kernel == 'attn_fwd_sm90'",
        "backend in ('sm90',) and backend != 'sm90'",
        "plan.kernel == DQ_KERNEL",
    ],
)
def test_such_questions_are_seen(text: str) -> None:
    assert list(questions(ast.parse(text)))


def test_every_kernel_is_registered() -> None:
    written = {path.stem for path in KERNELS_DIR.glob("*/attn_*.cuh")}
    assert written == set(registry.BY_NAME)
    assert {kernel.name for kernel in registry.FORWARD} == {
        kernel.name for kernel in registry.BY_NAME.values() if not kernel.is_backward
    }
    assert registry.PORTABLE is registry.FORWARD[-1]
    assert registry.PORTABLE.only_arch is None


def text_of(kernel: Kernel) -> str:
    """Return a kernel's text, with all that it includes."""
    seen: dict[Path, str] = {}

    def read(path: Path) -> None:
        if path in seen or not path.is_file():
            return
        seen[path] = path.read_text(encoding="utf-8")
        for name in re.findall(r'#include "([^"]+)"', seen[path]):
            read(KERNELS_DIR / name)

    read(kernel_file(kernel.name))
    return "\n".join(seen.values())


@pytest.mark.parametrize("kernel", registry.BY_NAME.values(), ids=lambda kernel: kernel.name)
def test_a_kernel_knows_its_stages_and_functions(kernel: Kernel) -> None:
    """The phases name functions of the text, and each phase says where to look."""
    assert kernel.stages
    assert [p for p in kernel.phases.values() if kernel.suspects_of(p) is None] == []
    assert [p for p in plant_stages.STAGES.get(kernel.name, ()) if not kernel.suspects_of(p)] == []
    together = registry.BACKWARD if kernel.is_backward else (kernel,)
    text = "\n".join(map(text_of, together))
    assert [name for name in kernel.phases if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("kernel", registry.FORWARD, ids=lambda kernel: kernel.name)
def test_a_forward_kernel_answers(kernel: ForwardKernel) -> None:
    assert registry.BY_BACKEND[kernel.backend] is kernel
    assert registry.forward(kernel.name) is kernel
    arch = kernel.only_arch or 80
    assert registry.forward_for(arch) is kernel
    assert index.BY_KERNEL[kernel.name]
    assert kernel.rules
    for name in kernel.maps:
        assert any(field == f"{name}_map" for field, *_ in kernel.params._fields_)


def test_every_planted_bug_has_its_text() -> None:
    """A kernel that changes takes its planted bugs along."""
    lost = [
        f"{kernel}: {plant.name}"
        for kernel, plants in (*index.BY_KERNEL.items(), *index.BESIDE.items())
        for plant in plants.values()
        if (KERNELS_DIR / plant.file).read_text(encoding="utf-8").count(plant.find) != 1
    ]
    assert lost == []


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kernel='attn_fwd' is not one of attn_fwd_sm90, attn_"):
        registry.forward("attn_fwd")
