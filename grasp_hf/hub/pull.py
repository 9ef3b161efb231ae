"""Sources pulled one at a time onto a constant disk: the next one arrives while one is used, and what was used goes."""

import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from huggingface_hub import constants

from ..files import workspace
from .client import Stopped, hub_errors
from .download import cached_bytes, cached_source, fetch, fetch_source, locate, resolve_model
from .listing import Listing
from .reference import Source, SourceRef

PATIENCE = 5.0  # seconds that a download has to end when it is not wanted any more

Brought = tuple[Source, Path | None]
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ShardedSource(Source):
    """A full model on the Hub whose shards come one by one; its folder holds those that are here.

    Attributes:
        listing: Its commit.
        cache: Where they are fetched to.
        token: Hub token.
        arriving: The shards, each fetched when it is asked for, or while the one before it is used.
    """

    listing: Listing
    cache: Path
    token: str | None = field(default=None, repr=False)
    arriving: Iterator[Path] = iter(())

    @property
    def num_bytes(self) -> int:
        """Size of all the weights in bytes."""
        return self.listing.num_bytes

    def shards(self) -> Iterator[Path]:
        """Yield the weight files in turn; each is removed when the next one is asked for."""
        for path in self.arriving:
            blob = path.resolve()
            yield path
            path.unlink(missing_ok=True)
            if self.cache.resolve() in blob.parents:  # else it is the user's own
                blob.unlink(missing_ok=True)

    def gather(self) -> None:
        """Bring all shards to this machine: an ordinary source from now on."""
        for _ in self.arriving:
            pass


class Puller:
    """Brings sources to this machine, as a context manager; at most two are here at a time, one without `prefetch`.

    With `undo_bytes` the same holds for shards: at most two are here at a time, one without `prefetch`.

    A source on the Hub is downloaded into a cache of its own under `HF_HOME`, which is removed when the source has been
    used. What the user's own Hugging Face cache holds is read there, and stays.

    Args:
        token: Hub token; left out, the one that you are logged in with.
        prefetch: Whether the following source is brought while one is used.
        trusted: References whose own Python code may run.
        undo_bytes: Yield a `ShardedSource` where a source is in shards and that needs less disk, with this many bytes
            that its user keeps elsewhere because a later shard may fail. Left out, every source is here as a whole.
        commits: The commit to take of a reference, where that was looked up before: a branch may have moved meanwhile.
    """

    def __init__(
        self,
        *,
        token: str | None = None,
        prefetch: bool = True,
        trusted: Collection[str] = (),
        undo_bytes: int | None = None,
        commits: Mapping[str, str] | None = None,
    ) -> None:
        self._token, self._prefetch, self._trusted = token, prefetch, trusted
        self._undo_bytes, self._commits = undo_bytes, commits or {}
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
        """Yield a source whose files are on this machine until the end of the block, or come there in it.

        Args:
            reference: The source.
            following: The one that will be asked for next; it is being brought meanwhile.

        Raises:
            SourceNotFoundError, DownloadError: As for `hub.locate`.
        """
        expected, self._next = self._next, None
        future = expected[1] if expected and expected[0] == reference else self._begin(lambda: self._bring(reference))
        source, own = future.result()
        over = threading.Event()

        def follow() -> None:
            if following is not None and self._prefetch:
                self._next = following, self._begin(lambda: self._bring(following))

        if isinstance(source, ShardedSource):
            source = replace(source, arriving=self._arriving(source, over, follow))
        else:
            follow()
        try:
            yield source
        finally:
            over.set()
            if own is not None:
                shutil.rmtree(own, ignore_errors=True)

    def _arriving(self, source: ShardedSource, over: threading.Event, follow: Callable[[], None]) -> Iterator[Path]:
        """Yield the shards of a source, of which the first is here, and `follow` when all are."""

        def fetch_shard(path: str) -> Path:
            with self._removing(source.cache, over):
                return fetch(source.listing, path, token=self._token, cache_dir=source.cache, stop=over)

        first, *others = source.listing.weights
        file = source.folder / Path(first).name
        for path in others:
            coming = self._begin(partial(fetch_shard, path)) if self._prefetch else None
            yield file
            file = coming.result() if coming else fetch_shard(path)
        follow()
        yield file

    def _begin(self, bring: Callable[[], Result]) -> Future[Result]:
        """Bring something in a thread of its own, after what is being brought.

        The thread is a daemon, as the client waits for minutes where a connection has stalled: neither the end of the
        block nor that of the process waits as long.
        """
        before, future = self._thread, Future[Result]()

        def run() -> None:
            if before is not None:
                before.join()
            try:
                future.set_result(bring())
            except BaseException as error:
                future.set_exception(error)

        self._thread = threading.Thread(target=run, name="grasp_hf-pull", daemon=True)
        self._thread.start()
        return future

    def _bring(self, reference: str) -> Brought:
        """Return the source, and the folder to be removed when it has been used."""
        ref = SourceRef.parse(reference)
        if ref.is_local:
            source = locate(ref, trusted=self._trusted)
            read_ahead(source)
            return source, None
        at = replace(ref, revision=self._commits.get(reference, ref.revision))
        trusted = [str(at)] if ref.is_among(self._trusted) else []
        listing = resolve_model(at, token=self._token, trusted=trusted)
        if listing is None:
            source = replace(cached_source(at, trusted=trusted), ref=ref)
            read_ahead(source)
            return source, None
        listing = replace(listing, ref=ref)
        with hub_errors(ref):
            own = self._new_folder()
        sharded = self._needs_less_disk_in_shards(listing)
        with self._removing(own, self._stop):
            weights = listing.weights[:1] if sharded else None
            source = fetch_source(listing, weights, token=self._token, cache_dir=own, stop=self._stop)
        if sharded:
            source = ShardedSource(**vars(source), listing=listing, cache=own, token=self._token)
        return source, own

    def _needs_less_disk_in_shards(self, listing: Listing) -> bool:
        weights, at_once = listing.weights, 2 if self._prefetch else 1
        if self._undo_bytes is None or not all(path.endswith(".safetensors") for path in weights):
            return False
        whole = listing.num_bytes - cached_bytes(listing)
        largest = max((listing.files[path].size for path in weights), default=0)
        return at_once * largest + self._undo_bytes < at_once * whole

    @contextmanager
    def _removing(self, own: Path, stop: threading.Event) -> Iterator[None]:
        """Remove the folder of a source where the block, which fetches into it, fails or ends after `stop` was set."""
        try:
            yield
            if stop.is_set():
                raise Stopped
        except BaseException:
            # Where the end of the block has not waited, the client may have made its folders once more.
            shutil.rmtree(own.parent if self._stop.is_set() else own, ignore_errors=True)
            raise

    def _new_folder(self) -> Path:
        if self._stop.is_set():
            raise Stopped
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
