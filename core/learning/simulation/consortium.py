"""The encrypted run: every party's steps, through the functions and files of the commands.

A step whose output is there is not done again, so an interrupted run is taken up where it
stopped. All that depends on chance is derived from the seed, but for keys and ciphertexts.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dtl.core.errors import FormatError, QuorumError, VerificationError
from dtl.core.files.atomic import machine_errors, read_file, remove_second_names, write_file
from dtl.core.files.container import Container
from dtl.core.files.headers import AnyHeader, ReleaseHeader, read_header
from dtl.core.files.job_file import SERVER, Job
from dtl.core.files.key_file import Key
from dtl.core.files.shards import Shard, load_shard
from dtl.core.files.tensors import open_tensors
from dtl.core.learning import mlp, split
from dtl.core.learning.optimizers import Recording, StateFiles, apply_sum
from dtl.core.learning.simulation.journal import Journal
from dtl.core.learning.simulation.options import SimulationOptions
from dtl.core.parallel import Work
from dtl.core.roles import key_center, participant, server

KGC, EVERYBODY = "kgc", "everybody"
JOB, SHARDS, ROUNDS, INITIAL = "job", "shards", "rounds", "w0.safetensors"
MAX_RECORD_BYTES = 1 << 20
STATE = "optimizer.safetensors"


class RoundRecord(BaseModel):
    """What became of a round; the names are those of the release's manifest.

    `released` is false for a void round: too few could contribute. `waiting` were there
    without a grant of the model that the round was based on. `clamped` is None where an
    interruption lost the count.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    round: int
    released: bool
    present: tuple[str, ...]
    waiting: tuple[str, ...]
    contributors: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    granted: tuple[str, ...] = ()
    admitted: tuple[str, ...] = ()
    kind: Literal["model", "sum"] | None = None
    result: str | None = None
    opened: str | None = None
    clamped: int | None = None


class Consortium:
    """All parties of a job on one machine, in one folder; each acts only with its own key."""

    def __init__(
        self, folder: Path, options: SimulationOptions, journal: Journal, work: Work
    ) -> None:
        self._folder, self._options, self._journal = folder, options, journal
        self._work = replace(work, progress=lambda *_: None)
        self._last: RoundRecord | None = None  # the last round that was released
        self._void_since: list[int] = []

    # --- set up ---------------------------------------------------------------------------

    def set_up(self) -> None:
        """Keys, shards and initial weights."""
        o = self._options
        roster = ("--participants", ",".join(o.participants))
        self._journal.run(
            0,
            KGC,
            self._folder / JOB / "job.json",
            lambda: key_center.generate_job(self._folder / JOB, o.job, work=self._work),
            *("keygen", JOB, *roster, "--modulus-bits", o.modulus_bits),
            *("--slot-bits", o.slot_bits, "--fraction-bits", o.fraction_bits),
            *("--cipher", o.cipher),
            *("--min-contributors", o.min_contributors, *_given("--insecure", o.insecure)),
        )
        self._journal.run(
            0,
            EVERYBODY,
            self._folder / SHARDS / f"{split.TEST}.npz",
            lambda: split.split_data(o.source, self._folder / SHARDS, o.split, force=True),
            *("split-data", o.source, *roster, "--out", SHARDS, "--test", o.test),
            *("--seed", o.seed, *_given("--alpha", o.alpha)),
        )
        first = f"{SHARDS}/{o.participants[0]}.npz"
        self._journal.run(
            0,
            EVERYBODY,
            self._folder / INITIAL,
            lambda: mlp.init_model(self._folder / first, self._folder / INITIAL, o.hidden, o.seed),
            *("init-model", "--data", first, "--hidden", ",".join(map(str, o.hidden))),
            *("--seed", o.seed, "-o", INITIAL),
        )

    @cached_property
    def job(self) -> Job:
        """The public job file."""
        return Job.load(self._folder / JOB / "job.json")

    @cached_property
    def shards(self) -> dict[str, Shard]:
        """Everyone's samples, and those of the test."""
        names = (*self._options.participants, split.TEST)
        return {name: load_shard(self._folder / SHARDS / f"{name}.npz") for name in names}

    @cached_property
    def shares(self) -> dict[str, float]:
        """Everyone's weight in the sum."""
        names = self._options.participants
        if self._options.weights == "equal":
            return {name: 1 / len(names) for name in names}
        counts = {name: len(self.shards[name].x) for name in names}
        return {name: count / sum(counts.values()) for name, count in counts.items()}

    @cached_property
    def _keys(self) -> dict[str, Key]:
        job = self._folder / JOB
        names = (SERVER, *self._options.participants)
        return {
            name: Key.load(job / f"{name}.key", job / "job.json", lambda: b"") for name in names
        }

    def key(self, name: str) -> Key:
        """The key of a party."""
        return self._keys[name]

    # --- a round --------------------------------------------------------------------------

    def round(self, number: int) -> RoundRecord:
        """Do one round, or what is left of it."""
        folder = self._folder / ROUNDS / f"{number:03}"
        path = folder / "round.json"
        with machine_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        # A round that was done is walked through again: nothing is taken on trust.
        record = self._do_round(number)
        if path.exists():
            remove_second_names(path)
            noted = _read_record(path)
            if noted != record.model_copy(update={"clamped": noted.clamped}):
                raise VerificationError(f"{path}: contradicts the files of the round")
            record = noted
        else:
            write_file(path, record.model_dump_json(indent=1).encode())
        if record.released:
            self._last, self._void_since = record, []
        else:
            self._void_since.append(number)
        return record

    def _do_round(self, number: int) -> RoundRecord:
        o = self._options
        present = [name for name in o.participants if o.is_present(number, name)]
        able = [name for name in present if self._last is None or name in self._last.granted]
        record = RoundRecord(
            round=number,
            released=False,
            present=tuple(present),
            waiting=tuple(name for name in present if name not in able),
        )
        clamped = [self._contribute(number, name) for name in able]
        release = self._release(number, able) if able else None
        if release is None:
            return record
        manifest = release.manifest
        opened = {self._open(number, name) for name in manifest.names}
        if len(opened) != 1:
            raise VerificationError(f"round {number}: participants opened different models")
        return record.model_copy(
            update={
                "released": True,
                "contributors": manifest.names,
                "missing": manifest.missing,
                "granted": release.names,
                "admitted": release.admitted,
                "kind": manifest.kind,
                "result": release.of,
                "opened": opened.pop(),
                "clamped": None if None in clamped else sum(c for c in clamped if c),
            }
        )

    def _contribute(self, number: int, name: str) -> int | None:
        """Open the model, train on the own shard, encrypt; returns how many were clamped."""
        o, key = self._options, self.key(name)
        if self._last is not None and o.server_keeps_model:
            self._open(self._last.round, name)
        model, data = self._model(name), f"{SHARDS}/{name}.npz"
        gradients = _file(number, f"{name}.grads.safetensors")
        upload = _file(number, f"{name}.upload")
        training = o.training(number, name)
        self._journal.run(
            number,
            name,
            self._folder / gradients,
            lambda: mlp.compute_gradients(
                self._folder / model, self._folder / data, self._folder / gradients, training
            ),
            *("compute-grads", "--model", model, "--data", data),
            *("--local-epochs", training.epochs, *_given("--batch-size", training.batch_size)),
            *(*_given("--local-lr", training.lr), "--seed", training.seed, "-o", gradients),
        )
        # A round that was void is begun anew on the same base.
        again = any((self._folder / _file(n, f"{name}.upload")).exists() for n in self._void_since)
        wanted = participant.UploadOptions(
            rounding=o.rounding_of(number, name),
            weight=self.shares[name],
            lr=o.upload_lr,
            round=number,
            accept_differencing=again,
        )
        seed = o.rounding_seed(number, name) if o.rounding == "stochastic" else None
        reports: list[participant.UploadReport] = []
        self._journal.run(
            number,
            name,
            self._folder / upload,
            lambda: reports.append(
                participant.encrypt_gradients(
                    key, self._folder / gradients, self._folder / upload, wanted, work=self._work
                )
            ),
            *("encrypt-grads", gradients, "--key", f"{JOB}/{name}.key", "--round", number),
            *("--weight", wanted.weight, "--lr", wanted.lr, "--rounding", o.rounding),
            *_given("--rounding-seed", seed),
            *(*_given("--accept-differencing", again), "-o", upload),
        )
        return reports[0].clamped if reports else None

    def _release(self, number: int, able: Sequence[str]) -> ReleaseHeader | None:
        """Let the server add up and release; None when the round is void."""
        o, key = self._options, self.key(SERVER)
        uploads = [_file(number, f"{name}.upload") for name in able]
        kind = "model" if o.server_keeps_model else "sum"
        result, release = _file(number, f"{kind}.enc"), _file(number, f"{kind}.release")
        given = server.Round()
        closing: tuple[object, ...] = ()
        if set(able) != set(o.participants):
            try:
                close, reveals = self._close(number, able, uploads)
            except QuorumError:
                return None
            given = replace(
                given,
                close=self._folder / close,
                reveals=[self._folder / reveal for reveal in reveals],
            )
            closing = ("--close", close, "--reveals", *reveals)
        start: tuple[object, ...] = ()
        if o.server_keeps_model:
            if self._last is None:
                given = replace(given, initial=self._folder / INITIAL)
                start = ("--initial", INITIAL)
            else:
                model = _file(self._last.round, "model.enc")
                given = replace(given, model=self._folder / model)
                start = ("--model", model)
        self._journal.run(
            number,
            SERVER,
            self._folder / result,
            lambda: server.aggregate(
                key, self._paths(uploads), self._folder / result, given, work=self._work
            ),
            *("aggregate", *uploads, "--key", f"{JOB}/server.key", *start, *closing, "-o", result),
        )
        admit = server.newcomers(key, self._folder / result)
        self._journal.run(
            number,
            SERVER,
            self._folder / release,
            lambda: server.release(
                key,
                self._folder / result,
                self._folder / release,
                server.Policy(admit=admit),
                work=self._work,
            ),
            *("release-model", result, "--key", f"{JOB}/server.key"),
            *_given("--admit", ",".join(admit) or None),
            *("-o", release),
        )
        header, _ = self._header(release)
        if not isinstance(header, ReleaseHeader):
            raise VerificationError(f"{release}: expected a release")
        return header

    def _close(
        self, number: int, able: Sequence[str], uploads: Sequence[str]
    ) -> tuple[str, list[str]]:
        """Go on without the missing; QuorumError when too few are there."""
        close = _file(number, "round.close")
        self._journal.run(
            number,
            SERVER,
            self._folder / close,
            lambda: server.close_round(
                self.key(SERVER), self._paths(uploads), self._folder / close, work=self._work
            ),
            *("close-round", *uploads, "--key", f"{JOB}/server.key", "-o", close),
        )
        reveals = [self._reveal(number, name, close) for name in able]
        return close, reveals

    def _reveal(self, number: int, name: str, close: str) -> str:
        reveal = _file(number, f"{name}.reveal")
        self._journal.run(
            number,
            name,
            self._folder / reveal,
            lambda: participant.reveal_masks(
                self.key(name), self._folder / close, self._folder / reveal
            ),
            *("reveal-masks", close, "--key", f"{JOB}/{name}.key", "-o", reveal),
        )
        return reveal

    def _open(self, number: int, name: str) -> str:
        """Open the release of a round, and step if the model is kept here; returns V."""
        kind = "model" if self._options.server_keeps_model else "sum"
        release, opened = (
            _file(number, f"{kind}.release"),
            _file(number, f"{name}.{kind}.safetensors"),
        )
        self._journal.run(
            number,
            name,
            self._folder / opened,
            lambda: participant.open_release(
                self.key(name), self._folder / release, self._folder / opened, work=self._work
            ),
            *("open-model", release, "--key", f"{JOB}/{name}.key", "-o", opened),
        )
        source = open_tensors(self._folder / opened)
        source.close()
        if source.metadata is None or source.metadata.opened is None:
            raise VerificationError(f"{opened}: expected what open-model wrote")
        if kind == "sum":
            self._step(number, name)
        return source.metadata.opened

    def _step(self, number: int, name: str) -> None:
        """Apply a released sum to the model that a participant keeps itself."""
        o, before = self._options, self._model(name)
        total, model = (_file(number, f"{name}.{kind}.safetensors") for kind in ("sum", "model"))
        last, state = (_file(n, f"{name}.{STATE}") for n in (number - 1, number))
        known = last if number > 1 else None
        self._journal.run(
            number,
            name,
            self._folder / model,
            lambda: apply_sum(
                self._folder / total,
                self._folder / before,
                self._folder / model,
                o.make_optimizer(),
                StateFiles(self._folder / known if known else None, self._folder / state),
                force=True,
                recording=Recording(self.key(name)),
            ),
            *("apply-sum", total, "--model", before, "--key", f"{JOB}/{name}.key"),
            *("--optimizer", o.optimizer),
            *("--lr", o.step_lr, *_given("--state", known), "--state-out", state, "-o", model),
        )

    def _model(self, name: str) -> str:
        """The model that a participant trains on next."""
        if self._last is None:
            return INITIAL
        return _file(self._last.round, f"{name}.model.safetensors")

    def model(self, record: RoundRecord) -> Path:
        """The opened model of a released round."""
        return self._folder / _file(record.round, f"{record.contributors[0]}.model.safetensors")

    def _header(self, file: str) -> tuple[AnyHeader, str]:
        """The header and digest of a bulk file."""
        with Container(self._folder / file) as container:
            kinds = ("sum", "model", "release")
            return read_header(container, kinds, self.job.digest), container.digest().hex()

    def _paths(self, files: Sequence[str]) -> list[Path]:
        return [self._folder / file for file in files]


def _read_record(path: Path) -> RoundRecord:
    try:
        return RoundRecord.model_validate_json(read_file(path, MAX_RECORD_BYTES))
    except ValidationError:
        raise FormatError(
            f"{path}: expected what became of a round", "remove it, and --resume makes it anew"
        ) from None


def _file(number: int, name: str) -> str:
    """A file of a round, as seen from the folder of the run."""
    return f"{ROUNDS}/{number:03}/{name}"


def _given(option: str, value: object) -> tuple[object, ...]:
    """An option on a command line, where it has a value."""
    if value is None or value is False:
        return ()
    return (option,) if value is True else (option, value)
