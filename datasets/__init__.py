"""Real, freely licensed data sets that come with dtl; see README.md in this folder."""

from pathlib import Path

NAMES = ("digits", "breast_cancer")


def path_of(name: str) -> Path:
    """The CSV file of a data set in NAMES."""
    return Path(__file__).with_name(f"{name}.csv")
