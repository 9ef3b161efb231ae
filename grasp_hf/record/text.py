"""Tables and numbers as text."""

import re
import textwrap
from collections.abc import Mapping, Sequence

from ..errors import one_line

WIDTH = 100  # columns of a line in a terminal
NO_VALUE = "–"


def markdown_table(rows: Sequence[Mapping[str, str | None]]) -> str:
    """Return rows as a Markdown table with aligned columns; `None` is printed as a dash."""
    columns = list(rows[0])
    lines = [columns, *([_cell(row[column]) for column in columns] for row in rows)]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    texts = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])


def escape_markdown(text: str) -> str:
    """Return the text of a stranger in one line that Markdown shows as it is: without links, images, HTML or headings.

    The line may stand in a table: `markdown_table` escapes its bars.
    """
    escaped = re.sub(r"([\\`*\[\]<>#~])", r"\\\1", one_line(text))
    return escaped.replace("://", ":\\//").replace("www.", "www\\.")  # a bare address would become a link


def code(text: str) -> str:
    """Return the text of a stranger as code in a line of Markdown; backticks, which would end it, become quotes."""
    return "`" + one_line(text).replace("`", "'") + "`"


def code_block(text: str, language: str) -> str:
    """Return lines of text as a block of code in Markdown, in a fence that no line of the text can close."""
    fence = "`" * max(3, *(len(found) + 1 for found in re.findall("`+", text) or [""]))
    return f"{fence}{language}\n{text}{fence}\n"


def _cell(text: str | None) -> str:
    return NO_VALUE if text is None else text


def format_number(value: float | None, digits: int = 3) -> str:
    """Return a number as text; a dash for `None`."""
    return NO_VALUE if value is None else f"{value:.{digits}f}"


def format_size(size: float) -> str:
    """Return a number of bytes in MB, from 1 GB on in GB."""
    return f"{size / 1e6:.1f} MB" if size < 999.95e6 else f"{size / 1e9:.2f} GB"


def shorten(name: str, width: int) -> str:
    """Return `name` in at most `width` characters; a long one loses its middle."""
    if len(name) <= width:
        return name
    end = (width - 1) // 2
    return f"{name[: width - 1 - end]}…{name[len(name) - end :]}"


def wrap(text: str, first: str = "", rest: str = "") -> str:
    """Return `text` in lines of at most `WIDTH` columns; `first` begins the first line, `rest` the others."""
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
