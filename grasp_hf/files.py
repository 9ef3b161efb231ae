"""Files that are written whole or not at all, temporary directories with a lock, and blocks safe from interrupts."""

import ctypes
import errno
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

# Constants of the system calls that exchange two folders.
AT_FDCWD, RENAME_EXCHANGE, RENAME_SWAP = -100, 2, 2
LFS_ADVICE = "a git-LFS pointer, not the file itself; run `git lfs pull` in its repository"


def is_lfs_pointer(content: bytes) -> bool:
    """Whether a file with this content stands for a large file that git has not fetched."""
    return content.startswith(b"version https://git-lfs.github.com/spec/")


def lfs_pointers(folder: Path, names: Iterable[str]) -> list[str]:
    """Return those of `names`, files in `folder`, that are git-LFS pointers; a missing file is none."""
    found = []
    for name in names:
        if (folder / name).is_file():
            with open(folder / name, "rb") as file:
                found += [name] if is_lfs_pointer(file.read(64)) else []
    return found


def exists(path: Path) -> bool:
    """Whether there is a file or a folder at `path`; no name is an error, however long it is."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def find_folder(text: str) -> Path | None:
    """Return the folder that `text` names, where `~` is the home of a user; `None` if there is no such folder."""
    try:
        path = Path(text).expanduser()
        return path if path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # a long name, an unknown user, a zero byte
        return None


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`. The file keeps its old content until the new one is complete, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Write a file, or the entries of a folder, from the memory of the system to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Flush a folder with everything in it."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            flush(path)
    flush(folder)
    flush(folder.parent)


def exchange(first: Path, second: Path) -> None:
    """Exchange two folders of one file system in one atomic step.

    Raises:
        OSError: The system or the file system cannot do that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        call, arguments = getattr(libc, "renamex_np", None), (os.fsencode(first), os.fsencode(second), RENAME_SWAP)
    else:
        call = getattr(libc, "renameat2", None)
        arguments = (AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE)
    if call is None:
        raise OSError(errno.ENOSYS, "the system cannot exchange folders")
    if call(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def replace_folder(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`, in one step where the system can exchange folders; `new` is then the old one.

    Both are in one file system.

    Raises:
        OSError: Nothing was changed, because `folder` cannot be renamed: it is a mount point, or its parent is read-only.
    """
    if not folder.exists():
        new.rename(folder)
    else:
        try:
            exchange(new, folder)
        except OSError:  # a file system that cannot exchange: for a moment there is no `folder`
            aside = new.with_name(f"{new.name}.aside")
            folder.rename(aside)
            try:
                new.rename(folder)
            except OSError:
                aside.rename(folder)
                raise
            aside.rename(new)
    flush(folder.parent)


def link_or_copy(path: Path, to: Path) -> None:
    """Make a file or a folder appear at `to` too: by links where the file system has them, otherwise as a copy."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    if path.is_symlink():
        to.symlink_to(os.readlink(path))
    elif path.is_dir():
        shutil.copytree(path, to, symlinks=True, copy_function=link)
    else:
        link(str(path), str(to))


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the block has ended."""
    if threading.current_thread() is not threading.main_thread():  # Python interrupts only the main thread
        yield
        return
    received: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for pending in received:  # all of them: the user's handler may ignore one signal and not the other
        signal.raise_signal(pending)


LOCK = ".lock"


@contextmanager
def workspace(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new directory `parent/prefix…`, which is removed at the end of the block.

    A killed process leaves its directory behind, but the operating system releases its lock. Such directories are
    removed first.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent, prefix)
    # Other processes look for `prefix`. The directory gets that name only after it is locked, so they never remove it.
    made = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))
    lock = FileLock(made / LOCK, thread_local=False)  # another thread may release it
    try:
        lock.acquire()
        made = made.rename(parent / made.name.removeprefix("."))
        yield made
    finally:
        lock.release()
        _remove(made)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the directories of processes that no longer run; a running process holds the lock of its directory."""
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
    """Remove a directory, its lock last. After an interrupt, the next run finds the lock and removes the rest."""
    for path in directory.glob("*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            with suppress(OSError):
                path.unlink()
    shutil.rmtree(directory, ignore_errors=True)
