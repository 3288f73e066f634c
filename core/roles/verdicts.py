"""What an audit says of a file, and the measurements of values that it rests on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dtl.core.encoding.fixed_point import Integers
from dtl.core.files.headers import ResultHeader, UploadHeader
from dtl.core.files.job_file import Job
from dtl.core.files.tensors import VectorDigest


@dataclass
class Verdict:
    """What the audit says of one file; `problems` is empty for a good one.

    `doubts` hold what would be a problem if what the audit assumes of a base is right: they
    accuse nobody.
    """

    file: str
    kind: str
    signer: str
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The verdict in words."""
        if self.problems:
            return "; ".join(self.problems)
        return f"not judged: {'; '.join(self.doubts)}" if self.doubts else "good"

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "file": self.file,
            "kind": self.kind,
            "signer": self.signer,
            "verdict": self.text,
            **self.facts,
        }


class Measurement:
    """The values of a vector, measured batch by batch."""

    def __init__(self, job: Job, header: UploadHeader | ResultHeader) -> None:
        fixed_point = job.fixed_point
        limits = {
            "upload": fixed_point.max_step,
            "sum": fixed_point.max_sum,
            "model": fixed_point.max_value,
        }
        self._one, self._header, self._limit = fixed_point.one, header, limits[header.kind]
        self._smallest = self._largest = self._at_limit = self._beyond = 0
        self._squares = 0.0
        self.state = VectorDigest(header.layout, header.values, job.slot_bits)

    def add(self, integers: Integers) -> None:
        """Measure the next values."""
        self._smallest = min(self._smallest, int(integers.min(initial=0)))
        self._largest = max(self._largest, int(integers.max(initial=0)))
        self._squares += float(np.square(integers.astype(np.float64)).sum())
        self._at_limit += int((np.abs(integers) == self._limit).sum())
        self._beyond += int((np.abs(integers) > self._limit).sum())
        self.state.update(integers)

    def judge(self, verdict: Verdict) -> None:
        """Add what was measured to the verdict on a vector that opened."""
        verdict.facts |= {
            "smallest": self._smallest / self._one,
            "largest": self._largest / self._one,
            "norm": self._squares**0.5 / self._one,
            "share_clamped": self._at_limit / self._header.values,
            "share_out_of_range": self._beyond / self._header.values,
        }
        if self._beyond:
            limit = self._limit / self._one
            verdict.problems.append(f"{self._beyond} values beyond +-{limit:g}")


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as text: 0-3, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
