"""What all commands share: where text goes, the one JSON document, progress, exit codes.

Tables and sentences go to stdout. With `--json` stdout holds exactly one JSON document and nothing
else, so `flashcore doctor --json | jq .` always works. Progress and errors go to stderr.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2

JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")
]

# A pipe has no width; this keeps tables whole in CI logs.
_PIPE_WIDTH = 110


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=False)


class Output:
    """The output of one command: human text or one JSON document, never both on stdout."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    @property
    def is_terminal(self) -> bool:
        """Whether somebody watches the progress: else it goes into a log."""
        return _console(stderr=True).is_terminal

    def print(self, *renderables: Any, wrap: bool = True) -> None:
        """Print for a human; silent with --json. `wrap=False` keeps long lines (a command, a path)
        in one piece, so that they can be copied."""
        if not self.as_json:
            _console().print(*renderables, soft_wrap=not wrap)

    def note(self, text: str) -> None:
        """One line to stderr, also with --json."""
        _console(stderr=True).print(text, style="dim", markup=False, soft_wrap=True)

    def error(self, text: str) -> None:
        """One error line to stderr."""
        console = _console(stderr=True)
        console.print("error:", style="bold red", end=" ")
        console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, description: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """Show progress on stderr; yields `advance(steps=1, description=None)`.

        A terminal gets a bar that disappears at the end; a log file gets one line.
        """
        console = _console(stderr=True)
        if not console.is_terminal:
            console.print(f"{description} ...", markup=False, soft_wrap=True)

            def silent(steps: int = 1, description: str | None = None) -> None:
                del steps, description

            yield silent
            return
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=30)]
        with Progress(
            *columns, MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True
        ) as bar:
            task = bar.add_task(description, total=total)

            def advance(steps: int = 1, description: str | None = None) -> None:
                bar.update(task, advance=steps, description=description)

            yield advance

    def finish(self, document: Any, ok: bool = True) -> NoReturn:
        """Print the JSON document if it was asked for and leave with exit status 0 or 1."""
        if self.as_json:
            sys.stdout.write(json.dumps(to_json(document), indent=2) + "\n")
        raise typer.Exit(EXIT_OK if ok else EXIT_FAILED)


@contextmanager
def command(as_json: bool) -> Iterator[Output]:
    """The frame of every command: a FlashCoreError becomes one readable line and exit status 1."""
    from flashcore.errors import FlashCoreError

    output = Output(as_json)
    try:
        yield output
    except FlashCoreError as error:
        output.error(str(error))
        if as_json:
            sys.stdout.write(json.dumps({"error": str(error)}, indent=2) + "\n")
        raise typer.Exit(EXIT_FAILED) from error


@contextmanager
def usage_errors() -> Iterator[None]:
    """What the library rejects in here came from the command line: exit status 2, no traceback."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        raise typer.BadParameter(str(error)) from error


def to_json(value: Any) -> Any:
    """Plain JSON values: dataclasses become objects, NaN and infinities become null or strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        # JSON has no NaN; "inf" says more than null would.
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Path):
        return str(value)
    return value


def table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table whose first column is left-aligned and whose numbers are right-aligned."""
    result = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    numeric = [
        all(isinstance(row[index], (int, float)) or _looks_numeric(str(row[index])) for row in rows)
        for index in range(len(columns))
    ]
    for index, name in enumerate(columns):
        align = "right" if rows and numeric[index] else "left"
        wraps = not numeric[index] and index == len(columns) - 1
        result.add_column(name, justify=align, overflow="fold", no_wrap=not wraps)  # type: ignore[arg-type]
    for row in rows:
        result.add_row(*[str(cell) for cell in row])
    return result


def _looks_numeric(text: str) -> bool:
    return text in ("", "-") or text[:1].isdigit() or (text[:1] == "-" and text[1:2].isdigit())


def si_bytes(size: int) -> str:
    """A size in bytes for a human: 512 B, 48.0 KiB, 1.2 MiB."""
    if size < 1024:
        return f"{size} B"
    value = size / 1024
    for unit in ("KiB", "MiB"):
        if value < 1024:
            return f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def seconds(value: float) -> str:
    """A duration in seconds for a human, three digits: 9.41 us, 1.33 ms, 2.10 s."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1.0 or unit == "us":
            scaled = value * factor
            return f"{scaled:.{max(0, 2 - int(math.log10(max(scaled, 1.0))))}f} {unit}"
    raise AssertionError("unreachable")
