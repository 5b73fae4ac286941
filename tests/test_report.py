"""Report, README and tables must say the same."""

import re
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
def test_pictures_and_links_exist(name):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_report_is_two_to_three_pages():
    words = re.sub(r"<!--.*?-->|^\|.*$", "", (ROOT / "analysis.md").read_text(), flags=re.M)
    assert 900 <= len(words.split()) <= 1800


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
