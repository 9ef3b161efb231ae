"""The tables and lists of the project's Markdown files, printed by the commands that stand above them.

A table stands between `<!-- begin: COMMAND -->` and `<!-- end -->`. `python -m tests.benchmarks.tables` runs every
`COMMAND` and writes what it prints between the two lines; with `--check` it changes nothing and fails where a file differs.
Commands read the record in `tests/benchmarks/results/`, or the settings of the package, and measure nothing: each is a
module of `tests` with the option `--table`. The columns of the tables are not aligned in the files, so that a new number
changes one line.
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
FILES = (Path(__file__).parent / "README.md", ROOT / "README.md", ROOT / "recipes" / "README.md")
PROGRAM = ["python", "-m"]
PACKAGE = "tests"
BEGIN = re.compile(r"^<!-- begin: (.+) -->$")
END = "<!-- end -->"


def filled(text: str) -> str:
    """Return a Markdown text with its tables as their commands print them now.

    Raises:
        ValueError: A marker has no partner, or a command would measure something.
    """
    lines: list[str] = []
    command = None
    for number, line in enumerate(text.split("\n"), 1):
        begins, ends = BEGIN.match(line), line == END
        if (begins and command) or (ends and not command):
            raise ValueError(f"line {number}: '{line}' has no partner; expected a begin and an end in turns")
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
    """Return what a command prints, its tables compact."""
    program, module, arguments = (words := shlex.split(command))[:2], words[2:3], words[3:]
    if program != PROGRAM or not module or not module[0].startswith(f"{PACKAGE}.") or "--table" not in arguments:
        raise ValueError(f"expected 'python -m {PACKAGE}.NAME … --table', which runs nothing, got '{command}'")
    output = io.StringIO()
    with patch.object(sys, "argv", [module[0], *arguments]), contextlib.redirect_stdout(output):
        importlib.import_module(module[0]).main()
    text = "\n".join(compact(line) for line in output.getvalue().split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text.strip())


def compact(line: str) -> str:
    """Return a line of a Markdown table without the spaces that align its columns; any other line as it is."""
    if not line.startswith("|"):
        return line
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    if all(set(cell) == {"-"} for cell in cells):
        return f"|{'---|' * len(cells)}"
    return f"| {' | '.join(cells)} |"


def differing(files: Sequence[Path], *, write: bool) -> list[Path]:
    """Return the files whose tables are not what their commands print; with `write`, they are when this returns."""
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
    parser.add_argument("--check", action="store_true", help="change nothing, and fail where a table differs")
    args = parser.parse_args()
    found = differing(args.files, write=not args.check)
    for path in found:
        print(f"{path}: {'its tables are out of date' if args.check else 'written'}")
    if args.check and found:
        sys.exit("run python -m tests.benchmarks.tables to write them")


if __name__ == "__main__":
    main()
