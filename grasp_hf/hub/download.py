"""Models on the Hub: found, resolved to a commit, downloaded and verified."""

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
from .listing import CONFIG_FILES, NOT_NEEDED, Listing, RemoteFile
from .reference import ADAPTER_WEIGHTS, FULL_WEIGHTS, INDEX, Source, SourceRef, shards_of

logger = logging.getLogger(__name__)


def resolve(ref: SourceRef, *, token: str | None = None, trusted: Collection[str] = ()) -> Listing | None:
    """Return the commit that `ref` names now; `None` where the Hub cannot be asked, so that only a cache can serve.

    Raises:
        SourceNotFoundError: No such repository or revision, or no access to it; also with a token that the Hub refuses.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        with hub_errors(ref, token), time_limit(TIMEOUT):
            info = retry(lambda: _info(ref, token), f"looking up '{ref}'")
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
        return _warn_of_pickles(replace(source, trusted=ref.is_among(trusted)))
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
    return _warn_of_pickles(replace(source, gated=listing.gated, trusted=listing.trusted))


def _warn_of_pickles(source: Source) -> Source:
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
            tqdm_class=stoppable_progress(stop) if stop is not None else None,
        )
        damaged = not expected.matches(Path(file))
        if damaged:
            raise Corrupt(f"{path}: its checksum is not the one that the Hub lists")
        return Path(file)

    with hub_errors(listing.ref, token, path), time_limit(TIMEOUT):
        found = try_to_load_from_cache(listing.repo_id, path, revision=listing.sha)
        if isinstance(found, str):
            if expected.matches(Path(found)):
                return Path(found) if cache_dir is None else _linked(Path(found), listing, path, cache_dir)
            damaged = cache_dir is None
        if cache_dir is None:
            _remove_partial(listing, path)
        return retry(download, f"downloading {path} of '{listing.ref}'")


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


def cached_source(ref: SourceRef, token: str | None = None, trusted: Collection[str] = ()) -> Source:
    """Return a model that the user's cache holds whole, without asking the Hub; its card need not be there."""
    names = [*CONFIG_FILES, FULL_WEIGHTS[0], ADAPTER_WEIGHTS[0], *(["*.py"] if ref.is_among(trusted) else [])]
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
                f"{path.name} is damaged in the cache; run it again when the Hub can be reached", subject=ref
            )
    return _warn_of_pickles(source)


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
