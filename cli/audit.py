"""`dtl audit`: the key generation center opens and judges files after the fact."""

from pathlib import Path
from typing import Annotated

import typer

from dtl.cli import options
from dtl.cli.options import (
    ForceOption,
    JobOption,
    JsonOption,
    KeyOption,
    Output,
    PassphraseOption,
    QuietOption,
    WorkersOption,
)

EXAMPLE = """Example:

  dtl audit alice.upload bob.upload carol.upload model-1.enc --key job/kgc.key

  dtl audit model-1.enc --key job/kgc.key --plaintext recovered.safetensors"""


def audit(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Uploads, sums, models, releases, reveals.",
            show_default=False,
        ),
    ],
    key: KeyOption,
    model: Annotated[
        Path | None,
        typer.Option(
            help="The model that the uploads are based on: encrypted, released or opened. Needed "
            "from round 2 on, to remove the masks.",
            show_default=False,
        ),
    ] = None,
    reveals: Annotated[
        list[Path] | None,
        typer.Option(metavar="R...", help="Reveals of the round.", show_default=False),
    ] = None,
    plaintext: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT", help="Write the values of the one FILE here.", show_default=False
        ),
    ] = None,
    unsigned: Annotated[
        bool, typer.Option("--unsigned", help="Also open files whose signature is invalid.")
    ] = False,
    job: JobOption = None,
    passphrase_file: PassphraseOption = None,
    force: ForceOption = False,
    workers: WorkersOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Open files with the strong trapdoor; report what is wrong with them, and whose fault it is.

    Prints statistics only; values are written to --plaintext and nowhere else. Ends with code 4
    if any file is bad, or cannot be judged.
    """
    from dtl.core.errors import NotAllowedError, VerificationError
    from dtl.core.roles import auditor

    output = Output(json, quiet)
    # A missing key of any other name, or in another folder than the job's, is a slip: code 2.
    discarded = key.name == "kgc.key" and options.job_path(job, key).exists()
    if discarded and not key.exists():
        raise NotAllowedError(
            f"{key}: there is no such key",
            "a job made with --discard-master can never be audited",
        )
    opened = options.open_key(key, job, passphrase_file)
    wanted = auditor.AuditOptions(model, reveals or (), plaintext, unsigned, force)
    with output.work(workers) as work:
        verdicts = auditor.audit(opened, files, wanted, work)
    bad = [verdict for verdict in verdicts if verdict.problems]
    output.show_many("files", [verdict.plain() for verdict in verdicts])
    if bad:
        raise VerificationError(
            "; ".join(f"{v.file} (by {v.signer}): {v.problems[0]}" for v in bad)
        )
    if unclear := [verdict for verdict in verdicts if verdict.doubts]:
        raise VerificationError("; ".join(f"{v.file}: {v.text}" for v in unclear))
