"""The Hub: references become folders on this machine, a folder becomes a repository. Nothing else talks to the network."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import PushError, SourceNotFoundError
from .sources import Source, SourceRef

logger = logging.getLogger(__name__)

CONFIG_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "README.md"]
SAFETENSORS = ["model.safetensors", "model-*.safetensors", "adapter_model.safetensors"]
PICKLED = ["pytorch_model.bin", "pytorch_model-*.bin", "adapter_model.bin"]
SUBFOLDERS = ["*/*"]
TIMEOUT = 30.0  # seconds


def locate(reference: str | SourceRef, *, token: str | None = None) -> Source:
    """Return where the files of `reference` lie on this machine, downloaded where they are not here yet.

    All files of a Hub source are taken from one commit. Weights are downloaded in one format: safetensors where the
    repository has them.

    Raises:
        SourceNotFoundError: No such folder, repository, revision or weights, or no access to them.
    """
    ref = SourceRef.parse(reference) if isinstance(reference, str) else reference
    if ref.is_local:
        return Source.inspect(ref, Path(ref.name))
    folder = _download(ref, [*CONFIG_FILES, *SAFETENSORS], token)
    if not any(folder.glob("*.safetensors")):
        folder = _download(SourceRef(ref.name, folder.name), [*CONFIG_FILES, *PICKLED], token)
        if any(folder.glob("*.bin")):
            logger.warning("%s has no safetensors weights; its pickled weights are read with weights_only=True", ref)
    return Source.inspect(ref, folder, sha=folder.name)


def look_up(reference: str, *, token: str | None = None) -> tuple[Source, int]:
    """Return what `reference` is and the bytes of its weights; of a Hub source, only configuration files are downloaded.

    The folder of the returned source then holds no weights.

    Raises:
        SourceNotFoundError: As for `locate`.
    """
    ref = SourceRef.parse(reference)
    if ref.is_local:
        source = Source.inspect(ref, Path(ref.name))
        return source, source.num_bytes
    folder = _download(ref, CONFIG_FILES, token)
    pinned = SourceRef(ref.name, folder.name)
    with _named_errors(ref):
        info = HfApi(token=token).model_info(
            pinned.name, revision=pinned.revision, files_metadata=True, timeout=TIMEOUT
        )
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    source = Source.inspect(ref, folder, folder.name, files=sorted(sizes))
    for patterns in (SAFETENSORS, PICKLED):
        if weights := [size for name, size in sizes.items() if any(fnmatch(name, pattern) for pattern in patterns)]:
            return source, sum(weights)
    return source, 0


def commit_of(ref: SourceRef, *, token: str | None = None) -> str | None:
    """Return the sha that a reference to the Hub names now.

    Raises:
        SourceNotFoundError: No such repository or revision, or the Hub cannot be reached.
    """
    with _named_errors(ref):
        return HfApi(token=token).model_info(ref.name, revision=ref.revision, timeout=TIMEOUT).sha


def _download(ref: SourceRef, patterns: list[str], token: str | None) -> Path:
    """Download the files of one commit that match `patterns`; the folder's name is the commit's sha."""
    with _named_errors(ref):
        folder = snapshot_download(
            ref.name, revision=ref.revision, token=token, allow_patterns=patterns, ignore_patterns=SUBFOLDERS
        )
    return Path(folder)


@contextmanager
def _named_errors(ref: SourceRef) -> Iterator[None]:
    """Turn the client's errors into one that says which reference it was and what to do."""
    try:
        yield
    except GatedRepoError as error:
        problem = "is gated: accept its conditions on its page, then log in with `hf auth login` or pass a token"
        raise SourceNotFoundError(f"'{ref}' {problem}") from error
    except RepositoryNotFoundError as error:
        problem = "no such model on the Hub, or it is private: check the spelling, or pass a token that may read it"
        raise SourceNotFoundError(f"'{ref}': {problem}") from error
    except RevisionNotFoundError as error:
        raise SourceNotFoundError(
            f"'{ref.name}' has no revision '{ref.revision}': expected a branch, tag or sha"
        ) from error
    except HFValidationError as error:
        raise SourceNotFoundError(f"'{ref}' is not a Hub id: {error}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, HTTPError) as error:
        raise SourceNotFoundError(
            f"'{ref}' could not be downloaded, and no complete copy is cached: {error}"
        ) from error


def create_repo(repo_id: str, *, private: bool | None, token: str | None) -> str:
    """Create a model repository where there is none, and return its full id.

    Raises:
        PushError: The token may not, or the Hub could not be reached.
    """
    with _named_push_errors(repo_id):
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def push_folder(folder: Path, repo_id: str, *, token: str | None, revision: str | None) -> str:
    """Upload `folder` to an existing repository as one commit, replacing its weights, and return the commit's URL.

    Raises:
        PushError: The token may not, or the Hub could not be reached.
    """
    api = HfApi(token=token)
    with _named_push_errors(repo_id):
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message="Upload model merged with grasp_hf",
            delete_patterns=[*SAFETENSORS, "model.safetensors.index.json"],
        )
    return str(commit.commit_url)


@contextmanager
def _named_push_errors(repo_id: str) -> Iterator[None]:
    try:
        yield
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, HTTPError, LocalTokenNotFoundError) as error:
        raise PushError(
            f"'{repo_id}' could not be written on the Hub: {error}; log in with `hf auth login` or pass a token that may "
            "write there"
        ) from error
