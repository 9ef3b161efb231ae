"""Files and directories: written whole or not at all, locked while a run uses them, safe from interrupts."""

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`, which holds what it held before until all of it is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let Ctrl-C, and the SIGTERM of who stops a job, wait until the block is done."""
    if threading.current_thread() is not threading.main_thread():  # no other thread is ever interrupted
        yield
        return
    waiting: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    previous = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for received in waiting:  # of which one may be ignored, the others not
        signal.raise_signal(received)


LOCK = ".lock"


@contextmanager
def workspace(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new directory `parent/prefix…`, removed at the end; those of dead processes are removed at the start.

    A process that is killed leaves its directory behind, and the system opens its lock.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent, prefix)
    # Locked before it has the name that others look for: nobody takes it for an abandoned one.
    made = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))
    lock = FileLock(made / LOCK, thread_local=False)  # it may be released in another thread
    try:
        lock.acquire()
        made = made.rename(parent / made.name.removeprefix("."))
        yield made
    finally:
        lock.release()
        _remove(made)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for found in parent.glob(f"{prefix}*"):
        lock = found / LOCK
        if not lock.is_file() or not os.access(lock, os.W_OK):
            continue
        try:
            with FileLock(lock, timeout=0):
                _remove(found)
        except (Timeout, OSError):
            continue


def _remove(directory: Path) -> None:
    """Remove a directory; its lock goes last, so that the next run finds what is left when this is interrupted."""
    for path in directory.glob("*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            with suppress(OSError):
                path.unlink()
    shutil.rmtree(directory, ignore_errors=True)
