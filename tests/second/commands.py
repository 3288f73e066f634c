"""The checks of dtl's commands, run with the same arguments; nothing is written.

Raises Refused with the exit code that the command must end with.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.second import auditing, bases, bulk, documents, ledger, proof, releases, results, values
from tests.second.documents import Document, Job, Key
from tests.second.encoding import Refused, require
from tests.second.ledger import Entry, find


@dataclass
class Given:
    """Arguments: files in order, and the values of each option."""

    files: list[Path]
    options: dict[str, list[str]]

    def path(self, option: str) -> Path | None:
        found = self.options.get(option)
        return Path(found[0]) if found else None

    def paths(self, option: str) -> list[Path]:
        return [Path(text) for text in self.options.get(option, [])]

    @property
    def job(self) -> Job:
        return documents.read_job(self.path("--job") or self.files[0].with_name("job.json"))

    def key(self, role: str) -> tuple[Key, Job]:
        """The key of --key, which must be of this role, and its job."""
        path = self.path("--key")
        assert path
        passphrase = self.path("--passphrase-file")
        secret = passphrase.read_bytes().splitlines()[0] if passphrase else b""
        key, job = documents.read_key(
            path, self.path("--job") or path.with_name("job.json"), secret
        )
        found = key.name if key.name in ("server", "kgc") else "participant"
        require(found == role, 5, "a key of another role")
        return key, job

    def ledger(self, key: Key) -> list[Entry]:
        """What the ledger beside --key says."""
        return ledger.read(Path(self.options["--key"][0]).with_name(f"{key.name}.ledger"), key)


def parse(arguments: Sequence[str]) -> Given:
    given, option = Given([], defaultdict(list)), ""
    for text in arguments:
        if text.startswith("-"):
            option = text
            given.options[option] = []
        elif option:
            given.options[option].append(text)
        else:
            given.files.append(Path(text))
    return given


def _is_valid(job: Job, path: Path) -> bool:
    """Whether an upload by itself is what it must be."""
    try:
        upload = bulk.read(path, job, "upload")
        results.check_uploads(job, [upload], None, closing=True)
    except Refused:
        return False
    return True


def _accept(
    job: Job, given: Given, start: results.Start | None, closing: bool = False
) -> tuple[list[bulk.Bulk], dict[str, str]]:
    skip = "--skip-invalid" in given.options
    paths = [path for path in given.files if not skip or _is_valid(job, path)]
    uploads = [bulk.read(path, job, "upload") for path in paths]
    results.check_uploads(job, uploads, start, closing)
    return uploads, {upload.header["signer"]: upload.digest.hex() for upload in uploads}


def _check_first(entries: list[Entry], round_: int, digests: dict[str, str]) -> None:
    for entry in [*find(entries, "aggregate", round=round_), *find(entries, "close", round=round_)]:
        for name, digest in digests.items():
            require(entry["uploads"].get(name, digest) == digest, 5, "a second upload")
            closed = entry["event"] == "close" and name not in entry["uploads"]
            require(not closed, 5, "the round was closed without it")


def _start(job: Job, given: Given) -> results.Start | None:
    model, initial = given.path("--model"), given.path("--initial")
    if model:
        return results.start_from_model(job, results.read_result(model, job))
    return results.start_from_weights(job, initial) if initial else None


def _check_close(
    job: Job, close: Document, uploads: list[bulk.Bulk], digests: dict[str, str]
) -> None:
    """Hold a close file against the uploads that go in."""
    body, first = close.body, uploads[0].header
    closed = {entry["participant"]: entry["upload"] for entry in body["contributors"]}
    require(sorted([*closed, *body["missing"]]) == job.names, 3, "not the roster")
    require(documents.can_close(job, len(closed)), 3, "too few to close a round")
    same = (body["round"], body["base"]) == (first["round"], first["base"])
    require(same, 3, "a close file of another round or base")
    for name, digest in digests.items():
        require(closed.get(name) == digest, 5, "not the upload of the close file")
    require(closed.keys() == digests.keys(), 6, "an upload of the close file is not given")


def aggregate(given: Given) -> None:
    key, job = given.key("server")
    path = given.path("--close")
    close = documents.read_close(path, job) if path else None
    reveals = [documents.read_reveal(item, job) for item in given.paths("--reveals")]
    start = _start(job, given)
    uploads, digests = _accept(job, given, start)
    entries, round_ = given.ledger(key), uploads[0].header["round"]
    _check_first(entries, round_, digests)
    require(len(uploads) >= job.body["min_contributors"], 6, "too few contributors")
    if close is None:
        require(not job.body["masks"] or digests.keys() == set(job.names), 6, "somebody is missing")
    else:
        _check_close(job, close, uploads, digests)
        closed = [entry["digest"] for entry in find(entries, "close", round=round_)]
        require(closed[:1] == [close.digest.hex()], 3, "not the close file of the round")
        for reveal in reveals:
            require(reveal.body["close"] == close.digest.hex(), 3, "of another close file")
        results.orphaned(job, close.body["missing"], uploads, reveals, 6)
    results.manifest(job, uploads, start, uploads[0].header["layout"], "")
    for upload in uploads:
        upload.body(job)


def close_round(given: Given) -> None:
    key, job = given.key("server")
    uploads, digests = _accept(job, given, None, closing=True)
    entries, round_ = given.ledger(key), uploads[0].header["round"]
    _check_first(entries, round_, digests)
    require(documents.can_close(job, len(digests)), 6, "too few to close a round")
    require(not find(entries, "release", round=round_), 5, "the round was released")
    for entry in find(entries, "aggregate", round=round_):
        require(entry["uploads"].keys() <= digests.keys(), 5, "the round was added up")
    for entry in find(entries, "close", round=round_):
        require(entry["uploads"] == digests, 5, "closed with others")


def reveal_masks(given: Given) -> None:
    key, job = given.key("participant")
    close = documents.read_close(given.files[0], job)
    body = close.body
    present = {entry["participant"]: entry["upload"] for entry in body["contributors"]}
    require(sorted([*present, *body["missing"]]) == job.names, 3, "not the roster")
    require(key.name in present, 5, "declares the owner missing")
    require(documents.can_close(job, len(present)), 6, "too few")
    entries = given.ledger(key)
    sent = find(entries, "upload", round=body["round"])
    require(sent, 4, "nothing was sent for that round")
    stated = (sent[0]["upload"], sent[0]["base"])
    require(stated == (present[key.name], body["base"]), 4, "not the own upload")
    before = find(entries, "reveal", round=body["round"])
    if not before:
        for event in ("open", "tried"):
            require(not find(entries, event, round=body["round"]), 5, "the result was released")
        later = [e for e in find(entries, "upload") if e["round"] > body["round"]]
        again = [e for e in later if e["base"] is not None and e["base"] == body["base"]]
        require(not again, 5, "the round was begun anew")
    for entry in before:
        require(entry["close"] == close.digest.hex(), 5, "a second close file of a round")


def release_model(given: Given) -> None:
    key, job = given.key("server")
    result = results.read_result(given.files[0], job)
    header, digest = result.header, result.digest.hex()
    require(len(header["contributors"]) >= job.body["min_contributors"], 6, "too few contributors")
    entries, base = given.ledger(key), header["parent"] or header["initial"]
    for name in given.options.get("--admit", []):
        for entry in find(entries, "release"):
            again = name in entry["admitted"] and entry["result"] != digest
            require(not again, 5, "admitted before")
    for entry in find(entries, "release"):
        if entry["result"] != digest:
            require(entry["round"] != header["round"], 5, "another result of the round")
            require(base is None or entry["base"] != base, 5, "another result on the base")
    results.vector(job, result)


def _evidence(job: Job, given: Given, initial: bool = True) -> results.Evidence:
    uploads = [bulk.read(item, job, "upload") for item in given.paths("--uploads")]
    models = [results.read_result(item, job) for item in given.paths("--model")]
    path = given.path("--initial") if initial else None
    weights = results.start_from_weights(job, path) if path else None
    reveals = [documents.read_reveal(item, job) for item in given.paths("--reveals")]
    return results.Evidence(uploads, models, weights, reveals)


def open_model(given: Given) -> None:
    key, job = given.key("participant")
    release = releases.read(given.files[0], job)
    require(key.name in releases.granted(release), 5, "not granted")
    entries = given.ledger(key)
    releases.check_history(entries, key.name, release)
    releases.check_attempts(entries, release, "--after-failure" in given.options)
    sealed = releases.unlock(job, key, release)
    if given.options["--uploads"]:
        results.recompute(job, release.result, _evidence(job, given))
    releases.open_sealed(job, key, release, sealed, entries)


def encrypt_grads(given: Given) -> None:
    key, _ = given.key("participant")
    gradients = values.read_plain(given.files[0])
    known = gradients.metadata
    require(not known or known["kind"] == "gradients", 3, "not gradients")
    entries = given.ledger(key)
    number = given.options.get("--round")
    wanted = int(number[0]) if number else None
    own = "--own-step" in given.options
    basis = bases.basis_of(gradients, given.path("--model"), wanted, entries, own)
    require(not find(entries, "upload", round=basis.round), 5, "a second upload of the round")
    if own:
        bases.check_step(entries, str(basis.base), str(basis.content))
    bases.check_basis(entries, basis, own)
    again = basis.base is not None and find(entries, "upload", base=basis.base)
    require(not again or "--accept-differencing" in given.options, 5, "a second upload on a base")
    require(all(map(values.is_finite, gradients.floats())), 7, "not finite")


def apply_sum(given: Given) -> None:
    key, _ = given.key("participant")
    total = values.read_plain(given.files[0])
    path = given.path("--model")
    assert path
    model = values.read_plain(path)
    require(total.metadata.get("kind") == "sum", 3, "not a sum")
    require(results.shapes(total.layout) == results.shapes(model.layout), 3, "other tensors")
    bases.check_applied(given.ledger(key), total, model)


def verify(given: Given) -> None:
    key, job = given.key("participant") if "--key" in given.options else (None, given.job)
    path = given.files[0]
    if path.read_bytes().startswith(b"{"):
        _verify_document(path, job)
        return
    evidence = _evidence(job, given)
    kind = bulk.read_form(path, tuple(bulk.KINDS)).kind
    if kind == "upload":
        upload = bulk.read(path, job, "upload")
        proof.check(job, upload)
        upload.body(job)
    elif kind == "release":
        release = releases.read(path, job)
        release.result.body(job)
        if key:
            releases.unlock(job, key, release)
        results.recompute(job, release.result, evidence)
    else:
        results.recompute(job, results.read_result(path, job), evidence)


def _verify_document(path: Path, job: Job) -> None:
    kind = documents.kind_of(path)
    if kind == "reveal":
        documents.read_reveal(path, job)
    elif kind == "close":
        body = documents.read_close(path, job).body
        present = [entry["participant"] for entry in body["contributors"]]
        require(sorted([*present, *body["missing"]]) == job.names, 3, "not the roster")
        require(documents.can_close(job, len(present)), 6, "too few")
    else:
        require(kind is None, 3, "a document of an unknown kind")
        documents.read_job(path)


def audit(given: Given) -> None:
    key, job = given.key("kgc")
    for path in given.files:
        auditing.audit(job, key, path, given.path("--model"))


COMMANDS: dict[str, Callable[[Given], None]] = {
    "aggregate": aggregate,
    "apply-sum": apply_sum,
    "audit": audit,
    "close-round": close_round,
    "encrypt-grads": encrypt_grads,
    "open-model": open_model,
    "release-model": release_model,
    "reveal-masks": reveal_masks,
    "verify": verify,
}


def run(command: Sequence[str]) -> None:
    """Make the checks of a command line."""
    COMMANDS[command[0]](parse(command[1:]))
