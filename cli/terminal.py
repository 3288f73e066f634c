"""All that dtl says on a terminal; the only file that uses rich.

Results go to stdout; progress, warnings and errors to stderr. Bars are shown only on a
terminal.
"""

import errno
import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dtl.core.errors import DtlError
from dtl.core.progress import ProgressCallback, silent

_DIGEST = re.compile("[0-9a-f]{128}")


class _Console(Console):
    """A console that fails where its reader is gone; rich would end the program unheard."""

    def on_broken_pipe(self) -> None:
        """Raise the error that rich has caught."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def _errors() -> Console:
    return _Console(file=sys.stderr, highlight=False, soft_wrap=True)


def _complain(text: str) -> None:
    """Print to stderr if that can be done; where not, the work and its exit code still count."""
    with suppress(OSError):
        _errors().print(text)


@contextmanager
def _printing() -> Iterator[None]:
    """Print to stdout. Raises DtlError where that cannot be done."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # what is left in buffers goes there
        raise DtlError(
            f"stdout: {os.strerror(error.errno or 0).lower()}",
            "only the result could not be printed; the files are complete",
        ) from None


def make_streams_safe() -> None:
    """Keep closed or narrow output streams from failing a command, or from showing nothing."""
    if not os.environ.get("COLUMNS", "80").strip("0"):
        del os.environ["COLUMNS"]  # a width of zero says that the width is not known
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  (for good)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show_error(error: DtlError) -> None:
    """Print an error, and its hint where it has one."""
    _complain(f"[bold red]dtl: error:[/] {escape(_plain_text(error.message))}")
    if error.hint:
        lines = [escape(_plain_text(line)) for line in error.hint.split("\n")]
        _complain("[bold]dtl: hint:[/] " + "\n".join(lines))


def _plain_text(text: str) -> str:
    """Text without control characters: file names and tensor names come from outside."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


class WarningHandler(logging.Handler):
    """Prints the warnings that core logs, each once a command."""

    def __init__(self) -> None:
        super().__init__()
        self._printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print one warning."""
        message = record.getMessage()
        if message not in self._printed:
            self._printed.add(message)
            show_warning(message)


def set_up_warnings() -> None:
    """Send what core logs to stderr."""
    logger = logging.getLogger("dtl")
    logger.handlers = [WarningHandler()]
    logger.propagate = False


def show_result(result: Mapping[str, Any], as_json: bool, quiet: bool) -> None:
    """Print a result: one JSON object, or a short table."""
    if as_json:
        with _printing():
            sys.stdout.write(json.dumps(result) + "\n")
    elif not quiet:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in result.items():
            for label, text in _rows(name.replace("_", " "), value):
                table.add_row(label, escape(_plain_text(text)))
        with _printing():
            _Console(highlight=False).print(table)


def show_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool, quiet: bool
) -> None:
    """Print a table: text in the first column, figures in the others."""
    if quiet:
        return
    if markdown:
        rules = ["---", *["---:"] * (len(heads) - 1)]
        with _printing():
            for row in (heads, rules, *rows):
                sys.stdout.write(f"| {' | '.join(row)} |\n")
        return
    table = Table(box=None, padding=(0, 1, 0, 0))
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    with _printing():
        _Console(highlight=False).print(table)


def show_warning(text: str) -> None:
    """Print a warning."""
    _complain(f"[yellow]dtl: warning:[/] {escape(_plain_text(text))}")


def show_blank_line(quiet: bool) -> None:
    """Set results apart."""
    if not quiet:
        with _printing():
            sys.stdout.write("\n")


def _rows(label: str, value: Any) -> Iterator[tuple[str, str]]:
    match value:
        case dict() if value:
            for number, (name, item) in enumerate(value.items()):
                for _, text in _rows("", item):
                    yield (label if not number else "", f"{name}: {text}")
        case list() | dict():
            yield label, ", ".join(map(str, value)) or "none"
        case bool():
            yield label, "yes" if value else "no"
        case None:
            yield label, "none"
        case float():
            yield label, f"{value:.6g}"
        case int() if abs(value) >= 10_000:
            yield label, f"{value:,}"
        case str() if _DIGEST.fullmatch(value):
            yield label, f"{value[:16]}..."  # in full with --json
        case _:
            yield label, str(value)


class _RateColumn(ProgressColumn):
    """How much is done a second: values, bytes, or whatever the step counts."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{_amount(speed)}/s" if speed else "", style="progress.data.speed")


def _amount(number: float) -> str:
    """A number in three figures: 950, 12.3 k, 4.56 M."""
    units = ["", " k", " M", " G"]
    while number >= 1000 and len(units) > 1:
        number, units = number / 1000, units[1:]
    return f"{number:.3g}{units[0]}"


@contextmanager
def progress_bar(quiet: bool) -> Iterator[ProgressCallback]:
    """A callback for core's progress: a bar a step on a terminal, nothing elsewhere."""
    console = _errors()
    if quiet or not console.is_terminal:
        yield silent
        return
    bars: dict[str, TaskID] = {}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(complete_style="cyan", finished_style="green"),  # red would be an error
        TaskProgressColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as progress:

        def update(step: str, done: int, total: int | None) -> None:
            if step not in bars:
                bars[step] = progress.add_task(escape(step), total=total)
            progress.update(bars[step], completed=done, total=total)

        yield update
