"""Audit by the center, verification by anyone, and to whom results are released."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dtl.core.ciphers import lattice
from dtl.core.ciphers.cipher import Batch, Encoded
from dtl.core.crypto import scheme
from dtl.core.encoding.fixed_point import FixedPoint
from dtl.core.files import canonical_json
from dtl.core.files.container import BODY, RESIDUES
from dtl.core.files.tensors import METADATA_KEY, load_arrays
from dtl.core.lattice import portable
from dtl.core.lattice import ring as door
from dtl.core.lattice.parameters import INSECURE
from dtl.core.roles.participant import planning
from tests import hostile
from tests.forging import Statement, header_of, resign, tensors_of, write
from tests.helpers import CIPHERS, ONE, THREE, Arrays, Cli, Round, random_arrays, residues_of

NewRound = Callable[..., Round]
FOUR = ("a", "b", "c", "d")


@pytest.fixture
def masked(new_round: NewRound) -> Round:
    return new_round(FOUR, masks=True)


class Chain:
    """An honest chain of rounds with everyone in, file by file."""

    def __init__(self, round_: Round, rounds: int) -> None:
        self.round = round_
        self.w0 = plain = round_.save("w0.safetensors", random_arrays(70, 0.5))
        self.uploads: list[list[Path]] = []
        self.models: list[Path] = []
        self.opened: list[Path] = []
        for number in range(1, rounds + 1):
            given = {p: random_arrays(10 * number + i) for i, p in enumerate(round_.names)}
            made = round_.uploads(given, "--model", plain, tag=f"-{number}")
            source = ("--model", self.models[-1]) if self.models else ("--initial", self.w0)
            model = round_.aggregate(made, *source, out=f"model-{number}.enc")
            release = round_.release(model, out=f"model-{number}.release")
            plain = round_.open_all(release, out=f"w{number}.safetensors")
            self.uploads.append(made)
            self.models.append(model)
            self.opened.append(plain)

    def evidence(self) -> list[object]:
        flat = [path for uploads in self.uploads for path in uploads]
        parents = [item for path in self.models[:-1] for item in ("--model", path)]
        return ["--uploads", *flat, *parents, "--initial", self.w0]


def verify(round_: Round, path: Path, *evidence: object, code: int = 0) -> dict[str, object]:
    job = ("--job", round_.keys / "job.json", "--json")
    result = round_.dtl("verify", path, *job, *evidence, code=code)
    return {} if code else result.json


def verify_error(round_: Round, path: Path, *evidence: object) -> str:
    job = ("--job", round_.keys / "job.json")
    return round_.dtl("verify", path, *job, *evidence, code=4).err


def audit(round_: Round, *arguments: object, code: int = 0) -> list[dict[str, object]]:
    command = ("audit", *arguments, "--key", round_.key("kgc"), "--json")
    result = round_.dtl(*command, code=code)
    found: list[dict[str, object]] = json.loads(result.out)["files"] if result.out else []
    return found


# --- verify --------------------------------------------------------------------------------


def test_an_honest_chain_verifies_back_to_round_one(masked: Round) -> None:
    chain = Chain(masked, 3)
    found = verify(masked, chain.models[-1], *chain.evidence())
    assert found["rounds_recomputed"] == 3
    for number, model in enumerate(chain.models):
        parent = ("--model", chain.models[number - 1]) if number else ()
        given = ("--uploads", *chain.uploads[number], *parent, "--initial", chain.w0)
        assert verify(masked, model, *given)["rounds_recomputed"] == 1
        assert verify(masked, model)["product"] == "not recomputed: no uploads given"
        verify(masked, chain.uploads[number][0])
        release = masked.folder / f"model-{number + 1}.release"
        found = verify(masked, release, "--model", model)
        assert (found["of"], found["recomputed"]) == (verify(masked, model)["digest"], False)
        own = verify(masked, release, *given, "--key", masked.key("b"))
        assert own["recomputed"]
        assert "to this very result" in str(own["sealed"])
        public = verify(masked, release, *given)
        assert "the result inside is recomputed" in str(public["product"])
        assert not public["recomputed"]
    verify(masked, masked.keys / "job.json")
    # Not from the wrong parent, not with uploads of another round, not without the start.
    verify(
        masked, chain.models[2], "--uploads", *chain.uploads[2], "--model", chain.models[0], code=4
    )
    verify(masked, chain.models[2], "--uploads", *chain.uploads[1], code=4)
    verify(masked, chain.models[2], "--uploads", *chain.uploads[2], code=4)
    verify(
        masked, chain.models[0], "--uploads", *chain.uploads[0][:3], "--initial", chain.w0, code=4
    )


def test_a_product_is_not_taken_for_recomputed(masked: Round) -> None:
    chain = Chain(masked, 2)
    command = ("verify", chain.models[1], "--job", masked.keys / "job.json")
    start = ("--model", chain.models[0], "--initial", chain.w0)
    failed = masked.dtl(*command, *start, "--uploads", *chain.uploads[0], code=4)
    assert "the upload of round 2 that it names is not given for a, b, c, d" in failed.err
    without = masked.dtl(*command, "--json")
    assert (without.json["recomputed"], "not recomputed" in without.err) == (False, True)
    whole = masked.dtl(*command, *start, "--uploads", *chain.uploads[1], "--json")
    assert (whole.json["recomputed"], "not recomputed" in whole.err) == (True, False)
    release = masked.folder / "model-2.release"
    alone = masked.dtl("verify", release, *command[2:], "--json")
    assert (alone.json["recomputed"], "not recomputed" in alone.err) == (False, True)


def test_each_changed_byte_in_a_chain_is_refused(masked: Round) -> None:
    from dtl.cli import app

    chain = Chain(masked, 3)
    job = masked.keys / "job.json"
    arguments = ["verify", chain.models[-1], "--job", job, *chain.evidence()]
    generator = np.random.default_rng(5)
    for victim in (*chain.models, chain.uploads[0][0], chain.uploads[2][3], chain.w0, job):
        original = victim.read_bytes()
        header = 8 + int.from_bytes(original[:8], "little") if victim != job else len(original)
        places = [*generator.integers(0, header, 6), *generator.integers(0, len(original), 6)]
        for place in places:
            changed = bytearray(original)
            changed[place] ^= 1 << int(generator.integers(8))
            victim.write_bytes(changed)
            code = app.run([str(argument) for argument in arguments])
            assert code in (3, 4), (victim, place)
        victim.write_bytes(original)
    assert app.run([str(argument) for argument in arguments]) == 0


def test_a_server_that_cheats_with_a_model(masked: Round) -> None:
    chain = Chain(masked, 2)
    secret = masked.opened_key("server").secrets.sign
    model, parent = chain.models[1], chain.models[0]
    given = ("--uploads", *chain.uploads[1], "--model", parent)
    # It leaves one upload out of the product, but names it all the same.
    key = masked.job.public_key
    total = scheme.add(key, [residues_of(path) for path in chain.uploads[1][:3]])
    product = scheme.subtract(key, residues_of(parent), total)
    bodies = tensors_of(model)["body"]
    forged = {"residues": product, "body": bodies}
    path = write(masked.folder / "left-out", header_of(model), forged, secret)
    assert "not the product" in verify_error(masked, path, *given)
    # Or it changes the sum of the bodies alone.
    codec = masked.job.codec
    readers = [tensors_of(path)["body"].tobytes() for path in chain.uploads[1][:3]]
    body = codec.combine_body(
        *(335, codec.batches(335)[0], [reader_of(data) for data in readers], ()),
        *(reader_of(tensors_of(parent)["body"].tobytes()), None),
    )
    forged = tensors_of(model) | {"body": np.frombuffer(body, np.uint8)}
    path = write(masked.folder / "left-out-too", header_of(model), forged, secret)
    assert "not the sum" in verify_error(masked, path, *given)
    for number, changes in enumerate(
        (
            {"contributions": dict.fromkeys(FOUR, 7)},
            {"parent": header_of(parent)["initial"]},
            {"initial": "0" * 128},
            {"round": 9},
            {"layout": relaid(model, name="z")},
            {"layout": relaid(model, dtype="F64")},
            {"layout": [{"name": "z", "shape": [335], "dtype": "F32"}]},
        )
    ):
        bad = resign(model, changes, secret, masked.folder / f"bad{number}")
        verify(masked, bad, *given, code=4)
    # A swapped upload: another of the same participant.
    other = masked.folder / "other"
    resign(chain.uploads[1][2], {}, masked.opened_key("c").secrets.sign, other)
    assert other.read_bytes() == chain.uploads[1][2].read_bytes()
    copied = masked.keys / "c.ledger"
    copied.write_bytes(copied.read_bytes().split(b"\n")[0] + b"\n")
    masked.open(masked.folder / "model-1.release", "c", "--force")
    swapped = masked.upload("c", random_arrays(99), "--model", chain.opened[0], out="swapped")
    uploads = [*chain.uploads[1][:2], swapped, chain.uploads[1][3]]
    verify(masked, model, "--uploads", *uploads, "--model", parent, code=4)


def reader_of(data: bytes) -> Callable[[int, int], bytes]:
    return lambda first, count: data[first : first + count]


def relaid(path: Path, **changes: object) -> list[dict[str, object]]:
    """The layout of a file with its last tensor changed."""
    layout: list[dict[str, object]] = header_of(path)["layout"]
    return [*layout[:-1], layout[-1] | changes]


def test_a_server_that_cheats_with_a_sum(new_round: NewRound) -> None:
    round_ = new_round()
    uploads = [round_.upload(p, random_arrays(1)) for p in round_.names]
    result = round_.aggregate(uploads)
    secret = round_.opened_key("server").secrets.sign
    verify(round_, result, "--uploads", *uploads)
    edits: tuple[dict[str, object], ...] = (
        {"layout": relaid(result, name="z")},
        {"layout": relaid(result, dtype="F16")},
        {"contributions": dict.fromkeys(round_.names, 2)},
        {"parent": "0" * 128},
    )
    for number, changes in enumerate(edits):
        bad = resign(result, changes, secret, round_.folder / f"bad{number}")
        verify(round_, bad, "--uploads", *uploads, code=4)
    strangers = {"contributions": {"alice": 1, "bob": 1, "carol": 7}}
    bad = resign(result, strangers, secret, round_.folder / "bad")
    verify(round_, bad, code=4)


def test_verify_holds_documents_against_the_job(new_round: NewRound) -> None:
    ours, theirs = new_round(folder="ours"), new_round(folder="theirs")
    verify(ours, ours.keys / "job.json")
    verify(ours, theirs.keys / "job.json", code=3)


def test_a_release_stands_for_its_chain(masked: Round) -> None:
    chain = Chain(masked, 2)
    models = ("--model", chain.models[1], "--model", chain.models[0])
    verify(masked, masked.folder / "model-2.release", *models)
    verify(masked, masked.folder / "model-2.release", "--model", chain.models[1])
    verify(masked, masked.folder / "model-2.release", "--model", chain.models[0])
    verify(masked, masked.folder / "model-1.release", "--model", chain.models[1], code=4)


def test_audit_does_not_accuse_without_the_base(masked: Round) -> None:
    chain = Chain(masked, 2)
    verdicts = audit(masked, *chain.uploads[1], code=4)
    assert {str(v["masks"]) for v in verdicts} == {"unknown"}
    assert all("add --model" in str(v["verdict"]) for v in verdicts)
    audit(masked, *chain.uploads[1], "--model", chain.w0, code=3)
    audit(masked, *chain.uploads[1], "--model", chain.opened[1], code=3)


def test_audit_is_certain_where_others_are_good(masked: Round) -> None:
    spoil(masked, "a", "b")
    w0 = masked.save("w0.safetensors", random_arrays(9))
    uploads = masked.uploads({p: random_arrays(i) for i, p in enumerate(FOUR)}, "--model", w0)
    for extra in ((), ("--model", w0)):
        verdicts = audit(masked, *uploads, *extra, code=4)
        assert [str(v["masks"]) == "wrong" for v in verdicts] == [True, False, False, False]
        assert "add --model" not in str(verdicts[0]["verdict"])


def test_a_release_to_strangers_is_refused_by_everyone(masked: Round) -> None:
    uploads = masked.uploads({p: random_arrays(i) for i, p in enumerate(FOUR)})
    result = masked.aggregate(uploads)
    release = masked.release(result, "--to", "a,b")
    header = header_of(release)
    secret = masked.opened_key("server").secrets.sign
    manifest = header["manifest"] | {
        "contributors": header["manifest"]["contributors"][1:],
        "missing": ["a"],
        "contributions": dict.fromkeys("bcd", 1),
    }
    bad = resign(release, {"manifest": manifest}, secret, masked.folder / "bad")
    verify(masked, bad, code=4)
    masked.open(bad, "b", code=4)


# --- audit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cipher", CIPHERS)
def test_an_honest_round_is_found_good(new_round: NewRound, cipher: str) -> None:
    masked = new_round(FOUR, "--cipher", cipher, masks=True)
    chain = Chain(masked, 2)
    first = audit(masked, *chain.uploads[0], chain.models[0])
    assert [f["verdict"] for f in first] == ["good"] * 5
    assert {str(f["masks"]) for f in first[:4]} == {"as they should be"}
    for base in (chain.opened[0], chain.models[0]):
        second = audit(masked, *chain.uploads[1], "--model", base)
        assert [f["verdict"] for f in second] == ["good"] * 4
    for given in (chain.models[0], masked.folder / "model-1.release"):
        together = audit(masked, *chain.uploads[1], given)
        assert [f["verdict"] for f in together] == ["good"] * 5
        assert {str(f["base_opened_to"]) for f in together[:4]} == {"what was released"}
        second = audit(masked, *chain.uploads[1], "--model", given)
        assert [f["verdict"] for f in second] == ["good"] * 4
    assert together[4]["kind"] == "model"
    norm = float(np.sqrt(sum((array**2).sum() for array in random_arrays(10).values())) / 4)
    assert first[0]["norm"] == pytest.approx(norm, rel=1e-3)
    assert first[0]["share_clamped"] == 0


@pytest.mark.parametrize("cipher", CIPHERS)
def test_the_center_recovers_a_model_and_an_upload_alone(new_round: NewRound, cipher: str) -> None:
    masked = new_round(FOUR, "--cipher", cipher, masks=True)
    chain = Chain(masked, 1)
    out = masked.folder / "recovered.safetensors"
    for name in ("server.key", "a.key", "b.key"):
        (masked.keys / name).unlink()
    audit(masked, chain.models[0], "--plaintext", out)
    assert out.read_bytes() == chain.opened[0].read_bytes()
    audit(masked, chain.uploads[0][1], "--plaintext", out, code=2)
    audit(masked, chain.uploads[0][1], "--plaintext", out, "--force")
    for name, array in load_file(out).items():
        assert np.abs(array - random_arrays(11)[name] / 4).max() < 1 / ONE
    audit(masked, *chain.uploads[0], "--plaintext", masked.folder / "x.npz", code=2)


def spoil(round_: Round, name: str, partner: str) -> None:
    """Give a participant a wrong mask seed."""
    path = round_.key(name)
    plain = json.loads(path.read_bytes())
    plain["mask_seeds"][partner] = plain["sign"]
    path.write_bytes(canonical_json.dumps(plain))


@pytest.mark.parametrize("cipher", CIPHERS)
def test_wrong_masks_are_traced_to_their_sender(new_round: NewRound, cipher: str) -> None:
    masked = new_round(FOUR, "--cipher", cipher, masks=True)
    spoil(masked, "c", "b")
    uploads = masked.uploads({p: random_arrays(i) for i, p in enumerate(FOUR)})
    result = masked.aggregate(uploads)
    masked.open(masked.release(result), "a", code=4)
    verdicts = audit(masked, *uploads, result, code=4)
    good = {str(v["signer"]): v["verdict"] == "good" for v in verdicts}
    assert good == {"a": True, "b": True, "c": False, "d": True, "server": False}
    bad = verdicts[2]
    assert (bad["masks"], bad["undecodable_groups"]) == ("wrong", [0, 1, 2])
    assert "wrong masks in groups 0-2" in str(bad["verdict"])
    assert "beyond" not in str(bad["verdict"])
    assert not verdicts[4]["opens"]
    error = masked.dtl("audit", *uploads, "--key", masked.key("kgc"), code=4).err
    assert "by c" in error


def test_a_wrong_reveal_is_traced_to_its_sender(masked: Round) -> None:
    uploads = masked.uploads({p: random_arrays(i) for i, p in enumerate("abc")})
    closed = masked.folder / "close"
    masked.dtl("close-round", *uploads, "--key", masked.key("server"), "-o", closed)
    spoil(masked, "b", "d")
    reveals = []
    for p in "abc":
        reveals.append(masked.folder / f"{p}.reveal")
        masked.dtl("reveal-masks", closed, "--key", masked.key(p), "-o", reveals[-1])
    result = masked.aggregate(uploads, "--close", closed, "--reveals", *reveals)
    masked.open(masked.release(result), "a", code=4)
    verdicts = audit(masked, *uploads, result, "--reveals", *reveals, code=4)
    bad = {v["file"] for v in verdicts if v["verdict"] != "good"}
    assert bad == {str(result), str(reveals[1])}
    assert audit(masked, *uploads, reveals[0])[-1]["verdict"] == "good"


@pytest.mark.parametrize("place", [(1, 0), (2, 5)])
def test_malformed_groups_are_named(masked: Round, place: tuple[int, int]) -> None:
    uploads = masked.uploads({p: random_arrays(i) for i, p in enumerate(FOUR)})
    forged = Statement(masked, "a", header_of(uploads[0]), 3)
    numbers = forged.numbers()
    group, column = place
    n = masked.job.N
    numbers[8 * group + column] = 3 * numbers[8 * group + column] % (n**2 if column else n)
    forged.send(numbers)
    bad = forged.write("bad.upload")
    verdict = audit(masked, bad, code=4)[0]
    assert verdict["malformed_groups"] == [group]
    assert verdict["proof"] == "does not hold"
    numbers[8 * group] = n + 1  # no residue at all
    forged.send(numbers)
    bad = forged.write("worse.upload")
    error = masked.dtl("audit", bad, "--key", masked.key("kgc"), code=3).err
    assert f"{bad}: a residue is out of range" in error


@pytest.mark.parametrize("cipher", CIPHERS)
def test_values_out_of_range_and_clamped_ones(
    new_round: NewRound, cipher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = new_round(THREE, "--cipher", cipher)
    arrays = {"x": np.array([99.0, 0, -99, 0.1], np.float32)}
    upload = round_.upload("alice", arrays)
    verdict = audit(round_, upload)[0]
    assert verdict["share_clamped"] == 0.5
    assert verdict["masks"] == "none"
    with monkeypatch.context() as patch:  # bob does not clamp
        patch.setattr(FixedPoint, "max_step", property(lambda format: format.max_value))
        bad = round_.upload("bob", arrays)
    verdict = audit(round_, bad, code=4)[0]
    assert verdict["share_out_of_range"] == 0.5
    assert "2 values beyond +-" in str(verdict["verdict"])
    assert verdict["proof"] == "holds"


@pytest.mark.parametrize("masks", [False, True])
def test_secrets_and_errors_out_of_range_are_named(
    new_round: NewRound, masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = new_round(FOUR, masks=masks)
    arrays = {"x": np.full(2000, 0.5, np.float32)}  # two polynomials
    arithmetic = type(door.arithmetic(INSECURE))
    sample, encode = arithmetic.sample, lattice._LatticeEncoder.encode

    def large(self: door.LatticeArithmetic, key: bytes, polynomial: int | None = None) -> Any:
        small = sample(self, key, polynomial)
        small[130] = -65
        return small

    def noisy(self: Any, values: Any, batch: Batch) -> Any:
        made = encode(self, values, batch)
        total = portable.Sum(self._shape, 0, 2)
        total.add(np.frombuffer(made.body, np.uint8))
        for word, prime in zip(total._words[1], INSECURE.primes, strict=True):
            word[3] = (word[3] + 129) % prime  # -64 + 129 is beyond
        return Encoded(made.blocks, total.body().tobytes(), made.clamped)

    uploads = [round_.upload(p, arrays) for p in "ab"]
    with monkeypatch.context() as patch:
        patch.setattr(arithmetic, "sample", large)
        uploads.append(round_.upload("c", arrays))
    with monkeypatch.context() as patch:
        patch.setattr(lattice._LatticeEncoder, "encode", noisy)
        uploads.append(round_.upload("d", arrays))
    verdicts = audit(round_, *uploads, code=4)
    assert [verdict["verdict"] == "good" for verdict in verdicts] == [True, True, False, False]
    assert {str(verdict["masks"]) for verdict in verdicts} == (
        {"as they should be"} if masks else {"none"}
    )
    assert {str(verdict["proof"]) for verdict in verdicts} == {"holds"}
    assert verdicts[2]["secret_out_of_range"] == [1]
    assert verdicts[2]["verdict"] == "the secret is beyond +-64 in groups 1"
    assert verdicts[3]["errors_out_of_range"] == [1]
    assert verdicts[3]["verdict"] == "errors are beyond +-64 in polynomials 1 of the body"
    assert verdicts[3]["largest"] == 0.125


def test_another_model_than_the_one_released_is_named(
    masked: Round, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(masked, 1)
    honest = [masked.upload(p, random_arrays(1), "--model", chain.opened[0]) for p in "ab"]
    with monkeypatch.context() as patch:  # a random tag does not excuse anybody
        patch.setattr(planning, "opened_tag", lambda *_: "5" * 32)
        random = masked.upload("c", random_arrays(1), "--model", chain.opened[0])
    verdicts = audit(masked, *honest, random, "--model", chain.models[0], code=4)
    told = [verdict["base_opened_to"] for verdict in verdicts]
    assert told == ["what was released", "what was released", "something else"]
    assert "the fault is c's own" in str(verdicts[2]["verdict"])
    assert verdicts[2]["masks"] == "as they should be"
    # What the metadata of a plain file says is a claim: nobody is accused of it.
    claimed = masked.folder / "claimed.safetensors"
    loaded = load_arrays(chain.opened[0])
    assert loaded.metadata is not None
    claim = loaded.metadata.model_copy(update={"opened": "7" * 128})
    save_file(dict(loaded.arrays), claimed, {"dtl": claim.encode().decode()})
    verdicts = audit(masked, *honest, "--model", claimed, code=4)
    for verdict in verdicts:
        assert "own" not in str(verdict["verdict"])
        assert "--model is not what was released" in str(verdict["verdict"])


def test_audit_takes_only_signed_files_unless_told(new_round: NewRound) -> None:
    round_ = new_round()
    upload = round_.upload("alice", random_arrays(1))
    bad = round_.folder / "bad"
    text = upload.read_bytes()
    at = text.index(b'signature":"') + len(b'signature":"')
    bad.write_bytes(text[:at] + b"0" * 128 + text[at + 128 :])
    assert audit(round_, bad, code=4) == []
    assert audit(round_, bad, "--unsigned")[0]["verdict"] == "good"


def test_a_job_without_master_key_cannot_be_audited(
    dtl: Cli, tmp_path: Path, fixed_primes: None
) -> None:
    job = tmp_path / "job"
    sizes = ("--modulus-bits", 512, "--insecure", "--discard-master")
    dtl("keygen", job, "--participants", "a,b,c", *sizes)
    assert not (job / "kgc.key").exists()
    (tmp_path / "u").touch()
    error = dtl("audit", tmp_path / "u", "--key", job / "kgc.key", code=5).err
    assert "there is no such key" in error
    assert "can never be audited" in error
    for slip in (job / "kcg.key", tmp_path / "jbo" / "kgc.key"):
        error = dtl("audit", tmp_path / "u", "--key", slip, code=2).err
        assert f"dtl: error: {slip}: no such file" in error
    dtl("audit", tmp_path / "u", "--key", job / "server.key", code=5)


def test_audit_prints_no_values(masked: Round) -> None:
    arrays: Arrays = {"x": np.full(40, 0.123456, np.float32)}
    uploads = masked.uploads(dict.fromkeys(FOUR, arrays), "--rounding", "nearest")
    shown = masked.dtl("audit", *uploads, "--key", masked.key("kgc")).out
    assert "verdict" in shown
    spoil(masked, "a", "b")


# --- release policies ------------------------------------------------------------------------


def may_open(round_: Round, model: Path, *options: object, code: int = 0) -> list[str]:
    out = round_.folder / "policy.release"
    command = ("release-model", model, "--key", round_.key("server"), "-o", out, "--json")
    result = round_.dtl(*command, *options, code=code)
    if code:
        assert not out.exists()
        return []
    out.unlink()
    found: list[str] = result.json["may_open"]
    return found


@pytest.fixture
def uneven(new_round: NewRound) -> tuple[Round, Path]:
    """Three rounds: d never, c not in the last two."""
    round_ = new_round(("a", "b", "c", "d"), "--min-contributors", 2)
    w0 = round_.save("w0.safetensors", random_arrays(1))
    plain, model = w0, w0
    for number, present in ((1, "abc"), (2, "ab"), (5, "ab")):
        given = {p: random_arrays(number) for p in present}
        options = ("--model", plain, "--round", number)
        uploads = round_.uploads(given, *options, tag=str(number))
        model = round_.aggregate(
            uploads, "--initial" if number == 1 else "--model", model, out=f"{number}.enc"
        )
        release = round_.release(model, out=f"r{number}")
        openers = "a" if number == 5 else "abc"
        plain = round_.open_all(release, openers, out=f"w{number}.safetensors")
    return round_, model


def test_policies(uneven: tuple[Round, Path]) -> None:
    round_, model = uneven
    assert header_of(model)["contributions"] == {"a": 3, "b": 3, "c": 1}
    assert may_open(round_, model) == ["a", "b", "c"]
    assert may_open(round_, model, "--min-rounds", 2) == ["a", "b"]
    assert may_open(round_, model, "--min-share", 0.34) == ["a", "b"]
    assert may_open(round_, model, "--min-share", 0.33) == ["a", "b", "c"]
    assert may_open(round_, model, "--min-share", 1) == ["a", "b"]
    assert may_open(round_, model, "--to", "c") == ["c"]
    may_open(round_, model, "--to", "c", "--min-rounds", 2, code=5)
    may_open(round_, model, "--to", "d", code=5)
    may_open(round_, model, "--min-rounds", 9, code=5)
    may_open(round_, model, "--min-rounds", 0, code=2)
    may_open(round_, model, "--min-share", 1.5, code=2)
    may_open(round_, model, "--admit", "zoe", code=2)
    may_open(round_, model, "--admit", "a", code=2)


def go_on(round_: Round, number: int, present: str, source: Path) -> Path:
    """The next model, from the one that was opened last."""
    given = {p: random_arrays(number) for p in present}
    plain = round_.folder / f"w{number - 1}.safetensors"
    uploads = round_.uploads(given, "--model", plain, tag=str(number))
    return round_.aggregate(uploads, "--model", source, out=f"{number}.enc")


def test_an_admission_is_given_once_and_lapses(uneven: tuple[Round, Path]) -> None:
    round_, model = uneven
    release = round_.release(model, "--admit", "d", out="admitting")
    assert header_of(release)["admitted"] == ["d"]
    shown = round_.dtl("inspect", release, "--job", round_.keys / "job.json", "--json").json
    assert "admitted" in shown["may_open"]["d"]
    assert "3 rounds" in shown["may_open"]["a"]
    round_.open_all(release, "bd", out="bd.safetensors")
    assert may_open(round_, model, "--admit", "d") == ["a", "b", "c", "d"]  # the same result
    assert may_open(round_, model) == ["a", "b", "c"]
    # No contribution follows: no grant, no second admission, and so nothing to go on from.
    without = go_on(round_, 6, "ab", model)
    assert may_open(round_, without) == ["a", "b", "c"]
    may_open(round_, without, "--admit", "d", code=5)
    may_open(round_, without, "--to", "d", code=5)
    plain = round_.open(round_.release(without, out="r6"), "a", out="w6.safetensors")
    round_.upload("d", random_arrays(7), "--model", plain, code=5)


def test_who_contributes_after_an_admission_is_one_of_them(uneven: tuple[Round, Path]) -> None:
    round_, model = uneven
    release = round_.release(model, "--admit", "d", out="admitting")
    round_.open_all(release, "bd", out="bd.safetensors")
    with_d = go_on(round_, 6, "abd", model)
    assert header_of(with_d)["contributions"] == {"a": 4, "b": 4, "c": 1, "d": 1}
    assert may_open(round_, with_d) == ["a", "b", "c", "d"]
    may_open(round_, with_d, "--admit", "d", code=2)
    round_.open_all(round_.release(with_d, out="r6"), "abcd", out="w6.safetensors")


def test_participants_notice_a_second_admission(uneven: tuple[Round, Path]) -> None:
    round_, model = uneven
    release = round_.release(model, "--admit", "d", out="admitting")
    round_.open(release, "b", out="b.safetensors")
    ledger = round_.keys / "server.ledger"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:-1]))  # the server forgets
    uploads = round_.uploads(
        {p: random_arrays(6) for p in "ab"}, "--model", round_.folder / "w5.safetensors", tag="6"
    )
    later = round_.aggregate(uploads, "--model", model, out="6.enc")
    again = round_.release(later, "--admit", "d", out="again")
    round_.open(again, "b", "--force", code=4)


def test_a_second_result_on_one_base_needs_consent(new_round: NewRound) -> None:
    round_ = new_round()
    w0 = round_.save("w0.safetensors", random_arrays(1))
    results = []
    for number in (1, 2):
        options = ("--model", w0, "--round", number, "--accept-differencing")
        given = {p: random_arrays(number) for p in round_.names}
        uploads = round_.uploads(given, *options, tag=str(number))
        results.append(round_.aggregate(uploads, "--initial", w0, out=f"{number}.enc"))
    round_.release(results[0], out="r1")
    round_.release(results[1], out="r2", code=5)
    round_.release(results[1], "--accept-differencing", out="r2")


@pytest.mark.parametrize("seed", ["server_seed", "participant_seed"])
def test_a_center_with_another_jobs_seed_accuses_nobody(new_round: NewRound, seed: str) -> None:
    round_ = new_round()
    upload = round_.upload("alice", random_arrays(1))
    key = round_.key("kgc")
    body = json.loads(key.read_bytes())
    key.write_bytes(canonical_json.dumps(body | {seed: body["mask_root"]}))
    found = round_.dtl("audit", upload, "--key", key, code=4)
    assert f"{key}: not the key that the job names for kgc" in found.err
    assert not found.out


# --- what a server claims of a base accuses nobody ------------------------------------------


def second_round(round_: Round) -> tuple[Chain, Path]:
    """Two honest rounds, and a model by the server that names model 1 as initial weights."""
    chain = Chain(round_, 2)
    header, tensors = hostile.read(chain.models[0])
    own = round_.opened_key("server").secrets.sign
    digest = hostile.digest_of(chain.models[0])
    return chain, hostile.write(
        round_.folder / "evil.enc", {**header, "initial": digest}, tensors, own
    )


@pytest.mark.parametrize("cipher", CIPHERS)
def test_a_model_that_calls_another_one_initial_weights_accuses_nobody(
    cipher: str, new_round: NewRound
) -> None:
    chain, evil = second_round(new_round(FOUR, "--cipher", cipher, masks=True))
    upload, model = chain.uploads[1][0], chain.models[0]
    for files in ((evil, model, upload), (model, evil, upload), (evil, upload, "--model", model)):
        found = {str(verdict["file"]): verdict["verdict"] for verdict in audit(chain.round, *files)}
        assert found[str(upload)] == "good"
    failed = chain.round.dtl("audit", evil, upload, "--key", chain.round.key("kgc"), code=4).err
    assert "not judged" in failed
    assert "(by a)" not in failed
    assert "add --model" in failed


@pytest.mark.parametrize("cipher", CIPHERS)
def test_reveals_are_judged_with_their_base_alone(cipher: str, new_round: NewRound) -> None:
    round_ = new_round(FOUR, "--cipher", cipher, masks=True)
    chain = Chain(round_, 1)
    plain, model = chain.opened[0], chain.models[0]
    uploads = [
        round_.upload(name, random_arrays(4), "--model", plain, out=f"{name}.2")
        for name in FOUR[:3]
    ]
    close = round_.folder / "2.close"
    round_.dtl("close-round", *uploads, "--key", round_.key("server"), "-o", close)
    reveal = round_.folder / "a.reveal"
    round_.dtl("reveal-masks", close, "--key", round_.key("a"), "-o", reveal)
    for more in ((model,), ("--model", model), (round_.folder / "model-1.release",)):
        found = audit(round_, reveal, *more)
        assert {v["verdict"] for v in found} == {"good"}
    failed = round_.dtl("audit", reveal, "--key", round_.key("kgc"), code=4).err
    assert "not judged" in failed
    assert "(by a)" not in failed


@pytest.mark.parametrize("cipher", CIPHERS)
def test_a_claim_about_a_base_accuses_nobody(cipher: str, new_round: NewRound) -> None:
    round_ = new_round(FOUR, "--cipher", cipher, masks=True)
    chain = Chain(round_, 2)
    upload = chain.uploads[1][0]
    arrays = load_file(chain.opened[0])
    with safe_open(chain.opened[0], "np") as file:
        said = json.loads(file.metadata()[METADATA_KEY])
    said["opened"] = "5" * 128
    claim = {METADATA_KEY: canonical_json.dumps(said).decode()}
    false = round_.save("false.safetensors", arrays, **claim)
    failed = round_.dtl("audit", upload, "--model", false, "--key", round_.key("kgc"), code=4).err
    assert "not judged" in failed
    assert "(by a)" not in failed
    audit(round_, upload, "--model", chain.models[0])


# --- results that nobody can compute with ------------------------------------------------------


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("part", [RESIDUES, BODY])
def test_a_signed_result_with_bad_numbers_is_refused_by_name(
    cipher: str, part: str, new_round: NewRound
) -> None:
    round_ = new_round(FOUR, "--cipher", cipher, masks=True)
    chain = Chain(round_, 1)
    header, tensors = hostile.read(chain.models[0])
    if part not in tensors:
        return
    if part == BODY:
        tensors[part][:] = 0xFF
    else:
        tensors[part][0, 0] = 0
    own = round_.opened_key("server").secrets.sign
    bad = hostile.write(round_.folder / "bad.enc", header, tensors, own)
    hostile.forget(round_, "server")
    server = ("--key", round_.key("server"), "-o", round_.folder / "x")
    before = (round_.keys / "server.ledger").read_bytes()
    for words in (
        ("verify", bad, "--job", round_.keys / "job.json"),
        ("release-model", bad, *server),
        ("audit", bad, "--key", round_.key("kgc")),
    ):
        assert f"{bad}: " in round_.dtl(*words, code=3).err
    assert (round_.keys / "server.ledger").read_bytes() == before
    assert not (round_.folder / "x").exists()
