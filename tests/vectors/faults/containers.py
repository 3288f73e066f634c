"""Faulty containers and spellings of a header."""

from collections.abc import Callable, Iterator

from tests.vectors.command_lines import SUM, A
from tests.vectors.faults import edits
from tests.vectors.faults.fault import Fault
from tests.vectors.scene import Scene


def spellings() -> Iterator[Fault]:
    def fault(name: str, about: str, make: Callable[[Scene], bytes]) -> Fault:
        return Fault(f"container-{name}", about, SUM, 3, lambda scene: {A: make(scene)})

    def text(name: str, about: str, old: str, new: str) -> Fault:
        return fault(name, about, lambda scene: scene.container(A, old, new))

    yield fault("empty", "no byte at all", lambda scene: b"")
    yield fault("trailing-byte", "a byte after the last", lambda scene: scene.read(A) + b"\0")
    yield fault("cut", "the last byte is missing", lambda scene: scene.read(A)[:-1])
    yield fault("header-cut", "ends within the header", lambda scene: scene.read(A)[:100])
    yield fault(
        "length-huge",
        "the header's length is 2^63",
        lambda scene: (1 << 63).to_bytes(8, "little") + scene.read(A)[8:],
    )
    yield fault("padding", "eight spaces more than needed", edits.padded)
    yield fault("padding-newline", "padded with a line end", edits.newline)
    yield fault("deep", "the header is 10,000 arrays in one another", edits.deep)
    yield fault("not-utf-8", "the header is not UTF-8", edits.not_utf8)
    yield text("key-twice", "a key twice", '"proof":{', '"proof":0,"proof":{')
    yield text("space", "a space after a colon", '"dtype":"U8"', '"dtype": "U8"')
    yield text("keys-unsorted", "keys out of order", *edits.unsorted())
    yield text("escaped", "a letter escaped without need", '"proof"', '"\\u0070roof"')
    yield text("offset-float", "an offset is 0.0", "[0,", "[0.0,")
    yield text("offset-minus-zero", "an offset is -0", "[0,", "[-0,")
    yield text("overlap", "two tensors overlap", '"data_offsets":[575,', '"data_offsets":[574,')
    yield text("gap", "a gap between two tensors", '"data_offsets":[575,', '"data_offsets":[576,')
    yield text("dtype", "a tensor is of dtype I8", '"dtype":"U8"', '"dtype":"I8"')
    yield text(
        "metadata-more", "a third text in the metadata", '"signature"', '"more":"","signature"'
    )
    yield text("metadata-renamed", "the signature by another name", '"signature"', '"signatures"')
    yield fault("signature-upper-case", "the signature in upper case", edits.upper_signature)
    yield fault("signature-short", "a digit of the signature is missing", edits.short_signature)

    def header(name: str, about: str, old: str, new: str) -> Fault:
        return Fault(
            f"header-{name}",
            f"{about}; signed anew",
            SUM,
            3,
            lambda scene: {A: scene.text(A, old, new)},
        )

    yield header("key-twice", "a key twice", '"round":3', '"round":3,"round":3')
    yield header("key-twice-other", "a key twice, not the same", '"round":3', '"round":2,"round":3')
    yield header("space", "a space", '"round":3', '"round": 3')
    yield header("line-end", "a line end at its end", '"values":159}', '"values":159}\n')
    yield header("float", "a float", '"round":3', '"round":3.0')
    yield header("exponent", "an exponent", '"round":3', '"round":3e0')
    yield header("nan", "NaN", '"round":3', '"round":NaN')
    yield header("minus-zero", "-0", '"round":3', '"round":-0')
    yield header("long-number", "a number of 5,000 digits", '"round":3', '"round":' + "1" * 5000)
    yield header("surrogate", "half a surrogate pair", '"b"', '"\\ud800"')
    yield header("escaped", "a letter escaped without need", '"b"', '"\\u0062"')
    yield header("slash", "an escaped slash", '"dtl/v2"', '"dtl\\/v2"')
    yield header("true", "true for 1", '"round":3', '"round":true')
    yield header("null", "null for a text", '"kind":"upload"', '"kind":null')
    yield header("look-alike", "a Cyrillic letter in a name", '"alice"', '"аlice"')
