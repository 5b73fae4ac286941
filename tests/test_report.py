"""Texts and tables must say the same; numbers are rounded as their intervals ask; the report has two or three pages."""

import contextlib
import hashlib
import json
import math
import re
import shutil
import struct
import sys
import zlib
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from notebooks import BEYOND, MAIN

import llada_helpers as h
from beyond import report

ROOT = Path(__file__).parents[1]
TEXTS = sorted(report.TEXTS)
REPORT = (ROOT / "analysis.md").read_text()
RECIPES = [[float(x) for x in cells] for cells in re.findall(r"^\| [a-z][\w ]+ \| ([\d.]+) \| ([\d.]+) \|$", REPORT, flags=re.M)]
PUBLISHED = {"1.4697", "1.618", "2.3"}  # numbers of other people, cited in the text: two losses, the tokens of LLaDA
PUBLISHED |= {"31.6", "3.4", "4.5"}  # seen on one H100 at the commit that CONTRIBUTING names: ms a step, % of its peak, minutes
PUBLISHED |= {"1.45", "1.58", "0.02"}  # what is aimed at there
PUBLISHED |= {f"{x:g}" for cells in RECIPES for x in cells}
VERSIONS = re.compile(r"Python \d+\.\d+|\d+\.\d+\.\d+|arXiv:\d+\.\d+|[\w-]+[=<>]=?\d[\d.]*")
PICTURE = re.compile(r"!\[.*?\]\((.*?)\)")


# --- what is committed ---


@pytest.mark.parametrize("name", TEXTS)
def test_numbers_are_those_of_the_tables(name):
    """If this fails: python -m beyond.report"""
    text = (ROOT / name).read_text()
    assert "<!-- end -->" in text
    assert report.fill_report(text, ROOT / report.TABLES) == text


@pytest.mark.parametrize("name", TEXTS)
def test_no_measured_number_stands_outside_the_markers(name):
    text = re.sub(MARKED, "", (ROOT / name).read_text(), flags=re.S)
    text = VERSIONS.sub("", re.sub(r"```.*?```", "", text, flags=re.S))
    assert set(re.findall(r"\d+\.\d+", text)) <= PUBLISHED


MARKED = r"<!-- (?:table \S|[\w-]+ ; ).*? -->.*?<!-- end -->"  # other comments have no end
CITED = re.compile(r"et al\. \d+|arXiv:\S+|Eqs?\. \d+|^\d+\. |\$.*?\$|\(.*?\.(?:png|ipynb)\)", re.M)


def numbers(text: str) -> list[str]:
    """What a reader has to take in: each number with its interval is one; equations, references and lists are not counted."""
    text = CITED.sub("", re.sub(r"<!--.*?-->", "", text, flags=re.S))
    return re.findall(r"(?<!\w)\d+(?:,\d{3})*(?:\.\d+)?(?: ± [\d,.]*\d)?", text)


def test_the_report_is_read_in_ten_minutes():
    words = re.sub(r"<!--.*?-->|[|*`$#]", " ", REPORT, flags=re.S).split()
    assert len(words) <= 1500 and len(numbers(REPORT)) <= 60


def test_every_number_of_the_report_is_of_a_table():
    """But for the recipes, the size of a window, and the level of the intervals."""
    by_hand = numbers(re.sub(MARKED, "", REPORT, flags=re.S))
    assert set(by_hand) <= {"95", "128", *(f"{x:g}" for cells in RECIPES for x in cells)}


def test_the_recipes_are_those_of_the_preset():
    preset = h.PRESETS["cpu"]
    assert [[getattr(config, name) for config in (preset.llada, preset.ar)] for name in ("muon_lr", "weight_decay")] == RECIPES
    assert preset.llada.batch_size == preset.ar.batch_size and preset.seq_len == 128


def test_nothing_is_left_to_fill():
    assert not re.findall(r"TODO.*|>\?<", REPORT)


COMPARISONS = {"ablations": "difference", "crossover_best": "LLaDA − AR", "vocabulary_bits": "gain"}  # between trainings
COMPARISONS |= {"decoder": "difference", "budget_gap": "LLaDA − AR", "bell": "difference"}


@pytest.mark.parametrize("table, column", COMPARISONS.items(), ids=COMPARISONS)
def test_comparisons_between_trainings_carry_an_interval(table, column):
    texts = "\n".join((ROOT / name).read_text() for name in TEXTS)
    found = re.findall(rf"<!-- {table} ; (.*?) ; {column} -->(.*?)<!-- end -->", texts)
    assert found and [row for row, shown in found if " ± " not in shown] == []


def test_the_studys_intervals_are_over_paired_seeds():
    """Student's, over the differences of trainings of the same seed; three at least."""
    table = pd.read_csv(ROOT / report.TABLES / "ablations.csv").set_index("row")
    seeds = table.filter(regex=r"^seed \d+$")
    assert seeds.shape[1] >= 3 and len(table) >= 5
    for row, line in table.iterrows():
        apart = seeds.loc[row] - seeds.loc[f"{row.partition(',')[0]}, ours"]
        assert line["difference"] == pytest.approx(apart.mean(), abs=2e-4)
        assert line["difference ±"] == pytest.approx(h.half_width(apart), abs=5e-4), row


def sections(notebook: str) -> list[list[dict]]:
    """The cells of each section of a committed notebook."""
    parts = [[]]
    for cell in json.loads((ROOT / notebook).read_text())["cells"]:
        if re.match(r"##+ ", "".join(cell["source"])):
            parts.append([])
        parts[-1].append(cell)
    return parts


@pytest.mark.parametrize("notebook", [MAIN, BEYOND])
def test_answers_about_trainings_say_their_seeds_and_intervals(notebook):
    """Each section that shows a suite has a bold answer, an interval, and says how many seeds stand behind it."""
    for section in sections(notebook):
        pick = lambda kind: "\n".join("".join(c["source"]) for c in section if c["cell_type"] == kind)  # noqa: E731, B023
        code, prose = pick("code"), pick("markdown")
        if re.search(r'\b(suite|committed)\("(ablations|blocks|budget|crossover|decoder|vocabulary)"\)', code):
            title = prose.partition("\n")[0]
            assert " ± " in prose and "**" in prose and re.search(r"\bseeds?\b", prose), title


def test_what_is_counted():
    text = "1. Nie et al. 2025, Eq. 3: $1/t$, <!-- t ; a ; 7 -->1.88 ± 0.01<!-- end -->, 1,860 of 95%, MD4. ![x](b1.png)"
    assert numbers(text) == ["1.88 ± 0.01", "1,860", "95"]


@pytest.mark.parametrize("name", TEXTS)
def test_every_marker_names_a_table_that_is_there(name):
    """fill_report leaves markers of absent tables alone, so a misspelt one would keep an old number for ever."""
    text = (ROOT / name).read_text()
    names = re.findall(r"<!-- table (\S+)", text) + re.findall(r"<!-- ([\w-]+) ; .*? ; .*? -->", text)
    assert names and not [n for n in set(names) if not (ROOT / report.TABLES / f"{n}.csv").exists()]


@pytest.mark.parametrize("name", TEXTS)
def test_no_number_of_the_text_has_trailing_noise(name):
    """At most three significant digits, but for whole numbers and where an interval asks for more; none without its interval."""
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.S)
    for shown in re.findall(r"<!-- [\w-]+ ; .*? ; .*? -->(.*?)<!-- end -->", text):
        if re.fullmatch(r"−?[\d,]+\.\d+", shown):
            assert len(re.sub(r"\D", "", shown).lstrip("0")) <= 3, shown
        half = re.fullmatch(r"−?[\d,.]+ ± ([\d,.]+)", shown)
        assert not half or len(re.sub(r"\D", "", half[1]).lstrip("0")) <= 2, shown
    assert not re.search(r"±\s*(?!\d)\S", text), "an interval written by hand"


@pytest.mark.parametrize("name", TEXTS)
def test_no_marker_starts_a_line_of_a_paragraph(name):
    """GitHub takes such a line for raw HTML, and the rest of the paragraph with it."""
    assert not re.findall(r"^[\s>]*<!-- [\w-]+ ;.*", (ROOT / name).read_text(), flags=re.M)


@pytest.mark.parametrize("name", TEXTS)
def test_pictures_and_links_exist(name):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), target


def pages(pdf: bytes) -> int:
    return len(re.findall(rb"/Type\s*/Page\b", pdf))


def test_committed_pdf_is_of_the_committed_text():
    """If this fails: python -m beyond.report"""
    pdf = (ROOT / "analysis.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-") and pages(pdf) in (2, 3)
    assert hashlib.sha256((ROOT / "analysis.md").read_bytes()).hexdigest().encode() in pdf[-200:]


# --- numbers ---


@pytest.mark.parametrize(
    "value, shown",
    [
        (1.9388, "1.94"),
        (22.5886, "22.6"),
        (421.41, "421"),
        (13_273.4, "13,300"),
        (0.0594, "0.059"),
        (0.0019, "0.0019"),
        (-0.3412, "−0.341"),
        (112.0, "112"),
        (1_000_704.0, "1,000,704"),
        (0.0, "0"),
        (-0.0, "0"),
        (9.996, "10.0"),
        (999.6, "1,000"),
    ],
)
def test_a_number_without_an_interval(value, shown):
    assert h.number(value) == shown


@pytest.mark.parametrize(
    "value, half, shown",
    [
        (1.9388, 0.0088, "1.94 ± 0.01"),
        (1.5976, 0.014, "1.60 ± 0.01"),
        (1.9388, 0.0008, "1.939 ± 0.001"),
        (0.3412, 0.0097, "0.341 ± 0.010"),
        (0.0016, 0.0104, "0.002 ± 0.010"),
        (-0.0022, 0.007, "−0.002 ± 0.007"),
        (0.0, 0.0302, "0.00 ± 0.03"),
        (1.0, 0.0302, "1.00 ± 0.03"),
        (-0.0001, 0.05, "0.00 ± 0.05"),
        (22.5886, 2.3476, "22.6 ± 2.3"),
        (163.84, 12.3, "164 ± 12"),
        (13_273.0, 480.0, "13,300 ± 500"),
        (0.096, 0.4526, "0.1 ± 0.5"),
        (0.3635, 0.0957, "0.36 ± 0.10"),
        (0.3635, 0.0997, "0.36 ± 0.10"),
        (0.0, 0.0, "0"),
    ],
)
def test_a_number_with_an_interval(value, half, shown):
    assert h.number(value, half) == shown


@given(st.floats(-1e6, 1e6), st.floats(1e-4, 1e5))
def test_an_interval_is_never_misstated(value, half):
    """What is read back differs from the truth by less than the interval that is shown, which has the right size."""
    shown, width = (float(x.replace(",", "").replace("−", "-")) for x in h.number(value, half).split(" ± "))
    assert 0.49 * half <= width <= 1.51 * half and abs(shown - value) <= 0.51 * width + 1e-9
    assert len(f"{width:g}".replace(".", "").lstrip("0").rstrip("0")) <= 2


@given(st.floats(1e-4, 1e9))
def test_a_number_keeps_its_size(value):
    assume(value != int(value))
    shown = h.number(value)
    assert float(shown.replace(",", "")) == pytest.approx(value, rel=0.051)
    assert math.isclose(float(h.number(-value).replace(",", "").replace("−", "-")), -float(shown.replace(",", "")))


MARKUP = ["a|b", "*a*", "_a_ `b` $c$", "<b>", "[a](b)", "a\\n", "#1", "~~a~~", "&amp;", "a<br>b", "AR, 4 steps"]


@pytest.mark.parametrize("text", MARKUP)
def test_words_are_no_markup(text):
    """Whatever a table says stands in the text as it is: in Pandoc's reading, which is GitHub's dialect."""
    pypandoc = pytest.importorskip("pypandoc")
    table = f"| x | y |\n| --- | --- |\n| {report.escaped(text)} | end |\n"
    read = pypandoc.convert_text(table, "plain", "gfm", extra_args=["--wrap=none"])
    assert re.split(r"\s{2,}", read.strip().splitlines()[-1].strip()) == [text, "end"]


@pytest.mark.parametrize("text", ["nan", "None", "1 ± 2", "12 steps", "1,000", "10.50"])
def test_words_are_left_as_they_are(tmp_path, text):
    pd.DataFrame({"row": [text, "b"], "x": [text, "word"]}).to_csv(tmp_path / "t.csv", index=False)
    assert report.read_table(tmp_path / "t.csv").to_numpy().tolist() == [[text, text], ["b", "word"]]


# --- markers ---


@pytest.fixture
def tables(tmp_path) -> Path:
    """A table with counts, intervals, speeds, a lone number, words and gaps."""
    rows = {"row": ["a", "b"], "nats/char": [1.9388, 1.5976], "95% ±": [0.0088, None], "bits/char": [2.7971, 2.0]}
    rows |= {"ours, seconds": [421.41, 1.0], "tokens/s": [13_273.0, 363.0], "text": ["x\ny|z", ""]}
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    return tmp_path


def test_a_cell_comes_with_its_interval(tables):
    for row, column, shown in (
        ("a", "nats/char", "1.94 ± 0.01"),
        ("b", "nats/char", "1.60"),
        ("a", "bits/char", "2.80"),
        ("a", "ours, seconds", "421"),
        ("a", "tokens/s", "13,300"),
        ("a", "text", "x<br>y\\|z"),
        ("b", "text", ""),
    ):
        marker = f"<!-- t ; {row} ; {column} -->"
        assert report.fill_report(f"{marker}9<!-- end -->", tables) == f"{marker}{shown}<!-- end -->"


def test_tables_are_filled_whole_or_by_columns(tables):
    filled = report.fill_report("<!-- table t -->old<!-- end -->.", tables)
    whole = "|  | nats/char | bits/char | ours, seconds | tokens/s | text |\n| --- | --- | --- | --- | --- | --- |\n"
    whole += "| a | 1.94 ± 0.01 | 2.80 | 421 | 13,300 | x<br>y\\|z |\n| b | 1.60 | 2 | 1 | 363 |  |"
    assert filled == f"<!-- table t -->\n{whole}\n<!-- end -->."
    filled = report.fill_report("<!-- table t ; ours, seconds ; nats/char -->\n\n<!-- end -->", tables)
    assert "|  | ours, seconds | nats/char |\n" in filled and "\n| b | 1 | 1.60 |\n" in filled
    assert report.fill_report(filled, tables) == filled, "filling again changes nothing"


def test_markers_of_absent_tables_are_left():
    text = "<!-- table nowhere -->old<!-- end --> <!-- nowhere ; a ; x -->7<!-- end -->"
    assert report.fill_report(text, Path("nowhere")) == text


@pytest.mark.parametrize(
    "wrong", ["<!-- t ; c ; text -->", "<!-- t ; a ; y -->", "<!-- t ; a ; 95% ± -->", "<!-- table t ; y -->"]
)
def test_a_marker_that_names_nothing_is_refused(tables, wrong):
    with pytest.raises(ValueError, match=r"t\.csv"):
        report.fill_report(f"{wrong}1<!-- end -->", tables)


def test_a_row_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("row,x\na,1\na,2\n")
    with pytest.raises(ValueError, match=r"2 rows 'a'"):
        report.fill_report("<!-- t ; a ; x -->1<!-- end -->", tmp_path)


@pytest.mark.parametrize("there", [[], ["README.md"], ["README.md", "analysis.md"]])
def test_elsewhere_the_command_says_where_to_run_it(tmp_path, monkeypatch, capsys, there):
    """Nothing is written, and no traceback either."""
    monkeypatch.chdir(tmp_path)
    for name in there:
        Path(name).write_text("text")
    with pytest.raises(SystemExit, match="2"):
        report.main([])
    said = capsys.readouterr().err
    assert f"{report.TABLES}: not here" in said and str(tmp_path) in said and "run it in the project's folder" in said
    assert all((name in said) != (name in there) for name in TEXTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == there


# --- the report as PDF ---


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A directory with the texts, the figures and nothing else; skips where nothing can set a report."""
    pytest.importorskip("pypandoc")
    pytest.importorskip("typst")
    for name in TEXTS:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "figures", tmp_path / "figures", ignore=shutil.ignore_patterns("*.gif"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def png_size(path: Path) -> tuple[int, int]:
    return struct.unpack(">II", path.read_bytes()[16:24])


def test_one_command_fills_the_texts_and_sets_the_report(desk, capsys):
    for name in TEXTS:
        emptied = re.sub(r"(<!-- [\w-]+ ; [^>]*? -->)[^<]*<!-- end -->", r"\g<1>?<!-- end -->", (ROOT / name).read_text())
        (desk / name).write_text(emptied)
    report.main([])
    assert [(desk / name).read_text() for name in TEXTS] == [(ROOT / name).read_text() for name in TEXTS]
    pdf = (desk / "analysis.pdf").read_bytes()
    assert pages(pdf) in (2, 3) and f"analysis.pdf: {pages(pdf)} pages" in capsys.readouterr().out
    boxes = {tuple(round(float(x)) for x in box.split()) for box in re.findall(rb"/MediaBox\s*\[(.*?)\]", pdf)}
    assert boxes == {(0, 0, 595, 842)}
    assert sorted(p.name for p in desk.iterdir()) == sorted([*TEXTS, "analysis.pdf", "figures"])
    fonts = set(re.findall(rb"/BaseFont\s*/(?:[A-Z]+\+)?(\w+)", pdf))
    assert fonts <= {b"LibertinusSerif", b"DejaVuSansMono", b"NewCMMath"}, "fonts of this machine would break pages elsewhere"


def test_every_figure_is_in_the_report_as_wide_as_its_text(desk):
    report.save_report(Path("analysis.md"), Path("analysis.pdf"))
    pdf = (desk / "analysis.pdf").read_bytes()
    figures = PICTURE.findall((desk / "analysis.md").read_text())
    images = [part for part in pdf.split(b"endobj") if re.search(rb"/Subtype\s*/Image", part)]
    sizes = [dict(re.findall(rb"/(Width|Height) (\d+)", image)) for image in images]
    embedded = [(int(size[b"Width"]), int(size[b"Height"])) for size in sizes]
    assert 1 <= len(figures) <= 3
    for name in figures:
        assert png_size(desk / name) in embedded, name
    drawn = []
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.S):
        with contextlib.suppress(zlib.error):
            drawn += re.findall(rb"([\d.]+) 0 0 [\d.-]+ [\d.-]+ [\d.-]+ cm\s*/\w+ Do", zlib.decompress(stream))
    text_width = 595.28 - 2 * 22 * 72 / 25.4  # of an A4 page with margins of 22 mm, in points
    assert [*map(float, drawn)] == [pytest.approx(text_width, abs=1)] * len(figures)


def test_the_same_text_makes_the_same_bytes(desk):
    made = []
    for name in ("a.pdf", "b.pdf"):
        report.save_report(Path("analysis.md"), desk / name)
        made.append((desk / name).read_bytes())
    assert made[0] == made[1]


def test_the_pdf_knows_its_text(desk):
    text = '# A "title" of 100%\n\nof $x_t^2 \\le \\frac{1}{t}$ and 1.94 ± 0.01\n\n| a | b |\n| --- | --- |\n| c<br>d | e |\n'
    (desk / "a.md").write_text(text)
    assert report.save_report(desk / "a.md", desk / "a.pdf") == 1
    mark = f"% of a.md, SHA-256 {hashlib.sha256((desk / 'a.md').read_bytes()).hexdigest()}\n"
    assert (desk / "a.pdf").read_bytes().endswith(mark.encode())


def test_a_report_too_long_is_an_error_and_keeps_the_old_file(desk):
    (desk / "a.md").write_text("# Long\n\n" + "One paragraph.\n\n" * 400)
    (desk / "a.pdf").write_text("old")
    with pytest.raises(ValueError, match=r"needs \d+ pages; pass a text that fits 3"):
        report.save_report(desk / "a.md", desk / "a.pdf")
    assert (desk / "a.pdf").read_text() == "old"


def test_a_figure_that_is_not_there_is_named(desk):
    (desk / "a.md").write_text("![a figure](figures/nowhere.png)")
    with pytest.raises(Exception, match=r"nowhere\.png"):
        report.save_report(desk / "a.md", desk / "a.pdf")


def test_without_typst_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "typst", None)
    (tmp_path / "a.md").write_text("text")
    with pytest.raises(ValueError, match="pip install pypandoc_binary typst"):
        report.save_report(tmp_path / "a.md", tmp_path / "a.pdf")
