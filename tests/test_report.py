"""`report.html` in a real browser: no console error, no request, readable on any screen."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dtl.cli import app
from dtl.core.learning.simulation import charts, report
from tests.helpers import Cli

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-sync", "--disable-background-networking", "--disable-component-update"),
    "--hide-scrollbars",
)
POLICY = re.compile('<meta http-equiv="Content-Security-Policy"[^>]*>')
# A window of the browser cannot be narrower than 500 pixels, a frame in it can.
FRAME = """<iframe id="frame" style="border:0;width:%dpx;height:3000px" srcdoc="%s"></iframe>
<pre id="found"></pre><script>
frame.onload = () => {
  const inner = frame.contentWindow, page = frame.contentDocument;
  const texts = [...page.querySelectorAll("svg text")];
  const boxes = texts.map(text => text.getBoundingClientRect());
  found.textContent = JSON.stringify({
    width: inner.innerWidth,
    needs: page.documentElement.scrollWidth,
    smallest: Math.min(...texts.map(text => {
      const svg = text.ownerSVGElement;
      const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
      return scale * parseFloat(inner.getComputedStyle(text).fontSize);
    })),
    cut: boxes.filter(box => box.left < 0 || box.right > inner.innerWidth).length,
    charts: [...page.querySelectorAll("section > svg")].map(
      svg => Math.round(svg.getBoundingClientRect().width)),
    requests: inner.performance.getEntriesByType("resource").map(entry => entry.name),
    lines: page.querySelectorAll("path.line").length,
  });
};
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one run, for all tests here: none of them changes it."""
    folder = tmp_path_factory.mktemp("report") / "run"
    wanted = ("--participants", 7, "--rounds", 9, "--drop", 0.25, "--seed", 1, "--hidden", 6)
    small = ("--modulus-bits", 512, "--insecure", "--quiet")
    words = ("simulate", "breast_cancer", *wanted, *small, "--out", folder)
    assert app.run([str(word) for word in words]) == 0
    return folder / "report.html"


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link"):
            self.open.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(page: Path) -> None:
    text = page.read_text()
    parser = _Links()
    parser.feed(text)
    assert parser.open == []
    assert parser.found == ["data:,"]
    assert not re.search(r"https?:|url\(|@import", text)
    found = json.loads((page.parent / "report.json").read_text())
    summary = found["summary"]
    assert f"{summary['accuracy']:.1f} %" in text
    released = summary["rounds_released"]
    assert f"{released} of {released}" in text
    for record in found["rounds"]:
        for name in record["contributors"]:
            assert f"<title>{name}, round {record['round']}: contributed</title>" in text
    for party in found["parties"]:
        counts = "".join(f'<td class="number">{n}</td>' for n in party["saw"].values())
        assert f"<td>{party['name']}</td>{counts}" in text


def test_a_package_whose_version_cannot_be_read_ends_no_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "version", lambda name: None)
    assert report._software()["gmpy2"] == "unknown"


def test_names_cannot_break_the_page(dtl: Cli, tmp_path: Path, fixed_primes: None) -> None:
    source = tmp_path / "a<script>&'.csv"
    lines = ["x,y,class", *(f"{i % 7},{i % 5},{i % 2}" for i in range(40))]
    source.write_text("\n".join(lines) + "\n")
    small = ("--modulus-bits", 512, "--insecure", "--participants", 3, "--rounds", 1)
    dtl("simulate", source, *small, "--out", tmp_path / "run")
    text = (tmp_path / "run" / "report.html").read_text()
    assert "<script" not in text
    assert html.escape(source.name) in text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium installed")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_it_without_errors_or_requests(
    width: int, page: Path, tmp_path: Path
) -> None:
    measured = tmp_path / "measured.html"
    # The page forbids itself every request and script; a copy without that can be measured.
    text, forbidden = POLICY.subn("", page.read_text())
    assert forbidden == 1
    measured.write_text(FRAME % (width, html.escape(text)))

    def browse(what: Path, *options: str) -> subprocess.CompletedProcess[str]:
        profile = tmp_path / f"profile-{what.stem}-{len(options)}"
        command = [str(BROWSER), *FLAGS, f"--user-data-dir={profile}", *options]
        size = f"--window-size={width},2400"
        return subprocess.run(
            [*command, size, what.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )

    shot = tmp_path / "shot.png"
    shown = browse(page, "--enable-logging=stderr", f"--screenshot={shot}")
    assert "CONSOLE" not in shown.stderr, "a violation of its policy would be an error too"
    assert shot.stat().st_size > 20_000

    document = browse(measured, "--dump-dom").stdout
    found = json.loads(html.unescape(document.split('id="found">')[1].split("</pre>")[0]))
    assert found["width"] == width
    assert found["needs"] <= width, "nothing is wider than the screen"
    assert found["smallest"] >= 9, "text in charts stays readable"
    assert not found["cut"]
    assert not found["requests"]
    assert len(found["charts"]) == 5
    assert min(found["charts"]) >= min(0.8 * width, 400)
    assert found["lines"] == 8


@pytest.mark.parametrize(
    "values",
    [(0, 0), (0.0, 2.2e-16), (2e-16, 3e-16), (97.2, 97.2), (-1e12, -1e12 + 1e-3), (1e300, 2e300)],
)
def test_a_chart_of_what_hardly_differs(values: tuple[float, ...]) -> None:
    drawn = charts.line_chart({"a": charts.Line("loss", values)}, "", "loss")
    places = [float(number) for number in re.findall(r"-?[0-9.]+", drawn.split(' d="M')[-1])[:4]]
    assert all(0 <= place <= charts.WIDTH for place in places)
