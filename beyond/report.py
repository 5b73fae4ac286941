"""The report: numbers of figures/tables/ put into Markdown, and the Markdown set as a PDF.

    python -m beyond.report   # fills README.md and analysis.md, writes analysis.pdf

Pandoc turns the Markdown into Typst, Typst sets it; both come as wheels: pip install pypandoc_binary typst.
Numbers are rounded here and nowhere else: tables keep four decimals, text shows the digits that count.
"""

import argparse
import hashlib
import itertools
import json
import math
import re
from pathlib import Path

import pandas as pd

from llada_helpers import write_atomically

TABLES = Path("figures/tables")


def places(value: float, digits: int) -> int:
    """Decimal places at which `value` shows so many significant digits; negative: tens, hundreds and so on are rounded.

    >>> places(1.9388, 3), places(0.0088, 1), places(13273.0, 3)
    (2, 3, -2)
    """
    return digits - 1 - int(f"{value:.{digits - 1}e}".partition("e")[2])


def number(value: float, half: float = math.nan) -> str:
    """A measured number as text: three significant digits, two below a tenth; whole numbers stay whole.

    With the half-width of its interval it is "value ± half", to the place where the half-width has its second digit (its first,
    if that is three or more), but not beyond the value's third, unless the half-width would be off by more than a half.

    >>> number(0.98451), number(421.41), number(-0.0924), number(1000704.0)
    ('0.985', '421', '−0.092', '1,000,704')
    >>> number(1.9388, 0.0088), number(0.0016, 0.0104), number(0.0, 0.0302), number(1.9388, 0.0011)
    ('1.94 ± 0.01', '0.002 ± 0.010', '0.00 ± 0.03', '1.939 ± 0.001')
    """
    if math.isnan(half) or half == 0:
        place, half = 0 if value == int(value) else places(value, 3 if abs(value) >= 0.1 else 2), math.nan
    else:
        place = min(places(value, 3), places(half, 2) - (f"{half:.1e}"[0] >= "3"))
        while abs(round(half, place) - half) > half / 2:
            place += 1

    def rounded(x: float) -> str:
        return f"{round(x, place) + 0.0:,.{max(0, place)}f}".replace("-", "−")  # + 0.0: no minus before a zero

    return rounded(value) if math.isnan(half) else f"{rounded(value)} ± {rounded(half)}"


def cell(text: str, half: str = "", column: str = "") -> str:
    r"""One entry of a CSV file as Markdown: numbers rounded, words with their signs escaped and their line ends kept.

    >>> cell("1.9388", "0.0088"), cell("13273.0", column="tokens/s"), cell("a|b\nc"), cell("")
    ('1.94 ± 0.01', '13,300', 'a\\|b<br>c', '')
    """
    try:
        value, width = float(text), float(half or "nan")
    except ValueError:
        value = width = math.nan
    if math.isfinite(value):
        return number(float(f"{value:.2e}") if column == "tokens/s" else value, width)
    return re.sub(r"([\\`*_{}\[\]<>#|$~&])", r"\\\1", text).replace("\n", "<br>")


def read_table(path: Path) -> pd.DataFrame:
    r"""A table as it is shown: strings, the first column in its own words, a value and the "... ±" column after it in one.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "t.csv").write_text("row,x,95% ±,n\n10.50,1.5012,0.0131,1200\n")
    ...     read_table(Path(folder, "t.csv")).to_dict("records")
    [{'row': '10.50', 'x': '1.50 ± 0.01', 'n': '1,200'}]
    """
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    shown = {table.columns[0]: [re.sub(r"([|<*_])", r"\\\1", name) for name in table.iloc[:, 0]]}
    for column, following in itertools.pairwise([*table.columns[1:], ""]):
        if not column.endswith("±"):
            halves = table[following] if following.endswith("±") else itertools.repeat("")
            shown[column] = [cell(text, half, column) for text, half in zip(table[column], halves)]
    return pd.DataFrame(shown, index=table.iloc[:, 0])


def markdown_table(path: Path, columns: list[str] | None = None) -> str:
    r"""A CSV file as a Markdown table: the first column, nameless if it is "row", and of the others `columns` or all.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "t.csv").write_text("row,x,y\na,1.50,2\n")
    ...     print(markdown_table(Path(folder, "t.csv"), ["y"]))
    |  | y |
    | --- | --- |
    | a | 2 |
    """
    table = read_table(path)
    unknown = set(columns or ()) - set(table)
    if unknown:
        raise ValueError(f"{path.name} has no columns {sorted(unknown)}; it has {list(table)}")
    kept = table[[table.columns[0], *columns]] if columns else table
    lines = [["" if name == "row" else name for name in kept], ["---"] * len(kept.columns), *kept.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill_report(text: str, tables: Path = TABLES) -> str:
    r"""Put the tables' numbers between the markers of a Markdown text.

    `<!-- table NAME -->...<!-- end -->` becomes the table (`<!-- table NAME ; COLUMN ; COLUMN -->`: just these columns),
    `<!-- NAME ; ROW ; COLUMN -->...<!-- end -->` one cell, where ROW is the value of the first column; with its interval, if the
    table has one. Markers of tables that were not made here are left as they are.

    Raises:
        ValueError: a table lacks the row or the column.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "t.csv").write_text("row,x,x ±\na,1.5012,0.02\n")
    ...     fill_report("x = <!-- t ; a ; x -->?<!-- end -->", Path(folder))
    'x = <!-- t ; a ; x -->1.50 ± 0.02<!-- end -->'
    """

    def one(match: re.Match) -> str:
        marker, name, row, column = match.groups()
        if not (tables / f"{name}.csv").exists():
            return match.group()
        table = read_table(tables / f"{name}.csv")
        if list(table.index).count(row) != 1 or column not in table:
            found = list(table.index).count(row)
            raise ValueError(f"{marker}: {name}.csv has {found} rows {row!r}; its columns are {list(table)}")
        return f"{marker}{table.at[row, column]}<!-- end -->"

    def whole(match: re.Match) -> str:
        marker, name, columns = match.groups()
        path = tables / f"{name}.csv"
        made = path.exists() and markdown_table(path, columns.split(" ; ")[1:])
        return f"{marker}\n{made}\n<!-- end -->" if made else match.group()

    text = re.sub(r"(<!-- table (\S+)(.*?) -->).*?<!-- end -->", whole, text, flags=re.DOTALL)
    return re.sub(r"(<!-- ([\w-]+) ; (.*?) ; (.*?) -->).*?<!-- end -->", one, text, flags=re.DOTALL)


STYLE = """
#set page("a4", margin: (x: 17mm, y: 13mm))
#set text(9.5pt, lang: "en", font: "Libertinus Serif")
#set par(justify: true, leading: 0.5em, spacing: 0.65em)
#set image(width: 100%)
#set table(stroke: none, inset: (x: 0.6em, y: 0.25em))
#set table.hline(stroke: 0.5pt)
#show table: set text(9pt)
#show table: set par(justify: false)
#show table.cell: set align(left)
#show heading.where(level: 2): set text(11pt)
#show heading: set block(above: 0.9em, below: 0.5em)
"""


def save_report(source: Path, target: Path, most_pages: int = 3) -> int:
    """Set a Markdown report as a PDF on A4, its figures as wide as its text; returns the number of pages.

    The same text and figures make the same bytes, on any machine: the fonts are Typst's own. The last line of the PDF names the
    SHA-256 of `source`, by which a test knows whether it is current.

    Raises:
        ValueError: Pandoc or Typst is missing, or the text is too long.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.md").write_text("# Title")
    ...     save_report(Path(folder, "a.md"), Path(folder, "a.pdf"))
    1
    """
    try:
        import pypandoc
        import typst
    except ImportError as error:
        raise ValueError(f"{error}; to set the report: pip install pypandoc_binary typst") from error
    text = source.read_text(encoding="utf-8")
    title = json.dumps(text.partition("\n")[0].strip("# "), ensure_ascii=False)
    unbroken = text.replace(" ± ", "\u00a0±\u00a0").replace("<br>", "`#linebreak()`{=typst}")
    body = pypandoc.convert_text(unbroken, "typst", "gfm+raw_attribute", extra_args=["--wrap=none"])
    document = f"#set document(title: {title}, date: none)\n{STYLE}{body}"
    pdf = typst.compile(document.encode(), root=source.parent, ignore_system_fonts=True)
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    if pages > most_pages:
        raise ValueError(f"{source} needs {pages} pages; pass a text that fits {most_pages}")
    mark = f"% of {source.name}, SHA-256 {hashlib.sha256(text.encode()).hexdigest()}\n"
    write_atomically(target, pdf + mark.encode())
    return pages


def main(arguments: list[str] | None = None) -> None:
    """The command line, `python -m beyond.report`: everything that holds numbers of the tables, in the current directory.

    >>> main(["--help"])
    Traceback (most recent call last):
    SystemExit: 0
    """
    description = "Put the numbers of figures/tables/ into README.md and analysis.md, and set analysis.md as analysis.pdf."
    argparse.ArgumentParser(description=description).parse_args(arguments)
    for path in (Path("README.md"), Path("analysis.md")):
        write_atomically(path, fill_report(path.read_text(encoding="utf-8")).encode())
        print(f"{path} holds the numbers of {TABLES}/")
    print(f"analysis.pdf: {save_report(Path('analysis.md'), Path('analysis.pdf'))} pages")


if __name__ == "__main__":
    main()
