"""`dtl close-round`: the server continues without the missing participants."""

from pathlib import Path
from typing import Annotated

import typer

from dtl.cli import options
from dtl.cli.options import (
    ForceOption,
    JobOption,
    JsonOption,
    KeyOption,
    OutOption,
    Output,
    PassphraseOption,
    QuietOption,
    WorkersOption,
)

EXAMPLE = """Example:

  dtl close-round alice.upload bob.upload carol.upload --key job/server.key -o round-1.close"""


def close_round(
    uploads: Annotated[
        list[Path], typer.Argument(metavar="U...", help="Uploads.", show_default=False)
    ],
    key: KeyOption,
    out: OutOption,
    job: JobOption = None,
    passphrase_file: PassphraseOption = None,
    force: ForceOption = False,
    workers: WorkersOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """State who contributed and who is missing; that round then accepts no other upload."""
    from dtl.core.roles import server

    output = Output(json, quiet)
    opened = options.open_key(key, job, passphrase_file)
    with output.work(workers) as work:
        close = server.close_round(opened, uploads, out, force, work)
    output.show(
        close=str(out),
        digest=close.digest,
        round=close.round,
        contributors=list(close.names),
        missing=list(close.missing),
    )
