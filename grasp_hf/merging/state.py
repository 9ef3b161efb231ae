"""The state of a merge on disk, from which the same merge goes on after its process was killed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from torch import Tensor

from ..errors import DiskFullError, StateError
from ..files import flush, flush_tree, write_whole
from ..models.mixture import restore_state_, state_tensors
from ..tensors.placing import overwrite_
from ..tensors.stored import file_sum, read_tensors, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..models.finetune import Checkpoints

VERSION = 1
LOCK, HEAD, IDENTITY, DOWNLOADS, TRAINING = "lock", "HEAD.json", "run.json", "downloads", "training"
CHECKPOINT, CONTROLS = "checkpoint", "controls"
CHECKPOINT_SECONDS = (
    60.0  # a training without evaluation data keeps a checkpoint at the first end of an epoch after these
)


class RunState:
    """A folder of entries, each of which is complete or absent. `RunState.open` locks it.

    An entry has values and, in a file, tensors. The files of new entries are flushed to the disk before `HEAD.json`, which
    names them, is replaced by a rename. So a kill or a power cut leaves the entries from before or those from after.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[str, dict[str, Any]] = {}
        self._serial = 0
        head = folder / HEAD
        if head.exists():
            try:
                found = json.loads(head.read_text(encoding="utf-8"))
                self._entries, self._serial = dict(found["entries"]), int(found["serial"])
            except (ValueError, KeyError, TypeError) as error:
                raise self._error(f"{HEAD} cannot be read: {error}") from error
        self._remove_unnamed()

    @classmethod
    @contextmanager
    def open(cls, folder: Path, *, fresh: bool = False) -> Iterator[RunState]:
        """Yield the state in `folder`, locked for this process; a folder without an entry is removed.

        The operating system releases the lock of a process that dies.

        Args:
            folder: Created if it is missing.
            fresh: Whether to discard a state that is there.

        Raises:
            StateError: Another process uses the state, or it cannot be read.
        """
        lock = FileLock(folder / LOCK, timeout=0, thread_local=False)
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout as error:
                raise StateError(
                    f"another process is merging with the state in '{folder}'; wait for it, or name another output"
                ) from error
            if (folder / LOCK).exists():  # otherwise its last owner removed the folder meanwhile
                break
            lock.release()
        try:
            if fresh:
                _empty(folder)
            yield cls(folder)
        finally:
            if {path.name for path in folder.glob("*")} <= {LOCK, IDENTITY}:  # nothing was done
                shutil.rmtree(folder, ignore_errors=True)
            lock.release()

    def check(self, run: Mapping[str, Any]) -> None:
        """Note which merge this is, or compare it with the merge that the state belongs to.

        Args:
            run: Everything that decides the result, as values of JSON.

        Raises:
            StateError: It is another merge. The error lists the differences.
        """
        ours = json.loads(json.dumps({"state": VERSION, **run}))
        path = self.folder / IDENTITY
        if not path.exists():
            write_whole(path, json.dumps(ours, indent=1) + "\n")
            return
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise self._error(f"{IDENTITY} cannot be read: {error}") from error
        if problems := [*_differences(theirs, ours)]:
            raise StateError(
                f"'{self.folder}' holds the state of another merge; start that merge again to go on, or discard the "
                "state with --fresh (from Python: delete the folder)",
                problems=problems,
            )

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """Return the names of all entries."""
        return [*self._entries]

    def values(self, name: str) -> Any:
        """Return the values of an entry; `None` if there is no such entry."""
        return self._entries[name]["values"] if name in self._entries else None

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the values of each tensor of an entry.

        Raises:
            StateError: The file is damaged.
        """
        entry = self._entries[name]
        path = self.folder / entry["file"]
        try:
            damaged = file_sum(path) != entry["sum"]
        except OSError as error:
            raise self._error(f"'{path.name}' cannot be read: {error.strerror}") from error
        if damaged:
            raise self._error(f"'{path.name}' has another checksum than {HEAD} lists")
        yield from read_tensors(path, entry["header"])

    def restore_(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Change `tensors` to those of an entry."""
        for own, value in self.tensors(name):
            overwrite_(tensors, {own: value})

    def save(
        self, name: str, values: Any = None, tensors: Mapping[str, Tensor] | None = None, *, drop: Collection[str] = ()
    ) -> None:
        """Add an entry or replace it, and remove the entries `drop`, in one step.

        Raises:
            DiskFullError: The disk has no space for the entry. The state is as before.
        """
        entry = {"values": json.loads(json.dumps(values))}
        try:
            if tensors is not None:
                self._serial += 1
                path = self.folder / f"{self._serial}.bin"
                entry["header"], entry["sum"] = write_tensors(path, tensors)
                entry["file"] = path.name
            kept = {own: found for own, found in self._entries.items() if own not in drop}
            self._commit({**kept, name: entry})
        except OSError as error:
            self._remove_unnamed()
            raise DiskFullError(
                f"the state of the merge cannot be written to '{self.folder}': {error.strerror}; free some space there. "
                "The state is as it was before this step"
            ) from error

    def complete(self) -> None:
        """Remove the state, because the merge is done and delivered."""
        _empty(self.folder)

    def train(self, name: str, model: PreTrainedModel, train: Callable[[Checkpoints], None]) -> None:
        """Change `model` by a training, or to its result if an earlier process has finished it.

        Args:
            name: Name of the entry.
            model: The target.
            train: Trains the model. It goes on from a checkpoint if there is one, and keeps new ones.
        """
        if name in self._entries:
            restore_state_(model, self.tensors(name))
            return
        folder, found = self.folder / TRAINING, self.values(CHECKPOINT)
        ours = found if found and found["training"] == name else None
        if ours is None:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        # A checkpoint that this entry does not name may be incomplete.
        for path in folder.glob("checkpoint-*"):
            if ours is None or path.name not in ours["complete"]:
                shutil.rmtree(path, ignore_errors=True)

        def keep(path: Path) -> None:
            flush_tree(path)
            complete = [found.name for found in folder.glob("checkpoint-*")]
            self.save(CHECKPOINT, {"training": name, "last": path.name, "complete": complete})

        from ..models.finetune import Checkpoints  # imports datasets, which a merge without data does not need

        last = folder / ours["last"] if ours and (folder / ours["last"]).is_dir() else None
        train(Checkpoints(folder, last, keep, CHECKPOINT_SECONDS))
        self.save(name, None, state_tensors(model), drop=[CHECKPOINT])
        shutil.rmtree(folder, ignore_errors=True)

    def _commit(self, entries: dict[str, dict[str, Any]]) -> None:
        flush(self.folder)
        head = {"saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "serial": self._serial, "entries": entries}
        write_whole(self.folder / HEAD, json.dumps(head))
        self._entries = entries
        self._remove_unnamed()

    def _remove_unnamed(self) -> None:
        named = {entry.get("file") for entry in self._entries.values()}
        for path in [*self.folder.glob("*.bin"), *self.folder.glob(f".{HEAD}.*")]:
            if path.name not in named:
                with suppress(OSError):
                    path.unlink()

    def _error(self, problem: str) -> StateError:
        return StateError(
            f"the state in '{self.folder}' is damaged: {problem}; discard it with --fresh (from Python: delete the folder)"
        )


def _empty(folder: Path) -> None:
    """Remove everything in a folder but its lock; `HEAD.json` goes first, so that a kill leaves no half of a state."""
    (folder / HEAD).unlink(missing_ok=True)
    for path in folder.glob("*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink(missing_ok=True)


def _differences(theirs: Any, ours: Any, place: str = "") -> Iterator[str]:
    """Yield a sentence for each value that differs."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in [*theirs, *(key for key in ours if key not in theirs)]:
            yield from _differences(theirs.get(key), ours.get(key), f"{place}.{key}" if place else key)
    elif theirs != ours:
        yield f"{place}: the state has {_shorten(theirs)}, this merge {_shorten(ours)}"


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}…"
