"""Options that several commands share, and what they mean."""

import sys
import termios
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtl.cli import terminal
from dtl.core.cluster import connect
from dtl.core.errors import UsageError
from dtl.core.parallel import Work
from dtl.core.progress import ProgressCallback

if TYPE_CHECKING:
    from dtl.core.files.key_file import Key

JOB_FILE = "job.json"


class BackendName(StrEnum):
    """Where heavy work is done."""

    LOCAL = "local"
    DASK = "dask"


JobOption = Annotated[
    Path | None,
    typer.Option(
        "--job",
        envvar="DTL_JOB",
        help="The public job file; by default job.json in the folder of the key, or of "
        "FILE without a key.",
        show_default=False,
    ),
]
KeyOption = Annotated[
    Path, typer.Option("--key", envvar="DTL_KEY", help="Your key file.", show_default=False)
]
PassphraseOption = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        envvar="DTL_PASSPHRASE_FILE",
        help="A file whose first line is the passphrase of the key; else you are asked for it.",
        show_default=False,
    ),
]
OutOption = Annotated[
    Path, typer.Option("--out", "-o", help="The file to write.", show_default=False)
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Overwrite the output; never a key or a ledger.")
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Cores to use; by default all.", show_default=False),
]
BackendOption = Annotated[
    BackendName,
    typer.Option("--backend", help="Where the work is done: on this machine, or by Dask."),
]
ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="ADDRESS",
        help="With --backend dask: its scheduler, tcp://HOST:PORT or tls://HOST:PORT. Workers "
        "need the same dtl and read the same files under the same names.",
        show_default=False,
    ),
]
SecretsOption = Annotated[
    bool,
    typer.Option(
        "--secrets-to-workers",
        help="With --backend dask: let secrets of this step leave this machine.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
UploadsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--uploads",
        metavar="U...",
        help="The uploads that the result was made of.",
        show_default=False,
    ),
]
ParentsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--model",
        metavar="PARENT",
        help="The encrypted model before the result. verify takes earlier ones, too: repeat the "
        "option, back to round 1.",
        show_default=False,
    ),
]
InitialOption = Annotated[
    Path | None,
    typer.Option("--initial", metavar="M0", help="The public initial weights.", show_default=False),
]
RevealsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--reveals",
        metavar="R...",
        help="The reveals, if somebody was missing.",
        show_default=False,
    ),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print no progress, and no result but that of --json.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Makes the outcome repeatable.")]
ParticipantsOption = Annotated[
    str,
    typer.Option(
        "--participants",
        metavar="NAMES",
        help="Names, separated by commas: alice,bob,carol.",
        show_default=False,
    ),
]


class RoundingName(StrEnum):
    """How values are rounded."""

    STOCHASTIC = "stochastic"
    NEAREST = "nearest"


class CipherName(StrEnum):
    """How values are encrypted."""

    LATTICE = "lattice"
    DIRECT = "direct"


class OptimizerName(StrEnum):
    """How weights move along gradients."""

    SGD = "sgd"
    MOMENTUM = "momentum"
    ADAM = "adam"


@dataclass(frozen=True)
class Output:
    """How a command shows its result."""

    as_json: bool
    quiet: bool

    def show(self, **result: Any) -> None:
        """Print the result."""
        terminal.show_result(result, self.as_json, self.quiet)

    def show_many(self, name: str, results: Sequence[Mapping[str, Any]]) -> None:
        """Print several results: one JSON object that lists them, or a table each."""
        if self.as_json:
            terminal.show_result({name: results}, True, self.quiet)
        else:
            for result in results:
                terminal.show_result({**result}, False, self.quiet)
                terminal.show_blank_line(self.quiet)

    @contextmanager
    def work(
        self,
        workers: int | None,
        backend: BackendName = BackendName.LOCAL,
        address: str | None = None,
        secrets_to_workers: bool = False,
    ) -> Iterator[Work]:
        """Work on this number of cores, or on a cluster, and show progress."""
        if backend is BackendName.LOCAL:
            if address is not None or secrets_to_workers:
                raise UsageError("--cluster, --secrets-to-workers: only with --backend dask")
            with self.progress() as progress:
                yield Work(workers, progress)
            return
        if address is None:
            raise UsageError("--backend dask: needs --cluster tcp://HOST:PORT")
        with connect(address, secrets_to_workers) as cluster, self.progress() as progress:
            yield Work(workers, progress, cluster)

    @contextmanager
    def progress(self) -> Iterator[ProgressCallback]:
        """Show progress while the command works."""
        with terminal.progress_bar(self.quiet) as callback:
            yield callback


def job_path(job: Path | None, key: Path) -> Path:
    """The job file: the one named, or `job.json` beside the key."""
    return job or key.parent / JOB_FILE


def open_key(key: Path, job: Path | None, passphrase_file: Path | None) -> "Key":
    """Read the key file, and check it against its job."""
    from dtl.core.files.key_file import Key

    asked = []
    ask = passphrase(passphrase_file)

    def note() -> bytes:
        asked.append(True)
        return ask()

    opened = Key.load(key, job_path(job, key), note)
    if passphrase_file is not None and not asked:
        terminal.show_warning(
            f"{key}: not boxed: anybody who can read it can use it; --passphrase-file is not used"
        )
    return opened


def passphrase(path: Path | None) -> Callable[[], bytes]:
    """How to get at the passphrase of a boxed key."""
    from dtl.core.files.key_file import read_passphrase

    def ask() -> bytes:
        if path is not None:
            return read_passphrase(path)
        if not sys.stdin.isatty():
            raise UsageError("the key is boxed, and there is no passphrase", "--passphrase-file")
        return _typed_unseen("dtl: passphrase: ")

    return ask


def _typed_unseen(prompt: str) -> bytes:
    """A line typed at the terminal, which does not show it: any bytes, as in a passphrase file.

    (getpass.getpass fails where what is typed is no text in the encoding of the terminal.)
    """
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    unseen = [*before]
    unseen[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, unseen)
        sys.stderr.write(prompt)
        sys.stderr.flush()
        line = sys.stdin.buffer.readline()
    finally:
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)
        sys.stderr.write("\n")
    if not line:
        raise EOFError
    return line.splitlines()[0]


def names(text: str, option: str) -> list[str]:
    """Names separated by commas."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise UsageError(f"{option}: expected names separated by commas, found {text!r}")
    return found


def sizes(text: str, option: str) -> list[int]:
    """Whole numbers separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option}: expected numbers such as 64,32, found {text!r}") from None
