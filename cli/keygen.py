"""`dtl keygen`: the key generation center makes a job and hands out the keys."""

from pathlib import Path
from typing import Annotated

import typer

from dtl.cli import options
from dtl.cli.options import (
    CipherName,
    JsonOption,
    Output,
    ParticipantsOption,
    PassphraseOption,
    QuietOption,
    WorkersOption,
)
from dtl.core import defaults

EXAMPLE = """Example:

  dtl keygen job --participants alice,bob,carol

  ls job   # job.json is for everyone, NAME.key and NAME.ledger for NAME"""


def keygen(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A new folder.", show_default=False)
    ],
    participants: ParticipantsOption,
    modulus_bits: Annotated[
        int, typer.Option(help="2048 or 3072; smaller with --insecure.")
    ] = defaults.MODULUS_BITS,
    slot_bits: Annotated[
        int,
        typer.Option(help="Bits of a value; weights are within 2^(slot bits - fraction bits - 2)."),
    ] = defaults.SLOT_BITS,
    fraction_bits: Annotated[
        int, typer.Option(help="Bits after the binary point.")
    ] = defaults.FRACTION_BITS,
    min_contributors: Annotated[
        int, typer.Option(help="The fewest uploads that are ever added up.")
    ] = defaults.MIN_CONTRIBUTORS,
    cipher: Annotated[
        CipherName,
        typer.Option(
            help="lattice: a one-time lattice pad hides the values, and the double trapdoor "
            "encrypts the pad's secret. direct: the double trapdoor encrypts every value; no "
            "lattice assumption, but larger and much slower."
        ),
    ] = CipherName.LATTICE,
    no_masks: Annotated[
        bool,
        typer.Option(
            "--no-masks",
            help="No pairwise masks: the server and any participant can open every upload.",
        ),
    ] = False,
    discard_master: Annotated[
        bool,
        typer.Option(
            "--discard-master", help="Write no kgc.key: nobody can ever audit or recover."
        ),
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow a small modulus, for tests.")
    ] = False,
    passphrase_file: PassphraseOption = None,
    workers: WorkersOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a job: a public job file, and keys for the center, the server and each participant."""
    from dtl.core.files.key_file import read_passphrase
    from dtl.core.roles import key_center

    output = Output(json, quiet)
    wanted = key_center.JobOptions(
        participants=options.names(participants, "--participants"),
        modulus_bits=modulus_bits,
        slot_bits=slot_bits,
        fraction_bits=fraction_bits,
        min_contributors=min_contributors,
        masks=not no_masks,
        cipher=str(cipher),
        insecure=insecure,
        keep_master=not discard_master,
    )
    passphrase = read_passphrase(passphrase_file) if passphrase_file else None
    with output.work(workers) as work:
        job = key_center.generate_job(folder, wanted, passphrase, work)
    output.show(
        folder=str(folder),
        job=job.digest,
        security=job.security,
        cipher=job.cipher,
        participants=list(job.names),
        masks=job.masks,
        min_contributors=job.min_contributors,
        master_key="kept in kgc.key" if not discard_master else "discarded",
    )
