"""Sources pulled one at a time onto a constant disk: the next one arrives while one is used, and what was used goes."""

import os
import shutil
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import tqdm as hub_tqdm

from . import hub
from .sources import Source, SourceRef
from .workspace import workspace


class _Stopped(Exception):
    """The download is not wanted any more."""


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
        self._next: tuple[str, Future[tuple[Source, Path | None]]] | None = None
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grasp_hf-pull")

    def __enter__(self) -> "Puller":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
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
        future = expected[1] if expected and expected[0] == reference else self._thread.submit(self._bring, reference)
        source, own = future.result()
        if following is not None and self._prefetch:
            self._next = following, self._thread.submit(self._bring, following)
        try:
            yield source
        finally:
            if own is not None:
                shutil.rmtree(own, ignore_errors=True)

    def _bring(self, reference: str) -> tuple[Source, Path | None]:
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
        own = self._new_folder()
        try:
            return hub.fetch_source(listing, token=self._token, cache_dir=own, tqdm_class=self._progress()), own
        except BaseException:
            shutil.rmtree(own, ignore_errors=True)
            raise

    def _new_folder(self) -> Path:
        if self._directory is None:
            self._directory = self._held.enter_context(workspace(Path(constants.HF_HOME, "grasp_hf"), "run-"))
        self._count += 1
        folder = self._directory / str(self._count)
        folder.mkdir()
        return folder

    def _progress(self) -> type[hub_tqdm]:
        stop = self._stop

        class Progress(hub_tqdm):
            """The client's progress bar, which also stops a download that nobody waits for."""

            def update(self, n: float | None = 1) -> Any:
                if stop.is_set():
                    raise _Stopped
                return super().update(n)

        return Progress


def read_ahead(source: Source) -> None:
    """Ask the system to read the weight files of `source` into its page cache, where it can."""
    if hasattr(os, "posix_fadvise"):
        for path in source.weight_files:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
