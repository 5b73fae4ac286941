"""Report, README and tables must say the same; the report prints as two to three pages."""

import hashlib
import html
import os
import re
import shutil
import stat
import struct
import sys
from pathlib import Path

import pandas as pd
import pytest

import llada_helpers as h

ROOT = Path(__file__).parents[1]
PUBLISHED = {"1.4697"}  # numbers of other people's, cited in the text
VERSIONS = re.compile(r"Python \d+\.\d+|\d+\.\d+\.\d+|arXiv:\d+\.\d+|[\w-]+[=<>]=?\d[\d.]*")


@pytest.mark.parametrize("name", ["analysis.md", "README.md"])
def test_numbers_are_those_of_the_tables(name):
    text = (ROOT / name).read_text()
    assert "<!-- end -->" in text
    assert h.fill_report(text, ROOT / "figures" / "tables") == text


@pytest.mark.parametrize("name", ["analysis.md", "README.md"])
def test_no_measured_number_stands_outside_the_markers(name):
    text = re.sub(r"<!-- .*? -->.*?<!-- end -->", "", (ROOT / name).read_text(), flags=re.S)
    text = VERSIONS.sub("", re.sub(r"```.*?```", "", text, flags=re.S))
    assert set(re.findall(r"\d+\.\d+", text)) <= PUBLISHED


@pytest.mark.parametrize("name", ["analysis.md", "README.md"])
def test_every_marker_names_a_table_that_is_there(name):
    """fill_report leaves markers of absent tables alone, so a misspelt one would keep an old number for ever."""
    text = (ROOT / name).read_text()
    names = re.findall(r"<!-- table (\S+) -->", text) + re.findall(r"<!-- ([\w-]+) ; .*? ; .*? -->", text)
    assert names and not [n for n in set(names) if not (ROOT / "figures" / "tables" / f"{n}.csv").exists()]


@pytest.mark.parametrize("name", ["analysis.md", "README.md"])
def test_no_marker_starts_a_line_of_a_paragraph(name):
    """GitHub takes such a line for raw HTML, and the rest of the paragraph with it."""
    assert not re.findall(r"^\s*<!-- [\w-]+ ;.*", (ROOT / name).read_text(), flags=re.M)


@pytest.mark.parametrize("name", ["analysis.md", "README.md"])
def test_pictures_and_links_exist(name):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_report_is_two_to_three_pages():
    words = re.sub(r"<!--.*?-->|^\|.*$", "", (ROOT / "analysis.md").read_text(), flags=re.M)
    assert 900 <= len(words.split()) <= 2150  # what three pages hold; the PDF's pages are counted below


def test_fill_report_leaves_markers_of_absent_tables(tmp_path):
    text = "<!-- table nowhere -->old<!-- end --> <!-- nowhere ; a ; x -->7<!-- end -->"
    assert h.fill_report(text, tmp_path) == text


def test_fill_report_replaces_tables_and_cells(tmp_path):
    pd.DataFrame({"row": ["a", "b"], "x": [1.5, 2.0]}).to_csv(tmp_path / "t.csv", index=False)
    text = "<!-- table t -->old<!-- end --> and <!-- t ; b ; x -->9<!-- end -->."
    filled = h.fill_report(text, tmp_path)
    assert "| a | 1.5 |" in filled and "old" not in filled
    assert filled.endswith("and <!-- t ; b ; x -->2.0<!-- end -->.")
    assert h.fill_report(filled, tmp_path) == filled
    for wrong in ("<!-- t ; c ; x -->1<!-- end -->", "<!-- t ; a ; y -->1<!-- end -->"):
        with pytest.raises(ValueError, match=r"t\.csv"):
            h.fill_report(wrong, tmp_path)


# --- the report as PDF ---

BROWSER = any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
INSISTS = os.environ.get("LLADA_BROWSER") == "1"
needs_browser = pytest.mark.skipif(not BROWSER and not INSISTS, reason="no Chromium (LLADA_BROWSER=1 makes this a failure)")
PICTURE = re.compile(r"!\[.*?\]\((.*?)\)")


def pages(pdf: bytes) -> int:
    return len(re.findall(rb"/Type\s*/Page\b", pdf))


def png_size(path: Path) -> tuple[int, int]:
    return struct.unpack(">II", path.read_bytes()[16:24])


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A directory with the report, its figures and nothing else."""
    shutil.copy(ROOT / "analysis.md", tmp_path)
    shutil.copytree(ROOT / "figures", tmp_path / "figures", ignore=shutil.ignore_patterns("*.gif", "tables"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@needs_browser
def test_report_prints_on_two_to_three_a4_pages_with_every_figure(desk, capsys):
    h.main(["report"])
    pdf = (desk / "analysis.pdf").read_bytes()
    assert pages(pdf) in (2, 3) and f"{pages(pdf)} pages" in capsys.readouterr().out
    boxes = {tuple(round(float(x)) for x in box.split()) for box in re.findall(rb"/MediaBox\s*\[(.*?)\]", pdf)}
    assert boxes == {(0, 0, 595, 842)}
    figures = PICTURE.findall((desk / "analysis.md").read_text())
    objects = [dict(re.findall(rb"/(Width|Height) (\d+)", o)) for o in pdf.split(b"endobj") if b"/Subtype /Image" in o]
    embedded = [(int(o[b"Width"]), int(o[b"Height"])) for o in objects]
    assert len(figures) >= 3
    for name in figures:
        assert png_size(desk / name) in embedded, name
    assert sorted(p.name for p in desk.iterdir()) == ["analysis.md", "analysis.pdf", "figures"], "scratch files were left behind"
    # Were they this machine's, pages would break elsewhere on another.
    fonts = set(re.findall(rb"/BaseFont\s*/(?:[A-Z]+\+)?([\w-]+)", pdf))
    assert fonts == {b"STIXGeneral-Regular", b"STIXGeneral-Bold", b"STIXGeneral-Italic", b"DejaVuSansMono"}


def test_committed_pdf_is_of_the_committed_text():
    """If this fails: python llada_helpers.py report"""
    pdf = (ROOT / "analysis.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-") and pages(pdf) in (2, 3)
    assert hashlib.sha256((ROOT / "analysis.md").read_bytes()).hexdigest().encode() in pdf[-200:]


def test_page_shows_text_and_nothing_of_its_source():
    text = (ROOT / "analysis.md").read_text()
    page = h.report_html(text, ROOT)
    body = re.sub(r"<[^>]*>", "", page.partition("</style>")[2])
    for mark in ("<!--", "-->", "**", "| ---", "](", "$"):
        assert mark not in html.unescape(body), mark
    assert "\\" not in body and not re.search(r"&\w+;", html.unescape(body)), "a formula that the report cannot set"
    assert page.count("<img ") == len(PICTURE.findall(text))
    assert page.count("<tr>") == len(re.findall(r"^\|(?! ---)", text, flags=re.M))
    assert len(re.findall(r"<h\d", page)) == len(re.findall(r"^#", text, flags=re.M))
    assert "<title>LLaDA and an autoregressive model on TinyShakespeare</title>" in page


@pytest.mark.parametrize(
    "formula, shown",
    [
        (r"\ln V", "ln <i>V</i>"),
        ("1/t", "1/<i>t</i>"),
        (r"-\log p", "−log <i>p</i>"),
        (r"\sqrt{D}", "√<i>D</i>"),
        ("10^{-4}", "10<sup>−4</sup>"),
        ("x_t^2", "<i>x</i><sub><i>t</i></sub><sup>2</sup>"),
        (r"p_\theta(x_0 \mid x_t)", "<i>p</i><sub>θ</sub>(<i>x</i><sub>0</sub> ∣<i>x</i><sub><i>t</i></sub>)"),
        (r"0 < t \le 1", "0 < <i>t</i> ≤1"),
        ("n(1-s)", "<i>n</i>(1−<i>s</i>)"),
    ],
)
def test_formulas(formula, shown):
    page = h.report_html(f"of ${formula}$, `$x_1$` and $5")
    assert f"<p>of {shown}, <code>$x_1$</code> and $5</p>" in html.unescape(page)


def test_page_of_odd_text():
    page = h.report_html("# A <b> & *c*\n\n<!-- a\n| b | -->é 1.5 ±\n<!-- t ; r ; c -->0.1<!-- end --> and x ± y", ROOT)
    assert "<title>A &lt;b&gt; &amp; *c*</title>" in page
    assert "<p>é 1.5\u00a0±\u00a00.1 and x ± y</p>" in page, "a number keeps its interval on the same line"
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        h.report_html("![a figure](figures/nowhere.png)", ROOT)


@pytest.fixture
def fake_browser(tmp_path, monkeypatch):
    """A "chromium" that runs the given Python code with `page`, the text that it was given, and `pdf`, the path to write."""

    def install(code: str) -> None:
        path = tmp_path / "bin" / "chromium"
        path.parent.mkdir()
        start = "import sys, pathlib, urllib.request\npage = urllib.request.urlopen(sys.argv[-1]).read().decode()\n"
        start += "pdf = pathlib.Path(next(a for a in sys.argv if a.startswith('--print-to-pdf=')).partition('=')[2])\n"
        path.write_text(f"#!{sys.executable}\n{start}{code}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(path.parent))

    return install


@pytest.mark.parametrize("limit, width", [(3, 75), (2, 50), (4, 80)])
def test_figures_are_as_wide_as_the_pages_allow(tmp_path, fake_browser, limit, width):
    (tmp_path / "a.png").write_bytes(b"a picture")
    (tmp_path / "a.md").write_text("![](a.png)")
    fake_browser(
        "wide = int(page.split('width: ')[-1].split('%')[0])\npdf.write_text('/BaseFont' + '/Type /Page\\n' * (wide // 26 + 1))"
    )
    said = h.save_report(tmp_path / "a.md", tmp_path / "a.pdf", limit)
    assert f"{width}% wide" in said and pages((tmp_path / "a.pdf").read_bytes()) <= limit


@pytest.mark.parametrize(
    "code, complaint",
    [
        ("sys.exit('no display')", "printed no text.*no display"),
        ("pdf.write_text('/BaseFont'); sys.exit(1)", "printed no text"),
        ("", "printed no text"),
        ("pdf.write_text('/Type /Page')", "install a font"),
        ("pdf.write_text('/BaseFont' + '/Type /Page ' * 4)", "needs 4 pages.*pass a shorter text"),
    ],
    ids=["says no", "dies while writing", "writes nothing", "has no fonts", "too long"],
)
def test_failed_print_is_an_error_and_keeps_the_old_file(tmp_path, fake_browser, code, complaint):
    (tmp_path / "a.md").write_text("text")
    (tmp_path / "a.pdf").write_text("old")
    fake_browser(code)
    with pytest.raises(ValueError, match=re.compile(complaint, re.S)):
        h.save_report(tmp_path / "a.md", tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.md", "a.pdf", "bin"]


def test_without_chromium_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"install .*chromium"):
        h.save_report(ROOT / "analysis.md", tmp_path / "analysis.pdf")
