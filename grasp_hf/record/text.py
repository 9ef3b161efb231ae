"""Tables and numbers as text."""

import textwrap
from collections.abc import Sequence


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """Return rows as a Markdown table with aligned columns, which also reads well in a terminal."""
    columns = list(rows[0])
    lines = [
        [cell.replace("|", "\\|") for cell in line]
        for line in [columns, *([row[column] for column in columns] for row in rows)]
    ]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    texts = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])


def format_number(value: float | None, digits: int = 3) -> str:
    """Return a number for a table; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


WIDTH = 100  # columns of a line in a terminal


def shorten(name: str, width: int) -> str:
    """Return `name` in at most `width` characters; a long one loses its middle."""
    if len(name) <= width:
        return name
    end = (width - 1) // 2
    return f"{name[: width - 1 - end]}…{name[len(name) - end :]}"


def wrap(text: str, first: str = "", rest: str = "") -> str:
    """Return `text` in lines of at most `WIDTH` columns; `first` begins the first line, `rest` the others."""
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
