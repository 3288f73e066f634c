"""What a release can be recomputed from, as files that the server sends along with it.

The names in a message are of the server's choice, so a reader takes none but these:
upload-0, upload-1, ...; reveal-0, ...; and one of model (the encrypted parent) and initial.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dtl.core.errors import FormatError
from dtl.core.files.atomic import write_file
from dtl.core.public.verification import Evidence

UPLOAD, REVEAL, MODEL, INITIAL = "upload-", "reveal-", "model", "initial"
_NAME = re.compile(f"(?:{UPLOAD}|{REVEAL})[0-9]{{1,4}}|{MODEL}|{INITIAL}")


def named(evidence: Evidence) -> dict[str, Path]:
    """The files of an evidence under the names that they have in a message.

    Only the first of its models: one round is recomputed.
    """
    found = {f"{UPLOAD}{number}": path for number, path in enumerate(evidence.uploads)}
    found |= {f"{REVEAL}{number}": path for number, path in enumerate(evidence.reveals)}
    if evidence.models:
        found[MODEL] = evidence.models[0]
    if evidence.initial:
        found[INITIAL] = evidence.initial
    return found


def write(folder: Path, along: Mapping[str, bytes]) -> Evidence:
    """Write files of these names into a folder; FormatError for any other name."""
    for told, data in along.items():
        if not _NAME.fullmatch(told):
            raise FormatError(f"a file along with a release under the name {told!r:.40}")
        write_file(folder / told, data)

    def paths(kind: str) -> Sequence[Path]:
        return [folder / told for told in along if told.startswith(kind)]

    initial = folder / INITIAL if INITIAL in along else None
    return Evidence(paths(UPLOAD), paths(MODEL), initial, paths(REVEAL))
