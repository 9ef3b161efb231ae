"""Models on the Hub: find them, resolve a revision to a commit, download and verify files."""

import logging
import os
import tempfile
import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, ModelInfo, constants, hf_hub_download, snapshot_download, try_to_load_from_cache

from ..errors import DownloadError, SourceNotFoundError
from ..files import workspace, write_whole
from .client import TIMEOUT, Corrupt, Stopped, hub_errors, retry, stoppable_progress, time_limit
from .licenses import license_of
from .limits import check_folder, check_sizes
from .listing import CONFIG_FILES, NOT_NEEDED, Listing, RemoteFile
from .reference import ADAPTER_WEIGHTS, FULL_WEIGHTS, INDEX, Source, SourceRef, shards_of

logger = logging.getLogger(__name__)


def resolve(ref: SourceRef, *, token: str | None = None, trusted: Collection[str] = ()) -> Listing | None:
    """Return the current commit of `ref`; `None` if the Hub cannot be reached, so that only the cache can be used.

    Raises:
        SourceNotFoundError: The repository or the revision does not exist, or the Hub refuses access to it, also
            because of a wrong token.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        with hub_errors(ref, token), time_limit(TIMEOUT):
            info = retry(lambda: _request_info(ref, token), f"looking up '{ref}'")
    except DownloadError as error:
        logger.warning("the Hub cannot be reached (%s); the cached copy of '%s' is used", error.__cause__, ref)
        return None
    files = {}
    for file in info.siblings or []:
        sha256 = file.lfs["sha256"] if file.lfs else None
        files[file.rfilename] = RemoteFile(file.size or 0, sha256, file.blob_id or "")
    if info.id != ref.name and "/" in ref.name:
        logger.warning("'%s' was renamed on the Hub: it is now '%s'", ref.name, info.id)
    card: Any = info.card_data or {}
    parents = card.get("base_model") or []
    base_models = [parents] if isinstance(parents, str) else parents if isinstance(parents, list) else []
    return Listing(
        ref,
        info.id,
        str(info.sha),
        files,
        license_of(card),
        tuple(name for name in base_models if isinstance(name, str)),
        bool(info.gated),
        ref.is_among(trusted),
    )


def resolve_model(ref: SourceRef, *, token: str | None = None, trusted: Collection[str] = ()) -> Listing | None:
    """Return the same as `resolve` after a check that `ref` is a complete model or adapter.

    An index of weight files is downloaded to a temporary folder, and `shards` lists its files.

    Raises:
        SourceNotFoundError: The reason is one of `resolve`, or `ref` is no model, or weight files are missing.
        DownloadError: The index could not be downloaded.
    """
    listing = resolve(ref, token=token, trusted=trusted)
    if listing is None:
        return None
    listing.inspect()
    check_sizes(listing.ref, {path: listing.files[path].size for path in listing.configuration})
    main = listing.main_weights
    if main is None or not main.endswith(INDEX):
        return listing
    with workspace(Path(tempfile.gettempdir()), "grasp_hf-") as folder:
        names = shards_of(fetch(listing, main, token=token, cache_dir=folder), listing.ref)
    if missing := [name for name in names if listing.folder + name not in listing.files]:
        raise SourceNotFoundError(
            f"'{listing.ref}' is not complete: {Path(main).name} lists {', '.join(missing)}, which the repository lacks; "
            "name another revision, or ask its authors"
        )
    return replace(listing, shards=tuple(names))


def _request_info(ref: SourceRef, token: str | None) -> ModelInfo:
    return HfApi(token=token).model_info(ref.name, revision=ref.revision, files_metadata=True, timeout=TIMEOUT)


def locate(reference: str | SourceRef, *, token: str | None = None, trusted: Collection[str] = ()) -> Source:
    """Return a source with all its files on this machine, downloaded to the Hugging Face cache if it is on the Hub.

    All files are from one commit. A file whose checksum differs from the one that the Hub lists is downloaded again.
    Weights are downloaded in one format, in safetensors if possible.

    Args:
        reference: The source.
        token: Hub token.
        trusted: References whose Python files are downloaded too.

    Raises:
        SourceNotFoundError: The folder, the repository, the revision or the weights do not exist, or the Hub refuses
            access.
        DownloadError: A file could not be downloaded.
    """
    ref = SourceRef.parse(reference) if isinstance(reference, str) else reference
    if ref.is_local:
        source = Source.inspect(ref, Path(ref.name))
        if missing := source.missing_weights:
            raise SourceNotFoundError(f"'{ref}' is not complete: {', '.join(missing)} missing; copy the folder again")
        return _warn_of_pickles(replace(source, trusted=ref.is_among(trusted)))
    listing = resolve_model(ref, token=token, trusted=trusted)
    if listing is None:
        return cached_source(ref, token, trusted)
    source = fetch_source(listing, token=token)
    _record_revision(listing)
    return source


def fetch_source(listing: Listing, weights: Sequence[str] | None = None, **options: Any) -> Source:
    """Download the configuration and the weights of a commit, and return its source.

    Args:
        listing: The commit.
        weights: Paths of the weight files to download; all if left out.
        options: Options of `fetch`.
    """
    folder = Path()
    for path in [*listing.configuration, *(listing.weights if weights is None else weights)]:
        folder = fetch(listing, path, **options).parent
    source = Source.inspect(listing.ref, folder, listing.sha)
    return _warn_of_pickles(replace(source, gated=listing.gated, trusted=listing.trusted))


def _warn_of_pickles(source: Source) -> Source:
    """Log a warning if the weights of `source` are pickled, and return `source`."""
    if any(name.endswith(".bin") for name in source.weight_names):
        logger.warning(
            "%s has no safetensors weights; its pickled weights are loaded with weights_only=True", source.ref
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
    """Return the path of one file of a commit in a cache, downloaded unless the cache has it with the right checksum.

    If the user's own cache has the file and `cache_dir` is another cache, the file is linked, not downloaded.

    Args:
        listing: The commit.
        path: Path of the file in the commit.
        token: Hub token.
        cache_dir: The cache; the user's own if left out.
        stop: Stops the download when it is set.

    Raises:
        Stopped: `stop` was set.
        SourceNotFoundError: The Hub refuses access to the file.
        DownloadError: Several attempts to download the file failed.
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
            tqdm_class=stoppable_progress(stop) if stop is not None else None,
        )
        damaged = not expected.matches(Path(file))
        if damaged:
            raise Corrupt(f"{path}: its checksum differs from the one that the Hub lists")
        return Path(file)

    with hub_errors(listing.ref, token, path), time_limit(TIMEOUT):
        found = try_to_load_from_cache(listing.repo_id, path, revision=listing.sha)
        if isinstance(found, str):
            if expected.matches(Path(found)):
                return Path(found) if cache_dir is None else _link(Path(found), listing, path, cache_dir)
            damaged = cache_dir is None
        if cache_dir is None:
            _remove_partial(listing, path)
        return retry(download, f"downloading {path} of '{listing.ref}'")


def _remove_partial(listing: Listing, path: str) -> None:
    """Remove parts of this file that killed downloads left in the user's cache; a running download holds the lock."""
    name, file = listing.cache_name, listing.files[path]
    etag = file.sha256 or file.git_sha1
    partial = [*Path(constants.HF_HUB_CACHE, name, "blobs").glob(f"{etag}.*incomplete")]
    if not partial:
        return
    try:
        with FileLock(Path(constants.HF_HUB_CACHE, ".locks", name, f"{etag}.lock"), timeout=0):
            for part in partial:
                part.unlink(missing_ok=True)
    except (Timeout, OSError):  # the parts belong to a running download, or to another user
        return


def _record_revision(listing: Listing) -> None:
    """Record the commit of the revision in the user's cache, so that the revision can be found without a network.

    The client records it only when it downloads by the name of a revision; this package downloads by commit.
    """
    revision = listing.ref.revision or "main"
    path = Path(constants.HF_HUB_CACHE, listing.cache_name, "refs", revision)
    with suppress(OSError):  # the cache may be read-only
        if revision == listing.sha or (path.is_file() and path.read_text() == listing.sha):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, listing.sha)


def _link(found: Path, listing: Listing, path: str, cache_dir: Path) -> Path:
    """Link a file of the user's cache into the snapshot in `cache_dir`, and return the link."""
    folder = cache_dir / listing.cache_name / "snapshots" / listing.sha
    link = folder / path
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)  # of a process that was killed
    link.symlink_to(found.resolve())
    return link


def cached_source(ref: SourceRef, token: str | None = None, trusted: Collection[str] = ()) -> Source:
    """Return a model from the user's cache, without a request to the Hub; its model card may be missing.

    Raises:
        DownloadError: The cache has no complete and undamaged copy.
    """
    names = [*CONFIG_FILES, FULL_WEIGHTS[0], ADAPTER_WEIGHTS[0]]
    if ref.is_among(trusted):
        names.append("*.py")
    inside = f"{ref.subfolder}/" if ref.subfolder else ""
    patterns = [inside + name for name in names if name != "README.md"]
    ignored = [inside + name for name in NOT_NEEDED] + ([] if inside else ["*/*"])
    with hub_errors(ref, token):
        folder = snapshot_download(
            ref.name,
            revision=ref.revision,
            allow_patterns=patterns,
            ignore_patterns=ignored,
            local_files_only=True,
        )
    try:
        source = Source.inspect(ref, Path(folder, ref.subfolder or ""), Path(folder).name)
    except FileNotFoundError as error:  # look_up caches the configuration only
        raise DownloadError(
            f"'{ref}' could not be downloaded, and no complete copy is cached; run it again when the Hub can be "
            "reached"
        ) from error
    if missing := source.missing_weights:
        raise DownloadError(
            f"'{ref}' is not complete in the cache: {', '.join(missing)} missing; run it again when the Hub can be "
            "reached"
        )
    source = replace(source, trusted=ref.is_among(trusted))
    for path in source.weight_files:
        # The cache links to a file whose name is the checksum of its content.
        checksum = Path(os.readlink(path)).name if path.is_symlink() else ""
        if len(checksum) == 64 and not RemoteFile(path.stat().st_size, checksum, "").matches(path):
            raise DownloadError(
                f"{path.name} is damaged in the cache; run it again when the Hub can be reached", subject=ref
            )
    return _warn_of_pickles(source)


def look_up(
    reference: str, *, token: str | None = None, trusted: Collection[str] = ()
) -> tuple[Source, Listing | None]:
    """Return the source and, if it is on the Hub, its commit. Only the configuration files are downloaded.

    The folder of a source on the Hub may therefore have no weights.

    Raises:
        SourceNotFoundError, DownloadError: See `locate`.
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
    _record_revision(listing)
    check_folder(ref, folder)
    return Source(ref, folder, listing.sha, source.kind, listing.gated, listing.trusted), listing


def cached_bytes(listing: Listing) -> int:
    """Return the size in bytes of the weight files of a commit that the user's cache already has."""
    found = {path: try_to_load_from_cache(listing.repo_id, path, revision=listing.sha) for path in listing.weights}
    return sum(Path(file).stat().st_size for file in found.values() if isinstance(file, str))


def commit_of(ref: SourceRef, *, token: str | None = None) -> str | None:
    """Return the current commit of a reference on the Hub, or the cached commit if the Hub cannot be reached.

    Raises:
        SourceNotFoundError: The repository or the revision does not exist, or the Hub refuses access to it.
    """
    if listing := resolve(ref, token=token):
        return listing.sha
    found = try_to_load_from_cache(ref.name, "config.json", revision=ref.revision)
    return Path(found).parent.name if isinstance(found, str) else None
