"""dtl's own steps, through the role functions and files that the commands use."""

from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from secrets import token_bytes
from statistics import median

from dtl.core.benchmark.sample import CONTRIBUTORS, Sample, Stopwatch
from dtl.core.ciphers.cipher import Steps
from dtl.core.encoding.fixed_point import Stochastic
from dtl.core.files import tensors
from dtl.core.files.atomic import AtomicOutput
from dtl.core.files.job_file import SERVER
from dtl.core.files.key_file import Key
from dtl.core.files.ledger import Ledger
from dtl.core.parallel import Work
from dtl.core.roles import participant, server
from dtl.core.roles.participant.basis import Basis
from dtl.core.roles.participant.planning import make_plan
from dtl.core.roles.participant.producing import write_upload

_rounds = count(1)


def names(uploads: int) -> tuple[str, ...]:
    """A roster for so many uploads."""
    if uploads <= CONTRIBUTORS:
        return ("alice", "bob", "carol")[:uploads]
    return tuple(f"p{number:04}" for number in range(1, uploads + 1))


@cache
def _key(folder: Path, name: str) -> Key:
    return Key.load(folder / f"{name}.key", folder / "job.json", lambda: b"")


def measure(keys: Path, gradients: Path, values: int, workers: int) -> Sample:
    """One round of a job on the gradients in a file; the files that it makes are removed.

    Up to three participants encrypt as in any round. Where the roster is larger, one does, and
    all other uploads are made before for the purpose, of the same gradients, without masks:
    the server cannot tell, and it has the same work with them.
    """
    number, work, watch = next(_rounds), Work(workers), Stopwatch(values)
    key = partial(_key, keys)
    roster = key(SERVER).job.names
    folder = keys / "round"
    uploads = [folder / f"{name}.upload" for name in roster]
    result, release, opened = (folder / name for name in ("sum", "release", "sum.safetensors"))

    def encrypt(name: str) -> object:
        options = participant.UploadOptions(Stochastic(token_bytes(32)), round=number)
        path = folder / f"{name}.upload"
        return participant.encrypt_gradients(key(name), gradients, path, options, work=work)

    folder.mkdir(exist_ok=True)
    try:
        encrypting = roster if len(roster) <= CONTRIBUTORS else roster[:1]
        times = [watch.time(partial(encrypt, name))[0] for name in encrypting]
        if encrypting != roster:
            uploads[0].unlink()
            for name, path in zip(roster, uploads, strict=True):
                make_without_masks(key(name), gradients, path, number, work)
        given = server.Round()
        aggregate, _ = watch.time(
            lambda: server.aggregate(key(SERVER), uploads, result, given, work=work)
        )
        released, _ = watch.time(
            lambda: server.release(key(SERVER), result, release, server.Policy(), work=work)
        )
        opening, _ = watch.time(
            lambda: participant.open_release(key(roster[-1]), release, opened, work=work)
        )
        size = uploads[0].stat().st_size / values
    finally:
        for path in (*uploads, result, release, opened):
            path.unlink(missing_ok=True)
    return Sample(values, median(times), 0.0, aggregate, released, opening, size, len(roster))


def make_without_masks(key: Key, gradients: Path, path: Path, number: int, work: Work) -> None:
    """A participant's upload without masks and without a ledger line, for measuring only."""
    steps = Steps(1 / len(key.job.participants), Stochastic(token_bytes(32)))
    with ExitStack() as stack:
        source = tensors.open_tensors(gradients)
        stack.callback(source.close)
        with Ledger(key) as ledger:
            plan = make_plan(key, source, Basis(number, None, None), steps, ledger)
        file = stack.enter_context(AtomicOutput(path))
        write_upload(key, replace(plan, mask_keys=()), file, work)
        file.commit()
