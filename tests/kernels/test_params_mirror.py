"""The kernels' argument is one struct in C++ and in Python: the same fields in the same order, each
at the same offset by the compiler that builds the simulator."""

from __future__ import annotations

import ctypes
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flashcore.compile.codegen import KERNELS_DIR, generate_source
from flashcore.compile.cxx import compile_file, find_compiler
from flashcore.errors import CompileError
from flashcore.kernels.bwd_sm90.params import AttnBwdSm90GateParams, AttnBwdSm90Params
from flashcore.kernels.bwd_sm90.plan import DQ_KERNEL, select_plans
from flashcore.kernels.fwd_sm90.params import AttnSm90GateParams, AttnSm90Params
from flashcore.kernels.fwd_wmma import params
from flashcore.kernels.fwd_wmma.params import AttnGateParams, AttnParams
from flashcore.problem import Problem
from flashcore.selection.select import select_plan
from flashcore.sim.build import COMMON_FLAGS

_TEXT = (KERNELS_DIR / "tile" / "params.cuh").read_text(encoding="utf-8")
_STRUCTS = dict(re.findall(r"^struct (\w+) \{\n(.*?)^\};", _TEXT, re.MULTILINE | re.DOTALL))


def fields_in_text(struct: str) -> list[str]:
    """Return the names of a struct's fields in params.cuh, in order."""
    lines = (line.split("//")[0] for line in _STRUCTS[struct].splitlines())
    return re.findall(r"(\w+)(?=[,;])", re.sub(r"<[^>]*>", "", " ".join(lines)))


def fields_of(struct: type[ctypes.Structure], path: str = "", start: int = 0) -> Iterator[Any]:
    """Yield the path, offset and size in bytes of every field, also of groups' fields."""
    for base in reversed(struct.__mro__):
        for name, kind, *_ in vars(base).get("_fields_", ()):
            offset = start + vars(base)[name].offset
            yield f"{path}{name}", offset, ctypes.sizeof(kind)
            if issubclass(kind, ctypes.Structure):
                yield from fields_of(kind, f"{path}{name}.", offset)


def source_of(kernel: str, gate: str | None = None) -> str:
    q = torch.empty(1, 2, 64, 64, dtype=torch.float16)
    problem = dataclasses.replace(Problem.from_tensors(q, q, q), device="cuda", arch=90)
    if kernel == DQ_KERNEL:
        plan = dataclasses.replace(select_plans(problem).dq, gate=gate)
        return generate_source(plan, "host")
    return generate_source(select_plan(problem, kernel=kernel, gate=gate), "host")


def compile_with(source: str, asserts: list[str], folder: Path) -> None:
    unit = folder / "unit.cpp"
    unit.write_text("#include <cstddef>\n" + source + "\n".join(asserts) + "\n", encoding="utf-8")
    arguments = [*COMMON_FLAGS, "-Wno-invalid-offsetof", "-c", str(unit)]
    compile_file(find_compiler("the test"), arguments, folder / "unit.o", "the argument's mirror")


CASES = {
    "attn_fwd_wmma": (AttnParams, "AttnParams", AttnParams, "", None),
    "attn_fwd_wmma, gate": (AttnGateParams, "AttnParams", AttnGateParams, "", "tile"),
    "attn_fwd_sm90": (AttnSm90Params, "AttnSm90Params", AttnParams, "attn.", None),
    "attn_fwd_sm90, gate": (AttnSm90GateParams, "AttnSm90Params", AttnGateParams, "attn.", "tile"),
    DQ_KERNEL: (AttnBwdSm90Params, "AttnBwdSm90Params", AttnParams, "attn.", None),
    f"{DQ_KERNEL}, gate": (
        AttnBwdSm90GateParams,
        "AttnBwdSm90Params",
        AttnGateParams,
        "attn.",
        "ds",
    ),
}


def asserts_of(case: str) -> list[str]:
    argument, name, attn, path, _ = CASES[case]
    start = argument.attn.offset if path else 0  # type: ignore[attr-defined]
    asserts = [f"static_assert(sizeof({name}) == {ctypes.sizeof(argument)});"]
    for field, offset, size in fields_of(attn, path, start):
        asserts.append(f'static_assert(offsetof({name}, {field}) == {offset}, "{field}");')
        asserts.append(f'static_assert(sizeof((({name}*)nullptr)->{field}) == {size}, "{field}");')
    return asserts


@pytest.mark.parametrize("case", CASES)
def test_fields_lie_at_the_same_offsets(case: str, tmp_path: Path) -> None:
    source = source_of(case.partition(",")[0], CASES[case][-1])
    compile_with(source, asserts_of(case), tmp_path)


def test_an_offset_that_differs_is_found(tmp_path: Path) -> None:
    asserts = asserts_of("attn_fwd_wmma")
    at = next(i for i, x in enumerate(asserts) if '"band.window_left"' in x)
    asserts[at] = asserts[at].replace("band.window_left)", "band.window_right)")
    with pytest.raises(CompileError, match=r"band\.window_left"):
        compile_with(source_of("attn_fwd_wmma"), asserts, tmp_path)


@pytest.mark.parametrize("struct", sorted(_STRUCTS))
def test_fields_have_the_same_names_and_order(struct: str) -> None:
    mirror = getattr(params, struct)
    names = [name for name, *_ in mirror._fields_]
    if struct == "AttnParams":
        names += [name for name, *_ in AttnGateParams._fields_]
    assert fields_in_text(struct) == names


def test_a_field_is_found_by_its_name_alone() -> None:
    """Addresses are placed by name, so no two groups may have a field of the same name."""
    groups = [getattr(params, name) for name in _STRUCTS if "Strides" not in name]
    names = [name for group in groups for name, *_ in group._fields_]
    assert len(names) == len(set(names))
    for path, offset, _ in fields_of(AttnGateParams):
        if not path.startswith("strides."):
            name = path.rpartition(".")[2]
            assert getattr(AttnGateParams, name).offset == offset, path
