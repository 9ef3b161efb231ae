"""What the Hub holds: a reference becomes one commit, with the size and the checksum of every file of it."""

import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, ModelInfo, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import _http, get_session
from huggingface_hub.utils import tqdm as hub_tqdm

from .errors import DownloadError, SourceNotFoundError, first_line
from .files import write_whole
from .licenses import license_of
from .sources import ADAPTER_WEIGHTS, FULL_WEIGHTS, INDEX, Source, SourceRef, main_weights, shards_of
from .workspace import workspace

logger = logging.getLogger(__name__)

TOKENIZERS = ("*.model", "*.spm", "*.tiktoken", "bpe.codes")  # those that are neither JSON nor text
CONFIG_FILES = ("*.json", "*.txt", *TOKENIZERS, "*.jinja", "README.md", "grasp_config.yaml")
CHAT_TEMPLATES = "additional_chat_templates"
NOT_NEEDED = ("trainer_state.json", "*results.json")
TIMEOUT = 30.0  # seconds
ATTEMPTS = 4
PAUSES = (1.0, 2.0, 4.0)  # seconds between them
BUSY = (408, 425, 429, 500, 502, 503, 504)

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a commit.

    Attributes:
        size: In bytes.
        sha256: Checksum of a large file; `None` for a small one.
        git_sha1: Checksum of a small one, as git makes it; that of a large one is of its pointer.
    """

    size: int
    sha256: str | None
    git_sha1: str

    def matches(self, path: Path) -> bool:
        """Tell whether the file at `path` has this content, by its checksum: the size alone says too little."""
        if path.stat().st_size != self.size:
            return False
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        with open(path, "rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
        return digest.hexdigest() == (self.sha256 or self.git_sha1)


@dataclass(frozen=True)
class Listing:
    """One commit of a repository.

    Attributes:
        ref: What the user named.
        repo_id: The repository's name now; another one than in `ref` where it was renamed.
        sha: The commit.
        files: What it holds, by path.
        license: What its card declares.
        gated: Whether conditions stand before its files.
        trusted: Whether its Python files are wanted.
        shards: Names of the weight files, where an index says which they are.
    """

    ref: SourceRef
    repo_id: str
    sha: str
    files: dict[str, RemoteFile]
    license: str | None = None
    gated: bool = False
    trusted: bool = False
    shards: tuple[str, ...] = ()

    def select(self, patterns: Sequence[str]) -> list[str]:
        """Return the files in the reference's folder that match one of `patterns`."""
        return [
            path
            for path in self.files
            if path.startswith(self.folder)
            and any(fnmatch(name := path.removeprefix(self.folder), p) for p in patterns)
            if "/" not in name and not any(fnmatch(name, pattern) for pattern in NOT_NEEDED)
        ]

    @property
    def folder(self) -> str:
        """The reference's folder in the repository, with a slash at its end; empty for the root."""
        return f"{self.ref.subfolder}/" if self.ref.subfolder else ""

    @property
    def cache_name(self) -> str:
        """The repository's folder in a cache of the client."""
        return repo_folder_name(repo_id=self.repo_id, repo_type="model")

    @property
    def names(self) -> list[str]:
        """The files in the reference's folder, by name."""
        return sorted(Path(path).name for path in self.select(["*"]))

    @property
    def exports(self) -> list[str]:
        """The names of files in folders below, where exports for other frameworks lie."""
        below = (path.removeprefix(self.folder) for path in self.files if path.startswith(self.folder))
        return sorted(path for path in below if "/" in path)

    def inspect(self) -> Source:
        """Return what it is, before anything is downloaded; raises as `Source.inspect`."""
        return Source.inspect(self.ref, Path(), self.sha, files=self.names, exports=self.exports)

    @property
    def configuration(self) -> list[str]:
        """Paths of the configuration files; chat templates beside the first one lie in a folder of their own."""
        templates = [path for path in self.files if path.startswith(f"{self.folder}{CHAT_TEMPLATES}/")]
        return templates + self.select([*CONFIG_FILES, "*.py"] if self.trusted else CONFIG_FILES)

    @property
    def main_weights(self) -> str | None:
        """Path of the file that holds the weights, or of the index of those that do."""
        name = main_weights(self.names)
        return self.folder + name if name else None

    @property
    def weights(self) -> list[str]:
        """Paths of the weight files, of one format only."""
        main = self.main_weights
        if main is None or not main.endswith(INDEX):
            return [main] if main else []
        return [self.folder + name for name in self.shards]

    @property
    def num_bytes(self) -> int:
        """Size of the weight files in bytes."""
        return sum(self.files[path].size for path in self.weights)


def resolve(ref: SourceRef, *, token: str | None = None, trusted: Collection[str] = ()) -> Listing | None:
    """Return the commit that `ref` names now; `None` where the Hub cannot be asked, so that only a cache can serve.

    Raises:
        SourceNotFoundError: No such repository or revision, or no access to it; also with a token that the Hub refuses.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        with named_errors(ref, token), time_limit(TIMEOUT):
            info = retried(lambda: _info(ref, token), f"looking up '{ref}'")
    except DownloadError as error:
        logger.warning("the Hub cannot be reached (%s); what is cached of '%s' is used", error.__cause__, ref)
        return None
    files = {}
    for file in info.siblings or []:
        sha256 = file.lfs["sha256"] if file.lfs else None
        files[file.rfilename] = RemoteFile(file.size or 0, sha256, file.blob_id or "")
    if info.id != ref.name and "/" in ref.name:
        logger.warning("'%s' is called '%s' now", ref.name, info.id)
    licence = license_of(info.card_data) if info.card_data else None
    return Listing(ref, info.id, str(info.sha), files, licence, bool(info.gated), ref.is_among(trusted))


def resolve_model(ref: SourceRef, *, token: str | None = None, trusted: Collection[str] = ()) -> Listing | None:
    """Return what `resolve` does, of what is a model or an adapter, and with the weight files that an index names.

    The index is not kept.

    Raises:
        SourceNotFoundError: Also where it is no model, or one that lacks weight files.
        DownloadError: The index did not arrive.
    """
    listing = resolve(ref, token=token, trusted=trusted)
    if listing is None:
        return None
    listing.inspect()
    main = listing.main_weights
    if main is None or not main.endswith(INDEX):
        return listing
    with workspace(Path(tempfile.gettempdir()), "grasp_hf-") as folder:
        names = shards_of(fetch(listing, main, token=token, cache_dir=folder), listing.ref)
    if missing := [name for name in names if listing.folder + name not in listing.files]:
        raise SourceNotFoundError(
            f"'{listing.ref}' is not complete: {Path(main).name} names {', '.join(missing)}, which the repository lacks"
        )
    return replace(listing, shards=tuple(names))


def _info(ref: SourceRef, token: str | None) -> ModelInfo:
    return HfApi(token=token).model_info(ref.name, revision=ref.revision, files_metadata=True, timeout=TIMEOUT)


def locate(reference: str | SourceRef, *, token: str | None = None, trusted: Collection[str] = ()) -> Source:
    """Return where the files of `reference` lie on this machine; those of a Hub model are in the Hugging Face cache.

    All files are of one commit, and each has the checksum that the Hub lists; one that has not is downloaded again.
    Weights are downloaded in one format: safetensors where the repository has them. Python files are downloaded only where
    `trusted` names the reference.

    Raises:
        SourceNotFoundError: No such folder, repository, revision or weights, or no access to them.
        DownloadError: A file did not arrive whole.
    """
    ref = SourceRef.parse(reference) if isinstance(reference, str) else reference
    if ref.is_local:
        source = Source.inspect(ref, Path(ref.name))
        if missing := source.missing_weights:
            raise SourceNotFoundError(f"'{ref}' is not complete: {', '.join(missing)} missing; copy it again")
        return _told(replace(source, trusted=ref.is_among(trusted)))
    listing = resolve_model(ref, token=token, trusted=trusted)
    if listing is None:
        return cached_source(ref, token, trusted)
    source = fetch_source(listing, token=token)
    _remember(listing)
    return source


def fetch_source(listing: Listing, weights: Sequence[str] | None = None, **options: Any) -> Source:
    """Download what is needed of a commit, or of its weight files only `weights`; `options` are those of `fetch`."""
    folder = Path()
    for path in [*listing.configuration, *(listing.weights if weights is None else weights)]:
        folder = fetch(listing, path, **options).parent
    source = Source.inspect(listing.ref, folder, listing.sha)
    return _told(replace(source, gated=listing.gated, trusted=listing.trusted))


def _told(source: Source) -> Source:
    """Return `source` after a warning where its weights are pickled."""
    if any(name.endswith(".bin") for name in source.weight_names):
        logger.warning(
            "%s has no safetensors weights; its pickled weights are read with weights_only=True", source.ref
        )
    return source


def fetch(
    listing: Listing,
    path: str,
    *,
    token: str | None = None,
    cache_dir: Path | None = None,
    stop: threading.Event | None = None,
) -> Path:
    """Return one file of a commit in a cache, downloaded where it is not there with the right checksum.

    A file that the user's own cache holds is not downloaded a second time into another one: it is linked.

    Args:
        listing: The commit.
        path: The file in it.
        token: Hub token.
        cache_dir: The cache; the user's own where left out.
        stop: Ends the download when it is set.

    Raises:
        Stopped: `stop` was set.
        SourceNotFoundError: No access to it.
        DownloadError: It did not arrive whole after several attempts.
    """
    expected = listing.files[path]
    damaged = False

    def download() -> Path:
        nonlocal damaged
        if stop is not None and stop.is_set():
            raise Stopped
        file = hf_hub_download(
            listing.repo_id,
            path,
            revision=listing.sha,
            token=token,
            cache_dir=cache_dir,
            force_download=damaged,
            tqdm_class=_stoppable(stop) if stop is not None else None,
        )
        damaged = not expected.matches(Path(file))
        if damaged:
            raise _Corrupt(f"{path}: its checksum is not the one that the Hub lists")
        return Path(file)

    with named_errors(listing.ref, token, path), time_limit(TIMEOUT):
        found = try_to_load_from_cache(listing.repo_id, path, revision=listing.sha)
        if isinstance(found, str):
            if expected.matches(Path(found)):
                return Path(found) if cache_dir is None else _linked(Path(found), listing, path, cache_dir)
            damaged = cache_dir is None
        if cache_dir is None:
            _remove_partial(listing, path)
        return retried(download, f"downloading {path} of '{listing.ref}'")


def _remove_partial(listing: Listing, path: str) -> None:
    """Remove from the user's cache what a killed download of this file has left; one that is going on holds its lock."""
    name, file = listing.cache_name, listing.files[path]
    etag = file.sha256 or file.git_sha1
    partial = [*Path(constants.HF_HUB_CACHE, name, "blobs").glob(f"{etag}.*incomplete")]
    if not partial:
        return
    try:
        with FileLock(Path(constants.HF_HUB_CACHE, ".locks", name, f"{etag}.lock"), timeout=0):
            for left in partial:
                left.unlink(missing_ok=True)
    except (Timeout, OSError):  # somebody else's
        return


class Stopped(Exception):
    """The download is not wanted any more."""


def _stoppable(stop: threading.Event) -> type[hub_tqdm]:
    class Progress(hub_tqdm):
        """The client's progress bar, which also stops a download that nobody waits for."""

        def update(self, n: float | None = 1) -> Any:
            if stop.is_set():
                raise Stopped
            return super().update(n)

    return Progress


def _remember(listing: Listing) -> None:
    """Note in the user's cache what the revision named, as every download by its name does; needed without a network."""
    revision = listing.ref.revision or "main"
    path = Path(constants.HF_HUB_CACHE, listing.cache_name, "refs", revision)
    with suppress(OSError):  # of a cache that others keep
        if revision == listing.sha or (path.is_file() and path.read_text() == listing.sha):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, listing.sha)


def _linked(found: Path, listing: Listing, path: str, cache_dir: Path) -> Path:
    """Put a file of another cache into the snapshot of `cache_dir`."""
    folder = cache_dir / listing.cache_name / "snapshots" / listing.sha
    link = folder / path
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(found.resolve())
    return link


_limits: list[tuple[Any, Any]] = []  # per open block, what the client had before the first
_limits_lock = threading.Lock()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Let no request of the client wait longer for the other side, in sessions that it makes meanwhile too.

    It has no limit of its own where a call names none, and makes a new session when a connection was refused. Blocks in
    several threads share the limit of the first.
    """
    with _limits_lock:
        make = _http._GLOBAL_CLIENT_FACTORY

        def limited() -> Any:
            client = make()
            client.timeout = seconds
            return client

        if _limits:
            _limits.append(_limits[0])
        else:
            _limits.append((make, get_session().timeout))
            _http._GLOBAL_CLIENT_FACTORY, get_session().timeout = limited, seconds
    try:
        yield
    finally:
        with _limits_lock:
            before = _limits.pop()
            if not _limits:
                _http._GLOBAL_CLIENT_FACTORY, get_session().timeout = before


class _Corrupt(OSError):
    """A file arrived with another content than the Hub lists."""


def retried(ask: Callable[[], Answer], doing: str) -> Answer:
    """Return the answer of `ask`, which is called again a few times where the network or the Hub failed for a moment."""
    for pause in (*PAUSES, None):
        try:
            return ask()
        except (HTTPError, HfHubHTTPError, OSError) as error:
            if pause is None or not _passing(error):
                raise
            logger.info("%s failed (%s), trying again in %.0f s", doing, first_line(error), pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _passing(error: Exception) -> bool:
    """Tell whether trying again may help: the client itself gives up on much that passes."""
    if isinstance(error, HfHubHTTPError):
        if error.response is None:
            return False
        # The address in the Hub's storage holds for a while only; the next attempt asks the Hub for another one.
        expired = error.response.status_code == 403 and not str(error.response.url).startswith(
            f"{constants.ENDPOINT}/"
        )
        return expired or error.response.status_code in BUSY
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):  # the client has tried for a while
        return False
    return isinstance(error, (HTTPError, ConnectionError, TimeoutError, _Corrupt)) or "onsistency check" in str(error)


def cached_source(ref: SourceRef, token: str | None = None, trusted: Collection[str] = ()) -> Source:
    """Return a model that the user's cache holds whole, without asking the Hub; its card need not be there."""
    names = [*CONFIG_FILES, FULL_WEIGHTS[0], ADAPTER_WEIGHTS[0], *(["*.py"] if ref.is_among(trusted) else [])]
    inside = f"{ref.subfolder}/" if ref.subfolder else ""
    patterns = [inside + name for name in names if name != "README.md"]
    ignored = [inside + name for name in NOT_NEEDED] + ([] if inside else ["*/*"])
    with named_errors(ref, token):
        folder = snapshot_download(
            ref.name,
            revision=ref.revision,
            allow_patterns=patterns,
            ignore_patterns=ignored,
            local_files_only=True,
        )
    try:
        source = Source.inspect(ref, Path(folder, ref.subfolder or ""), Path(folder).name)
    except FileNotFoundError as error:  # an earlier look left its configuration alone
        raise DownloadError(
            f"'{ref}' could not be downloaded, and no complete copy is cached; run it again when the Hub can be reached"
        ) from error
    if missing := source.missing_weights:
        raise DownloadError(
            f"'{ref}' is not complete in the cache: {', '.join(missing)} missing; run it again when the Hub can be reached"
        )
    source = replace(source, trusted=ref.is_among(trusted))
    for path in source.weight_files:
        checksum = (
            Path(os.readlink(path)).name if path.is_symlink() else ""
        )  # the cache names files by what is in them
        if len(checksum) == 64 and not RemoteFile(path.stat().st_size, checksum, "").matches(path):
            raise DownloadError(
                f"'{ref}': {path.name} is damaged in the cache; run it again when the Hub can be reached"
            )
    return _told(source)


def look_up(
    reference: str, *, token: str | None = None, trusted: Collection[str] = ()
) -> tuple[Source, Listing | None]:
    """Return what `reference` is and, for one on the Hub, its commit; only configuration files are downloaded.

    The folder of the returned source then holds no weights.

    Raises:
        SourceNotFoundError, DownloadError: As for `locate`.
    """
    ref = SourceRef.parse(reference)
    if ref.is_local:
        return locate(ref, trusted=trusted), None
    listing = resolve_model(ref, token=token, trusted=trusted)
    if listing is None:
        return cached_source(ref, token, trusted), None
    source, folder = listing.inspect(), Path()
    for path in listing.configuration:
        folder = fetch(listing, path, token=token).parent
    _remember(listing)
    return Source(ref, folder, listing.sha, source.kind, listing.gated, listing.trusted), listing


def cached_bytes(listing: Listing) -> int:
    """Return how many bytes of the weights lie in the user's cache already, by their sizes."""
    found = {path: try_to_load_from_cache(listing.repo_id, path, revision=listing.sha) for path in listing.weights}
    return sum(Path(file).stat().st_size for file in found.values() if isinstance(file, str))


def commit_of(ref: SourceRef, *, token: str | None = None) -> str | None:
    """Return the sha that a reference to the Hub names now, or in the cache where the Hub cannot be asked.

    Raises:
        SourceNotFoundError: No such repository or revision, or no access to it.
    """
    if listing := resolve(ref, token=token):
        return listing.sha
    found = try_to_load_from_cache(ref.name, "config.json", revision=ref.revision)
    return Path(found).parent.name if isinstance(found, str) else None


@contextmanager
def named_errors(ref: SourceRef, token: str | None = None, file: str = "") -> Iterator[None]:
    """Turn the client's errors into one that says which reference and which file of it it was, and what to do."""
    try:
        yield
    except GatedRepoError as error:
        problem = "is gated: accept its conditions on its page, then log in with `hf auth login` or pass a token"
        raise SourceNotFoundError(f"'{ref}' {problem}") from error
    except RepositoryNotFoundError as error:
        raise SourceNotFoundError(f"'{ref}': {_what_it_is(ref, token)}") from error
    except RevisionNotFoundError as error:
        raise SourceNotFoundError(
            f"'{ref.name}' has no revision '{ref.revision}': expected a branch, tag or sha"
        ) from error
    except HFValidationError as error:
        raise SourceNotFoundError(f"'{ref}' is not a Hub id: {error}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        folder = "" if "@" in str(ref) else "; there is no folder of that name either"
        why = "HF_HUB_OFFLINE is set, unset it" if constants.HF_HUB_OFFLINE else first_line(error)
        raise DownloadError(
            f"'{ref}' could not be downloaded, and no complete copy is cached: {why}{folder}"
        ) from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status == 401:
            problem = "the Hub refused the token: log in again with `hf auth login`, or pass another one"
            raise SourceNotFoundError(f"'{ref}': {problem}") from error
        if 400 <= status < 500 and status not in BUSY:
            raise SourceNotFoundError(f"'{ref}': the Hub refused it: {first_line(error)}") from error
        advice = "" if isinstance(error, _Corrupt) else "; run it again when the network and the disk allow"
        which = f"{file}: " if file and not isinstance(error, _Corrupt) else ""
        raise DownloadError(f"'{ref}' could not be downloaded: {which}{first_line(error)}{advice}") from error


def _what_it_is(ref: SourceRef, token: str | None) -> str:
    """Say why there is no such model: it may be something else."""
    for kind, name in (("dataset", "a data set"), ("space", "a Space")):
        try:
            HfApi(token=token).repo_info(ref.name, repo_type=kind, timeout=TIMEOUT)
        except (HTTPError, HfHubHTTPError):
            continue
        return f"it is {name} on the Hub, expected a model or an adapter"
    return "no such model on the Hub, or it is private: check the spelling, or pass a token that may read it"
