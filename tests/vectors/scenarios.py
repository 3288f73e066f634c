"""The good jobs: three rounds and a job of sums at an insecure size, and one at full size."""

import hashlib
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path

from dtl.core.files.safetensors import build_header

FOUR = ("alice", "bob", "carol", "dave")
THREE = PRESENT = FOUR[:3]
PASSPHRASE = b"published, and so of no use\n"
Spec = tuple[str, str, tuple[int, ...]]
SPECS: tuple[Spec, ...] = (("a.weight", "F32", (9, 17)), ("b", "F16", (5,)), ("c", "F64", ()))
CODES = {"F16": "e", "F32": "f", "F64": "d"}
INSECURE = "--modulus-bits 256 --insecure"


def tensors(seed: str, scale: float, specs: tuple[Spec, ...] = SPECS, text: str = "") -> bytes:
    """A plain file of published values within +-scale; `text` is dtl's metadata."""
    data = b""
    for name, dtype, shape in specs:
        count = prod(shape)
        stream = hashlib.shake_256(f"{seed}/{name}".encode()).digest(2 * count)
        values = [scale * (word / 2**15 - 1) for word in struct.unpack(f"<{count}H", stream)]
        data += struct.pack(f"<{count}{CODES[dtype]}", *values)
    return build_header({"dtl": text} if text else {}, specs) + data


def three_rounds(folder: Path, dtl: Callable[..., object]) -> None:
    """Lattice: a model without dave; its next round, whose release admits dave; a sum of four."""
    key = {name: f"job/{name}.key" for name in (*FOUR, "server")}
    (folder / "w0.safetensors").write_bytes(tensors("w0", 0.5))
    for name in FOUR:
        (folder / f"{name}.grads").write_bytes(tensors(name, 0.1))
    dtl(*f"keygen job --participants {','.join(FOUR)} {INSECURE}".split())

    basis = dict.fromkeys(PRESENT, "--model w0.safetensors")
    start = {1: "--initial w0.safetensors", 2: "--model model-1.enc"}
    admit = {1: "", 2: "--admit dave"}
    for number in (1, 2):
        for name in PRESENT:
            words = f"{name}.grads --key {key[name]} {basis[name]} -o {name}-{number}.upload"
            dtl("encrypt-grads", *words.split())
        present = " ".join(f"{name}-{number}.upload" for name in PRESENT)
        dtl(*f"close-round {present} --key {key['server']} -o round-{number}.close".split())
        for name in PRESENT:
            words = f"round-{number}.close --key {key[name]} -o {name}-{number}.reveal"
            dtl("reveal-masks", *words.split())
        reveals = " ".join(f"{name}-{number}.reveal" for name in PRESENT)
        closed = f"--close round-{number}.close --reveals {reveals} -o model-{number}.enc"
        dtl(*f"aggregate {present} --key {key['server']} {start[number]} {closed}".split())
        words = (
            f"model-{number}.enc --key {key['server']} {admit[number]} -o model-{number}.release"
        )
        dtl("release-model", *words.split())
        for name in PRESENT if number == 1 else FOUR:
            out = f"{name}.model-{number}.safetensors"
            dtl(*f"open-model model-{number}.release --key {key[name]} -o {out}".split())
            basis[name] = f"--model {out}"

    for name in FOUR:
        dtl(*f"encrypt-grads {name}.grads --key {key[name]} --round 3 -o {name}-3.upload".split())
    everyone = [f"{name}-3.upload" for name in FOUR]
    dtl("aggregate", *everyone, "--key", key["server"], "-o", "sum-3.enc")
    dtl(*f"release-model sum-3.enc --key {key['server']} -o sum-3.release".split())
    for name in FOUR[:2]:
        dtl(*f"open-model sum-3.release --key {key[name]} -o {name}.sum-3.safetensors".split())


def sums(folder: Path, dtl: Callable[..., object]) -> None:
    """Direct: a sum on initial weights, opened by two; one has taken the step along it."""
    key = {name: f"job/{name}.key" for name in (*THREE, "server")}
    (folder / "w0.safetensors").write_bytes(tensors("w0", 0.5))
    dtl(*f"keygen job --participants {','.join(THREE)} --cipher direct {INSECURE}".split())
    for name in THREE:
        (folder / f"{name}.grads").write_bytes(tensors(name, 0.1))
        words = f"{name}.grads --key {key[name]} --model w0.safetensors -o {name}-1.upload"
        dtl("encrypt-grads", *words.split())
    everyone = " ".join(f"{name}-1.upload" for name in THREE)
    for words in ("-o sum-1.enc", "--initial w0.safetensors -o model-1.enc"):
        dtl(*f"aggregate {everyone} --key {key['server']} {words}".split())
    dtl(*f"release-model sum-1.enc --key {key['server']} -o sum-1.release".split())
    for name in THREE[:2]:
        dtl(*f"open-model sum-1.release --key {key[name]} -o {name}.sum-1.safetensors".split())
    step = "alice.sum-1.safetensors --model w0.safetensors --key job/alice.key"
    dtl(*f"apply-sum {step} -o alice.w1.safetensors".split())
    upload = "alice.grads --key job/alice.key --model alice.w1.safetensors"
    dtl(*f"encrypt-grads {upload} -o alice-2.upload".split())


def full_size(folder: Path, dtl: Callable[..., object]) -> None:
    """Lattice: a sum of two, with masks, modulo the published 3072-bit N."""
    names = FOUR[:2]
    dtl("keygen", "job", "--participants", ",".join(names), "--min-contributors", "2")
    for name in names:
        (folder / f"{name}.grads").write_bytes(tensors(name, 0.1, (("w", "F32", (5,)),)))
        words = f"{name}.grads --key job/{name}.key --round 1 -o {name}-1.upload"
        dtl("encrypt-grads", *words.split())
    uploads = [f"{name}-1.upload" for name in names]
    dtl("aggregate", *uploads, "--key", "job/server.key", "-o", "sum-1.enc")
    dtl(*["release-model", "sum-1.enc", "--key", "job/server.key", "-o", "sum-1.release"])
    for name in names:
        dtl(*f"open-model sum-1.release --key job/{name}.key -o {name}.sum-1.safetensors".split())


SCENARIOS = {"three-rounds": three_rounds, "sums": sums, "full-size": full_size}
