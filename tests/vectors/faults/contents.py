"""How good contents become faulty ones: residues, proofs, bodies."""

import math
from collections.abc import Callable

from tests import helpers
from tests.second import lattice
from tests.vectors import forging
from tests.vectors.command_lines import A
from tests.vectors.scene import (
    Changes,
    Edit,
    Scene,
    Tensors,
)

WIDTH = 64
N = math.prod(helpers.PRIMES[256])
PRIMES = lattice.SMALL.primes
SMALL_BODY = lattice.Shape(lattice.SMALL, 24, 159)
COEFFICIENTS = 23  # of a body of 159 values in slots of 24 bits
Edit2 = Callable[[Tensors], object]
GROUPS = 5  # of a secret, at 256 bits


def beyond(scene: Scene, c: int) -> int:
    room = (1 << 8 * scene.width) - scene.square
    return c % room + scene.square


def added(scene: Scene, c: int) -> int:
    return c * (1 + scene.p * scene.q) % scene.square


def one_larger(part: str) -> Callable[[Scene], bytes]:
    return lambda scene: scene.proof(A, part, lambda number: number + 1)


def tensor(scene: Scene, name: str, tensor: str) -> tuple[list[int], bytes]:
    return scene.bulk(name)[1][tensor]


def swap(found: Tensors, tensor: str, width: int, one: int, other: int) -> None:
    shape, data = found[tensor]
    parts = [data[at : at + width] for at in range(0, len(data), width)]
    parts[one], parts[other] = parts[other], parts[one]
    found[tensor] = shape, b"".join(parts)


def reshape(found: Tensors, shape: list[int]) -> None:
    found["residues"] = shape, found["residues"][1]


def cut(found: Tensors, width: int) -> None:
    found["residues"] = [GROUPS - 1, 8, width], found["residues"][1][: -8 * width]


def resize(found: Tensors, more: int) -> None:
    (length,), data = found["body"]
    found["body"] = [length + more], (data + bytes(1))[: length + more]


def with_words(body: bytes, edit: Callable[[list[list[int]]], object]) -> bytes:
    """A body of one polynomial with edited words."""
    shape = SMALL_BODY
    words = lattice.read_body(body, shape)
    edit(words[0])
    return written(words[0])


def written(rows: list[list[int]]) -> bytes:
    """Words as they lie in a file, whether they are below their primes or not."""
    return lattice.write_body([rows])


def plus(number: int, coefficient: int = 0) -> Callable[[bytes], bytes]:
    """Add a number to a coefficient."""

    def edit(rows: list[list[int]]) -> None:
        for row, prime in zip(rows, PRIMES, strict=True):
            row[coefficient] = (row[coefficient] + number) % prime

    return lambda body: with_words(body, edit)


def word_set(prime: int, more: int) -> Callable[[bytes], bytes]:
    """The second word modulo a prime is the prime, or larger."""

    def edit(rows: list[list[int]]) -> None:
        rows[prime][1] = PRIMES[prime] + more

    return lambda body: with_words(body, edit)


def words(prime: int, more: int) -> Edit2:
    return lambda found: change_body(found, word_set(prime, more))


def words_plus(number: int, coefficient: int = 0) -> Edit2:
    return lambda found: change_body(found, plus(number, coefficient))


def change_body(found: Tensors, edit: Callable[[bytes], bytes]) -> None:
    shape, data = found["body"]
    found["body"] = shape, edit(data)


def word_larger(found: Tensors) -> None:
    change_body(found, plus(1))


plus_one = words_plus(1 << 28)


def garbage_body(found: Tensors) -> None:
    def edit(rows: list[list[int]]) -> None:
        for number, row in enumerate(rows):
            stream = forging.drawn(f"garbage {number}", 6 * len(row))
            row[:] = [int.from_bytes(stream[6 * c : 6 * c + 6], "little") for c in range(len(row))]

    change_body(found, lambda body: with_words(body, edit))


def proven_body(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Scene], bytes]:
    return lambda scene: forging.proven(scene, name, body=edit)


def proven_blocks(name: str, block: int, number: int) -> Callable[[Scene], bytes]:
    return lambda scene: forging.proven(scene, name, blocks=block_plus(block, number))


def proven_header(name: str, edit: Edit) -> Callable[[Scene], Changes]:
    return lambda scene: {name: forging.proven(scene, name, header=edit)}


def block_plus(block: int, number: int) -> Callable[[list[int]], list[int]]:
    return lambda blocks: [m + number * (t == block) for t, m in enumerate(blocks)]


def lifted(scene: Scene, name: str) -> int:
    """The lift of c_0 of the third group."""
    n = scene.p * scene.q
    _, data = scene.bulk(name)[1]["residues"]
    at = 16 * scene.width
    return pow(int.from_bytes(data[at : at + scene.width], "little"), n, n * n)


def set_residue(found: Tensors, width: int, group: int, k: int, edit: Callable[[int], int]) -> None:
    shape, data = found["residues"]
    at = (8 * group + k) * width
    found["residues"] = shape, number_set(data, at, width, edit)


def number_set(data: bytes, at: int, width: int, edit: Callable[[int], int]) -> bytes:
    new = edit(int.from_bytes(data[at : at + width], "little"))
    return data[:at] + new.to_bytes(width, "little") + data[at + width :]


def residue_set(
    name: str, group: int, k: int, value: Callable[[Scene], int]
) -> Callable[[Scene], Changes]:
    return lambda scene: {name: scene.residue(name, group, k, lambda old: value(scene))}


def residue_plus(group: int, j: int, number: int) -> Edit2:
    """Add to a block of a result; N is the published one."""
    return lambda found: set_residue(found, WIDTH, group, j, lambda c: c * (1 + number * N) % N**2)


def residue_times(group: int, j: int) -> Edit2:
    return lambda found: set_residue(found, WIDTH, group, j, lambda c: 2 * c % N**2)


def negated(scene: Scene, number: int) -> int:
    return scene.square - number
