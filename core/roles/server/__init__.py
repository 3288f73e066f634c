"""The parameter server: checks uploads, multiplies ciphertexts, releases what it cannot read."""

from dtl.core.roles.server.accepting import Round
from dtl.core.roles.server.aggregating import AggregateReport, aggregate
from dtl.core.roles.server.closing import close_round
from dtl.core.roles.server.releasing import Policy, ReleaseReport, newcomers, release

__all__ = [
    "AggregateReport",
    "Policy",
    "ReleaseReport",
    "Round",
    "aggregate",
    "close_round",
    "newcomers",
    "release",
]
