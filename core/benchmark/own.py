"""dtl's own steps, through the role functions and files that the commands use."""

from functools import cache, partial
from itertools import count
from pathlib import Path
from secrets import token_bytes
from statistics import median

from dtl.core.benchmark.sample import Sample, Stopwatch
from dtl.core.encoding.fixed_point import Stochastic
from dtl.core.files.job_file import SERVER
from dtl.core.files.key_file import Key
from dtl.core.parallel import Work
from dtl.core.roles import participant, server

NAMES = ("alice", "bob", "carol")
JOB, GRADIENTS = "job", "gradients.safetensors"


@cache
def _keys(folder: Path) -> dict[str, Key]:
    return {
        name: Key.load(folder / f"{name}.key", folder / "job.json", lambda: b"")
        for name in (*NAMES, SERVER)
    }


_rounds = count(1)


def measure(folder: Path, keys_folder: Path, values: int, workers: int) -> Sample:
    """One round on the gradients in `folder`, whose files are removed again."""
    keys, number, work = _keys(keys_folder), next(_rounds), Work(workers)
    watch = Stopwatch(values)
    uploads = [folder / f"{name}.upload" for name in NAMES]

    def encrypt_one(name: str, upload: Path) -> object:
        options = participant.UploadOptions(Stochastic(token_bytes(32)), round=number)
        return participant.encrypt_gradients(
            keys[name], folder / GRADIENTS, upload, options, work=work
        )

    result, release, opened = (folder / name for name in ("sum", "release", "sum.safetensors"))
    try:
        encrypt = [
            watch.time(partial(encrypt_one, name, upload))[0]
            for name, upload in zip(NAMES, uploads, strict=True)
        ]
        aggregate, _ = watch.time(
            lambda: server.aggregate(keys[SERVER], uploads, result, server.Round(), work=work)
        )
        released, _ = watch.time(
            lambda: server.release(keys[SERVER], result, release, server.Policy(), work=work)
        )
        opening, _ = watch.time(
            lambda: participant.open_release(keys[NAMES[0]], release, opened, work=work)
        )
        size = uploads[0].stat().st_size / values
    finally:
        for path in (*uploads, result, release, opened):
            path.unlink(missing_ok=True)
    return Sample(values, median(encrypt), 0.0, aggregate, released, opening, size)
