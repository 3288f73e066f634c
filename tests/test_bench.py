"""`dtl bench`: every step of every contender, in one run."""

import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dtl.core.benchmark import peers, plain, run
from dtl.core.benchmark.sample import Sample
from dtl.core.crypto import residues
from dtl.core.lattice import ring
from tests.helpers import Cli

OWN = {f"dtl lattice {kernel}" for kernel in ("native", "portable", "gmpy2")}
OWN |= {"dtl direct native", "dtl direct gmpy2"}
CIPHERS = ("lattice", "direct")
SMALL = ("--values", 3000, "--repeat", 1, "--modulus-bits", 512, "--insecure")


@pytest.mark.slow
def test_every_step_is_timed(dtl: Cli, fixed_primes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_peer = {name: p for name, p in peers.installed().items() if name == "python-paillier"}
    monkeypatch.setattr(peers, "installed", lambda: slow_peer)
    monkeypatch.setitem(run.DIRECT_VALUES, residues.GMPY2, 2000)
    found = dtl("bench", *SMALL, "--json").json
    rows = {row["name"]: row for row in found["microseconds_a_value"]}
    assert set(rows) | set(found["not_measured"]) == OWN | {"plain float32", "python-paillier"}
    assert {"dtl lattice gmpy2", "dtl direct gmpy2", "plain float32", "python-paillier"} <= set(
        rows
    )
    for cipher in ("lattice", "direct"):
        native = f"dtl {cipher} native"
        assert (native in rows) == (residues.kernel_name() == residues.NATIVE)
        assert (native in found["not_measured"]) != (native in rows)
    compiled = ring.lattice_kernel_name() != ring.NUMPY
    assert ("dtl lattice portable" in rows) == compiled
    for name, row in rows.items():
        steps = [row["aggregate"], row["open"], row["encrypt"] + row["serialise"]]
        assert min(steps) > 0, name
        assert row["round"] == pytest.approx(
            3 * (row["encrypt"] + row["serialise"])
            + row["aggregate"]
            + row["release"]
            + row["open"],
            abs=0.01,
        )
    lattice, direct = (rows[f"dtl {cipher} gmpy2"]["upload_bytes"] for cipher in CIPHERS)
    body = 25 * -(-3000 // 7) / 3000
    assert body < lattice < direct < 10
    assert 4 < rows["plain float32"]["upload_bytes"] < 4.1
    # What is slow a value is measured with fewer.
    assert rows["dtl direct gmpy2"]["values"] == 2000
    assert rows["dtl lattice gmpy2"]["values"] == rows["plain float32"]["values"] == 3000
    slow, fast = rows["python-paillier"], rows["dtl direct gmpy2"]
    assert slow["encrypt"] > 100 * fast["encrypt"]
    first = found["microseconds_a_value"][0]
    assert first["name"].startswith("dtl lattice")
    assert first["round_ratio"] == 1
    assert slow["round_ratio"] == pytest.approx(slow["round"] / first["round"], rel=0.01)


def test_many_uploads_are_made_for_the_purpose(
    dtl: Cli, fixed_primes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTL_KERNEL", "gmpy2")
    found = dtl("bench", *SMALL, "--no-peers", "--uploads", 5, "--json").json
    (many, plain) = found["microseconds_a_value"]
    assert (many["name"], many["uploads"]) == ("dtl lattice gmpy2", 5)
    assert (plain["name"], plain["uploads"]) == ("plain float32", 5)
    steps = many["aggregate"] + many["release"] + many["open"]
    assert many["round"] == pytest.approx(5 * many["encrypt"] + steps, abs=0.01)
    assert found["not_measured"]["dtl direct gmpy2"] == "only with --uploads 3"
    assert found["not_measured"]["dtl lattice portable"] == "DTL_KERNEL=gmpy2"


def test_the_plain_round_averages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_PIECE", 7)
    arrays = [np.random.default_rng(seed).normal(size=30).astype(np.float32) for seed in range(2)]
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, array in zip(paths, arrays, strict=True):
        save_file({"x": array}, path)
    plain._average(paths, tmp_path / "mean.safetensors")
    mean = load_file(tmp_path / "mean.safetensors")["x"]
    assert np.array_equal(mean, (arrays[0] + arrays[1]) / np.float32(2))


@pytest.mark.slow
def test_the_table_in_both_spellings(
    dtl: Cli, fixed_primes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("DTL_KERNEL", "gmpy2")
    shown = dtl("bench", *SMALL, "--no-peers").out
    assert "dtl lattice gmpy2" in shown
    assert "paillier" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    lines = dtl("bench", *SMALL, "--no-peers", "--markdown").out.splitlines()
    assert re.fullmatch(r"\| us a value \|( [a-z]+ \|)+", lines[0])
    assert len({line.count("|") for line in lines}) == 1
    assert not list(tmp_path.glob("dtl-bench-*")), "keys and files are removed"


def test_a_peer_that_fails_is_left_out_and_named(
    dtl: Cli, monkeypatch: pytest.MonkeyPatch, fixed_primes: None
) -> None:
    monkeypatch.setenv("DTL_KERNEL", "gmpy2")
    monkeypatch.setattr(peers, "installed", lambda: {"broken": _broken, "works": _works})
    shown = dtl("bench", *SMALL)
    assert "broken: not measured: RuntimeError" in shown.err
    rows = [line.split()[0] for line in shown.out.splitlines()]
    assert "works" in rows
    assert "broken" not in rows


def _broken(values: int) -> Sample:
    raise RuntimeError


def _works(values: int) -> Sample:
    return Sample(values, 1.0, 0.0, 1.0, 0.0, 1.0, 7.0)


@pytest.mark.parametrize("peer", [*peers.installed().values()])
def test_peers_that_are_installed_can_be_measured(peer: peers.Measure) -> None:
    sample = peer(10_000)
    assert sample.encrypt > 0
    assert sample.upload_bytes > 1
    assert sample.round > 3 * sample.encrypt


@pytest.mark.parametrize(
    "wanted",
    [
        ("--values", 0),
        ("--repeat", 0),
        ("--workers", 0),
        ("--uploads", 2),
        ("--uploads", 4097),
        ("--modulus-bits", 512),
    ],
)
def test_what_cannot_be_measured(wanted: tuple[object, ...], dtl: Cli) -> None:
    dtl("bench", *wanted, code=2)
