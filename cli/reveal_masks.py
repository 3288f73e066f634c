"""`dtl reveal-masks`: a participant helps to remove the masks of the missing."""

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
)

EXAMPLE = """Example:

  dtl reveal-masks round-1.close --key job/alice.key -o alice.reveal"""


def reveal_masks(
    close: Annotated[
        Path, typer.Argument(metavar="CLOSE", help="A close file.", show_default=False)
    ],
    key: KeyOption,
    out: OutOption,
    job: JobOption = None,
    passphrase_file: PassphraseOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Reveal the masks that you share with missing participants, for this one round."""
    from dtl.core.roles import participant

    output = Output(json, quiet)
    opened = options.open_key(key, job, passphrase_file)
    reveal = participant.reveal_masks(opened, close, out, force)
    output.show(
        reveal=str(out),
        participant=reveal.signer,
        round=reveal.round,
        close=reveal.close,
        missing=sorted(reveal.keys),
    )
