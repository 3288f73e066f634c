"""The root of the command line: the commands, and the one place where errors become exit codes."""

import os
import platform
import signal
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from functools import cache, wraps
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from dtl.cli import (
    aggregate,
    apply_sum,
    audit,
    bench,
    close_round,
    compute_grads,
    encrypt_grads,
    evaluate,
    flower,
    flower_config,
    init_model,
    inspect,
    keygen,
    open_model,
    release_model,
    reveal_masks,
    simulate,
    split_data,
    terminal,
    verify,
)
from dtl.core import dumps
from dtl.core.errors import DtlError, UsageError

DEBUG_VARIABLE = "DTL_DEBUG"
_MANY = ("--reveals", "--uploads")  # options that take several files
_OUTPUTS = ("out", "state_out", "plaintext")  # parameters that name files to write
_INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_EXAMPLE_WIDTH = 74  # of the 80 columns of a terminal, without margins and the backslash
_INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt

KGC, PARTICIPANT, SERVER, ANYONE = (
    "Key generation center",
    "Participant",
    "Parameter server",
    "Anyone",
)

app = typer.Typer(
    name="dtl",
    help="Train one model together without showing anyone your data.",
    epilog="Every command explains itself: dtl COMMAND --help. Results go to stdout, "
    "everything else to stderr.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(panel: str, function: Callable[..., None], example: str, **settings: bool) -> None:
    name = function.__name__.replace("_", "-")
    shown = _pasteable(example).replace("[", r"\[")  # no markup
    command = app.command(name, epilog=shown, rich_help_panel=panel, context_settings=settings)
    command(_sparing_inputs(function))


def _pasteable(example: str) -> str:
    """An example whose long lines end with a backslash, so that a shell takes them as they stand.

    typer joins the lines of a paragraph; so that a line stays one, it becomes a paragraph.
    """
    commands = [" ".join(part.split()) for part in example.split("\n\n")]
    parts = [
        textwrap.wrap(command, _EXAMPLE_WIDTH, break_long_words=False, break_on_hyphens=False)
        for command in commands
    ]
    return "\n\n".join(" \\\n\n".join(lines) for lines in parts)


def _sparing_inputs(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command refuse, even with --force, an output that is one of its inputs."""

    @wraps(function)  # typer sees the command's own signature
    def checked(**given: Any) -> None:
        files = {name: value for name, value in given.items() if name not in _OUTPUTS}
        inputs = [path for value in files.values() for path in _paths(value)]
        for output in (path for name in _OUTPUTS for path in _paths(given.get(name))):
            if any(_same_file(output, path) for path in inputs):
                raise UsageError(
                    f"{output}: expected a file to write, found one that is also an input",
                    "choose another name for the output",
                )
        function(**given)

    return checked


def _paths(value: object) -> list[Path]:
    items = value if isinstance(value, list | tuple) else [value]
    return [item for item in items if isinstance(item, Path)]


def _same_file(one: Path, other: Path) -> bool:
    with suppress(OSError, ValueError):  # one that is not there is not the other
        return one.samefile(other)
    return False


_add(KGC, keygen.keygen, keygen.EXAMPLE)
_add(KGC, audit.audit, audit.EXAMPLE)
_add(PARTICIPANT, compute_grads.compute_grads, compute_grads.EXAMPLE)
_add(PARTICIPANT, encrypt_grads.encrypt_grads, encrypt_grads.EXAMPLE)
_add(PARTICIPANT, reveal_masks.reveal_masks, reveal_masks.EXAMPLE)
_add(PARTICIPANT, open_model.open_model, open_model.EXAMPLE)
_add(PARTICIPANT, apply_sum.apply_sum, apply_sum.EXAMPLE)
_add(SERVER, aggregate.aggregate, aggregate.EXAMPLE)
_add(SERVER, close_round.close_round, close_round.EXAMPLE)
_add(SERVER, release_model.release_model, release_model.EXAMPLE)
_add(SERVER, flower_config.flower_config, flower_config.EXAMPLE)
_add(ANYONE, flower.flower, flower.EXAMPLE, allow_extra_args=True, ignore_unknown_options=True)
_add(ANYONE, inspect.inspect, inspect.EXAMPLE)
_add(ANYONE, verify.verify, verify.EXAMPLE)
_add(ANYONE, split_data.split_data, split_data.EXAMPLE)
_add(ANYONE, init_model.init_model, init_model.EXAMPLE)
_add(ANYONE, evaluate.evaluate, evaluate.EXAMPLE)
_add(ANYONE, simulate.simulate, simulate.EXAMPLE)
_add(ANYONE, bench.bench, bench.EXAMPLE)


def _show_version(context: typer.Context, wanted: bool) -> None:
    if wanted:
        typer.echo(f"dtl {version('dtl-toolkit')}")
        if context.params.get("verbose"):
            _show_kernel()
        raise typer.Exit


def _show_kernel() -> None:
    from dtl.core.crypto import residues
    from dtl.core.lattice import ring

    reason = residues.why_not_native()
    typer.echo(f"kernel: {residues.kernel_name()}" + (f" (not native: {reason})" if reason else ""))
    reason = ring.why_not_ifma()
    lattice = ring.lattice_kernel_name()
    typer.echo(f"lattice kernel: {lattice}" + (f" (not ifma: {reason})" if reason else ""))
    typer.echo(f"python: {platform.python_version()}\nlibrary: {residues.LIBRARY}")


@app.callback()
def root(
    verbose: Annotated[
        bool,
        typer.Option("--verbose", is_eager=True, help="With --version: which kernel is in use."),
    ] = False,
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, help="Print the version."),
    ] = False,
) -> None:
    """Train one model together without showing anyone your data."""


# typer brings its own copy of click or uses the one installed, depending on its version;
# its usage errors are known by this base class either way.
_ClickError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


@cache
def _command() -> Any:
    return typer.main.get_command(app)


def run(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    terminal.set_up_warnings()
    try:
        spread = _spread(sys.argv[1:] if arguments is None else arguments) or ["--help"]
        result = _command().main(args=spread, prog_name="dtl", standalone_mode=False)
    except typer.Exit as error:
        result = error.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        failure = _explain(error)
        terminal.show_error(failure)
        return failure.exit_code
    if result == _INTERRUPTED:
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


def _spread(arguments: list[str]) -> list[str]:
    """Write `--reveals A B C` as `--reveals A --reveals B --reveals C`.

    These options take all that follows up to the next option, which typer cannot express.
    """
    spread: list[str] = []
    option = None
    for argument, following in zip(arguments, [*arguments[1:], "-"], strict=False):
        if argument.startswith("-"):
            name, equals, _ = argument.partition("=")
            option = name if name in _MANY else None
            if option is None or equals or following.startswith("-"):
                spread.append(argument)
        else:
            spread += [option, argument] if option else [argument]
    return spread


def _explain(error: Exception) -> DtlError:
    """The failure to report for any exception."""
    match error:
        case DtlError():
            return error
        case MemoryError():
            return DtlError("out of memory", "take fewer --workers")
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            return DtlError(f"{where}{(error.strerror or str(error)).lower()}")
        case _ if isinstance(error, _ClickError):
            return _usage_error(error)
    if os.environ.get(DEBUG_VARIABLE):
        raise error
    # Only the type: the text of an unforeseen error might hold a value.
    return DtlError(
        f"unexpected failure ({type(error).__name__})",
        f"please report it; {DEBUG_VARIABLE}=1 shows where it happened",
    )


def _usage_error(error: Any) -> UsageError:
    message = error.format_message().strip().rstrip(".")
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "dtl"
    return UsageError(message[:1].lower() + message[1:], f"try {path} --help")


def _ignore_interruptions() -> None:
    for number in _INTERRUPTIONS:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _ignore_interruptions()  # one is enough; a second one would interrupt the cleaning up
    raise KeyboardInterrupt


def main() -> None:
    """Run a command; one that is interrupted cleans up and ends with 1."""
    terminal.make_streams_safe()
    dumps.forbid()
    for number in _INTERRUPTIONS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a job in the background
            signal.signal(number, _interrupt)
    try:
        code = run()
        _ignore_interruptions()  # all is done: let it end in peace
    except KeyboardInterrupt:
        terminal.show_error(DtlError("interrupted; every output is complete or absent"))
        code = DtlError.exit_code
    sys.stdout.flush()
    sys.exit(code)
