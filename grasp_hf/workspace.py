"""Directories of one run: locked while it lives, so that a later run can tell what a killed one has left, and remove it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

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
