"""Speed and size of every step on this machine, next to whatever peers are installed."""

from dtl.core.benchmark.run import BenchmarkOptions, BenchmarkReport, Row, run_benchmark

__all__ = ["BenchmarkOptions", "BenchmarkReport", "Row", "run_benchmark"]
