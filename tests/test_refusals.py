"""What is refused, with which exit code; nothing is ever left behind under the output's name."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dtl.core.ciphers import CIPHERS
from dtl.core.crypto import primitives
from dtl.core.files import canonical_json
from dtl.core.files.container import Container
from tests.forging import resign
from tests.helpers import THREE, Arrays, Cli, Round, random_arrays

NewRound = Callable[..., Round]


@pytest.fixture
def round_(new_round: NewRound) -> Round:
    return new_round()


@pytest.fixture(scope="module")
def made() -> list[Round]:
    """The round of `full`, once it was made."""
    return []


@pytest.fixture
def full(
    made: list[Round],
    dtl: Cli,
    fixed_primes: None,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Round:
    """A round up to the release: alice.upload.., result.enc, result.release; a copy each time."""
    if not made:
        round_ = Round(dtl, tmp_path_factory.mktemp("full"), THREE, "--no-masks")
        round_.save("w0.safetensors", random_arrays(9, 0.5))
        given = {p: random_arrays(i) for i, p in enumerate(round_.names)}
        uploads = round_.uploads(given, "--model", round_.folder / "w0.safetensors")
        round_.release(round_.aggregate(uploads, "--initial", round_.folder / "w0.safetensors"))
        made.append(round_)
    copy = made[0].copied(tmp_path)
    copy.dtl = dtl
    return copy


def upload_paths(round_: Round) -> list[Path]:
    return [round_.folder / f"{name}.upload" for name in round_.names]


def flips(path: Path) -> Iterator[tuple[int, bytes]]:
    """Files with one byte flipped: every part of the container, densely in its header."""
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    places = {*range(0, header, 37), *range(8), header - 1, header, len(data) - 1}
    places |= {data.index(b"signature") + i for i in (0, 5, 12, 60)}
    places |= set(np.random.default_rng(0).integers(header, len(data), 10).tolist())
    for place in sorted(places):
        changed = bytearray(data)
        changed[place] ^= (0x01, 0x20)[place % 2]  # 0x20 turns the case of a letter
        yield place, bytes(changed)


def test_a_flipped_byte_in_an_upload(full: Round) -> None:
    victim, *others = upload_paths(full)
    original = victim.read_bytes()
    bad, out = full.folder / "bad.upload", full.folder / "out.enc"
    for _, changed in flips(victim):
        assert changed != original
        bad.write_bytes(changed)
        arguments = ("aggregate", bad, *others, "--key", full.key("server"), "-o", out)
        code = run_code(full, arguments)
        assert code in (3, 4)
        assert not out.exists()


def test_a_flipped_byte_in_a_model(full: Round) -> None:
    bad, out = full.folder / "bad.enc", full.folder / "out.release"
    for _, changed in flips(full.folder / "result.enc"):
        bad.write_bytes(changed)
        arguments = ("release-model", bad, "--key", full.key("server"), "-o", out)
        assert run_code(full, arguments) in (3, 4)
        assert not out.exists()


def test_a_flipped_byte_in_a_release(full: Round) -> None:
    bad, out = full.folder / "bad.release", full.folder / "out.safetensors"
    for _, changed in flips(full.folder / "result.release"):
        bad.write_bytes(changed)
        arguments = ("open-model", bad, "--key", full.key("alice"), "-o", out)
        assert run_code(full, arguments) in (3, 4)
        assert not out.exists()


def run_code(round_: Round, arguments: tuple[object, ...]) -> int:
    from dtl.cli import app

    return app.run([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"round": 2}, 3),
        ({"base": "0" * 128}, 3),
        ({"base": None}, 3),
        ({"roster": "0" * 128}, 3),
        ({"job": "0" * 128}, 3),
        ({"masked": True}, 3),
        ({"signer": "bob"}, 4),
        ({"signer": "mallory"}, 3),
        ({"kind": "model"}, 3),
        ({"format": "dtl/v1"}, 3),
        ({"format": "dtl/v3"}, 3),
        ({"opened_tag": None}, 3),
        ({"opened_tag": "0" * 31}, 3),
        ({"values": 336}, 3),
        ({"layout": [{"name": "x", "shape": [335], "dtype": "F32"}]}, 3),
        ({"extra": 1}, 3),
        ({"created": "now"}, 3),
        ({"round": 0}, 3),
        ({"round": True}, 3),
    ],
)
def test_a_validly_signed_upload_of_something_else(
    full: Round, changes: dict[str, object], code: int
) -> None:
    alice, *others = upload_paths(full)
    bad = resign(alice, changes, full.opened_key("alice").secrets.sign, full.folder / "bad")
    full.aggregate([*others, bad], out="out.enc", code=code)
    initial = ("--initial", full.folder / "w0.safetensors")
    full.aggregate([*others, bad], *initial, out="out.enc", code=code)


@pytest.mark.parametrize("value", ["zero", "modulus", "factor"])
@pytest.mark.parametrize("column", [0, 2])
def test_a_signed_upload_with_a_bad_residue(full: Round, value: str, column: int) -> None:
    alice, *others = upload_paths(full)
    n = full.job.N
    p = full.opened_key("kgc").trapdoor.p
    modulus = n * n if column else n
    number = {"zero": 0, "modulus": modulus, "factor": 5 * p}[value]
    with Container(alice) as container:
        start = container.tensors["residues"].start + 128 * column
    data = bytearray(alice.read_bytes())
    data[start : start + 128] = number.to_bytes(128, "little")
    (full.folder / "raw").write_bytes(data)
    bad = resign(full.folder / "raw", {}, full.opened_key("alice").secrets.sign, full.folder / "b")
    full.aggregate([bad, *others], "--initial", full.folder / "w0.safetensors", out="x", code=3)


def test_an_upload_given_twice_and_two_of_one_participant(full: Round) -> None:
    alice, bob, carol = upload_paths(full)
    full.aggregate([alice, bob, carol, alice], out="out.enc", code=5)
    # A participant with a copy of its ledger can make a second one; the server refuses it.
    ledger = full.keys / "alice.ledger"
    ledger.write_bytes(ledger.read_bytes().split(b"\n")[0] + b"\n")
    w0 = full.folder / "w0.safetensors"
    second = full.upload("alice", random_arrays(5), "--model", w0, out="second")
    full.aggregate([alice, bob, carol, second], out="out.enc", code=5)
    # ... nor in place of the one that was accepted before, in another run.
    full.aggregate([second, bob, carol], out="out.enc", code=5)


def test_skip_invalid_goes_on_and_lists_what_it_refused(
    new_round: NewRound, dtl: Cli, tmp_path: Path
) -> None:
    round_ = new_round(("a", "b", "c", "d"))
    uploads = round_.uploads({p: random_arrays(i) for i, p in enumerate(round_.names)})
    damaged = bytearray(uploads[1].read_bytes())
    damaged[-1] ^= 1
    uploads[1].write_bytes(damaged)
    round_.aggregate(uploads, code=4)
    out = tmp_path / "result.enc"
    key = round_.key("server")
    report = dtl("aggregate", *uploads, "--skip-invalid", "--key", key, "-o", out, "--json").json
    assert list(report["refused"]) == [str(uploads[1])]
    assert report["contributors"] == ["a", "c", "d"]
    assert report["missing"] == ["b"]
    (tmp_path / "more.enc").touch()
    round_.aggregate([*uploads, tmp_path / "nowhere"], "--skip-invalid", out="o.enc", code=2)


def test_uploads_of_different_rounds_bases_or_layouts(round_: Round) -> None:
    one = [round_.upload(p, random_arrays(1)) for p in ("alice", "bob")]
    later = round_.upload("carol", random_arrays(1), "--round", 2)
    round_.aggregate([*one, later], code=3)
    other = round_.upload("carol", {"x": np.ones(335, np.float32)}, out="other")
    round_.aggregate([*one, other], code=3)


def test_an_upload_of_another_job(new_round: NewRound) -> None:
    ours, theirs = new_round(folder="ours"), new_round(folder="theirs")
    uploads = [ours.upload(p, random_arrays(1)) for p in ours.names]
    foreign = theirs.upload("alice", random_arrays(1))
    ours.aggregate([foreign, *uploads[1:]], code=3)
    release = ours.release(ours.aggregate(uploads))
    code = run_code(ours, ("open-model", release, "--key", theirs.key("alice"), "-o", "x.npz"))
    assert code in (3, 4, 5)
    job = ("--job", ours.keys / "job.json")
    ours.dtl("open-model", release, "--key", theirs.key("alice"), *job, "-o", "x.npz", code=4)


def test_a_model_is_needed_where_uploads_name_one_and_must_be_the_same(full: Round) -> None:
    other = full.save("other.safetensors", random_arrays(10, 0.5))
    full.aggregate(upload_paths(full), "--initial", other, out="out.enc", code=3)
    model = full.folder / "result.enc"
    full.aggregate(upload_paths(full), "--model", model, out="out.enc", code=3)
    both = ("--initial", other, "--model", model)
    full.aggregate(upload_paths(full), *both, out="out.enc", code=2)


def test_a_sum_is_not_a_model(round_: Round) -> None:
    uploads = [round_.upload(p, random_arrays(1)) for p in round_.names]
    result = round_.aggregate(uploads)
    round_.aggregate(uploads, "--model", result, out="out.enc", code=3)


def test_too_few_contributors(round_: Round) -> None:
    uploads = [round_.upload(p, random_arrays(1)) for p in ("alice", "bob")]
    command = ("aggregate", *uploads, "--key", round_.key("server"), "-o", round_.folder / "x")
    error = round_.dtl(*command, code=6).err
    assert "missing: carol" in error
    assert "wait for the missing uploads; or the round is void" in error


def test_fairness(new_round: NewRound) -> None:
    round_ = new_round(("alice", "bob", "carol", "dave"))
    uploads = [round_.upload(p, random_arrays(1)) for p in ("alice", "bob", "carol")]
    result = round_.aggregate(uploads)
    round_.release(result, "--to", "alice,dave", code=5)
    for option in ("--to", "--admit"):  # nobody of that name: a slip
        round_.release(result, option, "alice,zoe", code=2)
    release = round_.release(result)
    round_.open(release, "dave", code=5)
    only = round_.release(result, "--to", "alice", out="only")
    round_.open(only, "bob", code=5)
    round_.open(only, "alice")


def test_a_second_result_is_not_released(new_round: NewRound) -> None:
    round_ = new_round(("alice", "bob", "carol", "dave"))
    w0 = round_.save("w0.safetensors", random_arrays(9))
    uploads = [round_.upload(p, random_arrays(1), "--model", w0) for p in round_.names]
    first = round_.aggregate(uploads[:3], "--initial", w0, out="1")
    second = round_.aggregate(uploads, "--initial", w0, out="2")
    third = round_.aggregate(uploads, out="3")
    release = round_.release(first, out="r1")
    round_.release(second, out="r2", code=5)
    round_.release(third, out="r3", code=5)
    round_.release(first, out="again")
    # Even a server that lost its ledger's memory is caught by the participants'.
    round_.open(release, "alice")
    ledger = round_.keys / "server.ledger"
    ledger.write_bytes(ledger.read_bytes().split(b"\n")[0] + b"\n")
    other = round_.release(second, out="r2")
    round_.open(other, "alice", "--force", code=4)


def test_a_participant_checks_that_its_upload_is_in(new_round: NewRound) -> None:
    four = ("alice", "bob", "carol", "dave")
    round_ = new_round(four, folder="sums")
    first = [round_.upload(p, random_arrays(1)) for p in round_.names]
    release = round_.release(round_.aggregate(first[1:]))
    round_.open(release, "bob")
    round_.open(release, "alice", "--force", code=5)  # no grant at all
    round_ = new_round(four, folder="models")
    w0 = round_.save("w0.safetensors", random_arrays(9))
    uploads = round_.uploads({p: random_arrays(1) for p in four}, "--model", w0)
    model = round_.aggregate(uploads, "--initial", w0, out="m1")
    release = round_.release(model, out="r1")
    w1 = {p: round_.open(release, p, out=f"{p}1.safetensors") for p in four}
    later = [round_.upload(p, random_arrays(2), "--model", w1[p], out=f"{p}2") for p in four]
    left_out = round_.aggregate(later[1:], "--model", model, out="m2")
    release = round_.release(left_out, out="r2")
    w2 = {p: round_.open(release, p, out=f"{p}2.safetensors") for p in four[1:]}
    opening = ("open-model", release, "--key", round_.key("alice"), "-o", round_.folder / "x.npz")
    ledger = (round_.keys / "alice.ledger").read_bytes()
    late = round_.dtl(*opening, code=4).err
    assert "the upload that alice made for round 2 is not in it" in late
    assert "declared missing in round 2: it came too late" in late
    assert (round_.keys / "alice.ledger").read_bytes() == ledger
    last = [round_.upload(p, random_arrays(2), "--model", w2[p], out=f"{p}3") for p in four[1:]]
    model = round_.aggregate(last, "--model", left_out, out="m3")
    # In a round in which alice sent nothing, nothing of hers can be missing.
    w3 = round_.open(round_.release(model, out="r3"), "alice", out="w3.safetensors")
    round_.upload("alice", random_arrays(2), "--model", w3, out="alice4")


def test_a_second_upload(round_: Round) -> None:
    round_.upload("alice", random_arrays(1))
    round_.upload("alice", random_arrays(1), out="second", code=5)
    round_.upload("alice", random_arrays(2), "--round", 2, out="next")


def test_a_second_upload_on_one_base(round_: Round) -> None:
    w0 = round_.save("w0.safetensors", random_arrays(9))
    round_.upload("alice", random_arrays(1), "--model", w0)
    again = ("--model", w0, "--round", 3)
    gradients = round_.folder / "alice.grads.safetensors"
    command = ("encrypt-grads", gradients, "--key", round_.key("alice"), *again)
    out = ("-o", round_.folder / "second")
    refused = round_.dtl(*command, *out, code=5).err
    assert "alice.ledger: expected no upload on this base yet, found the one for round 1" in refused
    warned = round_.dtl(*command, *out, "--accept-differencing").err
    assert "round 3 on the model of round 0: right only if the rounds between were void" in warned
    bob = ("encrypt-grads", gradients, "--key", round_.key("bob"), "-o", round_.folder / "bob")
    assert "right only if" not in round_.dtl(*bob, "--model", w0).err


@pytest.mark.parametrize(("bad", "index"), [(np.nan, "[2, 1]"), (np.inf, "[2, 1]")])
@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_nan_and_infinity(round_: Round, bad: float, index: str, suffix: str) -> None:
    arrays = {"first": np.ones(3, np.float32), "layer.weight": np.ones((4, 2), np.float32)}
    arrays["layer.weight"][2, 1] = bad
    path = round_.folder / f"g.{suffix}"
    if suffix == "npz":
        np.savez(path, **arrays)  # type: ignore[arg-type]
    else:
        path = round_.save("g.safetensors", arrays)
    out = round_.folder / "u"
    options = ("--round", 1, "--key", round_.key("alice"), "-o", out)
    result = round_.dtl("encrypt-grads", path, *options, code=7)
    assert "'layer.weight'" in result.err
    assert index in result.err
    assert not out.exists()
    round_.upload("alice", random_arrays(1))  # the ledger was not touched


def test_initial_weights_without_headroom(round_: Round) -> None:
    w0 = round_.save("w0.safetensors", {"x": np.full(335, 64.5, np.float32)})
    uploads = [round_.upload(p, {"x": np.ones(335)}, "--model", w0) for p in round_.names]
    round_.aggregate(uploads, "--initial", w0, code=7)


@pytest.mark.parametrize("cipher", CIPHERS)
def test_a_model_without_headroom_does_not_open(new_round: NewRound, cipher: str) -> None:
    round_ = new_round(THREE, "--cipher", cipher)
    plain = round_.save("w0.safetensors", {"x": np.full(5, 63.9, np.float32)})
    given = {p: {"x": np.full(5, -1.0, np.float32)} for p in round_.names}
    uploads = round_.uploads(given, "--model", plain)
    release = round_.release(round_.aggregate(uploads, "--initial", plain))
    round_.open(release, "alice", code=4)


GARBAGE = {
    "empty": b"",
    "short": b"\x10",
    "text": b"hello, this is not a safetensors file at all",
    "huge header": (1 << 62).to_bytes(8, "little") + b"{}" * 50,
    "header over the limit": ((16 << 20) + 8).to_bytes(8, "little") + b" " * 4096,
    "no json": (16).to_bytes(8, "little") + b"x" * 16,
    "deep json": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "array": (2).to_bytes(8, "little") + b"[]",
    "empty object": (2).to_bytes(8, "little") + b"{}",
    "broken zip": b"PK\x03\x04" + b"\0" * 60,
    "json": b"{}",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_for_every_input(full: Round, name: str) -> None:
    bad = full.folder / "garbage"
    bad.write_bytes(GARBAGE[name])
    uploads, out = upload_paths(full), full.folder / "out.npz"
    server, alice = full.key("server"), full.key("alice")
    for arguments in (
        ("aggregate", bad, *uploads, "--key", server),
        ("aggregate", *uploads, "--model", bad, "--key", server),
        ("aggregate", *uploads, "--initial", bad, "--key", server),
        ("release-model", bad, "--key", server),
        ("open-model", bad, "--key", alice),
        ("encrypt-grads", bad, "--round", 5, "--key", alice),
        ("encrypt-grads", full.folder / "w0.safetensors", "--model", bad, "--key", alice),
        ("open-model", full.folder / "result.release", "--key", bad),
        ("open-model", full.folder / "result.release", "--key", alice, "--job", bad),
        ("compute-grads", "--model", bad, "--data", bad),
    ):
        full.dtl(*arguments, "-o", out, code=3)
        assert not out.exists()
    for arguments in (("inspect", bad), ("evaluate", "--model", bad, "--data", bad)):
        full.dtl(*arguments, code=3)


@pytest.mark.parametrize("share", [0.0001, 0.3, 0.9, 0.9999])
def test_truncated_files(full: Round, share: float) -> None:
    bad = full.folder / "bad"
    for name, arguments in (
        ("alice.upload", ("aggregate", bad, "--key", full.key("server"))),
        ("result.enc", ("release-model", bad, "--key", full.key("server"))),
        ("result.release", ("open-model", bad, "--key", full.key("alice"))),
        ("w0.safetensors", ("encrypt-grads", bad, "--round", 4, "--key", full.key("alice"))),
    ):
        data = (full.folder / name).read_bytes()
        bad.write_bytes(data[: int(len(data) * share)])
        full.dtl(*arguments, "-o", full.folder / "out.npz", code=3)
        bad.write_bytes(data + b"\0")
        full.dtl(*arguments, "-o", full.folder / "out.npz", code=3)


def test_a_job_file_edited_by_hand(full: Round) -> None:
    path = full.keys / "job.json"
    original = path.read_bytes()
    plain = json.loads(original)
    release, out = full.folder / "result.release", full.folder / "out.npz"
    edits: dict[str, object] = {
        "min_contributors": 2,
        "slot_bits": 25,
        "masks": True,
        "id": "0" * 32,
        "security": "128",
        "participants": plain["participants"][:2],
        "server": plain["kgc"],
    }
    for field, value in edits.items():
        path.write_bytes(canonical_json.dumps(plain | {field: value}))
        code = run_code(full, ("open-model", release, "--key", full.key("alice"), "-o", out))
        assert code in (3, 4), field
    for place in range(0, len(original), 211):
        changed = bytearray(original)
        changed[place] ^= 1
        path.write_bytes(changed)
        code = run_code(full, ("open-model", release, "--key", full.key("alice"), "-o", out))
        assert code in (3, 4), place
    path.write_bytes(json.dumps(plain, indent=1).encode())
    full.dtl("open-model", release, "--key", full.key("alice"), "-o", out, code=3)
    path.unlink()
    full.dtl("open-model", release, "--key", full.key("alice"), "-o", out, code=2)
    assert not out.exists()


def test_a_job_signed_by_another_center(new_round: NewRound) -> None:
    ours, theirs = new_round(folder="ours"), new_round(folder="theirs")
    gradients = ours.save("g.safetensors", random_arrays(1))
    job = ("--job", theirs.keys / "job.json")
    key = ("--key", ours.key("alice"), "--round", 1, "-o", "u")
    ours.dtl("encrypt-grads", gradients, *job, *key, code=4)


def test_keys_of_the_wrong_party(full: Round) -> None:
    out = full.folder / "out.npz"
    gradients = full.folder / "w0.safetensors"
    uploads = upload_paths(full)
    for arguments in (
        ("encrypt-grads", gradients, "--round", 9, "--key", full.key("server")),
        ("open-model", full.folder / "result.release", "--key", full.key("kgc")),
        ("aggregate", *uploads, "--key", full.key("alice")),
        ("release-model", full.folder / "result.enc", "--key", full.key("alice")),
    ):
        full.dtl(*arguments, "-o", out, code=5)


def test_swapped_secrets_are_noticed(full: Round) -> None:
    alice, bob = (json.loads(full.key(name).read_bytes()) for name in ("alice", "bob"))
    for field in ("sign", "hpke", "name"):
        mixed = full.keys / "mixed.key"
        mixed.write_bytes(canonical_json.dumps(alice | {field: bob[field]}))
        mixed.chmod(0o600)
        out = full.folder / "out.npz"
        full.dtl("open-model", full.folder / "result.release", "--key", mixed, "-o", out, code=4)


def test_passphrases(new_round: NewRound, dtl: Cli, tmp_path: Path) -> None:
    right, wrong, empty = (tmp_path / name for name in ("right", "wrong", "empty"))
    right.write_text("correct horse\n")
    wrong.write_text("incorrect horse\n")
    empty.write_text("\n")
    round_ = new_round(("alice", "bob"), "--passphrase-file", right, "--min-contributors", 2)
    key = round_.key("alice")
    text = key.read_text()
    assert "participant_seed" not in text
    gradients = round_.save("g.safetensors", random_arrays(1))
    common = ("encrypt-grads", gradients, "--round", 1, "--key", key, "-o", tmp_path / "u")
    dtl(*common, "--passphrase-file", wrong, code=5)
    dtl(*common, "--passphrase-file", empty, code=2)
    dtl(*common, "--passphrase-file", tmp_path / "none", code=2)
    assert f"{key}: the key is boxed" in dtl(*common, code=2).err  # no terminal to ask on
    dtl(*common, "--passphrase-file", right)
    box = json.loads(text)
    box["box"]["sealed"] = primitives.encode_base64(bytes(200))
    other = round_.keys / "other.key"
    other.write_bytes(canonical_json.dumps(box))
    other.chmod(0o600)
    dtl(
        "open-model",
        tmp_path / "u",
        "--key",
        other,
        "--passphrase-file",
        right,
        "-o",
        "x.npz",
        code=4,
    )


@pytest.mark.parametrize("typed", [b"correct horse", "pferd ß".encode("latin-1")])
def test_a_passphrase_is_the_same_bytes_from_a_file_and_a_terminal(
    typed: bytes, new_round: NewRound, tmp_path: Path
) -> None:
    file, out = tmp_path / "passphrase", tmp_path / "u"
    file.write_bytes(typed)
    round_ = new_round(("alice", "bob"), "--passphrase-file", file, "--min-contributors", 2)
    gradients = round_.save("g.safetensors", random_arrays(1))
    words = ("encrypt-grads", gradients, "--round", 1, "--key", round_.key("alice"), "-o", out)
    command = [sys.executable, "-c", "from dtl.cli.app import main; main()", *map(str, words)]
    master, slave = pty.openpty()
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=subprocess.PIPE) as process:
        os.close(slave)
        assert process.stderr is not None
        asked = b""
        while not asked.endswith(b"dtl: passphrase: ") and (more := process.stderr.read(1)):
            asked += more
        os.write(master, typed + b"\n")
        said = process.stderr.read()
        shown = os.read(master, 1 << 16)
    os.close(master)
    assert process.returncode == 0, asked + said
    assert typed not in shown
    assert out.exists()


def test_ledgers_are_needed_and_checked(round_: Round) -> None:
    round_.upload("alice", random_arrays(1))
    round_.upload("alice", random_arrays(1), "--round", 2, out="2")
    ledger = round_.keys / "alice.ledger"
    original = ledger.read_bytes()
    lines = original.splitlines(keepends=True)
    assert len(lines) == 3
    for changed in (
        lines[0] + lines[2],
        lines[1] + lines[2],
        lines[0] + lines[2] + lines[1],
        b"",
        original.replace(b'"round":1', b'"round":7'),
        (round_.keys / "bob.ledger").read_bytes(),
    ):
        ledger.write_bytes(changed)
        round_.upload("alice", random_arrays(1), "--round", 3, out="3", code=4)
        assert ledger.read_bytes() == changed
    ledger.unlink()
    round_.upload("alice", random_arrays(1), "--round", 3, out="3", code=5)
    assert not ledger.exists()
    ledger.write_bytes(original + b'{"torn')  # a crash while a line was written
    round_.upload("alice", random_arrays(1), "--round", 3, out="3")
    assert ledger.read_bytes().startswith(original + b'{"base"')
    round_.upload("alice", random_arrays(1), "--round", 3, out="4", code=5)


def test_outputs_are_not_overwritten_without_force(full: Round, dtl: Cli) -> None:
    release = full.folder / "result.release"
    out = full.folder / "precious.npz"
    out.write_text("precious")
    dtl("open-model", release, "--key", full.key("alice"), "-o", out, code=2)
    assert out.read_text() == "precious"
    dtl("open-model", release, "--key", full.key("bob"), "-o", out, "--force")
    assert out.read_bytes()[:2] == b"PK"
    link = full.folder / "link.npz"
    link.symlink_to(full.folder / "elsewhere.npz")
    for force in ((), ("--force",)):
        dtl("open-model", release, "--key", full.key("alice"), "-o", link, *force, code=2)
    assert not (full.folder / "elsewhere.npz").exists()
    full.dtl("keygen", full.keys, "--participants", "a,b,c", "--no-masks", code=2)
    out = full.folder / "none" / "out.npz"
    dtl("open-model", release, "--key", full.key("alice"), "-o", out, code=2)
    dtl("open-model", release, "--key", full.key("alice"), "-o", full.folder / "x.txt", code=2)


def test_no_command_overwrites_its_own_input(full: Round, dtl: Cli) -> None:
    uploads, server = upload_paths(full), ("--key", full.key("server"))
    spelled = full.folder / "job" / ".." / "carol.upload"
    master = ("--key", full.key("kgc"), "--plaintext", uploads[0])
    model = full.save("w0.safetensors", random_arrays(1))
    step = ("--model", model, "--state", full.save("s.npz", random_arrays(1)), "-o", "x.npz")
    before = {path: path.read_bytes() for path in full.folder.iterdir() if path.is_file()}
    for command in (
        ("aggregate", *uploads, *server, "-o", uploads[0]),
        ("aggregate", *uploads, *server, "-o", spelled),
        ("compute-grads", "--model", model, "--data", "none.npz", "-o", model),
        ("audit", *uploads, *master),
        ("apply-sum", "sum.npz", *step, "--state-out", model),
        ("apply-sum", "sum.npz", *step, "--state-out", full.folder / "s.npz"),
    ):
        for force in ((), ("--force",)):
            assert "also an input" in dtl(*command, *force, code=2).err
    assert before == {path: path.read_bytes() for path in full.folder.iterdir() if path.is_file()}


MISTAKES = [  # a command in the folder of a round, its exit code, and what is said
    ("evaluate --model result.enc --data x", 3, "found an encrypted model", "release-model"),
    ("evaluate --model sum.enc --data x", 3, "found an encrypted sum", "open-model"),
    ("compute-grads --model result.enc --data x -o y", 3, "found an encrypted model", "release-"),
    ("compute-grads --model result.release --data x -o y", 3, "found a release", "open-model"),
    ("apply-sum sum.enc --model w0.safetensors -o y.npz", 3, "found an encrypted sum", "open-"),
    ("encrypt-grads alice.upload --key job/bob.key -o y", 3, "found an upload", "aggregate takes"),
    ("encrypt-grads x.npy --key job/bob.key -o y", 3, "found .npy", "numpy.savez"),
    ("encrypt-grads x.txt --key job/bob.key -o y", 3, "expected .safetensors or .npz", "else"),
    ("aggregate w0.safetensors --key job/server.key -o y", 3, "plain tensors", "encrypt-grads"),
    (
        "aggregate alice.upload --key job/server.key --model w0.safetensors -o y",
        *(3, "found plain tensors", "--initial"),
    ),
    ("open-model result.enc --key job/bob.key -o y.npz", 3, "expected release, found model", "re"),
    ("encrypt-grads x.txt --key job/job.json -o y", 3, "key file, found a job file", "NAME.key"),
    ("verify result.enc", 2, "job.json: ", "hint: --job PATH"),
    ("encrypt-grads x.txt --key moved.key -o y", 2, "job.json: ", "hint: --job PATH"),
    ("inspect other.json", 3, "other.json: not a file that dtl inspects", "found other JSON"),
    ("keygen j --participants a,b", 2, "expected 2 to 2", "--min-contributors 2; each of the two"),
    ("keygen j --participants a --min-contributors 1", 2, "at least two participants", "found 1"),
]


def test_errors_say_what_was_found_and_what_comes_first(
    full: Round, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(full.folder)
    full.save("w0.safetensors", random_arrays(9, 0.5))
    sums = [full.upload(p, random_arrays(1), "--round", 9, out=f"{p}.9") for p in full.names]
    full.aggregate(sums, out="sum.enc")
    np.save("x.npy", np.ones(3))
    Path("x.txt").write_text("0.1, 0.2, 0.3\n")
    Path("other.json").write_text('{"loss": 0.5}\n')
    Path("moved.key").write_bytes(full.key("alice").read_bytes())
    for command, code, *said in MISTAKES:
        error = full.dtl(*command.split(), code=code).err
        assert all(part in error for part in said), (command, error)
        assert "chmod" not in error or "moved" in command


@pytest.mark.parametrize(
    "options",
    [
        ("--participants", "a,b,a"),
        ("--participants", "server,b,c"),
        ("--participants", "Alice,b,c"),
        ("--participants", "../a,b,c"),
        ("--participants", "a,,c"),
        ("--participants", "a,b"),
        ("--participants", ",".join(f"p{number}" for number in range(4097))),
        ("--participants", "a,b,c", "--min-contributors", 4),
        ("--participants", "a,b,c", "--min-contributors", 1),
        ("--participants", "a,b,c", "--modulus-bits", 512),
        ("--participants", "a,b,c", "--modulus-bits", 4096),
        ("--participants", "a,b,c", "--modulus-bits", 520, "--insecure"),
        ("--participants", "a,b,c", "--slot-bits", 3),
        ("--participants", "a,b,c", "--slot-bits", 60),
        ("--participants", "a,b,c", "--fraction-bits", 23),
        ("--participants", "a,b,c", "--nonsense"),
        (),
    ],
)
def test_keygen_usage(dtl: Cli, tmp_path: Path, options: tuple[object, ...]) -> None:
    dtl("keygen", tmp_path / "job", "--no-masks", *options, code=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--round", 0),
        ("--round", 1 << 32),
        ("--round", 1, "--weight", "nan"),
        ("--round", 1, "--weight", 0),
        ("--round", 1, "--lr", "inf"),
        ("--round", 1, "--rounding", "nearest", "--rounding-seed", "1"),
        ("--round", 1, "--workers", 0),
        ("--model", "nowhere"),
    ],
)
def test_encrypt_usage(round_: Round, options: tuple[object, ...]) -> None:
    gradients = round_.save("g.safetensors", random_arrays(1))
    out = round_.folder / "u"
    common = ("encrypt-grads", gradients, "--key", round_.key("alice"), "-o", out)
    round_.dtl(*common, *options, code=2)
    assert not out.exists()


def test_gradients_must_fit_their_model(round_: Round) -> None:
    w0 = round_.save("w0.safetensors", random_arrays(9))
    arrays: Arrays = {"x": np.ones(3, np.float32)}
    round_.upload("alice", arrays, "--model", w0, code=3)
    round_.upload("alice", {"x": np.ones(3, np.int32)}, code=3)


def test_weights_are_not_encrypted_by_mistake(round_: Round, dtl: Cli) -> None:
    dtl("split-data", "digits", "--participants", "a", "--out", round_.folder / "shards")
    w0, out = round_.folder / "w0.npz", round_.folder / "u"
    dtl("init-model", "--data", round_.folder / "shards" / "a.npz", "-o", w0)
    dtl("encrypt-grads", w0, "--key", round_.key("alice"), "-o", out, code=3)
    edited = dict(np.load(w0))
    edited["layer1.bias"] += 1
    np.savez(w0, **edited)
    model = ("--model", w0, "--data", round_.folder / "shards" / "a.npz")
    dtl("compute-grads", *model, "-o", round_.folder / "g.npz", code=4)


def test_special_files_are_refused_without_waiting(round_: Round, dtl: Cli, tmp_path: Path) -> None:
    import os

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for bad in (pipe, tmp_path, tmp_path / "none", Path("/dev/zero")):
        dtl("inspect", bad, code=2)
        dtl("encrypt-grads", bad, "--round", 1, "--key", round_.key("alice"), "-o", "u", code=2)
        dtl("aggregate", bad, "--key", round_.key("server"), "-o", "u", code=2)
        dtl("aggregate", bad, "--key", bad, "-o", "u", code=2)


@pytest.mark.parametrize("target", ["alice.key", "bob.ledger", "renamed"])
def test_force_never_overwrites_keys_and_ledgers(full: Round, target: str) -> None:
    (full.keys / "renamed").write_bytes((full.keys / "carol.ledger").read_bytes())
    victim = full.keys / target
    before = victim.read_bytes()
    options = ("--key", full.key("server"), "-o", victim, "--force")
    full.dtl("release-model", full.folder / "result.enc", *options, code=2)
    uploads = upload_paths(full)
    full.dtl("aggregate", *uploads, *options, code=2)
    assert victim.read_bytes() == before


def test_parameters_of_a_job_that_cannot_be(full: Round) -> None:
    path = full.keys / "job.json"
    plain = json.loads(path.read_bytes())
    edits: tuple[dict[str, object], ...] = (
        {"slot_bits": 0},
        {"slot_bits": -3},
        {"N": "1"},
        {"h": []},
        {"N": "f" * 9000},
    )
    for changes in edits:
        path.write_bytes(canonical_json.dumps(plain | changes))
        full.dtl("inspect", path, code=3)


def test_lone_surrogates_in_headers(full: Round) -> None:
    bad = full.folder / "bad"
    for metadata in ({"dtl": "\ud800", "signature": "0" * 128}, {"dtl": "{}", "x": "\udfff"}):
        header = json.dumps({"__metadata__": metadata}).encode()
        bad.write_bytes(len(header).to_bytes(8, "little") + header)
        full.dtl("aggregate", bad, "--key", full.key("server"), "-o", "x", code=3)
        full.dtl("inspect", bad, code=3)


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    "member",
    [
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': ((4,), }"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (16777217, 16777217), }"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (2,), }", b"\x80\x04N."),
        npy("{'descr': [('a', '<i2')], 'fortran_order': False, 'shape': (2,), }", b"abcd"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", b"abcd"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", b"abcdefgh"),
        npy("{'descr': '>f4', 'fortran_order': False, 'shape': (1,), }", b"abcd"),
        b"",
        b"\x93NUMPY\x09\x00\x00\x00",
    ],
)
def test_bad_npz_members(full: Round, member: bytes) -> None:
    import zipfile

    bad = full.folder / "bad.npz"
    with zipfile.ZipFile(bad, "w") as file:
        file.writestr("x.npy", member)
    key = ("--key", full.key("alice"), "--round", 9, "-o", full.folder / "x")
    full.dtl("encrypt-grads", bad, *key, code=3)
    full.dtl("evaluate", "--model", full.folder / "w0.safetensors", "--data", bad, code=3)


def test_flipped_bytes_in_npz_files_never_surprise(full: Round) -> None:
    from dtl.core.files.shards import Shard, encode_shard

    good, shard = full.folder / "good.npz", full.folder / "shard.npz"
    np.savez_compressed(good, a=np.ones(50, np.float32), b=np.ones((3, 4)))
    samples = Shard(np.ones((9, 2)), np.arange(9) % 2, np.array(["x", "y"]))
    shard.write_bytes(encode_shard(samples))
    key = ("--key", full.key("alice"), "-o", full.folder / "out", "--force")
    generator = np.random.default_rng(1)
    for path in (good, shard):
        original = path.read_bytes()
        for number in range(60):
            changed = bytearray(original)
            changed[int(generator.integers(len(changed)))] ^= 1 << int(generator.integers(8))
            path.write_bytes(changed)
            command = ("encrypt-grads", path, "--round", 1000 + number, *key)
            assert run_code(full, command) in (0, 3, 7)
            split = (
                "split-data",
                path,
                "--participants",
                "p",
                "--out",
                full.folder / "s",
                "--force",
            )
            assert run_code(full, split) in (0, 2, 3)


@pytest.mark.parametrize("name", ["__metadata__", "__dtl__", "a\x00b", "tab\tname", "\x7f"])
def test_tensor_names_that_cannot_be_written_back(round_: Round, name: str) -> None:
    if name != "__metadata__":
        round_.upload("alice", {name: np.ones(3, np.float32)}, code=3)
    else:
        path = round_.folder / "g.npz"
        np.savez(path, **{name: np.ones(3, np.float32)})  # type: ignore[arg-type]
        options = ("--round", 1, "--key", round_.key("alice"), "-o", round_.folder / "u")
        round_.dtl("encrypt-grads", path, *options, code=3)


def test_names_with_paths_and_alphabets_survive_a_round(round_: Round) -> None:
    names = ("../../x", "/etc/passwd", "ñandú.weight", "层.0", "a b", "\\windows")
    arrays: Arrays = {name: np.full(3, 0.25, np.float32) for name in names}
    uploads = [round_.upload(p, arrays) for p in round_.names]
    release = round_.release(round_.aggregate(uploads))
    assert set(round_.opened(release, "bob")) == set(names)
    out = round_.open(release, "alice", out="o.npz")
    assert set(np.load(out).files) == {*names, "__dtl__"}
    assert not (round_.folder.parent.parent / "x").exists()


def test_a_dtype_that_cannot_hold_the_result(new_round: NewRound) -> None:
    """No numeric error: whether it fits depends on what the server has made."""
    sizes = ("--slot-bits", 40, "--fraction-bits", 10)
    round_ = new_round(("alice", "bob", "carol"), *sizes)
    uploads = [
        round_.upload(p, {"x": np.full(3, 6e4, np.float16)}, "--weight", 1) for p in round_.names
    ]
    release = round_.release(round_.aggregate(uploads))
    round_.open(release, "alice", code=4)
    round_.open(release, "alice", out="x.npz", code=4)


def test_huge_gradients_are_clamped_quietly(round_: Round) -> None:
    arrays: Arrays = {"x": np.array([1e308, -1e308, 50.0])}
    key = ("--key", round_.key("alice"), "--json", "-o")
    gradients = round_.save("g.safetensors", arrays)
    for number, rounding in enumerate(("nearest", "stochastic"), 1):
        options = ("--round", number, "--rounding", rounding, "--lr", 10, *key)
        result = round_.dtl("encrypt-grads", gradients, *options, round_.folder / rounding)
        assert result.json["clamped"] == 3
        assert "RuntimeWarning" not in result.err
    huge = ("--lr", 1e308, "--weight", 1e308, "--round", 9)
    round_.dtl("encrypt-grads", gradients, *huge, *key, round_.folder / "x", code=2)
    known = round_.save("w0.safetensors", arrays)
    zero = ("--round", 0, "--model", known)
    round_.dtl("encrypt-grads", gradients, *zero, *key, round_.folder / "x", code=2)


@pytest.mark.parametrize("epoch", ["253402300800", "-1", "soon", "1e9", "５", "9" * 5000])
def test_impossible_times(round_: Round, monkeypatch: pytest.MonkeyPatch, epoch: str) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    round_.upload("alice", random_arrays(1), code=2)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    upload = round_.upload("alice", random_arrays(1))
    described = round_.dtl("inspect", upload, "--json").json
    assert described["created"] == "2001-09-09T01:46:40Z"


def test_skip_invalid_does_not_depend_on_the_order(new_round: NewRound) -> None:
    round_ = new_round(("a", "b", "c", "d"))
    odd = round_.upload("d", random_arrays(1), "--round", 2)
    more = [round_.upload("d", random_arrays(1), "--round", n, out=f"d{n}") for n in (3, 4, 5)]
    same = [
        resign(odd, {}, round_.opened_key("d").secrets.sign, round_.folder / f"o{n}")
        for n in range(5)
    ]
    uploads = [odd, *more, *same, *(round_.upload(p, random_arrays(1)) for p in "abc")]
    round_.aggregate(uploads, code=3)
    round_.aggregate(uploads, "--skip-invalid")


def test_lists_of_files_in_any_spelling(new_round: NewRound) -> None:
    from dtl.cli.app import _spread

    assert _spread(["x", "--reveals", "a", "b", "--force"]) == [
        "x",
        "--reveals",
        "a",
        "--reveals",
        "b",
        "--force",
    ]
    assert _spread(["--reveals=a", "b"]) == ["--reveals=a", "--reveals", "b"]
    assert _spread(["--reveals", "a", "--reveals", "b"]) == ["--reveals", "a", "--reveals", "b"]
    assert _spread(["--uploads", "--force"]) == ["--uploads", "--force"]
    assert _spread(["--reveals"]) == ["--reveals"]


def test_a_model_is_only_ever_the_servers(full: Round) -> None:
    secret = full.opened_key("alice").secrets.sign
    bad = resign(full.folder / "result.enc", {"signer": "alice"}, secret, full.folder / "bad")
    full.dtl("inspect", bad, "--job", full.keys / "job.json", code=3)
    full.release(bad, out="x", code=3)


@pytest.mark.parametrize("kind", ["upload", "job", "ee0dc1ce", "", "Close", 5])
def test_a_document_of_an_unknown_kind_is_not_verified(round_: Round, kind: object) -> None:
    path = round_.folder / "odd.close"
    path.write_text(json.dumps({"kind": kind, "signer": "server"}, separators=(",", ":")))
    round_.dtl("verify", path, "--job", round_.keys / "job.json", code=3)
