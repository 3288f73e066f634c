"""Known secrets, in every spelling that they could leak in, and a search for them."""

import base64
import json
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

from dtl.core.ciphers.cipher import Cipher
from dtl.core.ciphers.direct import DirectCipher
from dtl.core.ciphers.lattice import LatticeCipher
from dtl.core.encoding.packing import Packing
from dtl.core.files.job_file import Job
from dtl.core.files.key_file import Key, KgcSecrets, ParticipantSecrets, ServerSecrets
from dtl.core.files.tensors import read_arrays
from dtl.core.lattice.parameters import NOISE_BITS, Shape

SHORTEST = 12  # bytes: what is shorter stands somewhere by chance
SMALL = 100  # integers up to that do, too


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
    """Every value of a plain file in decimal, as a traceback would show it."""
    arrays, _ = read_arrays(path)
    texts = {json.dumps(float(value)) for array in arrays.values() for value in array.flat}
    return [text.encode() for text in texts if len(text) >= SHORTEST]


def plaintext_runs(path: Path, job: Job, codec: Cipher | None = None) -> list[bytes]:
    """Any two neighbours of a plain file, as they would stand in a binary file unencrypted.

    As float32 or float64; as fixed-point integers of 32 or 64 bits, packed into a block, or
    encoded in the words of a body, by `codec` or by the job's own cipher. Integers may be
    weighted with 1/n, and rounded down or up. What is near zero is left out: it stands
    somewhere by chance.
    """
    codec = codec or job.codec
    arrays, _ = read_arrays(path)
    values = np.concatenate([array.ravel() for array in arrays.values()])
    found = set()
    for dtype in ("<f4", "<f8"):
        raw = values.astype(dtype)
        found |= {raw[k : k + 2].tobytes() for k in range(raw.size - 1) if raw[k] and raw[k + 1]}
    for weight in (1, 1 / len(job.names)):
        low = [int(x) for x in np.floor(values * weight * job.fixed_point.one)]
        for place, pair in enumerate(pairwise(low)):
            if min(map(abs, pair)) > SMALL:
                found |= {*_integers(*pair)}
                if isinstance(codec, DirectCipher):
                    found |= {*_packed(*pair, place, codec.packing, job)}
        if isinstance(codec, LatticeCipher):
            found |= {*_words(low, codec.shape(len(low)))}
    return sorted(found)


def _integers(first: int, second: int) -> Iterator[bytes]:
    for up, up_too, dtype in product((0, 1), (0, 1), ("<i4", "<i8")):
        yield np.array([first + up, second + up_too], dtype).tobytes()


def _words(integers: list[int], shape: Shape) -> Iterator[bytes]:
    """The 48 low bits of every word of a body without its pad, where two values are not small."""
    for polynomial in range(shape.polynomials):
        m, start = shape.coefficients(polynomial), polynomial * shape.capacity
        for coefficient in range(m):
            values = integers[start + coefficient : start + shape.values_in(polynomial) : m]
            if sum(abs(value) > SMALL for value in values) < 2:
                continue
            for ups in product((0, 1), repeat=len(values)):
                slots = [value + up for value, up in zip(values, ups, strict=True)]
                x = sum(value << (shape.slot_bits * place) for place, value in enumerate(slots))
                for prime in shape.ring.primes:
                    yield ((x << NOISE_BITS) % prime % (1 << 48)).to_bytes(6, "little")


def _packed(first: int, second: int, place: int, packing: Packing, job: Job) -> Iterator[bytes]:
    """Two slots of a block: of signed numbers, modulo N where it is negative, or all biased.

    The slots below lend or carry at most one.
    """
    bits, slots = job.slot_bits, packing.slots
    slot = place % slots
    if slot + 1 == slots:
        return
    bias = sum(1 << (bits * number + bits - 1) for number in range(slots))
    for start, up, up_too in product((0, job.N, bias), (-1, 0, 1, 2), (0, 1)):
        both = (start >> (bits * slot)) + first + up + ((second + up_too) << bits)
        yield (both % (1 << (2 * bits))).to_bytes(2 * bits // 8, "little")
