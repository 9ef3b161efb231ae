"""Tables and numbers as text."""

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


def format_size(size: float) -> str:
    """Return a number of bytes in MB, from 1 GB on in GB."""
    return f"{size / 1e6:.1f} MB" if size < 999.95e6 else f"{size / 1e9:.2f} GB"


def shorten(text: str, width: int) -> str:
    """Return a text of at most `width` characters; a longer one loses its middle, because the ends tell names apart."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[-tail:]}"
