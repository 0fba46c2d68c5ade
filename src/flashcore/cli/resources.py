"""`flashcore resources` says what every kernel configuration costs a GPU, and the budget check."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashcore.cli.options import Arch, parse_archs
from flashcore.cli.output import JsonFlag, Output, command, table, usage_errors

if TYPE_CHECKING:
    from flashcore.compile.jit import Resources
    from flashcore.kernels.fwd_wmma.plan import Plan
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
            "one sum takes), uneven (head_dim 224/40, lengths, a mask and a window), "
            "pages-masked, packed-pages or tree.",
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

    Compiles for every architecture; needs NVRTC but no GPU. Compiled kernels are cached. The
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
        from flashcore.selection.backward_configurations import backward_configurations
        from flashcore.selection.building import append_units
        from flashcore.selection.configurations import DTYPES, HEAD_DIMS, VARIANTS, configurations

        for name, value, known in (("dtype", dtype, DTYPES), ("variant", variant, VARIANTS)):
            if value is not None and value not in known:
                raise typer.BadParameter(f"--{name} {value} is not one of {', '.join(known)}")
        with usage_errors():
            asked: dict[str, Any] = {
                "archs": parse_archs(arch),
                "head_dims": HEAD_DIMS if head_dim is None else (head_dim,),
                "dtypes": DTYPES if dtype is None else (dtype,),
                "variants": tuple(VARIANTS) if variant is None else (variant,),
            }
            wanted = configurations(**asked) + backward_configurations(**asked)
        if check and dtype is None:
            wanted = [entry for entry in wanted if entry.is_checked]
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
        measured = measure(out, wanted)
        rows = [_row(entry, found) for entry, found in measured]
        if kernel is None and head_dim is None and variant is None:  # it has neither
            of_append = append_units(asked["archs"], asked["dtypes"])
            num_known += len(of_append)
            rows += _append_rows(of_append.values(), sample)
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


def measure(out: Output, wanted: Sequence[Configuration]) -> list[tuple[Configuration, Resources]]:
    """Compile configurations, or find them compiled."""
    found = []
    with out.progress(f"Compiling {len(wanted)} configurations", len(wanted)) as advance:
        for entry, resources in zip(
            wanted, _compile_all([entry.plan for entry in wanted]), strict=True
        ):
            advance()
            found.append((entry, resources))
    return found


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


def _append_rows(units: Iterable[tuple[str, int, str, str, str]], sample: bool) -> Iterator[Row]:
    """Return a row for each variant of the kernel that appends to a cache; of a sample, for one of
    each architecture. It has no tiles and no head_dim."""
    from flashcore.compile.jit import compile_source

    seen: set[int] = set()
    for source, arch, kernel, suffix, label in units:
        if sample and arch in seen:
            continue
        seen.add(arch)
        found = compile_source(source, arch, kernel, suffix, label)
        spilled = f"{label}: {found.spill_bytes} spilled bytes, 0 allowed"
        violations = [spilled] if found.spill_bytes else []
        yield Row(
            kernel, f"sm_{arch}", 0, label.split()[1].rstrip(","), found.registers,
            found.static_smem_bytes, found.spill_bytes, found.code_bytes, "append", "-", 1, 1,
            (), found.remarks, violations,
        )  # fmt: skip


def _compile_all(plans: Sequence[Plan]) -> Iterator[Resources]:
    """Return resources of each plan, in order. NVRTC compiles one program at a time in a
    process, so many plans go to a second process as well; a worker's start (importing torch)
    takes seconds."""
    from flashcore.base.machine import available_cores
    from flashcore.compile.jit import resources as resources_of

    if len(plans) < _MANY or available_cores() < 2:
        yield from map(resources_of, plans)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=2, mp_context=context) as pool:
        yield from pool.map(resources_of, plans, chunksize=4)


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
