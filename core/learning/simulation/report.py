"""What a run amounts to: scores, times, bytes, contributions, and what every party saw."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from platform import python_version
from statistics import mean
from typing import Literal

from pydantic import BaseModel, ConfigDict

from dtl.core.files.job_file import SERVER
from dtl.core.files.ledger import AggregateEntry, Ledger, OpenEntry
from dtl.core.learning import split
from dtl.core.learning.simulation.baselines import Baselines
from dtl.core.learning.simulation.consortium import KGC, Consortium, RoundRecord
from dtl.core.learning.simulation.journal import Step
from dtl.core.learning.simulation.options import SimulationOptions

_LIBRARIES = ("dtl-toolkit", "cryptography", "gmpy2", "numpy", "scikit-learn")


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Score(_Frozen):
    """Accuracy (0 to 1) and cross-entropy loss on the test shard."""

    accuracy: float
    loss: float


class Scores(_Frozen):
    """Scores after a round; those of round 0 are of the initial weights."""

    encrypted: Score
    float: Score
    central: Score
    alone: dict[str, Score]

    @property
    def alone_mean(self) -> Score:
        """The mean over participants that train alone."""
        scores = self.alone.values()
        return Score(
            accuracy=mean(score.accuracy for score in scores),
            loss=mean(score.loss for score in scores),
        )


class StepTime(_Frozen):
    """How often a party did a step, and how long that took; some times may be lost."""

    step: str
    times: int
    seconds: float
    untimed: int


class View(_Frozen):
    """What a party got to see: how many of each.

    With two contributors each can take its own gradient off the sum and read the other's;
    that is what `gradients_of_others` counts.
    """

    encrypted_uploads: int
    encrypted_results: int
    own_gradients: int
    opened_results: int
    gradients_of_others: int


class Party(_Frozen):
    """One party's time, traffic (without keys, shards and initial weights) and view."""

    name: str
    steps: tuple[StepTime, ...]
    sent_bytes: int
    received_bytes: int
    saw: View

    @property
    def seconds(self) -> float:
        """The time of all steps."""
        return sum(step.seconds for step in self.steps)


class Summary(_Frozen):
    """The figures that matter; accuracies in percent, differences in points.

    An upload has `upload_body_bytes` of padded values (0 with the direct cipher), and
    `upload_key_bytes` of all else: ciphertexts of the double trapdoor, proof and header.
    """

    accuracy: float
    float_accuracy: float
    central_accuracy: float
    alone_mean_accuracy: float
    points_below_float: float
    points_above_alone: float
    rounds_released: int
    rounds_void: int
    rounds_identical_to_twin: int
    clamped: int
    values: int
    cipher: str
    upload_bytes_a_value: float
    upload_body_bytes: int
    upload_key_bytes: int


class Report(_Frozen):
    """Everything in `report.json`; `twin` has the twin's digest V of every round."""

    format: Literal["dtl/simulation/v2"] = "dtl/simulation/v2"
    options: SimulationOptions
    job: str
    security: str
    samples: dict[str, int]
    test_samples: int
    summary: Summary
    scores: tuple[Scores, ...]
    rounds: tuple[RoundRecord, ...]
    twin: tuple[str | None, ...]
    parties: tuple[Party, ...]
    steps: tuple[Step, ...]
    software: dict[str, str]

    def commands(self) -> str:
        """The whole run by hand, as a shell script for an empty folder."""
        lines = ["#!/bin/sh", "# The same training, every party's step by hand.", "set -eu"]
        folders: set[str] = set()
        for step in self.steps:
            folder = f"rounds/{step.round:03}"
            if step.round and folder not in folders:
                folders.add(folder)
                lines += ["", f"# round {step.round}", f"mkdir -p {folder}"]
            lines.append(f"dtl {step.command}")
        return "\n".join(lines) + "\n"


def make_report(
    options: SimulationOptions,
    consortium: Consortium,
    baselines: Baselines,
    rounds: Sequence[RoundRecord],
    twin: Sequence[str | None],
    identical: int,
    scores: Sequence[Scores],
    steps: Sequence[Step],
) -> Report:
    """Put the report of a finished run together."""
    shards = consortium.shards
    uploads = [step.bytes for step in steps if step.step == "encrypt-grads"]
    values = sum(array.size for array in baselines.twin.initial.values())
    body = consortium.job.codec.body_bytes(values)
    last = scores[-1]
    released = sum(record.released for record in rounds)

    def percent(score: Score) -> float:
        return round(100 * score.accuracy, 3)

    summary = Summary(
        accuracy=percent(last.encrypted),
        float_accuracy=percent(last.float),
        central_accuracy=percent(last.central),
        alone_mean_accuracy=percent(last.alone_mean),
        points_below_float=round(percent(last.float) - percent(last.encrypted), 3),
        points_above_alone=round(percent(last.encrypted) - percent(last.alone_mean), 3),
        rounds_released=released,
        rounds_void=len(rounds) - released,
        rounds_identical_to_twin=identical,
        clamped=baselines.twin.clamped,
        values=values,
        cipher=options.cipher,
        upload_bytes_a_value=round(mean(uploads) / values, 3) if uploads else 0.0,
        upload_body_bytes=body if uploads else 0,
        upload_key_bytes=round(mean(uploads) - body) if uploads else 0,
    )
    names = (KGC, SERVER, *options.participants)
    return Report(
        options=options,
        job=consortium.job.digest,
        security=consortium.job.security,
        samples={name: len(shards[name].x) for name in options.participants},
        test_samples=len(shards[split.TEST].x),
        summary=summary,
        scores=tuple(scores),
        rounds=tuple(rounds),
        twin=tuple(twin),
        parties=tuple(_party(name, consortium, steps, rounds) for name in names),
        steps=tuple(steps),
        software=_software(),
    )


def _software() -> dict[str, str]:
    """Versions by name; importlib returns None where it may not read a package's metadata."""
    return {"python": python_version()} | {n: version(n) or "unknown" for n in _LIBRARIES}


def _party(
    name: str, consortium: Consortium, steps: Sequence[Step], rounds: Sequence[RoundRecord]
) -> Party:
    own: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        if step.party == name:
            own[step.step].append(step)
    sent, received = _traffic(steps)
    return Party(
        name=name,
        steps=tuple(
            StepTime(
                step=step,
                times=len(done),
                seconds=round(sum(one.seconds or 0 for one in done), 4),
                untimed=sum(one.seconds is None for one in done),
            )
            for step, done in own.items()
        ),
        sent_bytes=sent[name],
        received_bytes=received[name],
        saw=_view(name, consortium, {k: len(done) for k, done in own.items()}, steps, rounds),
    )


def _traffic(steps: Sequence[Step]) -> tuple[Counter[str], Counter[str]]:
    """Bytes sent and received by each party: uploads, close files, reveals and releases."""
    sent: Counter[str] = Counter()
    received: Counter[str] = Counter()
    sizes = {(step.round, step.step): step.bytes for step in steps if step.party == SERVER}
    answers = {"open-model": "release-model", "reveal-masks": "close-round"}
    for step in steps:
        if step.step in ("encrypt-grads", "reveal-masks"):
            sent[step.party] += step.bytes
            received[SERVER] += step.bytes
        if step.step in answers:  # what this party was sent before it could do that
            size = sizes[step.round, answers[step.step]]
            sent[SERVER] += size
            received[step.party] += size
    return sent, received


def _view(
    name: str,
    consortium: Consortium,
    done: Mapping[str, int],
    steps: Sequence[Step],
    rounds: Sequence[RoundRecord],
) -> View:
    """What a party got to see, as its ledger, its steps and the manifests tell."""
    if name == KGC:
        results, opened = [], []
    else:
        with Ledger(consortium.key(name)) as ledger:
            results, opened = ledger.find(AggregateEntry), ledger.find(OpenEntry)
    uploads = sum(step.step == "encrypt-grads" for step in steps if name in (SERVER, step.party))
    return View(
        encrypted_uploads=uploads,
        encrypted_results=len(results),
        own_gradients=done.get("compute-grads", 0),
        opened_results=len(opened),
        gradients_of_others=sum(
            len(record.contributors) == 2 and name in record.contributors for record in rounds
        ),
    )
