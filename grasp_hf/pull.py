"""Sources pulled one at a time onto a constant disk: the next one arrives while one is used, and what was used goes."""

import os
import shutil
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

from huggingface_hub import constants

from . import hub
from .sources import Source, SourceRef
from .workspace import workspace

PATIENCE = 5.0  # seconds that a download has to end when it is not wanted any more

Brought = tuple[Source, Path | None]


class Puller:
    """Brings sources to this machine, as a context manager; at most two are here at a time, one without `prefetch`.

    A source on the Hub is downloaded into a cache of its own under `HF_HOME`, which is removed when the source has been
    used. What the user's own Hugging Face cache holds is read there, and stays.

    Args:
        token: Hub token; left out, the one that you are logged in with.
        prefetch: Whether the following source is brought while one is used.
        trusted: References whose own Python code may run.
    """

    def __init__(self, *, token: str | None = None, prefetch: bool = True, trusted: Collection[str] = ()) -> None:
        self._token, self._prefetch, self._trusted = token, prefetch, trusted
        self._held = ExitStack()
        self._directory: Path | None = None
        self._count = 0
        self._next: tuple[str, Future[Brought]] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Puller":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        try:
            if self._thread is not None:
                self._thread.join(PATIENCE)
        finally:
            self._held.close()

    @contextmanager
    def pull(self, reference: str, following: str | None = None) -> Iterator[Source]:
        """Yield a source whose files are on this machine until the end of the block.

        Args:
            reference: The source.
            following: The one that will be asked for next; it is being brought meanwhile.

        Raises:
            SourceNotFoundError, DownloadError: As for `hub.locate`.
        """
        expected, self._next = self._next, None
        future = expected[1] if expected and expected[0] == reference else self._begin(reference)
        source, own = future.result()
        if following is not None and self._prefetch:
            self._next = following, self._begin(following)
        try:
            yield source
        finally:
            if own is not None:
                shutil.rmtree(own, ignore_errors=True)

    def _begin(self, reference: str) -> Future[Brought]:
        """Bring a source in a thread of its own, after the one that is being brought.

        The thread is a daemon, as the client waits for minutes where a connection has stalled: neither the end of the
        block nor that of the process waits as long.
        """
        before, future = self._thread, Future[Brought]()

        def bring() -> None:
            if before is not None:
                before.join()
            try:
                future.set_result(self._bring(reference))
            except BaseException as error:
                future.set_exception(error)

        self._thread = threading.Thread(target=bring, name="grasp_hf-pull", daemon=True)
        self._thread.start()
        return future

    def _bring(self, reference: str) -> Brought:
        """Return the source, and the folder to be removed when it has been used."""
        ref = SourceRef.parse(reference)
        listing = None if ref.is_local else hub.resolve(ref, token=self._token, trusted=self._trusted)
        if listing is None:
            source = (
                hub.locate(ref, trusted=self._trusted)
                if ref.is_local
                else hub.cached_source(ref, trusted=self._trusted)
            )
            read_ahead(source)
            return source, None
        Source.inspect(ref, Path(), listing.sha, files=listing.names)  # raises before anything is downloaded
        with hub.named_errors(ref):
            own = self._new_folder()
        try:
            source = hub.fetch_source(listing, token=self._token, cache_dir=own, stop=self._stop)
            if self._stop.is_set():
                raise hub.Stopped
            return source, own
        except BaseException:
            # Where the end of the block has not waited, the client may have made its folders once more.
            shutil.rmtree(own.parent if self._stop.is_set() else own, ignore_errors=True)
            raise

    def _new_folder(self) -> Path:
        if self._stop.is_set():
            raise hub.Stopped
        if self._directory is None:
            self._directory = self._held.enter_context(workspace(Path(constants.HF_HOME, "grasp_hf"), "run-"))
        self._count += 1
        folder = self._directory / str(self._count)
        folder.mkdir()
        return folder


def read_ahead(source: Source) -> None:
    """Ask the system to read the weight files of `source` into its page cache, where it can."""
    if hasattr(os, "posix_fadvise"):
        for path in source.weight_files:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
