"""What people see: help that can be pasted, errors that say what a file is, widths of zero."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from dtl.cli import app
from dtl.core.crypto import primitives
from dtl.core.errors import VerificationError
from tests.helpers import Cli, Round, random_arrays

NewRound = Callable[..., Round]
COMMANDS = {command.name: command for command in app.app.registered_commands}


@pytest.mark.parametrize("columns", ["0", "00", "", "40"])
def test_a_terminal_of_no_known_width_shows_everything(columns: str, new_round: NewRound) -> None:
    round_ = new_round()

    def run(*words: object) -> "subprocess.CompletedProcess[str]":
        code = "from dtl.cli.app import main; main()"
        command = [sys.executable, "-c", code, *map(str, words)]
        environment = os.environ | {"COLUMNS": columns}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert "signature" in run("inspect", round_.keys / "job.json").stdout
    assert "dtl: error: nowhere" in run("inspect", "nowhere").stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_can_be_pasted_at_80_columns(
    name: str, dtl: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, _, shown = dtl(name, "--help").out.partition("Example:")
    lines = [line.strip() for line in shown.splitlines() if line.strip()]
    assert not any("#" in line and line.endswith("\\") for line in lines), "a cut comment"
    pasted = "\n".join(lines).replace("\\\n", "")
    callback = COMMANDS[name].callback
    assert callback is not None
    parts = sys.modules[callback.__module__].EXAMPLE.split("\n\n")[1:]
    assert [shlex.split(line) for line in pasted.splitlines()] == [shlex.split(p) for p in parts]
    assert any(line.startswith(f"dtl {name} ") for line in pasted.splitlines())


def test_typer_knows_all_these_commands() -> None:
    command = typer.main.get_command(app.app)
    assert set(COMMANDS) == set(command.commands)  # type: ignore[attr-defined]


def test_a_passphrase_that_is_not_used_is_told(new_round: NewRound) -> None:
    round_ = new_round()
    passphrase = round_.folder / "passphrase"
    passphrase.write_text("correct horse battery staple\n")
    gradients = round_.save("g.safetensors", random_arrays(1))
    for name, given in (("alice", ("--passphrase-file", passphrase)), ("bob", ())):
        out = ("--key", round_.key(name), "-o", round_.folder / name)
        told = round_.dtl("encrypt-grads", gradients, "--round", 1, *out, *given).err
        assert (f"{name}.key: not boxed" in told) == bool(given)


def test_a_wrong_file_in_place_of_a_key_is_named(new_round: NewRound) -> None:
    round_ = new_round()
    gradients = round_.save("g.safetensors", random_arrays(1))
    np.savez(round_.folder / "g.npz", x=np.ones(3, np.float32))
    (round_.folder / "empty").write_bytes(b"")
    upload = round_.upload("alice", random_arrays(1))
    for name, found in (
        (gradients.name, "found a file of tensors"),
        (upload.name, "found a file of tensors"),
        ("g.npz", "found an .npz or .zip file"),
        ("empty", "found an empty file"),
    ):
        key = ("--key", round_.folder / name, "--job", round_.keys / "job.json")
        out = ("--round", 1, "-o", round_.folder / "out.upload")
        assert found in round_.dtl("encrypt-grads", gradients, *key, *out, code=3).err


def test_a_job_has_one_name_wherever_it_is_shown(new_round: NewRound) -> None:
    round_ = new_round()
    job = round_.keys / "job.json"
    upload = round_.upload("alice", random_arrays(1))
    shown = [round_.dtl("inspect", path, "--json").json for path in (job, upload)]
    assert [found["job"] for found in shown] == [round_.job.digest] * 2
    assert round_.job.id not in str(shown)
    signed = round_.dtl("inspect", upload, "--job", job)
    assert f"of job {round_.job.digest[:8]}" in signed.out
    assert f"job {round_.job.digest[:8]} is insecure" in signed.err


FIELD = 2**255 - 19
D = -121665 * pow(121666, -1, FIELD) % FIELD
Point = tuple[int, int]


def add(one: Point, other: Point) -> Point:
    """Addition on Ed25519, as RFC 8032, section 5.1, has it."""
    (x, y), (u, v) = one, other
    product = D * x * y * u * v
    return (
        (x * v + u * y) * pow(1 + product, -1, FIELD) % FIELD,
        (y * v + x * u) * pow(1 - product, -1, FIELD) % FIELD,
    )


def points_of_small_order() -> list[Point]:
    """All eight, from one of order eight: 8 P is neutral, and 4 P is not."""
    y = int.from_bytes(
        bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"), "little"
    )
    square = (y * y - 1) * pow(D * y * y + 1, -1, FIELD) % FIELD
    x = pow(square, (FIELD + 3) // 8, FIELD)
    if x * x % FIELD != square:
        x = x * pow(2, (FIELD - 1) // 4, FIELD) % FIELD
    assert x * x % FIELD == square
    found = [(0, 1)]
    while len(found) < 8:
        found.append(add(found[-1], (x, y)))
    assert add(found[-1], (x, y)) == (0, 1)
    assert len(set(found)) == 8
    return found


def test_nobody_signs_with_a_key_of_small_order_or_of_a_second_spelling() -> None:
    """Under such a key the signature (R, 0) holds for every eighth message, R of small order."""
    encodings = []
    for x, y in points_of_small_order():
        encodings.append((y | (x & 1) << 255).to_bytes(32, "little"))
        if y < 19:
            encodings.append((y + FIELD | (x & 1) << 255).to_bytes(32, "little"))
    taken = 0
    for public in encodings:
        for point in encodings[:1]:
            signature = point + bytes(32)
            for number in range(30):
                digest = number.to_bytes(64, "little")
                message = primitives.fields("dtl/v2/upload", digest)
                try:
                    Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
                    taken += 1
                except Exception:  # noqa: S110
                    pass
                with pytest.raises(VerificationError):
                    primitives.verify_signature(public, "upload", digest, signature, "x")
    assert taken, "OpenSSL takes them, and this test would show nothing else"
