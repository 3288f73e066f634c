"""Replace every random choice of dtl by a published one, so that its files can be made anew.

The i-th call of a function of `secrets` for n bytes in a command gives SHAKE-256 of a text that
names the command, the function, n and i. The clock stands still. HPKE takes its randomness
inside `cryptography`, so what it wrapped once is kept in a file and treated as an input.
"""

import base64
import contextlib
import hashlib
import io
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

from dtl.cli import app
from dtl.core.crypto import primitives
from dtl.core.roles import key_center
from tests.helpers import PRIMES

EPOCH = "1700000000"  # when all of it was made
_hpke_wrap = primitives.hpke_wrap
NANOSECONDS = int(EPOCH) * 10**9
DRAWN = {
    ("encrypt-grads", 64): "system",
    ("encrypt-grads", 32): "rounding",
    ("release-model", 64): "system",
    ("release-model", 32): "content_key",
}
"""What uploads and releases take from the operating system, by the number of bytes."""


class Published:
    """Runs commands in a folder with published randomness.

    `inputs` are, by output, the bytes that an upload or a release proof was derived from.
    """

    def __init__(self, folder: Path, title: str, wrapped: dict[str, str]) -> None:
        self.folder, self.title, self.wrapped = folder, title, wrapped
        self.used: dict[str, str] = {}
        self.inputs: dict[str, dict[str, Any]] = {}

    def __call__(self, *command: str, code: int = 0) -> None:
        with self._published(command), contextlib.chdir(self.folder):
            errors = io.StringIO()
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                found = app.run(list(command))
            if found != code:
                raise SystemExit(f"dtl {' '.join(command)}: {found}\n{errors.getvalue()}")

    def _note(self, command: Sequence[str], name: str, drawn: str) -> None:
        known = self.inputs.setdefault(command[command.index("-o") + 1], {})
        assert name not in known
        known |= {name: drawn, "time": NANOSECONDS}

    def wrap(self, public: bytes, message: bytes, info: bytes) -> bytes:
        """As `primitives.hpke_wrap`; what was wrapped once is taken from the file."""
        name = primitives.hash_fields("wrapped", public, message, info).hex()[:32]
        found = self.wrapped.get(name)
        made = base64.b64decode(found) if found else _hpke_wrap(public, message, info)
        self.used[name] = base64.b64encode(made).decode()
        return made

    @contextlib.contextmanager
    def _published(self, command: Sequence[str]) -> Iterator[None]:
        calls: Counter[tuple[str, int]] = Counter()

        def draw(function: str, count: int) -> bytes:
            call = calls[function, count]
            calls[function, count] += 1
            words = [self.title, *command, function, str(count), str(call)]
            drawn = hashlib.shake_256(json.dumps(words).encode()).digest(count)
            name = DRAWN.get((command[0], count))
            if function == "token_bytes" and name:
                self._note(command, name, drawn.hex())
            return drawn

        def below(limit: int) -> int:
            size = limit.bit_length() // 8 + 16
            return int.from_bytes(draw("randbelow", size), "little") % limit

        def bits(count: int) -> int:
            return int.from_bytes(draw("randbits", -(-count // 8)), "little") >> -count % 8

        replaced = {
            "token_bytes": lambda count: draw("token_bytes", count),
            "token_hex": lambda count: draw("token_hex", count).hex(),
            "randbelow": below,
            "randbits": bits,
        }
        mine = ("DTL_JOB", "DTL_KEY", "DTL_PASSPHRASE_FILE")
        clean = {name: text for name, text in os.environ.items() if name not in mine}
        clean["SOURCE_DATE_EPOCH"] = EPOCH
        with contextlib.ExitStack() as stack:
            for name, function in replaced.items():
                stack.enter_context(patch.object(secrets, name, function))
            stack.enter_context(patch.object(time, "time_ns", lambda: NANOSECONDS))
            stack.enter_context(patch.object(primitives, "hpke_wrap", self.wrap))
            stack.enter_context(patch.object(key_center, "_safe_primes", _fixed_primes))
            stack.enter_context(patch.dict(os.environ, clean, clear=True))
            yield


def _fixed_primes(size: int, work: object) -> Iterator[int]:
    return cycle(PRIMES[size])
