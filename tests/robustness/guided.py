"""Fuzzing guided by coverage: atheris keeps every file that reaches new code of dtl.

An input of the fuzzer is the number of a target (two bytes), a byte of flags, and the bytes of
the target's file. The seeds are the files of a job, for every command that reads them, and the
test vectors. An input is changed by the mutations that know its format, and signed anew, if its
flag says so, just before a command reads it. Where atheris cannot be installed, files are
mutated by chance.

`make fuzz SECONDS=600 SEED=1` runs it; CASE=FILE runs one kept input again.
"""

import hashlib
import os
import random
import shutil
import sys
import traceback
from contextlib import suppress
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None
else:  # before dtl is imported for the first time
    atheris.instrument_imports(include=["dtl"]).__enter__()

from tests.robustness import fuzzing, mutations
from tests.robustness.faults import new_place
from tests.robustness.fuzzing import SIGNED_SHARE, Case, Corpus, Tally, Target

HEAD = 3  # bytes before the file's
SIGN, SWAPPED = 1, 2  # flags
MAX_BYTES = 1 << 20
SEEDS_A_SECOND = 8  # a short run takes a sample of the seeds
KEPT = Path.cwd() / "fuzz-failures"


class Guided:
    """What the fuzzer calls: a mutation, and a run of one input."""

    def __init__(self, corpus: Corpus, place: Path) -> None:
        self._corpus, self._place = corpus, place
        self._targets = [target for kind in corpus.targets.values() for target in kind]
        self._targets += [target for target, _ in corpus.vectors]
        self._vectors = {content for _, content in corpus.vectors}

    def seeds(self, folder: Path, most: int, seed: int) -> None:
        """Write an input for every target as it is, to be signed anew or not, and the vectors.

        At most so many, drawn by the seed: all of them run before the first mutation.
        """
        folder.mkdir()
        found = [(target, target.file.read_bytes()) for target in self._targets]
        found += self._corpus.vectors
        if len(found) > most:
            found = random.Random(seed).sample(found, most)  # noqa: S311
        for count, (target, content) in enumerate(found):
            for flags in (0, SIGN) if target.signer() else (0,):
                head = self._targets.index(target).to_bytes(2, "big") + bytes([flags])
                (folder / f"{count}-{flags}").write_bytes(head + content)

    def _target(self, data: bytes) -> Target:
        return self._targets[int.from_bytes(data[:2], "big") % len(self._targets)]

    def mutate(self, data: bytes, max_size: int, seed: int) -> bytes:
        """Another input for the same target."""
        chance = random.Random(seed)  # noqa: S311
        target, head, content = self._target(data), data[: HEAD - 1], data[HEAD:]
        flags = data[HEAD - 1] if len(data) >= HEAD else 0
        flags = flags | SIGN if chance.random() < SIGNED_SHARE else flags & ~SIGN
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            if chance.random() < 0.1 or not content:
                with suppress(Exception):  # no room
                    content = atheris.Mutate(content, max(1, max_size - HEAD))
                continue
            name, content = fuzzing.mutate(self._corpus, target, chance, content)
            flags |= SWAPPED if name == fuzzing.SWAP else 0
        return head.ljust(HEAD - 1, b"\0") + bytes([flags]) + content[: max_size - HEAD]

    def case(self, data: bytes, name: str) -> Case:
        """What an input stands for."""
        target, flags, content = self._target(data), data[2], data[HEAD:]
        signed = False
        signer = target.signer()
        if flags & SIGN and signer:
            with suppress(Exception):  # what cannot be signed stays as it is
                content = mutations.sign_anew(*signer, content)
                signed = True
        same = content == target.file.read_bytes()
        words = " ".join(target.words)
        named = f"{name}: {target.inside}: dtl {words}"
        mutation = fuzzing.UNCHANGED if same else "signed" if signed else "guided"
        # Vectors are signed as they are, by whoever made them.
        lies = signed or same or bool(flags & SWAPPED) or content in self._vectors
        return Case(self._corpus, named, target, mutation, content, lies)

    def run(self, data: bytes) -> None:
        """Run an input; keep it where something is wrong."""
        if len(data) < HEAD:
            return
        name = hashlib.sha256(data).hexdigest()[:16]
        if fuzzing.run_reported(self.case(data, f"{KEPT / name}"), self._place):
            KEPT.mkdir(exist_ok=True)
            (KEPT / name).write_bytes(data)


def _fuzz(guided: Guided, place: Path, seconds: int, seed: int) -> None:
    """Never returns."""
    fuzzing.prepare_child()
    options = {
        "max_total_time": seconds,
        "seed": seed,
        "max_len": MAX_BYTES,
        "reduce_inputs": 0,
        "reload": 0,
        "verbosity": 0,
        "rss_limit_mb": 0,  # RLIMIT_AS is set
        "artifact_prefix": f"{KEPT}/",
    }
    flags = [f"-{name}={value}" for name, value in options.items()]
    atheris.Setup(
        [sys.argv[0], *flags, str(place / "seeds")], guided.run, custom_mutator=guided.mutate
    )
    atheris.Fuzz()


def main() -> None:
    """Fuzz for so many seconds, or run one kept input again."""
    case = os.environ.get("CASE", "")
    if atheris is None or case.isdecimal():
        sys.stdout.write("by chance, not guided by coverage\n")
        fuzzing.main()
    seconds, seed = int(os.environ.get("SECONDS", "60")), int(os.environ.get("SEED", "1"))
    place = new_place()
    KEPT.mkdir(exist_ok=True)
    try:
        guided = Guided(Corpus(place), place)
        guided.seeds(place / "seeds", SEEDS_A_SECOND * seconds, seed)
        (place / "report").write_text("")
        tally = Tally.empty()
        child = os.fork()
        if not child:
            try:
                if case:
                    fuzzing.prepare_child()
                    guided.run(Path(case).read_bytes())
                else:
                    _fuzz(guided, place, seconds, seed)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        tally.add(place / "report")
        if status:
            tally.problems.append(f"the fuzzer ended with {status}; its input is in {KEPT}")
    finally:
        shutil.rmtree(place)
        with suppress(OSError):  # not empty
            KEPT.rmdir()
    tally.show()
    sys.exit(1 if tally.problems else 0)


if __name__ == "__main__":
    main()
