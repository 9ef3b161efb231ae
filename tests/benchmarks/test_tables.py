"""The tables of the Markdown files are those of the record; a command that would measure something is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import settings, tables

COMMAND = "python -m tests.benchmarks.settings --table"


def test_the_tables_of_the_project_are_those_of_the_record() -> None:
    assert all(path.exists() for path in tables.FILES)
    assert tables.FILES[0].read_text().count("<!-- begin: ") >= 17
    assert tables.FILES[2].read_text().count("<!-- begin: python -m tests.support.settings --table -->") == 1
    command = [sys.executable, "-m", "tests.benchmarks.tables", "--check"]
    run = subprocess.run(command, cwd=tables.ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture
def loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a record of settings whose default has a loss."""
    monkeypatch.setattr(settings, "FILE", tmp_path / "settings.json")

    def write(value: float) -> None:
        run = {"benchmark": "sotu", "target": "2005-2021", "labels": 64, "seed": 0, "seconds": 1.0}
        record = {"results": [{**run, "setting": "default", "loss": value}]}
        (tmp_path / "settings.json").write_text(json.dumps(record))

    return write


def test_a_table_follows_its_record(loss: Any, tmp_path: Path) -> None:
    path, around = tmp_path / "file.md", ("Before.\n\n", "\n\nAfter |  it.\n")
    path.write_text(f"<!-- begin: {COMMAND} -->\nold\n<!-- end -->".join(around))
    loss(2.0)
    assert tables.differing([path], write=False) == [path] and "old" in path.read_text()
    assert tables.differing([path], write=True) == [path]
    assert path.read_text() == (
        f"<!-- begin: {COMMAND} -->\n\nsotu, 64 labels\n\n"
        "| setting | runs | loss | loss: better by | time, of the default's |\n|---|---|---|---|---|\n"
        "| default | 1 | 2.000 | – | 1.0 |\n\n<!-- end -->"
    ).join(around)
    assert tables.differing([path], write=True) == []
    loss(2.001)
    assert tables.differing([path], write=False) == [path]


def test_checking_names_the_file_and_fails(loss: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.md"
    path.write_text(f"<!-- begin: {COMMAND} -->\n<!-- end -->\n")
    loss(2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tables", "--check", str(path)])
        with pytest.raises(SystemExit, match="run python -m tests.benchmarks.tables to update them"):
            tables.main()
    assert capsys.readouterr().out == f"{path}: its tables are out of date\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"<!-- begin: {COMMAND} -->\ntable\n", f"'<!-- begin: {COMMAND} -->' has no partner"),
        ("text\n<!-- end -->", "line 2: '<!-- end -->' has no partner"),
        (f"<!-- begin: {COMMAND} -->\n\n<!-- begin: {COMMAND} -->\n<!-- end -->", "line 3: .* has no partner"),
    ],
    ids=["no end", "no begin", "a second begin"],
)
def test_a_marker_without_a_partner_is_an_error(text: str, message: str, loss: Any) -> None:
    loss(2.0)
    with pytest.raises(ValueError, match=message):
        tables.filled(text)


@pytest.mark.parametrize(
    "command",
    [
        "python -m tests.benchmarks.speed",
        "python -m tests.benchmarks.compare sotu --show rows",
        "python -m pip --table",
        "python --table",
        "rm --table",
    ],
)
def test_a_command_that_does_not_read_the_record_is_refused(command: str) -> None:
    with pytest.raises(ValueError, match="expected 'python -m tests.NAME … --table', which measures nothing"):
        tables.printed(command)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("| a   | b \\| c |  |", "| a | b \\| c |  |"),
        ("|-----|---|---|", "|---|---|---|"),
        ("no | table  here", "no | table  here"),
    ],
)
def test_a_line_of_a_table_has_no_spaces_that_align_it(line: str, expected: str) -> None:
    assert tables.compact(line) == expected
