"""`flashcore resources` says what every kernel configuration costs a GPU, and the budget check."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashcore.cli.options import Arch, parse_archs
from flashcore.cli.output import JsonFlag, Output, command, table, usage_errors

if TYPE_CHECKING:
    from flashcore.compile.compiler import CompiledKernel
    from flashcore.compile.jit import Resources
    from flashcore.kernels.fwd_wmma.plan import Plan
    from flashcore.selection.building import Unit
    from flashcore.selection.configurations import Configuration

_MANY = 24  # plans that take longer to compile than a second process takes to start


@dataclass(frozen=True, slots=True)
class Row:
    """A row holds the resources of one configuration. `smem_bytes` is shared memory of one block,
    `registers` and `spill_bytes` of one thread, `code_bytes` the machine code; `role_registers`
    what a consumer and a producer thread have later, and one that computes dq, where roles differ;
    `remarks` the compiler's;
    `violations` of the budget."""

    kernel: str
    arch: str
    head_dim: int
    dtype: str
    registers: int
    smem_bytes: int
    spill_bytes: int
    code_bytes: int
    variant: str
    tile: str
    num_stages: int
    min_blocks: int
    role_registers: tuple[int, ...]
    remarks: tuple[str, ...]
    violations: list[str]


def resources(
    kernel: Annotated[
        str | None,
        typer.Option("--kernel", help="Only this kernel: wmma or sm90, or its name in full."),
    ] = None,
    head_dim: Annotated[
        int | None, typer.Option("--head-dim", "-d", min=1, help="Only this head_dim.")
    ] = None,
    arch: Arch = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Only float16 or bfloat16.")] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            "--variant",
            help="Only full, causal, window, options (window and softcap), masked (and a mask), "
            "varlen (packed sequences, window and softcap), varlen-causal, decode (one query), "
            "decode-masked (few, and a mask), chunk (100 queries, causal), long (more keys than "
            "one sum takes), uneven (head_dim 224/40, lengths, a mask and a window), pages-masked, "
            "packed-pages, tree, or one that only backward kernels have: loose-float-bias ...",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Print what is over its budget and no table; exit with 1 when something is.",
        ),
    ] = False,
    sample: Annotated[
        bool,
        typer.Option(
            "--sample",
            help="Only those nearest to a spill, of each kernel, architecture and head_dim.",
        ),
    ] = False,
    with_table: Annotated[
        bool, typer.Option("--table", help="Print the table with --check, too.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Show registers, shared memory, spills and code size of every kernel configuration.

    It compiles for every architecture, by NVRTC and without a GPU; kernels are cached. The
    budget: with head_dim 64 the portable kernel takes at most 96 registers and 48 KB of shared
    memory; nothing ever spills, and ptxas never serialises WGMMA. Without --sample, --check also
    fails when the sample would leave out what is nearest to a spill. Registers of the Hopper
    kernels, forward and backward: at launch / of a consumer / of a producer / of dq where a
    warpgroup of the backward kernel computes that alone.

    Examples:

        flashcore resources --head-dim 64 --variant full

        flashcore resources --arch sm_90 --json

        flashcore resources --check --sample
    """
    with command(json_output) as out:
        from flashcore.backends.dispatch import KERNELS
        from flashcore.selection import compile_gate
        from flashcore.selection.backward_configurations import (
            BACKWARD_VARIANTS,
            backward_configurations,
        )
        from flashcore.selection.building import append_units
        from flashcore.selection.configurations import DTYPES, VARIANTS, configurations

        known_variants = BACKWARD_VARIANTS
        for name, value, known in (("dtype", dtype, DTYPES), ("variant", variant, known_variants)):
            if value is not None and value not in known:
                raise typer.BadParameter(f"--{name} {value} is not one of {', '.join(known)}")
        with usage_errors():
            variants = tuple(known_variants) if variant is None else (variant,)
            asked: dict[str, Any] = {
                "archs": parse_archs(arch),
                "dtypes": DTYPES if dtype is None else (dtype,),
            }
            if head_dim is not None:
                asked["head_dims"] = (head_dim,)
            of_forward = [name for name in variants if name in VARIANTS]
            wanted = configurations(**asked, variants=of_forward)
            wanted += backward_configurations(**asked, variants=variants)
        if check and dtype is None:
            wanted = compile_gate.checked(wanted)
        kernels = sorted({entry.plan.kernel for entry in wanted})
        if kernel is not None:
            full_name = KERNELS.get(kernel, kernel)
            if full_name not in kernels:
                short_names = [short for short, name in KERNELS.items() if name in kernels]
                raise typer.BadParameter(
                    f"--kernel {kernel} is not one of {', '.join([*short_names, *kernels])}"
                )
            wanted = [entry for entry in wanted if entry.plan.kernel == full_name]
        num_known = len(wanted)
        if sample:
            wanted = compile_gate.sample(wanted)
        of_append: list[Unit] = []
        if kernel is None and head_dim is None and variant is None:  # it has neither
            of_append = list(append_units(asked["archs"], asked["dtypes"]).values())
            if check:
                of_append = compile_gate.checked_to_append(of_append)
            num_known += len(of_append)
            if sample:
                of_append = compile_gate.sampled_to_append(of_append)
        measured, appending = measure(out, wanted, of_append)
        rows = [_row(entry, found) for entry, found in measured]
        rows += [_append_row(unit, found) for unit, found in appending]
        violations = [text for row in rows for text in row.violations]
        missed = compile_gate.missed_by_sample(measured) if check and not sample else []
        if with_table or not check:
            _show(out, rows)
        for text in violations:
            out.print(f"[red]over budget[/] {text}", wrap=False)
        for text in missed:
            out.error(f"--sample misses what is nearest to a spill: {text}")
        counted = f"a sample of {len(rows)} of {num_known}" if sample else f"{len(rows)}"
        num_over = sum(bool(row.violations) for row in rows)
        verdict = f"{num_over} over budget" if num_over else "all within budget"
        out.print(f"{counted} configurations, {verdict}")
        out.finish(rows, ok=not (check and (violations or missed)))


def measure(
    out: Output, wanted: Sequence[Configuration], units: Sequence[Unit] = ()
) -> tuple[list[tuple[Configuration, Resources]], list[tuple[Unit, CompiledKernel]]]:
    """Compile configurations and other kernels, or find them compiled."""
    total = len(wanted) + len(units)
    with out.progress(f"Compiling {total} configurations", total) as advance:
        found = []
        for compiled in _compile_all([*(entry.plan for entry in wanted), *units]):
            advance()
            found.append(compiled)
    plans, others = found[: len(wanted)], found[len(wanted) :]
    return list(zip(wanted, plans, strict=True)), list(zip(units, others, strict=True))


def _row(entry: Configuration, found: Resources) -> Row:
    from flashcore.selection.compile_gate import over_budget

    return Row(
        found.kernel,
        found.arch,
        found.head_dim,
        found.dtype,
        found.registers,
        found.smem_bytes,
        found.spill_bytes,
        found.code_bytes,
        entry.variant,
        f"{entry.plan.block_m}x{entry.plan.block_n}",
        entry.plan.num_stages,
        entry.plan.min_blocks,
        entry.plan.role_registers,
        found.remarks,
        over_budget(entry, found),
    )


def _append_row(unit: Unit, found: CompiledKernel) -> Row:
    """Return the row of the kernel that appends to a cache, which has no tiles and no head_dim."""
    from flashcore.selection import compile_gate

    _, arch, kernel, _, label = unit
    most = compile_gate.APPEND_REGISTERS
    over = [f"{label}: {found.spill_bytes} spilled bytes, 0 allowed"] * bool(found.spill_bytes)
    if found.registers > most:
        over.append(f"{label}: {found.registers} registers, {most} allowed")
    return Row(
        kernel, f"sm_{arch}", 0, label.split()[1].rstrip(","), found.registers,
        found.static_smem_bytes, found.spill_bytes, found.code_bytes, "append", "-", 1, 1,
        (), found.remarks, over,
    )  # fmt: skip


def _compile_all(items: Sequence[Plan | Unit]) -> Iterator[Any]:
    """Return resources of each plan, and kernels of units, in order. NVRTC compiles one program at
    a time in a process, so many go to a second process as well; a worker's start (importing torch)
    takes seconds."""
    from flashcore.base.machine import available_cores

    if len(items) < _MANY or available_cores() < 2:
        yield from map(_compile, items)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=2, mp_context=context) as pool:
        yield from pool.map(_compile, items, chunksize=4)


def _compile(item: Plan | Unit) -> Resources | CompiledKernel:
    from flashcore.compile import jit

    return jit.compile_source(*item) if isinstance(item, tuple) else jit.resources(item)


def _show(out: Output, rows: Sequence[Row]) -> None:
    kernels = {row.kernel for row in rows}
    columns = ["kernel"] if len(kernels) > 1 else []
    columns += ["dim", "dtype", "variant", "arch", "tile", "stages", "blocks", "registers"]
    columns += ["shared B", "spill B", "code B"]
    cells = [
        [
            *([row.kernel.removeprefix("attn_")] if len(kernels) > 1 else []),
            row.head_dim,
            row.dtype,
            row.variant,
            row.arch,
            row.tile,
            row.num_stages,
            row.min_blocks,
            "/".join(map(str, (row.registers, *row.role_registers))),
            row.smem_bytes,
            row.spill_bytes,
            row.code_bytes,
        ]
        for row in rows
    ]
    out.print(table(", ".join(sorted(kernels)), columns, cells))
