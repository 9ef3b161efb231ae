"""Directories of one run are removed when it ends, or when the next run starts, but never while it runs."""

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from grasp_hf.files import workspace

HOLDER = """
import multiprocessing
import sys
from pathlib import Path
from grasp_hf.files import workspace

with workspace(Path(sys.argv[1]), "run-") as made:
    (made / "deep").mkdir()
    (made / "deep" / "weights").write_bytes(b"0" * 1000)
    worker = multiprocessing.get_context("fork").Process(target=len, args=[[]])  # inherits open files, and closes them
    worker.start()
    worker.join()
    print(made, flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(parent: Path) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """Run a process that holds a directory in `parent` until its input ends."""
    command = [sys.executable, "-c", HOLDER, str(parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_a_directory_is_removed_at_the_end(error: type[BaseException] | None, tmp_path: Path) -> None:
    with ExitStack() as stack:
        if error is not None:
            stack.enter_context(pytest.raises(error, match="inside"))
        with workspace(tmp_path / "new" / "parent", "run-") as made:
            assert made.parent == tmp_path / "new" / "parent" and made.name.startswith("run-")
            (made / "deep").mkdir()
            (made / "deep" / "file").write_text("x")
            if error is not None:
                raise error("inside")
    assert list((tmp_path / "new" / "parent").iterdir()) == []


def test_the_directory_of_a_killed_process_is_removed_by_the_next_run(tmp_path: Path) -> None:
    (tmp_path / "run-notes").mkdir()
    (tmp_path / "run-notes" / "mine.txt").write_text("of another program, which takes no lock")
    (tmp_path / "run-log").write_text("a file")
    with another_process(tmp_path) as (process, left):
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (left / "deep" / "weights").stat().st_size == 1000
        with workspace(tmp_path, "other-"):
            assert left.exists(), "its prefix differs"
        with workspace(tmp_path, "run-") as made:
            assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run-log", "run-notes", made.name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-log", "run-notes"]
    assert (tmp_path / "run-notes" / "mine.txt").exists()


def test_the_directory_of_a_living_process_stays(tmp_path: Path) -> None:
    with another_process(tmp_path) as (process, theirs):
        for _ in range(3):
            with workspace(tmp_path, "run-") as made:
                assert made != theirs
            assert (theirs / "deep" / "weights").stat().st_size == 1000
        process.communicate("")
        assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_several_in_one_process(tmp_path: Path) -> None:
    with workspace(tmp_path, "run-") as first, workspace(tmp_path, "run-") as second:
        assert first != second and first.exists() and second.exists()
        other = threading.Thread(target=lambda: workspace(tmp_path, "run-").__enter__())
        other.start()
        other.join()
        assert first.exists() and second.exists()


def test_a_directory_entered_in_another_thread_is_released(tmp_path: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        stack = ExitStack()
        entering = threading.Thread(target=lambda held=stack: held.enter_context(workspace(tmp_path, "run-")))
        entering.start()
        entering.join()
        stack.close()
        assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/dev/fd")) == before


def test_a_removal_that_was_interrupted_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink, calls = os.unlink, itertools.count(1)

    def interrupted(path: str, **options: Any) -> None:
        if next(calls) == 4:
            raise KeyboardInterrupt("at the fourth file")
        unlink(path, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match="at the fourth file"):
        with workspace(tmp_path, "run-") as made:
            for name in "abc":
                (made / name).write_text("x")
            patched.setattr(os, "unlink", interrupted)
    assert [path.name for path in made.iterdir()] == [".lock"]
    with workspace(tmp_path, "run-"):
        assert not made.exists()
