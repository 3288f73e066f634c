"""`report.html`: the report of a run as one page that needs nothing but itself."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from dtl.core.learning.simulation import charts
from dtl.core.learning.simulation.charts import Line
from dtl.core.learning.simulation.consortium import KGC, RoundRecord
from dtl.core.learning.simulation.report import Party, Report, Score, StepTime, View

_LINES = {
    "encrypted": "encrypted (dtl)",
    "float": "float64, no encryption",
    "central": "pooled data",
    "alone": "alone: mean, and range",
}
_STEPS = {
    "keygen": "s5",
    "compute-grads": "s1",
    "encrypt-grads": "s2",
    "open-model": "s3",
    "apply-sum": "s7",
    "close-round": "s4",
    "reveal-masks": "s4",
    "aggregate": "s5",
    "release-model": "s6",
}
_CELLS = {
    "in": "contributed",
    "admitted": "admitted: may read this model once, to contribute next",
    "absent": "absent",
    "waiting": "there, but without a grant",
    "void": "there, but the round was void",
}
_CELL_NAMES = {
    "in": "contributed",
    "absent": "absent",
    "admitted": "absent, admitted",
    "waiting": "without a grant",
    "void": "void round",
}

_NARROW_COLUMNS = 6  # what fits on a telephone
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root{color-scheme:light dark;--text:#1d2430;--soft:#5b6675;--rule:#dfe3ea;--page:#fff;
--card:#f5f7fa;--c1:#2563c9;--c2:#e07b00;--c3:#218a4c;--c4:#808a99;--c5:#8e4cc2;--c6:#c43d5a;
--c7:#14919b}
@media(prefers-color-scheme:dark){:root{--text:#e6e9ee;--soft:#a3adba;--rule:#38414e;
--page:#14181e;--card:#1d232b;--c1:#6ea1f5;--c2:#f3a54a;--c3:#5cc489;--c4:#98a2b0;--c5:#bd8bea;
--c6:#ee7f97;--c7:#55c7d0}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 3rem;max-width:75rem;background:var(--page);
color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .25rem}
h2{font-size:1.1rem;margin:0 0 .5rem}
p{margin:.25rem 0 .75rem}.soft{color:var(--soft)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;
margin:1.25rem 0;padding:0;list-style:none}
.figures li,section{background:var(--card);border-radius:.6rem;padding:.9rem 1rem}
.figures b{display:block;font-size:1.45rem;line-height:1.2}
.figures span{color:var(--soft);font-size:.85rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr));gap:.75rem}
section{min-width:0}section.wide{grid-column:1/-1}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:12px;fill:var(--soft)}
.rule{stroke:var(--rule);stroke-width:1;fill:none}
.line,.key{fill:none;stroke-width:2;stroke:currentColor;stroke-linejoin:round}
.encrypted{color:var(--c1)}.line.encrypted,.key.encrypted{stroke-width:5;stroke-opacity:.45}
.float{color:var(--c2)}.line.float,.key.float{stroke-dasharray:5 3}
.central{color:var(--c3)}.line.central,.key.central{stroke-dasharray:1.5 3}
.alone{color:var(--c4)}.band{fill:currentColor;fill-opacity:.16;stroke:none}
.s1{fill:var(--c4);color:var(--c4)}.s2{fill:var(--c1);color:var(--c1)}
.s3{fill:var(--c3);color:var(--c3)}.s4{fill:var(--c2);color:var(--c2)}
.s5{fill:var(--c5);color:var(--c5)}.s6{fill:var(--c6);color:var(--c6)}
.s7{fill:var(--c7);color:var(--c7)}
.key.s1,.key.s2,.key.s3,.key.s4,.key.s5,.key.s6,.key.s7,.key.cell{stroke-width:10}
.in{fill:var(--c1);color:var(--c1)}.absent{fill:var(--rule);color:var(--rule)}
.admitted{fill:var(--c3);color:var(--c3)}.waiting{fill:var(--c2);color:var(--c2)}
.void{fill:var(--c6);color:var(--c6)}
.legend{display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;list-style:none;margin:.6rem 0 0;padding:0;
font-size:.85rem;color:var(--soft)}
.legend svg{display:inline-block;width:24px;height:10px;margin-right:.4rem;overflow:hidden}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:.3rem .75rem .3rem 0;border-top:1px solid var(--rule);
vertical-align:top}
td{overflow-wrap:anywhere}td:first-child{white-space:nowrap}th{font-weight:600}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}td.number{white-space:nowrap}
code{font-size:.85em;overflow-wrap:anywhere}
@media(max-width:500px){table{font-size:.75rem}th,td{padding-right:.35rem}section{padding:.7rem}
.sideways::before{content:"more to the right: scroll";color:var(--soft);font-size:.75rem}}
@media print{body{max-width:none;padding:0;font-size:9pt}.charts{display:block;columns:2}
.charts section{margin-bottom:.5rem;padding:.5rem .6rem;width:100%}section.wide{column-span:all}
section,.figures li{border:1px solid var(--rule);break-inside:avoid}section.wide{break-inside:auto}
.tables{column-span:all;break-inside:auto!important}.scroll{overflow:visible}table{font-size:7pt}
th,td{padding:.1rem .4rem .1rem 0}
tr{break-inside:avoid}h2{break-after:avoid}svg{max-height:20cm}.sideways::before{content:none}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def render(report: Report) -> str:
    """The page, as HTML that asks for nothing from anywhere."""
    o = report.options
    title = f"Training together on {o.source.rpartition('/')[2]}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{len(o.participants)} participants, {o.rounds} rounds, '
        f"{report.summary.values:,} weights; security {escape(report.security)}, "
        f"{o.cipher} cipher, {o.slot_bits} bits a value. After the public "
        "initial weights, the server saw no gradient and no model.</p>",
        _figures(report),
        '<div class="charts">',
        _curve(report, "accuracy", "Test accuracy", 100, "%"),
        _curve(report, "loss", "Test loss", 1, ""),
        _contributions(report),
        _times(report),
        _traffic(report),
        _views(report),
        _table_of_times(report),
        _details(report),
        "</div>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        # An empty icon: else a browser asks for one.
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _figures(report: Report) -> str:
    s = report.summary
    figures = {
        "test accuracy, encrypted": f"{s.accuracy:.1f} %",
        "points against float64": _points(-s.points_below_float),
        "points against training alone": _points(s.points_above_alone),
        "rounds equal to the plaintext twin, integer for integer": (
            f"{s.rounds_identical_to_twin} of {s.rounds_released}"
        ),
        "bytes a value in an upload": f"{s.upload_bytes_a_value:.2f}",
        "void rounds": f"{s.rounds_void}",
    }
    if s.clamped:
        figures["values clamped: take more slot bits, or a smaller lr"] = f"{s.clamped:,}"
    items = (f"<li><b>{value}</b><span>{name}</span></li>" for name, value in figures.items())
    return f'<ul class="figures">{"".join(items)}</ul>'


def _points(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−") if round(value, 1) else "0.0"


def _curve(report: Report, measure: str, heading: str, factor: float, unit: str) -> str:
    def value(score: Score) -> float:
        return factor * float(getattr(score, measure))

    alone = [[value(score) for score in scores.alone.values()] for scores in report.scores]
    lines = {
        "alone": Line(
            _LINES["alone"],
            [sum(values) / len(values) for values in alone],
            [min(values) for values in alone],
            [max(values) for values in alone],
        )
    }
    # The encrypted line is broad, and lies below the float64 one, which it ought to equal.
    for kind in ("central", "encrypted", "float"):
        values = [value(getattr(scores, kind)) for scores in report.scores]
        lines[kind] = Line(_LINES[kind], values)
    chart = charts.line_chart(lines, unit, f"{heading} after each round")
    return _section(heading, chart + charts.legend(_LINES))


def _contributions(report: Report) -> str:
    rows = {
        name: [_cell(record, name) for record in report.rounds]
        for name in report.options.participants
    }
    used = {cell for cells in rows.values() for cell in cells}
    entries = {f"cell {cell}": name for cell, name in _CELL_NAMES.items() if cell in used}
    chart = charts.grid_chart(rows, _CELLS, "Who contributed in which round")
    return _section("Who contributed when", chart + charts.legend(entries))


def _cell(record: RoundRecord, name: str) -> str:
    if name in record.contributors:
        return "in"
    if name in record.admitted:
        return "admitted"
    if name not in record.present:
        return "absent"
    return "waiting" if name in record.waiting else "void"


def _times(report: Report) -> str:
    parties = [party for party in report.parties if party.name != KGC]
    bars = {}
    for party in parties:
        seconds = {step.step: step.seconds for step in party.steps}
        bars[party.name] = {step: seconds[step] for step in _STEPS if step in seconds}
    chart = charts.bar_chart(
        bars,
        _STEPS,
        {party.name: f"{party.seconds:.2f} s" for party in parties},
        "Time of each party by step",
    )
    entries: dict[str, str] = {}
    for step in _used(parties):
        entries[_STEPS[step]] = (
            f"{entries[_STEPS[step]]}, {step}" if _STEPS[step] in entries else step
        )
    return _section("Time, all rounds", chart + charts.legend(entries))


def _used(parties: Sequence[Party]) -> list[str]:
    """The steps that some of these parties took."""
    taken = {step.step for party in parties for step in party.steps}
    return [step for step in _STEPS if step in taken]


def _traffic(report: Report) -> str:
    parties = [party for party in report.parties if party.name != KGC]
    chart = charts.bar_chart(
        {p.name: {"sent": p.sent_bytes, "received": p.received_bytes} for p in parties},
        {"sent": "s2", "received": "s3"},
        {p.name: _size(p.sent_bytes + p.received_bytes) for p in parties},
        "Bytes sent and received by each party",
    )
    return _section("Bytes, all rounds", chart + charts.legend({"s2": "sent", "s3": "received"}))


def _size(count: int) -> str:
    amount, units = float(count), ["B", "kB", "MB", "GB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.3g} {units[0]}"


def _views(report: Report) -> str:
    heads = ("party", *(field.replace("_", " ") for field in View.model_fields))
    rows = [
        (p.name, *(f"{count}" for count in p.saw.model_dump().values())) for p in report.parties
    ]
    note = (
        "<p>Results are global models, or sums of gradients. Nobody but the participants ever "
        "had one in clear, and nobody a gradient of somebody else, unless the last column "
        "counts it. The center was offline after keygen; with kgc.key it could open all of "
        "it, for audit and recovery.</p>"
    )
    table = _table(heads, rows, set(range(1, len(heads))))
    return _section("What each party saw", note + table, "tables")


def _table_of_times(report: Report) -> str:
    steps = _used(report.parties)
    rows = []
    for party in report.parties:
        known = {step.step: step for step in party.steps}
        rows.append((party.name, *(_each(known.get(step)) for step in steps)))
    table = _table(("party", *steps), rows, set(range(1, len(steps) + 1)))
    return _section("Milliseconds a step, and how often", table, "wide")


def _each(step: StepTime | None) -> str:
    if step is None:
        return ""
    timed = step.times - step.untimed
    each = f"{1000 * step.seconds / timed:.1f}" if timed else "not measured"
    return f"{each} × {step.times}"


def _details(report: Report) -> str:
    o, s = report.options, report.summary
    rows = [
        ("data", f"{o.source}: {_counts(report.samples)}; {report.test_samples} for the test"),
        ("model", f"hidden layers {', '.join(map(str, o.hidden))}; {s.values:,} weights"),
        ("training", _training(report)),
        (
            "rounds",
            f"{s.rounds_released} released, {s.rounds_void} void; {s.clamped} values clamped",
        ),
        (
            "test accuracy",
            f"encrypted {s.accuracy:.2f} %, float64 {s.float_accuracy:.2f} %, "
            f"pooled {s.central_accuracy:.2f} %, alone {s.alone_mean_accuracy:.2f} % (mean)",
        ),
        ("fixed point", f"{o.slot_bits} slot bits, {o.fraction_bits} fraction bits, {o.rounding}"),
        ("job", f"{report.job[:32]}…, {o.cipher} cipher, {o.modulus_bits}-bit modulus"),
        ("upload", _upload(report)),
        ("software", ", ".join(f"{name} {known}" for name, known in report.software.items())),
    ]
    table = _table(("", ""), rows, set())
    note = (
        "<p>The plaintext twin is the same training in fixed point without encryption. "
        "float64 trains with the same contributors in every round, without rounding. On pooled "
        "data and alone, training has the same number of rounds, void ones included. "
        "<code>commands.sh</code> beside this page does the run by hand.</p>"
    )
    return _section("The run", note + table, "wide")


def _upload(report: Report) -> str:
    s = report.summary
    key = _size(s.upload_key_bytes)
    if not s.upload_body_bytes:
        return f"{key}: ciphertexts of all values, and their proof"
    body = _size(s.upload_body_bytes)
    return f"body (the padded values) {body}, key part (the pad's encrypted secret, proof) {key}"


def _counts(samples: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in samples.items()) + " samples"


def _training(report: Report) -> str:
    o = report.options
    place = "at the server, encrypted" if o.server_keeps_model else "at the participants"
    epochs = "1 local epoch" if o.local_epochs == 1 else f"{o.local_epochs} local epochs"
    local = f"{epochs} a round" if o.local_epochs else "one gradient a round"
    split = f"classes split by Dirichlet({o.alpha:g})" if o.alpha else "split evenly at random"
    return (
        f"{local}, {o.optimizer} with learning rate {o.rate:g}, model {place}; shares by "
        f"{o.weights}; {split}; misses a round with probability {o.drop:g}; seed {o.seed}"
    )


def _section(heading: str, content: str, kind: str = "chart") -> str:
    return f'<section class="{kind}"><h2>{escape(heading)}</h2>{content}</section>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: set[int]) -> str:
    """A table of text; the columns in `numbers` are right-aligned."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = [' class="number"' if column in numbers else "" for column in range(len(row))]
        return "".join(
            f"<{tag}{kind}>{escape(text)}</{tag}>" for kind, text in zip(kinds, row, strict=True)
        )

    head = f"<tr>{cells('th', heads)}</tr>" if any(heads) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    kind = "scroll sideways" if len(heads) > _NARROW_COLUMNS else "scroll"
    return f'<div class="{kind}"><table>{head}{body}</table></div>'
