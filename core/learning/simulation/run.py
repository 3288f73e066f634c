"""A whole training run in one folder: the encrypted one and what it is held against."""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dtl.core.errors import FormatError, NotAllowedError, UsageError, VerificationError
from dtl.core.files.atomic import (
    AtomicFolder,
    machine_errors,
    read_file,
    write_file,
)
from dtl.core.files.shards import Shard
from dtl.core.files.tensor_writer import write_arrays
from dtl.core.files.tensors import read_arrays
from dtl.core.learning import mlp, split
from dtl.core.learning.simulation import page
from dtl.core.learning.simulation.baselines import Baselines
from dtl.core.learning.simulation.consortium import INITIAL, Consortium
from dtl.core.learning.simulation.journal import Journal
from dtl.core.learning.simulation.options import SimulationOptions
from dtl.core.learning.simulation.report import Report, Score, Scores, make_report
from dtl.core.parallel import DEFAULT_WORK, Work

OPTIONS, JOURNAL, COMMANDS = "simulation.json", "journal.jsonl", "commands.sh"
REPORT, PAGE, MODEL = "report.json", "report.html", "model.safetensors"
MAX_OPTIONS_BYTES = 1 << 20


def simulate(folder: Path, options: SimulationOptions, work: Work = DEFAULT_WORK) -> Report:
    """Train from the first round to the last, or go on with an interrupted run.

    The folder holds every file of a real run, `report.json`, `report.html`, `commands.sh`
    (the same by hand) and the last opened model. Raises NumericError when a model leaves the
    range of the fixed point, VerificationError when a model is not that of the twin.
    """
    with _only_one(folder):
        journal = Journal(folder / JOURNAL)
        consortium = Consortium(folder, options, journal, work)
        consortium.set_up()
        initial, _ = read_arrays(folder / INITIAL)
        shards = consortium.shards
        test = shards[split.TEST]
        baselines = Baselines(options, initial, shards, consortium.shares)
        encrypted = initial
        scores = [_score_all(initial, baselines, test)]
        records, twin = [], []
        work.progress("rounds", 0, options.rounds)
        for number in range(1, options.rounds + 1):
            record = consortium.round(number)
            expected = baselines.advance(number, record.contributors)
            if record.opened != expected:
                raise VerificationError(
                    f"round {number}: the opened model is not that of the plaintext twin"
                )
            if record.released:
                encrypted, _ = read_arrays(consortium.model(record))
            records.append(record)
            twin.append(expected)
            scores.append(_score_all(encrypted, baselines, test))
            work.progress("rounds", number, options.rounds)
        report = make_report(options, consortium, baselines, records, twin, scores, journal.steps)
        write_arrays(folder / MODEL, encrypted, mlp.DTYPE, None, force=True)
        for name, text in (
            (COMMANDS, report.commands()),
            (REPORT, report.model_dump_json(indent=1)),
            (PAGE, page.render(report)),
        ):
            write_file(folder / name, text.encode(), force=True)
    return report


def new_run(folder: Path, wanted: Mapping[str, Any]) -> SimulationOptions:
    """Make the folder of a new run; `wanted` are SimulationOptions by name.

    Raises UsageError for options that cannot work, and unless the folder is new or empty.
    """
    options = SimulationOptions(**wanted)
    options.check()
    split.make_shards(options.source, options.split)  # its errors, before anything is written
    with AtomicFolder(folder) as staging:
        write_file(staging.temporary / OPTIONS, _encode(options))
        staging.commit()
    return options


def resume_run(folder: Path, wanted: Mapping[str, Any]) -> SimulationOptions:
    """The options of an interrupted run, or of a finished one that is to have more rounds.

    `wanted` may name what the run was started with again, and more rounds.
    """
    path = folder / OPTIONS
    if not path.is_file():
        raise UsageError(f"{folder}: no simulation to resume", "without --resume a new one starts")
    try:
        options = SimulationOptions.model_validate_json(read_file(path, MAX_OPTIONS_BYTES))
    except ValidationError:
        raise FormatError(f"{path}: expected the options of a simulation") from None
    for name, value in wanted.items():
        known = getattr(options, name)
        if value != known and not (name == "rounds" and value > known):
            option = "NAME" if name == "source" else f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{option}: the run in {folder} has {known}, found {value}",
                "a run is resumed with the options that it was started with",
            )
    longer = options.model_copy(update={"rounds": wanted.get("rounds", options.rounds)})
    longer.check()  # the names become names of files
    if longer != options:
        write_file(path, _encode(longer), force=True)
    return longer


def _encode(options: SimulationOptions) -> bytes:
    return options.model_dump_json(indent=1).encode()


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Keep two processes from working in one folder."""
    with machine_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NotAllowedError(f"{folder}: a simulation is running there already") from None
        with machine_errors(folder):
            yield
    finally:
        os.close(descriptor)


def _score_all(encrypted: mlp.Weights, baselines: Baselines, test: Shard) -> Scores:
    def score(weights: mlp.Weights) -> Score:
        accuracy, loss, _ = mlp.score(weights, test, "a simulated model")
        return Score(accuracy=accuracy, loss=loss)

    return Scores(
        encrypted=score(encrypted),
        float=score(baselines.float.weights),
        central=score(baselines.central.weights),
        alone={name: score(learner.weights) for name, learner in baselines.alone.items()},
    )
