"""What parties make that follow no rule: any header, any bytes, their own valid signature."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtl.core.ciphers.lattice import LatticeCipher
from dtl.core.crypto import scheme
from dtl.core.crypto.group import COMPONENTS
from dtl.core.files import canonical_json
from dtl.core.files.atomic import AtomicOutput
from dtl.core.files.container import BODY, RESIDUES, Container, ContainerWriter
from dtl.core.files.ledger import Ledger
from dtl.core.files.schema import Document
from dtl.core.lattice import portable
from dtl.core.lattice import ring as door
from tests.helpers import Round

Tensors = dict[str, NDArray[np.uint8]]


def read(path: Path) -> tuple[dict[str, Any], Tensors]:
    """The header and the tensors of a bulk file."""
    with Container(path) as container:
        header: dict[str, Any] = canonical_json.loads(container.raw_header, "")
        tensors = {
            name: np.frombuffer(container.whole(name), np.uint8).reshape(info.shape).copy()
            for name, info in container.tensors.items()
        }
        return header, tensors


def write(out: Path, header: Mapping[str, Any], tensors: Tensors, secret: bytes) -> Path:
    """A bulk file with this header and these tensors, signed with `secret`."""
    with AtomicOutput(out, force=True) as output:
        shapes = {name: array.shape for name, array in tensors.items()}
        writer = ContainerWriter(output, canonical_json.dumps(dict(header)), shapes)
        for name, array in tensors.items():
            writer.write(name, np.ascontiguousarray(array).tobytes())
        writer.finish(str(header["kind"]), secret)
        output.commit()
    return out


def again(
    round_: Round,
    path: Path,
    out: str,
    changes: Mapping[str, Any] | None = None,
    tensors: Tensors | None = None,
    signer: str = "server",
) -> Path:
    """A file with a changed header or changed tensors, signed anew."""
    header, found = read(path)
    secret = round_.opened_key(signer).secrets.sign
    return write(
        round_.folder / out, {**header, **(changes or {})}, found | (tensors or {}), secret
    )


def forget(round_: Round, name: str = "server") -> None:
    """A party that has forgotten what it did: its ledger is cut to the first line."""
    path = round_.keys / f"{name}.ledger"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])


def ledger_of(*entries: Document) -> Ledger:
    """A ledger with these entries, of no file."""
    made = object.__new__(Ledger)
    made.path, made.entries, made._descriptor = Path("x.ledger"), list(entries), -1
    return made


def digest_of(path: Path) -> str:
    """The digest of a bulk file."""
    with Container(path) as container:
        return container.digest().hex()


class Spoiler:
    """Changes a result of a lattice job as only somebody who knows its pads could."""

    def __init__(self, round_: Round, result: Path) -> None:
        self.round, self.path = round_, result
        self.header, self.tensors = read(result)
        codec = round_.job.codec
        assert isinstance(codec, LatticeCipher)
        self.codec, self.shape = codec, codec.shape(self.header["values"])
        self.arithmetic = portable.Arithmetic(codec.ring)

    def shift_secret(self, coefficient: int, amount: int) -> None:
        """Add to the sum of the secrets, in blocks and body alike."""
        small = np.zeros(self.codec.ring.n, np.int64)
        small[coefficient] = amount
        groups = self.tensors[RESIDUES].shape[0]
        blocks = self.codec.packing.pack(small, groups * COMPONENTS)
        key, residues = self.round.job.public_key, self.tensors[RESIDUES]
        self.tensors[RESIDUES] = scheme.add_public(
            key, residues, blocks.reshape(groups, COMPONENTS, -1)
        )
        pads = self.arithmetic._pads(self.arithmetic.transform(small))
        public = door.public_key(bytes.fromhex(self.round.job.digest))
        for i in range(self.shape.polynomials):
            m = self.shape.coefficients(i)
            self._add(i, [pads(public, i, j)[:m] for j in range(len(self.codec.ring.primes))])

    def shift(self, coefficient: int, amount: int, polynomial: int = 0) -> None:
        """Add a number to a coefficient of the body: noise below 2^28, values above."""
        words = []
        for prime in self.codec.ring.primes:
            word = np.zeros(self.shape.coefficients(polynomial), np.int64)
            word[coefficient] = amount % prime
            words.append(word)
        self._add(polynomial, words)

    def spoil_block(self) -> None:
        """Multiply c_1 of group 0 by 2."""
        n = self.round.job.N
        residue = self.tensors[RESIDUES][0, 1]
        number = 2 * int.from_bytes(residue.tobytes(), "little") % (n * n)
        residue[:] = np.frombuffer(number.to_bytes(len(residue), "little"), np.uint8)

    def _add(self, polynomial: int, words: list[NDArray[np.int64]]) -> None:
        span = self.shape.span(polynomial, 1)
        place = slice(span.start, span.start + span.length)
        total = portable.Sum(self.shape, polynomial, 1)
        total.add(self.tensors[BODY][place].copy())
        for word, more in zip(total._words[0], words, strict=True):
            np.add(word, more, out=word)
        self.tensors[BODY][place] = total.body()

    def write(self, out: str) -> Path:
        """The changed result, signed by the server."""
        secret = self.round.opened_key("server").secrets.sign
        return write(self.round.folder / out, self.header, self.tensors, secret)
