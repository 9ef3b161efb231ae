"""Downloads of sources one at a time: the next source is downloaded while one is used, and used files are removed."""

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

PATIENCE = 5.0  # seconds to wait for a download that was told to stop

Pulled = tuple[Source, Path | None]  # a source, and the folder to remove after its use
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ShardedSource(Source):
    """A full model on the Hub whose shards are downloaded one by one; `folder` has the shards downloaded so far.

    Attributes:
        listing: Commit of the model.
        cache: Folder that the shards are downloaded to.
        token: Hub token.
        arriving: Iterator over the shards. It downloads each shard on request, or while the one before it is used.
    """

    listing: Listing
    cache: Path
    token: str | None = field(default=None, repr=False)
    arriving: Iterator[Path] = iter(())

    @property
    def num_bytes(self) -> int:
        """Size of all shards in bytes."""
        return self.listing.num_bytes

    def shards(self) -> Iterator[Path]:
        """Yield the shards in turn. Each is removed when the next one is requested."""
        for path in self.arriving:
            blob = path.resolve()
            yield path
            path.unlink(missing_ok=True)
            if self.cache.resolve() in blob.parents:  # otherwise the file is in the user's own cache
                blob.unlink(missing_ok=True)

    def gather(self) -> None:
        """Download all shards and keep them. The source can then be read like any other source."""
        for _ in self.arriving:
            pass


class Puller:
    """Context manager that downloads sources and removes them after use.

    At most two sources are on disk at a time, and only one without `prefetch`. The same holds for the shards of a
    `ShardedSource`. Each source on the Hub is downloaded to a cache of its own under `HF_HOME`, which is removed after
    use. Files in the user's own Hugging Face cache are not downloaded again, and are not removed.

    Args:
        token: Hub token; that of your login if left out.
        prefetch: Whether to download the next source while one is used.
        trusted: References whose own Python code may run.
        undo_bytes: Size in bytes of the copy of the weights that a merge keeps to undo a source whose later shard
            fails. With it, a source in several shards becomes a `ShardedSource` if that needs less disk space. Without
            it, every source is downloaded whole.
        commits: Commits of references that were looked up before; a branch may have moved since then.
        keep_in: Folder for the downloads, in place of one under `HF_HOME`. After an error or an interrupt, and if the
            process is killed, the files that have arrived stay there, and the next download of the same commit uses them.
    """

    def __init__(
        self,
        *,
        token: str | None = None,
        prefetch: bool = True,
        trusted: Collection[str] = (),
        undo_bytes: int | None = None,
        commits: Mapping[str, str] | None = None,
        keep_in: Path | None = None,
    ) -> None:
        self._token, self._prefetch, self._trusted = token, prefetch, trusted
        self._undo_bytes, self._commits = undo_bytes, commits or {}
        self._keep_in = keep_in
        self._used: set[Path] = set()  # folders in `keep_in` that hold a source now
        self._exits = ExitStack()
        self._directory: Path | None = None
        self._count = 0
        self._next: tuple[str, Future[Pulled]] | None = None
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
            self._exits.close()

    @contextmanager
    def pull(self, reference: str, following: str | None = None) -> Iterator[Source]:
        """Yield a source whose files are on this machine until the end of the block.

        The later shards of a `ShardedSource` are downloaded during the block.

        Args:
            reference: The source.
            following: The source of the next call. It is downloaded during the block.

        Raises:
            SourceNotFoundError, DownloadError: See `hub.download.locate`.
        """
        expected, self._next = self._next, None
        if expected and expected[0] == reference:
            future = expected[1]
        else:
            future = self._start(lambda: self._download(reference))
        source, own = future.result()
        block_ended = threading.Event()

        def start_following() -> None:
            if following is not None and self._prefetch:
                self._next = following, self._start(lambda: self._download(following))

        if isinstance(source, ShardedSource):
            source = replace(source, arriving=self._iterate_shards(source, block_ended, start_following))
        else:
            start_following()
        failed = True
        try:
            yield source
            failed = False
        finally:
            block_ended.set()
            if own is not None and not (failed and self._keep_in):
                shutil.rmtree(own, ignore_errors=True)
                self._used.discard(own)

    def _iterate_shards(
        self, source: ShardedSource, block_ended: threading.Event, start_following: Callable[[], None]
    ) -> Iterator[Path]:
        """Yield the shards of a source in turn, and start the next source after the last download.

        Args:
            source: Source whose first shard is on this machine.
            block_ended: Stops a download when it is set.
            start_following: Starts the download of the next source.
        """

        def fetch_shard(path: str) -> Path:
            with self._remove_on_failure(source.cache, block_ended):
                return fetch(source.listing, path, token=self._token, cache_dir=source.cache, stop=block_ended)

        first, *others = source.listing.weights
        file = source.folder / Path(first).name
        for path in others:
            shard = self._start(partial(fetch_shard, path)) if self._prefetch else None
            yield file
            file = shard.result() if shard else fetch_shard(path)
        start_following()
        yield file

    def _start(self, download: Callable[[], Result]) -> Future[Result]:
        """Run `download` in a thread of its own, after the download that runs now.

        The client waits for minutes if a connection has stalled. The thread is a daemon, so that neither the end of
        the block nor the end of the process waits as long.
        """
        before, future = self._thread, Future[Result]()

        def run() -> None:
            if before is not None:
                before.join()
            try:
                future.set_result(download())
            except BaseException as error:
                future.set_exception(error)

        self._thread = threading.Thread(target=run, name="grasp_hf-pull", daemon=True)
        self._thread.start()
        return future

    def _download(self, reference: str) -> Pulled:
        """Download a source and return it. Only the first shard of a `ShardedSource` is downloaded here."""
        ref = SourceRef.parse(reference)
        if ref.is_local:
            source = locate(ref, trusted=self._trusted)
            read_ahead(source)
            return source, None
        pinned = replace(ref, revision=self._commits.get(reference, ref.revision))
        trusted = [str(pinned)] if ref.is_among(self._trusted) else []
        listing = resolve_model(pinned, token=self._token, trusted=trusted)
        if listing is None:
            source = replace(cached_source(pinned, trusted=trusted), ref=ref)
            read_ahead(source)
            return source, None
        listing = replace(listing, ref=ref)
        with hub_errors(ref):
            own = self._new_folder(listing)
        sharded = self._needs_less_disk_in_shards(listing)
        with self._remove_on_failure(own, self._stop):
            weights = listing.weights[:1] if sharded else None
            source = fetch_source(listing, weights, token=self._token, cache_dir=own, stop=self._stop)
        if sharded:
            source = ShardedSource(**vars(source), listing=listing, cache=own, token=self._token)
        return source, own

    def _needs_less_disk_in_shards(self, listing: Listing) -> bool:
        """Whether the shards and `undo_bytes` together need less disk space than whole models."""
        weights, at_once = listing.weights, 2 if self._prefetch else 1
        if self._undo_bytes is None or not all(path.endswith(".safetensors") for path in weights):
            return False
        whole = listing.num_bytes - cached_bytes(listing)
        largest = max((listing.files[path].size for path in weights), default=0)
        return at_once * largest + self._undo_bytes < at_once * whole

    @contextmanager
    def _remove_on_failure(self, own: Path, stop: threading.Event) -> Iterator[None]:
        """Remove `own`, the folder that the block downloads to, if the block fails or ends after `stop` was set.

        Downloads that are to be kept stay.
        """
        try:
            yield
            if stop.is_set():
                raise Stopped
        except BaseException:
            if self._keep_in is None:
                # If `__exit__` stopped waiting and removed the parent folder, the client may have created it again.
                shutil.rmtree(own.parent if self._stop.is_set() else own, ignore_errors=True)
            raise

    def _new_folder(self, listing: Listing) -> Path:
        """Return a folder for one source; it is empty, or holds what arrived of the same commit before."""
        if self._stop.is_set():
            raise Stopped
        if self._keep_in is not None:
            name, number = f"{listing.repo_id.replace('/', '--')}-{listing.sha}", 1
            while (folder := self._keep_in / (name if number == 1 else f"{name}-{number}")) in self._used:
                number += 1
            folder.mkdir(parents=True, exist_ok=True)
            self._used.add(folder)
            return folder
        if self._directory is None:
            self._directory = self._exits.enter_context(workspace(Path(constants.HF_HOME, "grasp_hf"), "run-"))
        self._count += 1
        folder = self._directory / str(self._count)
        folder.mkdir()
        return folder


def read_ahead(source: Source) -> None:
    """Ask the operating system to read the weight files of `source` into its page cache, if it supports this."""
    if hasattr(os, "posix_fadvise"):
        for path in source.weight_files:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
