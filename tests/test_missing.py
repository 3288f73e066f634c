"""Missing participants: close, reveal, and the masks that have to be taken off."""

import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dtl.core.crypto import primitives
from dtl.core.files import canonical_json
from tests.helpers import ONE, Arrays, Round, random_arrays

NewRound = Callable[..., Round]
SEVEN = ("a", "b", "c", "d", "e", "f", "g")


def close(round_: Round, uploads: list[Path], code: int = 0, out: str = "round.close") -> Path:
    path = round_.folder / out
    round_.dtl("close-round", *uploads, "--key", round_.key("server"), "-o", path, code=code)
    assert path.exists() == (code == 0)
    return path


def reveal(round_: Round, name: str, closed: Path, code: int = 0, out: str = "") -> Path:
    path = round_.folder / (out or f"{name}.reveal")
    round_.dtl("reveal-masks", closed, "--key", round_.key(name), "-o", path, code=code)
    return path


def exact_sum(given: dict[str, Arrays], names: str, count: int) -> Arrays:
    return {
        tensor: np.sum(
            [np.rint(given[p][tensor].astype(np.float64) / count * ONE) for p in names], axis=0
        )
        for tensor in given[names[0]]
    }


@pytest.mark.parametrize("missing", ["c", "g", "af", "cd"])
def test_a_round_of_seven_goes_on_without_one_or_two(new_round: NewRound, missing: str) -> None:
    round_ = new_round(SEVEN, masks=True)
    present = "".join(p for p in SEVEN if p not in missing)
    w0 = round_.save("w0.safetensors", random_arrays(90, 0.5))
    given = {p: random_arrays(i) for i, p in enumerate(present)}
    uploads = round_.uploads(given, "--model", w0, "--rounding", "nearest")
    initial = ("--initial", w0)
    round_.aggregate(uploads, *initial, code=6)
    closed = close(round_, uploads)
    reveals = [reveal(round_, p, closed) for p in present]
    model = round_.aggregate(uploads, *initial, "--close", closed, "--reveals", *reveals)
    opened = round_.opened(round_.release(model), present[0])
    expected = exact_sum(given, present, 7)
    for tensor, array in opened.items():
        start = np.rint(random_arrays(90, 0.5)[tensor].astype(np.float64) * ONE)
        assert (array.astype(np.float64) * ONE == start - expected[tensor]).all()
    job = ("--job", round_.keys / "job.json")
    evidence = ("--uploads", *uploads, "--initial", w0, "--reveals", *reveals)
    found = round_.dtl("verify", model, *job, *evidence, "--json").json
    assert found["product"].startswith("recomputed")
    assert found["missing"] == list(missing)
    round_.dtl("verify", model, *job, *evidence[:-1], code=4)
    # The next round: those who were missing have no grant, the others go on with everyone.
    round_.open(round_.folder / "result.release", missing[0], "--force", code=5)


def test_sums_and_plain_rounds_without_a_base(new_round: NewRound) -> None:
    round_ = new_round(("a", "b", "c", "d"), masks=True)
    given = {p: random_arrays(i) for i, p in enumerate("abd")}
    uploads = round_.uploads(given, "--rounding", "nearest")
    closed = close(round_, uploads)
    reveals = [reveal(round_, p, closed) for p in "abd"]
    result = round_.aggregate(uploads, "--close", closed, "--reveals", *reveals)
    opened = round_.opened(round_.release(result), "d")
    expected = exact_sum(given, "abd", 4)
    assert all((opened[t].astype(float) * ONE == expected[t]).all() for t in opened)


@pytest.mark.parametrize(
    ("roster", "present"), [("abcde", "abc"), ("abc", "ab"), ("abcdef", "abcd")]
)
def test_too_few_cannot_go_on(new_round: NewRound, roster: str, present: str) -> None:
    options = ("--min-contributors", 2)
    round_ = new_round(tuple(roster), *options, masks=True)
    uploads = round_.uploads({p: random_arrays(i) for i, p in enumerate(present)})
    close(round_, uploads, code=6)
    round_.aggregate(uploads, code=6)


def test_the_error_prints_the_commands_to_run_and_they_work(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = new_round(("a", "b", "c", "d"), masks=True)
    w0 = round_.save("w 0.safetensors", random_arrays(9))
    uploads = round_.uploads({p: random_arrays(i) for i, p in enumerate("abc")}, "--model", w0)
    monkeypatch.chdir(round_.folder)
    names = [path.name for path in uploads]
    server = ("--key", "job/server.key", "--initial", w0.name, "-o", "model.enc")
    error = round_.dtl("aggregate", *names, *server, code=6).err
    assert "missing: d" in error
    printed = [line.strip().split(": ", 1) for line in error.splitlines() if ": dtl " in line]
    assert [who for who, _ in printed] == ["server", "a", "b", "c", "server"]
    for _, command in printed:
        round_.dtl(*shlex.split(command)[1:])
    release = round_.release(round_.folder / "model.enc")
    assert set(round_.opened(release, "b")) == set(random_arrays(1))


def test_a_missing_reveal_is_named(new_round: NewRound) -> None:
    round_ = new_round(SEVEN, masks=True)
    uploads = round_.uploads({p: random_arrays(i) for i, p in enumerate("abcdef")})
    closed = close(round_, uploads)
    reveals = [reveal(round_, p, closed) for p in "abcdf"]
    out = ("-o", round_.folder / "x", "--key", round_.key("server"), "--close", closed)
    error = round_.dtl("aggregate", *uploads, *out, "--reveals", *reveals, code=6).err
    assert "no reveal of e" in error
    assert "--accept-differencing" in error
    round_.dtl("aggregate", *uploads, *out, code=6)
    last = reveal(round_, "e", closed)
    round_.dtl("aggregate", *uploads[:-1], *out, "--reveals", *reveals, last, code=6)
    round_.dtl("aggregate", *uploads, *out, "--reveals", *reveals, last, last, code=3)
    round_.dtl("aggregate", *uploads, *out, "--reveals", *reveals, last)


def test_nothing_is_accepted_for_a_closed_round(new_round: NewRound) -> None:
    round_ = new_round(SEVEN, masks=True)
    uploads = round_.uploads({p: random_arrays(i) for i, p in enumerate(SEVEN)})
    closed = close(round_, uploads[:6])
    again = close(round_, uploads[:6], out="again.close")
    assert again.read_bytes() == closed.read_bytes()
    close(round_, uploads[:5], code=5, out="other.close")
    round_.aggregate(uploads, code=5)
    reveals = [reveal(round_, p, closed) for p in "abcdef"]
    reveals_of = ("--close", closed, "--reveals", *reveals)
    round_.aggregate(uploads, *reveals_of, code=5)
    round_.aggregate(uploads[:6], *reveals_of)


def test_what_a_participant_refuses_to_reveal(new_round: NewRound) -> None:
    round_ = new_round(SEVEN, masks=True)
    uploads = round_.uploads({p: random_arrays(i) for i, p in enumerate(SEVEN)})
    closed = close(round_, uploads[:6])
    reveal(round_, "g", closed, code=5)  # it is declared missing itself
    reveal(round_, "a", closed)
    first = (round_.folder / "a.reveal").read_bytes()
    secret = round_.opened_key("server").secrets.sign
    plain = canonical_json.loads(closed.read_bytes(), "close")

    def forged(name: str, **changes: object) -> Path:
        """A close file that a lying server signs."""
        unsigned = {k: v for k, v in (plain | changes).items() if k != "signature"}
        digest = primitives.hash_fields("dtl/v2/close", canonical_json.dumps(unsigned))
        signature = primitives.encode_base64(primitives.sign(secret, "close", digest))
        path = round_.folder / f"{name}.close"
        path.write_bytes(canonical_json.dumps(unsigned | {"signature": signature}))
        return path

    entries = plain["contributors"]
    second = forged("second", contributors=[*entries[:5]], missing=["f", "g"])
    reveal(round_, "a", second, code=5, out="a2")  # one for a round, ever
    reveal(round_, "b", second, out="b2")
    few = forged("few", contributors=entries[:4], missing=["e", "f", "g"])
    reveal(round_, "c", few, code=6, out="c2")
    others = [dict(entry) for entry in entries]
    others[2]["upload"] = "0" * 128
    reveal(round_, "c", forged("swapped", contributors=others), code=4, out="c2")
    reveal(round_, "c", forged("later", round=2), code=4, out="c2")
    reveal(round_, "c", forged("base", base="0" * 128), code=4, out="c2")
    reveal(round_, "c", forged("roster", missing=["g", "h"]), code=3, out="c2")
    reveal(round_, "c", forged("job", job="0" * 128), code=3, out="c2")
    reveal(round_, "c", forged("empty", contributors=entries, missing=[]), code=3, out="c2")
    bad = round_.folder / "bad"
    bad.write_bytes(closed.read_bytes().replace(b'"round":1', b'"round":2'))
    reveal(round_, "c", bad, code=4, out="c2")
    assert not (round_.folder / "c2").exists()
    round_.dtl("reveal-masks", closed, "--key", round_.key("a"), "-o", round_.folder / "a3")
    assert (
        canonical_json.loads(first, "")["keys"]
        == canonical_json.loads((round_.folder / "a3").read_bytes(), "")["keys"]
    )


def test_a_flipped_byte_in_close_files_and_reveals(new_round: NewRound) -> None:
    round_ = new_round(("a", "b", "c", "d"), masks=True)
    uploads = round_.uploads({p: random_arrays(i) for i, p in enumerate("abc")})
    closed = close(round_, uploads)
    reveals = [reveal(round_, p, closed) for p in "abc"]
    server = ("--key", round_.key("server"), "-o", round_.folder / "x")
    from dtl.cli import app

    for victim in (closed, reveals[1]):
        original = victim.read_bytes()
        for place in range(0, len(original), 5):
            changed = bytearray(original)
            changed[place] ^= 1
            victim.write_bytes(changed)
            arguments = ("aggregate", *uploads, *server, "--close", closed, "--reveals", *reveals)
            assert app.run([str(argument) for argument in arguments]) in (3, 4), place
        victim.write_bytes(original)
    assert not (round_.folder / "x").exists()


def test_a_void_round_is_repeated_on_the_same_base(new_round: NewRound) -> None:
    round_ = new_round(("a", "b", "c"), masks=True)
    w0 = round_.save("w0.safetensors", random_arrays(9))
    given = {p: random_arrays(i) for i, p in enumerate("abc")}
    round_.uploads({p: given[p] for p in "ab"}, "--model", w0)  # c vanished
    again = ("--model", w0, "--round", 2)
    round_.upload("a", given["a"], *again, out="a2", code=5)
    uploads = [round_.upload("c", given["c"], *again, out="c2")]
    uploads += [
        round_.upload(p, given[p], *again, "--accept-differencing", out=f"{p}2") for p in "ab"
    ]
    model = round_.aggregate(uploads, "--initial", w0)
    opened = load_file(round_.open(round_.release(model), "c"))
    assert set(opened) == set(given["a"])


def test_rounds_without_masks_need_no_closing(new_round: NewRound) -> None:
    round_ = new_round(("a", "b", "c", "d"))
    uploads = round_.uploads({p: random_arrays(i) for i, p in enumerate("abc")})
    close(round_, uploads, code=2)
    round_.aggregate(uploads)


def test_a_close_file_means_nothing_in_a_job_without_masks(new_round: NewRound) -> None:
    round_ = new_round(("a", "b", "c", "d"))
    (round_.folder / "close").write_bytes(b"{}")
    reveal(round_, "a", round_.folder / "close", code=3)


def test_nobody_missing_needs_no_closing(new_round: NewRound) -> None:
    round_ = new_round(masks=True)
    uploads = round_.uploads({p: random_arrays(i) for i, p in enumerate(round_.names)})
    close(round_, uploads, code=2)
    round_.aggregate(uploads, "--reveals", uploads[0], code=2)
    round_.aggregate(uploads)
