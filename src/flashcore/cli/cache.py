"""`flashcore cache` shows where compiled kernels lie, how large they are, and how to be rid of
them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from flashcore.cli.output import JsonFlag, Output, command, si_bytes, table

if TYPE_CHECKING:
    from flashcore.base.housekeeping import Item

app = typer.Typer(no_args_is_help=True, help="Show and tidy the cache of compiled kernels.")

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@app.command("dir")
def show_dir(json_output: JsonFlag = False) -> None:
    """Print the folder of the cache.

    Example:

        flashcore cache dir
    """
    with command(json_output) as out:
        from flashcore.base import store

        folder, *stand_ins = store.folders()
        out.print(str(folder), wrap=False)
        out.finish({"dir": folder, "instead": stand_ins[0] if stand_ins else None})


@app.command("size")
def show_size(json_output: JsonFlag = False) -> None:
    """Print how many files of each kind there are, and how large they are.

    Example:

        flashcore cache size
    """
    with command(json_output) as out:
        from flashcore.base.housekeeping import items

        count: Counter[str] = Counter()
        size: Counter[str] = Counter()
        for item in items():
            count[item.kind] += 1
            size[item.kind] += item.size
        rows = [[kind, count[kind], si_bytes(size[kind])] for kind in sorted(count)]
        rows.append(["all", count.total(), si_bytes(size.total())])
        out.print(table(None, ["kind", "files", "size"], rows))
        kinds = {kind: {"files": count[kind], "bytes": size[kind]} for kind in sorted(count)}
        out.finish({"files": count.total(), "bytes": size.total(), "kinds": kinds})


@app.command("prune")
def prune(
    days: Annotated[
        float, typer.Option("--days", min=0, help="Remove what was not used for so many days.")
    ] = 30,
    max_size: Annotated[
        str | None,
        typer.Option("--max-size", help="Then the longest unused, down to a size such as 500M."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Remove leftovers of killed processes, and what was not used for long.

    Tiles that `flashcore tune` found stay.

    Examples:

        flashcore cache prune

        flashcore cache prune --days 7 --max-size 500M
    """
    with command(json_output) as out:
        from flashcore.base.housekeeping import items, to_prune

        limit = None if max_size is None else _bytes(max_size)
        _delete(out, to_prune(items(), max_bytes=limit, older_than_s=days * 86400))


@app.command("clean")
def clean(
    tuned: Annotated[
        bool, typer.Option("--tuned", help="The tiles that `flashcore tune` found as well.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Remove all that flashcore wrote into the cache; files of others stay.

    Example:

        flashcore cache clean
    """
    with command(json_output) as out:
        from flashcore.base.housekeeping import TUNED, items

        _delete(out, [item for item in items(0) if tuned or item.kind != TUNED])


def _delete(out: Output, found: Sequence[Item]) -> NoReturn:
    from flashcore.base.housekeeping import delete

    gone, stayed = delete(found)
    size = sum(item.size for item in gone)
    out.print(f"removed {len(gone)} files, {si_bytes(size)}", wrap=False)
    if stayed:
        out.print(f"{len(stayed)} files are another user's, such as {stayed[0].path}", wrap=False)
    out.finish({"removed": len(gone), "bytes": size, "stayed": [item.path for item in stayed]})


def _bytes(text: str) -> int:
    """Return "500M" as 500 * 2**20."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise typer.BadParameter(f"--max-size {text} is not a size such as 500M or 2G")
    return int(float(found[1]) * _UNITS[found[2].upper()])
