"""Provide what all commands share: where text goes, the one JSON document, progress, exit codes.

Tables and sentences go to stdout. With `--json` stdout holds exactly one JSON document and nothing
else, so `flashcore doctor --json | jq .` always works. Progress and errors go to stderr.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2

JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")
]

QuietFlag = Annotated[
    bool, typer.Option("-q", "--quiet", help="Print no progress and no notes on stderr.")
]
VerboseFlag = Annotated[
    bool, typer.Option("-v", "--verbose", help="Print the traceback of an error.")
]
_is_quiet = _is_verbose = False  # of the command that runs

# A pipe has no width; this keeps tables whole in CI logs.
_PIPE_WIDTH = 110
_WORD_MAX = 28  # characters; a longer word (a path, a flag with its value) is folded
_GAP = 2  # characters between two columns, and at both edges together


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=False)


def with_verbosity(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags -q and -v."""

    @functools.wraps(function)
    def command_with_flags(*args: Any, quiet: bool, verbose: bool, **options: Any) -> None:
        global _is_quiet, _is_verbose
        _is_quiet, _is_verbose = quiet, verbose
        function(*args, **options)

    flags = {"quiet": QuietFlag, "verbose": VerboseFlag}
    # Evaluated here: typer would look the names up in this module.
    hints = {**get_type_hints(function, include_extras=True), **flags}
    parameters = [
        *inspect.signature(function).parameters.values(),
        *(inspect.Parameter(x, inspect.Parameter.KEYWORD_ONLY, default=False) for x in flags),
    ]
    command_with_flags.__annotations__ = hints
    command_with_flags.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(annotation=hints[parameter.name]) for parameter in parameters]
    )
    return command_with_flags


class Output:
    """An Output takes the output of one command: human text or one JSON document, never both on
    stdout."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    @property
    def is_terminal(self) -> bool:
        """Return whether somebody watches the progress: else it goes into a log."""
        return _console(stderr=True).is_terminal

    def print(self, *renderables: Any, wrap: bool = True) -> None:
        """Print for a human; silent with --json. `wrap=False` keeps long lines (a command, a path)
        in one piece, so that they can be copied."""
        if not self.as_json:
            _console().print(*renderables, soft_wrap=not wrap)

    def note(self, text: str) -> None:
        """Print one line to stderr, also with --json, but not with --quiet."""
        if _is_quiet:
            return
        _console(stderr=True).print(text, style="dim", markup=False, soft_wrap=True)

    def error(self, text: str) -> None:
        """Print one error line to stderr."""
        console = _console(stderr=True)
        console.print("error:", style="bold red", end=" ")
        console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, description: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """Show progress on stderr; yields `advance(steps=1, description=None)`.

        A terminal gets a bar that disappears at the end; a log file gets one line; with --quiet
        there is neither.
        """
        console = _console(stderr=True)
        if _is_quiet or not console.is_terminal:
            self.note(f"{description} ...")

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
    """Give every command its frame: a FlashCoreError becomes one readable line and exit status
    1."""
    from flashcore.errors import FlashCoreError

    output = Output(as_json)
    try:
        yield output
    except FlashCoreError as error:
        output.error(str(error))
        if _is_verbose:
            traceback.print_exc()
        if as_json:
            sys.stdout.write(json.dumps({"error": str(error)}, indent=2) + "\n")
        raise typer.Exit(EXIT_FAILED) from error


@contextmanager
def usage_errors() -> Iterator[None]:
    """Return what the library rejects in here came from the command line: exit status 2, no
    traceback."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        raise typer.BadParameter(str(error)) from error


def to_json(value: Any) -> Any:
    """Return plain JSON values: dataclasses become objects, NaN and infinities become null or
    strings."""
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


def table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Sheet:
    """Return a table whose numbers are right-aligned and never cut, on any width."""
    return Sheet(title, columns, [[str(cell) for cell in row] for row in rows])


class Sheet:
    """A sheet is a table that fits the console it is printed on.

    Text wraps between words; a word of more than _WORD_MAX characters is folded. Columns that find
    no place beside the others follow below, behind the first column again: nothing is left out.

    Args:
        title: above the table, or None.
        columns: their headings.
        rows: their cells, in rich's markup.
    """

    def __init__(
        self, title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> None:
        self.title, self.columns = title, columns
        self.rows = [[Text.from_markup(cell) for cell in row] for row in rows]
        self._cells = [[row[i].plain for row in self.rows] for i in range(len(columns))]
        self._is_numeric = [bool(rows) and all(map(_looks_numeric, cells)) for cells in self._cells]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield one rich table for each group of columns that fits."""
        for number, group in enumerate(self._groups(options.max_width)):
            if number:
                yield ""
            yield self._part(self.title if number == 0 else None, group, options.max_width)

    def _groups(self, width: int) -> list[list[int]]:
        groups: list[list[int]] = [[]]
        for index in range(len(self.columns)):
            group = [*groups[-1], index]
            needed = sum(self._least(i) for i in group) + _GAP * len(group)
            if needed > width and len(groups[-1]) > 1:
                groups.append([0, index])
            else:
                groups[-1] = group
        return groups

    def _least(self, index: int) -> int:
        """Return the width that a column needs: numbers in one piece, words whole, and of the
        first column, which names the rows, the cells."""
        is_numeric = self._is_numeric[index]
        words = [word for cell in self._cells[index] for word in cell.split()]
        whole = self._cells[index] if is_numeric or index == 0 else words
        heading = max(map(cell_len, self.columns[index].split()), default=1)
        widest = max(map(cell_len, whole), default=1)
        return max(heading, widest if is_numeric else min(widest, _WORD_MAX))

    def _part(self, title: str | None, group: list[int], width: int) -> Table:
        least = {i: self._least(i) for i in group}
        widths = {
            i: max(least[i], *map(cell_len, self._cells[i]), cell_len(self.columns[i]))
            for i in group
        }
        # The widest column that can give gives, until all fit.
        while sum(widths.values()) + _GAP * len(group) > width:
            able = [i for i in group if widths[i] > least[i]]
            if not able:
                break
            widths[max(able, key=lambda i: widths[i])] -= 1
        result = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            header_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for i in group:
            justify: JustifyMethod = "right" if self._is_numeric[i] else "left"
            result.add_column(self.columns[i], justify=justify, overflow="fold", width=widths[i])
        for row in self.rows:
            result.add_row(*(row[i] for i in group))
        return result


def _looks_numeric(text: str) -> bool:
    return text in ("", "-") or text[:1].isdigit() or (text[:1] == "-" and text[1:2].isdigit())


def si_bytes(size: int) -> str:
    """Return a size in bytes for a human: 512 B, 48.0 KiB, 1.2 MiB."""
    if size < 1024:
        return f"{size} B"
    value = size / 1024
    for unit in ("KiB", "MiB"):
        if value < 1024:
            return f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def seconds(value: float) -> str:
    """Return a duration in seconds for a human, three digits: 9.41 us, 1.33 ms, 2.10 s."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1.0 or unit == "us":
            scaled = value * factor
            return f"{scaled:.{max(0, 2 - int(math.log10(max(scaled, 1.0))))}f} {unit}"
    raise AssertionError("unreachable")
