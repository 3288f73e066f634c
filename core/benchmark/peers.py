"""Other libraries doing the same: each is measured where it is installed.

All at 128 bits of security: Paillier and Okamoto-Uchiyama with 3072-bit keys, CKKS with
degree 8192 and the moduli [60, 40, 60]. The slow ones encrypt few values.
"""

# The peers are optional, and their modules are imported only where they are measured.
# ruff: noqa: PLC0415

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtl.core.benchmark.sample import CONTRIBUTORS, Sample, Stopwatch

KEY_BITS = 3072
CKKS_DEGREE, CKKS_MODULI, CKKS_SCALE = 8192, [60, 40, 60], 2.0**40
DEVIATION = 0.01
FEW, SOME, MANY = 6, 100, 2000  # values that slow, faster and fast peers encrypt
CKKS_VALUES = 1_000_000  # as many as CKKS encrypts; they are all in memory

Measure = Callable[[int], Sample]


def gradients(values: int, start: int = 0, count: int | None = None) -> NDArray[np.float64]:
    """What everyone encrypts: `count` of `values` gradients, from `start` on."""
    places = np.arange(start, start + (values if count is None else count), dtype=np.float64)
    return DEVIATION * (6 * places / max(1, values - 1) - 3)


@cache
def _tenseal() -> Any:
    import tenseal

    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS, CKKS_DEGREE, coeff_mod_bit_sizes=CKKS_MODULI, n_threads=1
    )
    context.global_scale = CKKS_SCALE
    return context


def tenseal(values: int) -> Sample:
    """TenSEAL: CKKS vectors of 4096 values."""
    import tenseal as library

    values = min(values, CKKS_VALUES)
    context, watch, slots = _tenseal(), Stopwatch(values), CKKS_DEGREE // 2
    reals = gradients(values)
    cuts = [reals[start : start + slots] for start in range(0, values, slots)]
    encrypt, vectors = watch.time(lambda: [library.ckks_vector(context, cut) for cut in cuts])
    serialise, data = watch.time(lambda: [vector.serialize() for vector in vectors])

    def add() -> list[Any]:
        first, *others = (
            [library.ckks_vector_from(context, one) for one in data] for _ in range(CONTRIBUTORS)
        )
        for other in others:
            first = [a + b for a, b in zip(first, other, strict=True)]
        return first

    aggregate, total = watch.time(add)
    opening, _ = watch.time(lambda: [vector.decrypt() for vector in total])
    size = sum(map(len, data)) / values
    return Sample(values, encrypt, serialise, aggregate, 0.0, opening, size)


@cache
def _heu(scheme: str) -> Any:
    from heu import numpy, phe

    return numpy.setup(getattr(phe.SchemaType, scheme), KEY_BITS)


def _measure_heu(scheme: str, values: int) -> Sample:
    from heu import phe

    kit, watch = _heu(scheme), Stopwatch(values)
    encoded = kit.array(gradients(values), phe.FloatEncoderParams())
    encrypt, array = watch.time(lambda: kit.encryptor().encrypt(encoded))
    serialise, data = watch.time(array.serialize)
    add = kit.evaluator().add
    aggregate, total = watch.time(lambda: add(add(array, array), array))
    opening, _ = watch.time(lambda: kit.decryptor().decrypt(total))
    return Sample(values, encrypt, serialise, aggregate, 0.0, opening, len(data) / values)


def heu_okamoto_uchiyama(values: int) -> Sample:
    """SecretFlow HEU, Okamoto-Uchiyama."""
    return _measure_heu("OU", min(values, MANY))


def heu_paillier(values: int) -> Sample:
    """SecretFlow HEU, its fast Paillier."""
    return _measure_heu("ZPaillier", min(values, SOME))


@cache
def _pypaillier() -> Any:
    import paillier

    return paillier.generate_keypair(KEY_BITS)


def pypaillier(values: int) -> Sample:
    """pypaillier: Paillier with short exponents, in Rust."""
    import paillier

    public, secret = _pypaillier()
    values = min(values, SOME)
    watch, reals = Stopwatch(values), gradients(values).tolist()
    encrypt, found = watch.time(lambda: paillier.encrypt_many(public, reals))
    blobs = [bytes(blob) for blob in found]
    aggregate, total = watch.time(
        lambda: [bytes(paillier.add_many(public, [blob] * CONTRIBUTORS)) for blob in blobs]
    )
    opening, _ = watch.time(lambda: [paillier.decrypt(secret, blob) for blob in total])
    size = sum(map(len, blobs)) / values
    return Sample(values, encrypt, 0.0, aggregate, 0.0, opening, size)


@cache
def _phe() -> Any:
    from phe import paillier

    return paillier.generate_paillier_keypair(n_length=KEY_BITS)


def python_paillier(values: int) -> Sample:
    """python-paillier: the field's baseline, on gmpy2."""
    public, secret = _phe()
    values = min(values, FEW)
    watch, reals = Stopwatch(values), gradients(values).tolist()
    encrypt, numbers = watch.time(lambda: [public.encrypt(value) for value in reals])
    aggregate, total = watch.time(lambda: [number + number + number for number in numbers])
    opening, _ = watch.time(lambda: [secret.decrypt(number) for number in total])
    size = 2 * KEY_BITS / 8
    return Sample(values, encrypt, 0.0, aggregate, 0.0, opening, size)


_PEERS: dict[str, tuple[str, Measure]] = {
    "TenSEAL CKKS": ("tenseal", tenseal),
    "HEU OU": ("heu", heu_okamoto_uchiyama),
    "HEU ZPaillier": ("heu", heu_paillier),
    "pypaillier": ("paillier", pypaillier),
    "python-paillier": ("phe", python_paillier),
}


def installed() -> dict[str, Measure]:
    """The peers that are there."""
    return {name: peer for name, (module, peer) in _PEERS.items() if find_spec(module)}
