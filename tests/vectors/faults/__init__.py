"""Every faulty vector: what is wrong, with which command, and the exit code it must cause."""

from tests.vectors.faults import containers, direct, parties, plain, releases, results, uploads
from tests.vectors.faults.fault import Fault

__all__ = ["Fault", "all_faults"]


def all_faults() -> list[Fault]:
    groups = (
        uploads.uploads,
        uploads.bodies,
        direct.direct,
        containers.spellings,
        results.results,
        results.closing,
        results.closings,
        releases.releases,
        releases.proofs,
        releases.attempts,
        parties.jobs,
        parties.keys,
        parties.ledgers,
        plain.plain,
        plain.bases,
        plain.older,
    )
    return [fault for group in groups for fault in group()]
