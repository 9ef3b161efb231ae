"""The settings as the list in `recipes/README.md`: `python -m tests.support.settings --table` prints it.

`python -m tests.benchmarks.tables` writes it there.
"""

import argparse
import re
import textwrap

from grasp_hf.config.settings import GROUPS, Setting, settings

WIDTH = 118
NO_BREAK = "\0"


def settings_list() -> str:
    """Return every setting with its values, its default and its whole description as Markdown, in groups."""
    rows = settings()
    groups = ["\n".join(item(row) for row in rows if row.group == group) for group in GROUPS]
    return "\n\n".join(f"### {group}\n\n{items}" for group, items in zip(GROUPS, groups, strict=True))


def item(row: Setting) -> str:
    """Return one setting as an item of a list."""
    text = f"- **`{row.name}`** ({row.values}; default `{row.default}`): {row.meaning}"
    whole = re.sub("`[^`]+`", lambda code: code[0].replace(" ", NO_BREAK), text)  # a line that begins with + is a list
    lines = textwrap.fill(whole, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return lines.replace(NO_BREAK, " ")


def main() -> None:
    """Print the settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", required=True, help="print the list")
    parser.parse_args()
    print(settings_list())


if __name__ == "__main__":
    main()
