"""Writes the tables and lists of the project's Markdown files, with the commands above them.

A table is between `<!-- begin: COMMAND -->` and `<!-- end -->`. `python -m tests.benchmarks.tables` runs every
`COMMAND` and writes its output between the two lines. With `--check` it writes nothing, and fails if a table differs.
Every command is a module of `tests` with the option `--table`. It reads the record in `tests/benchmarks/results/`, or
the settings of the package, and measures nothing. The columns are not aligned in the files, so a new number changes
only one line.
"""

import argparse
import contextlib
import importlib
import io
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
FILES = (
    Path(__file__).parent / "README.md",
    ROOT / "README.md",
    ROOT / "recipes" / "README.md",
    ROOT / "tests" / "README.md",
)
PROGRAM = ["python", "-m"]
PACKAGE = "tests"
BEGIN = re.compile(r"^<!-- begin: (.+) -->$")
END = "<!-- end -->"


def filled(text: str) -> str:
    """Return a Markdown text in which the commands have printed their tables anew.

    Raises:
        ValueError: A marker has no partner, or a command lacks `--table`.
    """
    lines: list[str] = []
    command = None
    for number, line in enumerate(text.split("\n"), 1):
        begins, ends = BEGIN.match(line), line == END
        if (begins and command) or (ends and not command):
            raise ValueError(f"line {number}: '{line}' has no partner; expected begin and end lines alternately")
        if begins:
            command = begins[1]
            lines += [line, "", printed(command), ""]
        if ends:
            command = None
        if not command:
            lines.append(line)
    if command:
        raise ValueError(f"'<!-- begin: {command} -->' has no partner; expected '{END}' below the table")
    return "\n".join(lines)


def printed(command: str) -> str:
    """Return the output of a command, with compact tables."""
    words = shlex.split(command)
    program, module, arguments = words[:2], words[2:3], words[3:]
    if program != PROGRAM or not module or not module[0].startswith(f"{PACKAGE}.") or "--table" not in arguments:
        raise ValueError(f"expected 'python -m {PACKAGE}.NAME … --table', which measures nothing, got '{command}'")
    output = io.StringIO()
    with patch.object(sys, "argv", [module[0], *arguments]), contextlib.redirect_stdout(output):
        importlib.import_module(module[0]).main()
    text = "\n".join(compact(line) for line in output.getvalue().split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text.strip())


def compact(line: str) -> str:
    """Return a row of a Markdown table without the spaces that align its columns; other lines stay unchanged."""
    if not line.startswith("|"):
        return line
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    if all(set(cell) == {"-"} for cell in cells):
        return f"|{'---|' * len(cells)}"
    return f"| {' | '.join(cells)} |"


def differing(files: Sequence[Path], *, write: bool) -> list[Path]:
    """Return the files whose tables differ from the output of their commands; with `write`, update them."""
    found = []
    for path in files:
        text = path.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            found.append(path)
            if write:
                path.write_text(new, encoding="utf-8")
    return found


def main() -> None:
    """Write or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=FILES, help="default: every README of the project")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if a table differs")
    args = parser.parse_args()
    found = differing(args.files, write=not args.check)
    for path in found:
        print(f"{path}: {'its tables are out of date' if args.check else 'written'}")
    if args.check and found:
        sys.exit("run python -m tests.benchmarks.tables to update them")


if __name__ == "__main__":
    main()
