"""`dtl bench`: speed and size on this machine."""

from typing import TYPE_CHECKING, Annotated

import typer

from dtl.cli import terminal
from dtl.cli.options import JsonOption, Output, QuietOption
from dtl.core import defaults

if TYPE_CHECKING:
    from dtl.core.benchmark import Row

EXAMPLE = """Example:

  dtl bench

  pip install 'dtl-toolkit[bench]' && dtl bench   # with its peers

  dtl bench --values 100000000 --repeat 1 --no-peers   # some 6 GB of files

  dtl bench --uploads 1000 --repeat 1"""


_STEPS = ("encrypt", "serialise", "add", "release", "open")


def bench(
    values: Annotated[int, typer.Option(help="Values an upload holds.")] = defaults.BENCH_VALUES,
    repeat: Annotated[int, typer.Option(help="Turns; medians are shown.")] = defaults.BENCH_REPEAT,
    uploads: Annotated[
        int,
        typer.Option(
            help="Uploads that are added up, and participants. More than 3 are made for the "
            "purpose: one participant encrypts with the masks of all, and the others' uploads "
            "hold the same gradients without masks."
        ),
    ] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Cores that each contender may use.")] = 1,
    no_peers: Annotated[
        bool, typer.Option("--no-peers", help="Leave other libraries out.")
    ] = False,
    modulus_bits: Annotated[
        int, typer.Option(help="2048 or 3072; smaller with --insecure.")
    ] = defaults.MODULUS_BITS,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow a small modulus, for tests.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as Markdown.")
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Time every step of a round: both ciphers, each kernel, a plain round, installed peers.

    Microseconds a value, medians; round = 3 x (encrypt + serialise) + add + release + open;
    ratio = that of the round to the first line's; bytes = of an upload, a value. The plain
    round averages float32 files with numpy. What is slow a value is measured with fewer
    values (--json says how many).
    """
    from dtl.core import benchmark

    wanted = benchmark.BenchmarkOptions(
        values, repeat, workers, uploads, modulus_bits, insecure, peers=not no_peers
    )
    output = Output(json, quiet)
    with output.progress() as progress:
        report = benchmark.run_benchmark(wanted, progress)
    if json:
        output.show(**report.plain())
        return
    heads = ("us a value", *_STEPS, "round", "ratio", "bytes")
    rows = [(row.name, *_cells(row)) for row in report.rows]
    terminal.show_table(heads, rows, markdown, quiet)
    for name, reason in report.not_measured.items():
        terminal.show_warning(f"{name}: not measured: {reason}")


def _cells(row: "Row") -> tuple[str, ...]:
    sample = row.sample
    steps = (sample.encrypt, sample.serialise, sample.aggregate, sample.release, sample.open)
    figures = (*steps, sample.round, row.times, sample.upload_bytes)
    return tuple(_short(value) if value else "" for value in figures)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
