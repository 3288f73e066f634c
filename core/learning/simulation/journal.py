"""What every party did in a run: one JSON line a step, with its time, size and command."""

import json
import os
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from dtl.core.errors import FormatError
from dtl.core.files.atomic import machine_errors, remove_second_names


@dataclass(frozen=True)
class Step:
    """One step of one party: `seconds` is None where an interruption lost the time.

    `command` is what does the same by hand, in the folder of the run.
    """

    round: int
    party: str
    step: str
    seconds: float | None
    bytes: int
    command: str


_STEP = TypeAdapter(Step)


def _read_step(line: bytes, path: Path) -> Step:
    try:
        return _STEP.validate_json(line)
    except ValidationError:
        raise FormatError(
            f"{path}: expected a step a line", "remove it: only times and commands are lost"
        ) from None


class Journal:
    """The steps of a run, oldest first, kept in a file that grows by a line a step.

    Raises FormatError for a file that is something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.steps: list[Step] = []
        with suppress(FileNotFoundError):
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]  # a killed run may leave a torn last line
            self.steps = [_read_step(line, path) for line in whole.split(b"\n")[:-1]]
            if whole != data:
                os.truncate(path, len(whole))
        self._known = {(step.round, step.party, step.step) for step in self.steps}

    def run(
        self, number: int, party: str, output: Path, act: Callable[[], object], *command: object
    ) -> None:
        """Do a step unless its output is there already, and note what it took.

        `command` is that of the command line, in parts.
        """
        seconds = None
        if not output.exists():
            start = time.perf_counter()
            act()
            seconds = round(time.perf_counter() - start, 6)
        else:
            remove_second_names(output)
        text = " ".join(shlex.quote(str(part)) for part in command)
        self._note(Step(number, party, str(command[0]), seconds, _size(output), text))

    def _note(self, step: Step) -> None:
        if (step.round, step.party, step.step) in self._known:
            return
        with machine_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(step)) + "\n")
        self._known.add((step.round, step.party, step.step))
        self.steps.append(step)


def _size(output: Path) -> int:
    return output.stat().st_size if output.is_file() else 0
