"""`dtl bench`: every step of every contender, in one run."""

import re
import tempfile
from pathlib import Path

import pytest

from dtl.core.benchmark import peers
from dtl.core.benchmark.sample import Sample
from dtl.core.crypto import residues
from tests.helpers import Cli

SMALL = ("--values", 3000, "--repeat", 1, "--modulus-bits", 512, "--insecure")


def test_every_step_is_timed(dtl: Cli, fixed_primes: None) -> None:
    found = dtl("bench", *SMALL, "--json").json
    rows = {row["name"]: row for row in found["microseconds_a_value"]}
    assert {"dtl gmpy2", "python-paillier"} <= set(rows)
    assert ("dtl native" in rows) == (residues.kernel_name() == residues.NATIVE)
    assert ("dtl native" in found["not_measured"]) != ("dtl native" in rows)
    for name, row in rows.items():
        steps = [row[step] for step in ("encrypt", "aggregate", "open")]
        assert min(steps) > 0, name
        assert row["round"] == pytest.approx(
            3 * (row["encrypt"] + row["serialise"])
            + row["aggregate"]
            + row["release"]
            + row["open"],
            abs=0.01,
        )
        assert row["upload_bytes"] > 6
    slow, fast = rows["python-paillier"], rows["dtl gmpy2"]
    assert slow["encrypt"] > 100 * fast["encrypt"]
    first = found["microseconds_a_value"][0]
    assert first["round_ratio"] == 1
    assert slow["round_ratio"] == pytest.approx(slow["round"] / first["round"], rel=0.01)


def test_the_table_in_both_spellings(
    dtl: Cli, fixed_primes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shown = dtl("bench", *SMALL, "--no-peers").out
    assert "dtl gmpy2" in shown
    assert "paillier" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    lines = dtl("bench", *SMALL, "--no-peers", "--markdown").out.splitlines()
    assert re.fullmatch(r"\| us a value \|( [a-z]+ \|)+", lines[0])
    assert len({line.count("|") for line in lines}) == 1
    assert not list(tmp_path.glob("dtl-bench-*")), "keys and files are removed"


def test_a_peer_that_fails_is_left_out_and_named(
    dtl: Cli, monkeypatch: pytest.MonkeyPatch, fixed_primes: None
) -> None:
    monkeypatch.setattr(peers, "installed", lambda: {"broken": _broken, "works": _works})
    found = dtl("bench", *SMALL, "--json").json
    assert found["not_measured"]["broken"] == "RuntimeError"
    assert "works" in {row["name"] for row in found["microseconds_a_value"]}
    assert "broken: not measured: RuntimeError" in dtl("bench", *SMALL).err


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
    "wanted", [("--values", 0), ("--repeat", 0), ("--workers", 0), ("--modulus-bits", 512)]
)
def test_what_cannot_be_measured(wanted: tuple[object, ...], dtl: Cli) -> None:
    dtl("bench", *wanted, code=2)
