"""Known secrets, in every spelling that they could leak in, and a search for them."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtl.core.files.key_file import Key, KgcSecrets, ParticipantSecrets, ServerSecrets

SHORTEST = 12  # bytes: what is shorter stands somewhere by chance


class Needles:
    """The spellings of secrets, each with a name that tells what leaked."""

    def __init__(self) -> None:
        self._spellings: dict[bytes, str] = {}

    @classmethod
    def of_keys(cls, folder: Path) -> "Needles":
        """The secrets of a job: see `add_keys`."""
        found = cls()
        found.add_keys(folder)
        return found

    def add_keys(self, folder: Path) -> None:
        """Add all that is secret in the key files of a job, and the halves that follow from it."""
        for path in sorted(folder.glob("*.key")):
            key = Key.load(path, folder / "job.json", lambda: b"")
            for name, value in _values(key.secrets.plain(), path.stem):
                self.add(name, value)
            if isinstance(key.secrets, ServerSecrets | ParticipantSecrets):
                for number, half in enumerate(key.half, 1):
                    self.add(f"half {number} of {path.stem}", half)
            if isinstance(key.secrets, KgcSecrets):
                self.add("p", key.secrets.p)
                self.add("q", key.secrets.q)

    def add(self, name: str, value: bytes | int) -> None:
        """Add a secret in raw bytes of both orders, hex, decimal and base64."""
        if isinstance(value, int):
            value = value.to_bytes((value.bit_length() + 7) // 8, "big")
        if len(value) < SHORTEST:
            raise ValueError(f"{name}: too short to search for")
        for order in (value, value[::-1]):
            number = int.from_bytes(order, "big")
            texts = (f"{number}", f"{number:x}", order.hex(), order.hex().upper())
            bases = (base64.b64encode(order).rstrip(b"="), base64.urlsafe_b64encode(order)[:-2])
            spelled = (repr(order)[2:-1], *texts)
            for spelling in (order, *bases, *(text.encode() for text in spelled)):
                self._spellings[spelling] = name

    def find(self, data: bytes) -> list[str]:
        """The names of the secrets that stand in these bytes."""
        return sorted({name for needle, name in self._spellings.items() if needle in data})


def _values(value: Any, name: str) -> Iterator[tuple[str, bytes]]:
    """The byte strings of a secret part, by name."""
    match value:
        case dict():
            for key, item in value.items():
                yield from _values(item, f"{key} of {name}")
        case str() if not name.startswith(("p of", "q of")):
            yield name, base64.b64decode(value)


def plaintext_values(path: Path) -> list[bytes]:
    """Every float64 and float32 of an .npz file in decimal, as a traceback would show it."""
    import numpy as np

    with np.load(path) as arrays:
        values = [array.ravel() for array in arrays.values() if array.dtype.kind == "f"]
    texts = {json.dumps(float(value)) for array in values for value in array}
    return [text.encode() for text in texts if len(text) >= SHORTEST]
