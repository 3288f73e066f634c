"""The server's side of many rounds: ask for uploads, add up, release; go on without the missing.

It knows no engine: a `Courier` brings files to participants and theirs back. All files stay in
one folder, a subfolder a round, under the names that a run by hand would give them; what is
there is not made again, so an interrupted run is taken up where it stopped.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from dtl.core.errors import DtlError, FormatError, QuorumError
from dtl.core.files.atomic import machine_errors, write_file
from dtl.core.files.closing import Close, Reveal
from dtl.core.files.container import Container
from dtl.core.files.headers import ReleaseHeader, ResultHeader, UploadHeader, read_header
from dtl.core.files.key_file import Key
from dtl.core.flower import evidence
from dtl.core.parallel import DEFAULT_WORK, Work
from dtl.core.public import results, uploads
from dtl.core.public.results import Start
from dtl.core.public.verification import Evidence
from dtl.core.roles import server

CONTRIBUTE, REVEAL, RELEASE = "contribute", "reveal", "release"
MODEL_RESULT, MODEL_RELEASE, CLOSE, VOID = "model.enc", "model.release", "round.close", "void"
POLL_SECONDS = 0.5
NOTHING: Mapping[str, Path] = MappingProxyType({})

logger = logging.getLogger("flwr.dtl")


class Courier(Protocol):
    """Brings requests with a file to participants, and their answers back."""

    def present(self) -> Collection[str]:
        """Who is there."""
        ...

    def ask(
        self,
        step: str,
        names: Collection[str],
        number: int,
        file: Path,
        along: Mapping[str, Path] = NOTHING,
    ) -> Iterator[tuple[str, bytes]]:
        """Send a file to those of the named who are there; yield (name, answer) as they come.

        Whoever fails, or does not answer in time, is left out; why somebody failed is not
        known. `number` is the round, `along` are more files by name.
        """
        ...


@dataclass(frozen=True)
class Plan:
    """What the server is to do: so many rounds, from these initial weights, in this folder.

    Those who work by hand have no node: they lay their files into the folder, and `patience`
    is how many seconds they have for each step, until the copy is complete. With
    `send_uploads`, a release goes out with all that it can be recomputed from.
    """

    folder: Path
    initial: Path
    rounds: int
    by_hand: Collection[str] = ()
    patience: float = 0
    send_uploads: bool = False


Check = Callable[[str, Path], None]
"""Raises a DtlError unless a file is what is expected of the named participant."""

Ask = Callable[[Collection[str]], Iterator[tuple[str, bytes]]]
"""Asks the named for the file of a step; yields (name, answer)."""


@dataclass
class _Laid:
    """A file that somebody lays into the folder, perhaps piece by piece."""

    path: Path
    check: Callable[[Path], None]
    reason: str = "no such file"
    _stamp: tuple[int, ...] = ()

    def is_good(self) -> bool:
        """Whether it passes its check, which is done again only when the file has changed."""
        stamp: tuple[int, ...] = ()
        with suppress(OSError):
            status = self.path.stat()
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self.check(self.path)
            except DtlError as error:
                self.reason = error.message
            else:
                self.reason = ""
        return not self.reason


class Conductor:
    """Leads the rounds of a job with the server's key."""

    def __init__(self, key: Key, plan: Plan, courier: Courier, work: Work = DEFAULT_WORK) -> None:
        self._key, self._plan, self._courier, self._work = key, plan, courier, work
        self._base = plan.initial  # what the next round starts from: weights, later a release
        self._granted: Collection[str] = key.job.names
        self._along = NOTHING  # what the base can be recomputed from, where that is sent

    def run(self) -> Path:
        """Do the rounds that are not done yet; returns the last release.

        Raises QuorumError when the last round is void: too few contributed.
        """
        done = True
        for number in range(1, self._plan.rounds + 1):
            done = self._round(number)
        if not done:
            raise QuorumError(f"round {self._plan.rounds} is void: too few contributed")
        last = (RELEASE, self._granted, self._plan.rounds, self._base, self._along)
        for name, _ in self._courier.ask(*last):
            logger.info("%s has opened the last release", name)
        return self._base

    def _round(self, number: int) -> bool:
        """Do a round, or what is left of it; False when it is void."""
        folder = self._plan.folder / f"{number:03}"
        with machine_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        release, void = folder / MODEL_RELEASE, folder / VOID
        if void.exists():
            return False
        if not release.exists():
            try:
                self._make_release(number, folder)
            except QuorumError as error:
                logger.warning("round %d is void: %s", number, error.message)
                write_file(void, error.message.encode())
                return False
        header = _header(release)
        manifest = header.manifest
        if self._plan.send_uploads:
            self._along = evidence.named(self._evidence(folder, manifest))
        self._base, self._granted = release, header.names
        present, missing = ", ".join(manifest.names), ", ".join(manifest.missing) or "nobody"
        logger.info("round %d: released; in it: %s; missing: %s", number, present, missing)
        return True

    def _evidence(self, folder: Path, manifest: ResultHeader) -> Evidence:
        """What a round's result was made of; `self._base` is still what the round started from."""
        first = self._base == self._plan.initial
        reveals = _files(folder, manifest.names, "reveal")
        return Evidence(
            uploads=list(_files(folder, manifest.names, "upload").values()),
            models=[] if first else [self._base.with_name(MODEL_RESULT)],
            initial=self._base if first else None,
            reveals=list(reveals.values()) if manifest.missing and self._key.job.masks else [],
        )

    def _make_release(self, number: int, folder: Path) -> None:
        result = folder / MODEL_RESULT
        if not result.exists():
            self._aggregate(number, folder, result)
        # An admission is given once: only to who is there to make use of it.
        here = {*self._courier.present(), *self._plan.by_hand}
        admit = [name for name in server.newcomers(self._key, result) if name in here]
        policy = server.Policy(admit=admit)
        server.release(self._key, result, folder / MODEL_RELEASE, policy, work=self._work)

    def _aggregate(self, number: int, folder: Path, result: Path) -> None:
        """Collect uploads and add them up, without those who are missing where need be."""
        key, job, close = self._key, self._key.job, folder / CLOSE
        first = self._base == self._plan.initial
        given = server.Round(
            model=None if first else self._base.with_name(MODEL_RESULT),
            initial=self._base if first else None,
            skip_invalid=True,
        )
        # Once a round is closed, nobody else is asked: what came now could be opened.
        names = Close.load(close, job).names if close.exists() else self._granted
        paths = _files(folder, names, "upload")
        fits_upload = partial(self._check_upload, number, self._start(given))
        asked = partial(self._courier.ask, number=number, file=self._base, along=self._along)
        paths = self._collect(partial(asked, CONTRIBUTE), paths, fits_upload)
        if not close.exists():
            if not job.masks or len(paths) == len(job.participants):
                try:
                    server.aggregate(key, list(paths.values()), result, given, work=self._work)
                    return
                except QuorumError as error:
                    if not job.masks:
                        raise
                    logger.warning("%s", error.message)  # one of them is no good
            paths = self._valid(paths)
            if not results.can_close(job, len(paths)):
                raise QuorumError(f"too few to go on without the others: {', '.join(paths)}")
            server.close_round(key, list(paths.values()), close, work=self._work)
        closed = Close.load(close, job)
        reveals = _files(folder, closed.names, "reveal")
        fits_reveal = partial(self._check_reveal, number, closed)
        asked = partial(self._courier.ask, number=number, file=close)
        reveals = self._collect(partial(asked, REVEAL), reveals, fits_reveal)
        given = replace(given, skip_invalid=False, close=close, reveals=list(reveals.values()))
        server.aggregate(key, list(paths.values()), result, given, work=self._work)

    def _start(self, given: server.Round) -> Start:
        """What uploads must be based on."""
        job = self._key.job
        if given.model is None:
            return results.start_from_weights(job, self._base)
        with ExitStack() as stack:
            return results.open_result(job, given.model, stack, self._work).start()

    def _valid(self, paths: Mapping[str, Path]) -> dict[str, Path]:
        """The uploads that pass every check of their own."""
        valid = {}
        for name, path in paths.items():
            try:
                with ExitStack() as stack:
                    job = self._key.job
                    opened = uploads.open_upload(job, path, stack, self._work)
                    uploads.check_proof(job, opened, self._work)
                    uploads.check_body(job, opened.body, opened.header.values, self._work)
            except DtlError as error:
                if error.exit_code < FormatError.exit_code:
                    raise
                logger.warning("%s", error.message)
            else:
                valid[name] = path
        return valid

    def _collect(self, ask: Ask, paths: Mapping[str, Path], check: Check) -> dict[str, Path]:
        """The files of a step that pass `check`, by participant; asked for are those not there."""
        wanted = [name for name, path in paths.items() if not path.exists()]
        answers = ask(wanted) if wanted else iter(())
        found = set()
        for name, data in answers:
            received = paths[name].with_name(f".{paths[name].name}.received")
            write_file(received, data, force=True)
            try:
                check(name, received)
            except DtlError as error:
                logger.warning("refused what the node of %s delivered: %s", name, error.message)
                received.unlink()
            else:
                if paths[name].exists():  # laid in by hand meanwhile: never overwritten
                    received.unlink()
                else:
                    received.rename(paths[name])
                    found.add(name)
        laid = {
            name: _Laid(path, partial(check, name))
            for name, path in paths.items()
            if name not in found and (name in self._plan.by_hand or path.exists())
        }
        found |= self._await(laid)
        return {name: path for name, path in paths.items() if name in found}

    def _await(self, files: Mapping[str, _Laid]) -> set[str]:
        """Whose files are good, or become so as long as there is patience.

        What is no good then stays where it is, and its participant counts as missing.
        """
        deadline = time.monotonic() + self._plan.patience
        pending = {name for name, file in files.items() if not file.is_good()}
        for name in sorted(pending):
            logger.info("waiting for %s, which is made by hand", files[name].path)
        while pending and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            pending = {name for name in pending if not files[name].is_good()}
        for name in sorted(pending):
            logger.warning("%s does not count: %s", files[name].path, files[name].reason)
        return files.keys() - pending

    def _check_upload(self, number: int, start: Start, name: str, path: Path) -> None:
        """Raise a DtlError unless a file is this participant's upload for this round."""
        with ExitStack() as stack:
            upload = uploads.open_upload(self._key.job, path, stack, self._work)
            _check_sender(name, number, upload.header)
            results.check_base(upload, start)

    def _check_reveal(self, number: int, close: Close, name: str, path: Path) -> None:
        """Raise a DtlError unless a file is this participant's answer to the close file."""
        reveal = Reveal.load(path, self._key.job)
        _check_sender(name, number, reveal)
        if (reveal.base, reveal.close) != (close.base, close.digest):
            raise FormatError(f"{path}: of another base or close file")
        if set(reveal.keys) != set(close.missing):
            raise FormatError(f"{path}: not about those who are missing in this round")


def _files(folder: Path, names: Collection[str], ending: str) -> dict[str, Path]:
    return {name: folder / f"{name}.{ending}" for name in sorted(names)}


def _check_sender(name: str, number: int, found: Reveal | UploadHeader) -> None:
    """Raise FormatError unless a file is this participant's, of this round.

    A node speaks for one participant, and delivers nobody else's files.
    """
    if (found.signer, found.round) != (name, number):
        raise FormatError(
            f"expected {name}'s of round {number}, found {found.signer}'s of round {found.round}"
        )


def _header(release: Path) -> ReleaseHeader:
    with Container(release) as container:
        header = read_header(container, ("release",), None)
    if not isinstance(header, ReleaseHeader):
        raise FormatError(f"{release}: expected a release")
    return header
