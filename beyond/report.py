"""The report: numbers of figures/tables/ put into Markdown, and the Markdown set as a PDF.

    python -m beyond.report   # fills README.md, CONTRIBUTING.md and analysis.md, writes analysis.pdf

Pandoc turns the Markdown into Typst, Typst sets it; both come as wheels: pip install pypandoc_binary typst.
Tables keep four decimals; text shows the digits that count, by the formatter of the notebooks.
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

import pandas as pd

from llada_helpers import pretty, write_atomically

TABLES = Path("figures/tables")
TEXTS = ("README.md", "CONTRIBUTING.md", "analysis.md")


def escaped(text: str) -> str:
    r"""A word of a table as Markdown: its signs escaped, its line ends kept.

    >>> escaped("a|b\nc")
    'a\\|b<br>c'
    """
    return re.sub(r"([\\`*_{}\[\]<>#|$~&])", r"\\\1", str(text)).replace("\n", "<br>")


def read_table(path: Path) -> pd.DataFrame:
    r"""A table as it is shown: strings, the first column in its own words, a value and the "... ±" column after it in one.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "t.csv").write_text("row,x,95% ±,n\n10.50,1.5012,0.0131,1200\n")
    ...     read_table(Path(folder, "t.csv")).to_dict("records")
    [{'row': '10.50', 'x': '1.50 ± 0.01', 'n': '1,200'}]
    """
    table = pd.read_csv(path, converters={0: str}, keep_default_na=False, na_values=[""])
    return pretty(table, rows=None).map(escaped).set_index(table.iloc[:, 0], drop=False)


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
    table has one. Markers of tables that were not made here are left as they are. ValueError: no such row or column.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "t.csv").write_text("row,x,x ±\na,1.5012,0.02\n")
    ...     fill_report("x = <!-- t ; a ; x -->?<!-- end -->", Path(folder))
    'x = <!-- t ; a ; x -->1.50 ± 0.02<!-- end -->'
    """

    def filled(match: re.Match) -> str:
        marker, whole, name, rest = match.groups()
        path, names = tables / f"{name}.csv", rest.split(" ; ")[1:]
        if not path.exists():
            return match.group()
        if whole:
            return f"{marker}\n{markdown_table(path, names)}\n<!-- end -->"
        table, (row, column) = read_table(path), names
        if (found := list(table.index).count(row)) != 1 or column not in table:
            raise ValueError(f"{marker}: {path.name} has {found} rows {row!r}; its columns are {list(table)}")
        return f"{marker}{table.at[row, column]}<!-- end -->"

    return re.sub(r"(<!-- (?!end )(table )?([\w-]+)((?: ; .*?)*) -->).*?<!-- end -->", filled, text, flags=re.DOTALL)


STYLE = """
#set page("a4", margin: (x: 22mm, y: 18mm))
#set text(10.5pt, lang: "en", font: "Libertinus Serif")
#set par(justify: true, leading: 0.58em, spacing: 0.8em)
#set image(width: 100%)
#set table(stroke: none, inset: (x: 0.6em, y: 0.25em))
#set table.hline(stroke: 0.5pt)
#show table: set text(10pt)
#show table: set par(justify: false)
#show table.cell: set align(left)
#show heading.where(level: 2): set text(12pt)
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

    What is missing there is an error (exit status 2) that says where to run it.
    """
    parser = argparse.ArgumentParser(description=f"Put the numbers of {TABLES}/ into {', '.join(TEXTS)}, and set analysis.pdf.")
    parser.parse_args(arguments)
    if missing := [str(path) for path in map(Path, (*TEXTS, TABLES)) if not path.exists()]:
        parser.error(f"{', '.join(missing)}: not here, in {Path.cwd()}; run it in the project's folder")
    for path in map(Path, TEXTS):
        write_atomically(path, fill_report(path.read_text(encoding="utf-8")).encode())
    print(f"{', '.join(TEXTS)}: the numbers are those of {TABLES}/")
    print(f"analysis.pdf: {save_report(Path('analysis.md'), Path('analysis.pdf'))} pages")


if __name__ == "__main__":
    main()
