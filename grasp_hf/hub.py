"""The Hub: references become folders on this machine, a folder becomes a repository. Nothing else talks to the network."""

import logging
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import SourceNotFoundError
from .sources import Source, SourceRef

logger = logging.getLogger(__name__)

CONFIG_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
SUBFOLDERS = ["*/*"]
TIMEOUT = 30.0


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
    folder = _download(ref, [*CONFIG_FILES, "*.safetensors"], token)
    if not any(folder.glob("*.safetensors")):
        logger.warning("%s has no safetensors weights; its pickled weights are read with weights_only=True", ref)
        folder = _download(SourceRef(ref.name, folder.name), [*CONFIG_FILES, "*.bin"], token)
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
    files = (
        HfApi(token=token).model_info(ref.name, revision=folder.name, files_metadata=True, timeout=TIMEOUT).siblings
        or []
    )
    sizes = {file.rfilename: file.size or 0 for file in files}
    source = Source.inspect(ref, folder, folder.name, files=sorted(sizes))
    weights = [name for name in sizes if "/" not in name and name.endswith(".safetensors")]
    weights = weights or [name for name in sizes if "/" not in name and name.endswith(".bin")]
    return source, sum(sizes[name] for name in weights)


def _download(ref: SourceRef, patterns: list[str], token: str | None) -> Path:
    """Download the files of one commit that match `patterns`; the folder's name is the commit's sha."""
    try:
        folder = snapshot_download(
            ref.name, revision=ref.revision, token=token, allow_patterns=patterns, ignore_patterns=SUBFOLDERS
        )
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
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise SourceNotFoundError(
            f"'{ref}' could not be downloaded, and no complete copy is cached: {error}"
        ) from error
    return Path(folder)


def push_folder(folder: Path, repo_id: str, *, private: bool | None, token: str | None, revision: str | None) -> str:
    """Upload `folder` to `repo_id` (created where it does not exist) as one commit, and return the commit's URL."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, revision=revision, commit_message="Upload model merged with grasp_hf"
    )
    return str(commit.commit_url)
