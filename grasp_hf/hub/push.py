"""Push a merge to the Hub: shard by shard, in one commit, so that others see all of it or nothing."""

import hashlib
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from ..errors import GraspError, PushError, SourceNotFoundError, StaleMergeError
from ..files import workspace
from .client import retry, time_limit
from .download import resolve
from .listing import Listing, RemoteFile
from .reference import ADAPTER_WEIGHTS, FULL_WEIGHTS, SourceRef

logger = logging.getLogger(__name__)

TIMEOUT = 120.0  # seconds to wait for one answer; the Hub needs long for a commit of many large files
# Earlier files that would be loaded instead of those of the merge, or together with them. A push deletes them.
REPLACED = (
    *FULL_WEIGHTS,
    "model-*.safetensors",
    "pytorch_model-*.bin",
    "adapter_config.json",
    *ADAPTER_WEIGHTS,
)


@dataclass(frozen=True)
class Destination:
    """Repository and branch that a merge is pushed to, as in `PreTrainedModel.push_to_hub`.

    Attributes:
        repo_id: Repository; created if it does not exist.
        revision: Branch; created if it does not exist.
        create_pr: Whether to open a pull request instead of changing the branch.
        private: Whether a new repository is private.
        token: Hub token.
    """

    repo_id: str
    revision: str | None = None
    create_pr: bool = False
    private: bool | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def api(self) -> HfApi:
        """The client of huggingface_hub, with the token."""
        return HfApi(token=self.token)


def check_repo_id(repo_id: str) -> None:
    """Raise `PushError` if `repo_id` is not a valid name of a repository; the Hub is not asked."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushError(f"'{repo_id}' cannot be a repository on the Hub, expected 'org/name': {error}") from error


def create_repo(to: Destination) -> str:
    """Create the repository and the branch if they do not exist, and return the repository's full id.

    Raises:
        PushError: The name is not valid, the token has no write access, or the Hub cannot be reached.
    """
    check_repo_id(to.repo_id)
    with _push_errors(to):
        repo_id = retry(
            lambda: to.api.create_repo(to.repo_id, private=to.private, exist_ok=True).repo_id,
            "creating the repository",
        )
        if to.revision is not None and not to.revision.startswith("refs/"):
            branch = to.revision
            retry(lambda: to.api.create_branch(repo_id, branch=branch, exist_ok=True), "creating the branch")
        return str(repo_id)


@dataclass(frozen=True)
class Pushed:
    """The result of a push.

    Attributes:
        url: Address of the commit or of the pull request.
        version: Repository and commit of a new version on the main branch; `None` for another branch or a pull
            request.
    """

    url: str
    version: tuple[str, str] | None


def push_merge(
    to: Destination,
    write: Callable[[Path, str], Iterable[Path]],
    *,
    message: str,
    earlier: tuple[str, str] | None,
) -> Pushed:
    """Create the repository if it does not exist, upload the files of a merge in one commit, and tag it as a version.

    Args:
        to: Destination of the push.
        write: Takes an empty folder and the full id of the repository, writes the files, and returns their paths. It
            may write a large file only when the path is requested.
        message: Title of the commit.
        earlier: Repository and commit of the version that the merge continues, if any.

    Raises:
        PushError: The reason is one of `push_files`, or the files could not be written.
    """
    to = replace(to, repo_id=create_repo(to))
    on_main = not to.create_pr and to.revision in (None, "main")
    continues = earlier[1] if on_main and earlier and earlier[0] == to.repo_id else None
    with workspace(Path(tempfile.gettempdir()), "grasp_hf-") as directory:
        folder = directory / "push"
        try:
            commit = push_files(to, folder, write(folder, to.repo_id), message=message, continues=continues)
        except (OSError, SafetensorError) as error:
            if isinstance(error, GraspError):
                raise
            raise PushError(
                f"'{to.repo_id}': the files to upload could not be written to '{directory.parent}': {error}; free some "
                "disk space there, set TMPDIR to another folder or lower max_shard_size, and push again"
            ) from error
    if on_main:
        tag_version(to, commit.oid)
    return Pushed(str(commit.pr_url or commit.commit_url), (to.repo_id, commit.oid) if on_main else None)


def push_files(
    to: Destination, folder: Path, files: Iterable[Path], *, message: str, continues: str | None = None
) -> CommitInfo:
    """Upload `files` in one commit to an existing repository. The commit replaces all earlier weights.

    Each large file is uploaded and then deleted here before the next one is requested. Others see none of the files
    until the commit at the end. A file that the Hub already has is not uploaded again, so a failed push can be
    resumed.

    Args:
        to: Destination, with the full id of the repository.
        folder: Folder that corresponds to the root of the repository.
        files: Paths in the folder. An iterator may write each file on request.
        message: Title of the commit.
        continues: Commit of the version that this version continues. The head of the branch must be this commit.

    Raises:
        PushError: The token has no write access, the Hub cannot be reached, or someone else changed the branch during
            the upload. The branch is unchanged.
        StaleMergeError: The repository has a newer version than `continues`.
    """
    with _push_errors(to):
        head = _resolve(to, to.revision)
        requests = _list_pull_requests(to) if to.create_pr else set()
        operations, intended = [], {}
        for path in files:
            name = path.relative_to(folder).as_posix()
            operation = CommitOperationAdd(name, path)
            intended[name] = _fingerprint(path)
            # If the head has the same file, it may be this very version, pushed before.
            if continues not in (None, head.sha) and not _has_files(head, {name: intended[name]}, []):
                raise StaleMergeError(
                    f"'{to.repo_id}' has a newer version than the one that this merge continues: expected {continues}, "
                    f"got {head.sha}; append to the new version, or push to another branch or as a pull request "
                    "(--create-pr)"
                )
            retry(lambda op=operation: _upload(to, op), f"uploading {name}")  # type: ignore[misc]
            # The client drops the content of an uploaded file. Small files are uploaded with the commit.
            if operation.path_or_fileobj == b"":
                path.unlink()
            operations.append(operation)
        stale = [path for path in head.select(REPLACED) if path not in intended]
        deletions = [CommitOperationDelete(path) for path in stale]
        commit = _commit(to, [*operations, *deletions], intended, stale, head, requests, message)
        arrived = _resolve(to, commit.oid)
        if not _has_files(arrived, intended, stale):
            problem = f"the files in its commit {commit.oid} differ from those sent; push again"
            raise PushError(problem, subject=to.repo_id)
        return commit


def _upload(to: Destination, operation: CommitOperationAdd) -> None:
    """Upload a large file; a small file is uploaded with the commit."""
    try:
        to.api.preupload_lfs_files(
            to.repo_id, [operation], revision=to.revision, create_pr=to.create_pr, num_threads=1
        )
    except (RuntimeError, ValueError) as error:
        if isinstance(error, (HfHubHTTPError, HFValidationError)):
            raise
        if isinstance(error.__cause__, (HfHubHTTPError, HTTPError, OSError)):  # the client wraps these errors
            raise error.__cause__ from None
        raise PushError(
            f"{operation.path_in_repo} could not be uploaded: {error}; push again", subject=to.repo_id
        ) from error


def _commit(
    to: Destination,
    operations: list[CommitOperationAdd | CommitOperationDelete],
    intended: dict[str, RemoteFile],
    stale: list[str],
    head: Listing,
    requests: set[str],
    message: str,
) -> CommitInfo:
    """Make the commit exactly once, even if the answer of the Hub is lost."""

    def attempt() -> CommitInfo:
        if done := _find_commit(to, intended, stale, head, requests):
            return done
        return to.api.create_commit(
            to.repo_id,
            operations,
            commit_message=message,
            revision=to.revision,
            create_pr=to.create_pr,
            parent_commit=None if to.create_pr else head.sha,
        )

    try:
        return retry(attempt, "the commit")
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code != 412:
            raise
        if done := _find_commit(to, intended, stale, head, requests):  # from an earlier attempt of the client itself
            return done
        raise PushError(
            f"'{to.repo_id}' was changed by someone else during the upload; look at the change, and push again"
        ) from error


def _find_commit(
    to: Destination, intended: dict[str, RemoteFile], stale: list[str], head: Listing, requests: set[str]
) -> CommitInfo | None:
    """Return the commit of this push if the Hub has made it and only the answer was lost, otherwise `None`."""
    for revision in sorted(_list_pull_requests(to) - requests) if to.create_pr else [to.revision]:
        now = _resolve(to, revision)
        if now.sha != head.sha and _has_files(now, intended, stale):
            url = f"{to.api.endpoint}/{to.repo_id}"
            return CommitInfo(
                commit_url=f"{url}/commit/{now.sha}",
                commit_message="",
                commit_description="",
                oid=now.sha,
                pr_url=f"{url}/discussions/{str(revision).rpartition('/')[2]}" if to.create_pr else None,
            )
    return None


def _has_files(listing: Listing, intended: dict[str, RemoteFile], stale: list[str]) -> bool:
    """Whether a commit has all `intended` files and none of the `stale` ones."""
    if set(stale) & set(listing.files):
        return False
    return all(name in listing.files and _is_same_file(listing.files[name], file) for name, file in intended.items())


def _is_same_file(found: RemoteFile, local: RemoteFile) -> bool:
    """Whether a file on the Hub has the size and the checksum of a local file."""
    if found.size != local.size:
        return False
    return found.sha256 == local.sha256 if found.sha256 else found.git_sha1 == local.git_sha1


def _fingerprint(path: Path) -> RemoteFile:
    """Return the size and both checksums of a local file."""
    size = path.stat().st_size
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            sha256.update(piece)
            sha1.update(piece)
    return RemoteFile(size, sha256.hexdigest(), sha1.hexdigest())


def _resolve(to: Destination, revision: str | None) -> Listing:
    """Return the current commit of a revision of the repository."""
    found = resolve(SourceRef(to.repo_id, revision), token=to.token)
    if found is None:
        raise PushError(f"'{to.repo_id}' could not be pushed: the Hub cannot be reached; push again later")
    return found


def _list_pull_requests(to: Destination) -> set[str]:
    """Return the refs of all pull requests, such as `refs/pr/1`."""
    refs = retry(lambda: to.api.list_repo_refs(to.repo_id, include_pull_requests=True), "listing pull requests")
    return {ref.ref for ref in refs.pull_requests or []}


def tag_version(to: Destination, sha: str) -> str | None:
    """Tag a commit with the next version, `v1`, `v2`, …, unless it has such a tag; return the tag.

    A failure is only a warning and returns `None`, because the model itself was pushed.
    """
    try:
        with _push_errors(to):
            tags = retry(lambda: to.api.list_repo_refs(to.repo_id), "listing tags").tags
            versions = {int(tag.name[1:]): tag.target_commit for tag in tags if re.fullmatch(r"v\d+", tag.name)}
            if existing := [f"v{number}" for number, commit in versions.items() if commit == sha]:
                return existing[0]
            name = f"v{max(versions, default=0) + 1}"
            retry(lambda: to.api.create_tag(to.repo_id, tag=name, revision=sha, exist_ok=True), "tagging")
            return name
    except PushError as error:
        logger.warning("the commit %s was pushed, but could not be tagged as a version: %s", sha, error)
        return None


@contextmanager
def _push_errors(to: Destination) -> Iterator[None]:
    """Turn errors of the client into `PushError`, and give every request a time limit."""
    try:
        with time_limit(TIMEOUT):
            yield
    except OfflineModeIsEnabled as error:
        raise PushError(
            f"'{to.repo_id}' could not be pushed to the Hub: {error}; unset HF_HUB_OFFLINE, and push again"
        ) from error
    except (HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError) as error:
        raise PushError(
            f"'{to.repo_id}' could not be pushed to the Hub: {error}; log in with `hf auth login` or pass a token "
            "with write access, and push again: files that the Hub already has are not uploaded again"
        ) from error
    except SourceNotFoundError as error:
        raise PushError(f"'{to.repo_id}' could not be pushed to the Hub: {error}") from error
    except (ConnectionError, TimeoutError) as error:  # Xet raises these
        if isinstance(error, PushError):
            raise
        raise PushError(f"'{to.repo_id}' could not be pushed to the Hub: {error}; push again") from error
