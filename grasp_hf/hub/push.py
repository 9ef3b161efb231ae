"""A merge pushed to the Hub: shard by shard, as one commit that others see whole or not at all."""

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

TIMEOUT = 120.0  # seconds for one answer; a commit of many large files takes its time
# Files that would be loaded instead of those of the merge, or with them.
REPLACED = (
    *FULL_WEIGHTS,
    "model-*.safetensors",
    "pytorch_model-*.bin",
    "adapter_config.json",
    *ADAPTER_WEIGHTS,
)


@dataclass(frozen=True)
class Destination:
    """Where to push to, as in `PreTrainedModel.push_to_hub`.

    Attributes:
        repo_id: Repository; made where there is none.
        revision: Branch; made where there is none.
        create_pr: Open a pull request instead of changing the branch.
        private: Make a new repository private.
        token: Hub token.
    """

    repo_id: str
    revision: str | None = None
    create_pr: bool = False
    private: bool | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def api(self) -> HfApi:
        """The client."""
        return HfApi(token=self.token)


def check_repo_id(repo_id: str) -> None:
    """Raise `PushError` where no repository can have this name; the Hub is not asked."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushError(f"'{repo_id}' cannot be a repository on the Hub, expected 'org/name': {error}") from error


def create_repo(to: Destination) -> str:
    """Create the repository and the branch where there is none, and return the repository's full id.

    Raises:
        PushError: The name is not possible, the token may not write there, or the Hub could not be reached.
    """
    check_repo_id(to.repo_id)
    with _pushing(to):
        repo_id = retry(
            lambda: to.api.create_repo(to.repo_id, private=to.private, exist_ok=True).repo_id, "creating it"
        )
        if to.revision is not None and not to.revision.startswith("refs/"):
            branch = to.revision
            retry(lambda: to.api.create_branch(repo_id, branch=branch, exist_ok=True), "creating the branch")
        return str(repo_id)


@dataclass(frozen=True)
class Pushed:
    """What a push made.

    Attributes:
        url: Of the commit, or of the pull request.
        version: Repository and commit of a new version on the main branch; `None` on another branch or in a pull request.
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
    """Create the repository if there is none, upload the files of a merge as one commit, and tag it as a version.

    Args:
        to: Where to push to.
        write: Writes the files to an empty folder, for a repository of that full id, and returns their paths. A large file
            may be written only when it is asked for.
        message: Title of the commit.
        earlier: Repository and commit of the version that the merge continues, if any.

    Raises:
        PushError: As for `push_files`, or the files could not be written.
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
                f"'{to.repo_id}': what is to be uploaded could not be written to '{directory.parent}': {error}; free some "
                "space there, set TMPDIR to another folder or lower max_shard_size, and push again"
            ) from error
    if on_main:
        tag_version(to, commit.oid)
    return Pushed(str(commit.pr_url or commit.commit_url), (to.repo_id, commit.oid) if on_main else None)


def push_files(
    to: Destination, folder: Path, files: Iterable[Path], *, message: str, continues: str | None = None
) -> CommitInfo:
    """Upload `files` as one commit to an existing repository, at their places in `folder`, replacing all its weights.

    Every large file is uploaded, and then deleted here, before the next one is asked for; others see nothing of it until
    the commit at the end. A file that the Hub holds already is not uploaded again, so a failed push goes on where it was.

    Args:
        to: The repository, under its full id.
        folder: What lies in it stands in the root of the repository.
        files: Paths in the folder, made as they are asked for.
        message: Title of the commit.
        continues: The commit that this version was made from; another one at the head is somebody else's version.

    Raises:
        PushError: The branch was changed by someone else meanwhile, or the token may not, or the Hub could not be reached;
            nothing has changed there.
    """
    with _pushing(to):
        head = _listing(to, to.revision)
        requests = _pull_requests(to) if to.create_pr else set()
        operations, intended = [], {}
        for path in files:
            name = path.relative_to(folder).as_posix()
            operation = CommitOperationAdd(name, path)
            intended[name] = _described(path)
            # A head that holds the same is this version itself, pushed before.
            if continues not in (None, head.sha) and not _holds(head, {name: intended[name]}, []):
                raise StaleMergeError(
                    f"'{to.repo_id}' has a newer version than the one that this was made from: expected {continues}, got "
                    f"{head.sha}; append to the new version, or push to another branch or as a pull request (--create-pr)"
                )
            retry(lambda op=operation: _upload(to, op), f"uploading {name}")  # type: ignore[misc]
            if operation.path_or_fileobj == b"":  # uploaded: the client holds on to small files only
                path.unlink()
            operations.append(operation)
        stale = [path for path in head.select(REPLACED) if path not in intended]
        deletions = [CommitOperationDelete(path) for path in stale]
        commit = _commit(to, [*operations, *deletions], intended, stale, head, requests, message)
        arrived = _listing(to, commit.oid)
        if not _holds(arrived, intended, stale):
            raise PushError(f"what its commit {commit.oid} holds is not what was sent; push again", subject=to.repo_id)
        return commit


def _upload(to: Destination, operation: CommitOperationAdd) -> None:
    try:
        to.api.preupload_lfs_files(
            to.repo_id, [operation], revision=to.revision, create_pr=to.create_pr, num_threads=1
        )
    except (RuntimeError, ValueError) as error:
        if isinstance(error, (HfHubHTTPError, HFValidationError)):
            raise
        if isinstance(error.__cause__, (HfHubHTTPError, HTTPError, OSError)):  # what the client hides
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
    """Make the commit once, also where the Hub's answer to it is lost."""

    def attempt() -> CommitInfo:
        if done := _done(to, intended, stale, head, requests):
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
        if done := _done(to, intended, stale, head, requests):  # the client had tried twice
            return done
        raise PushError(
            f"'{to.repo_id}' was changed by someone else while this was uploaded; look at the change, and push again"
        ) from error


def _done(
    to: Destination, intended: dict[str, RemoteFile], stale: list[str], head: Listing, requests: set[str]
) -> CommitInfo | None:
    """Return the commit of this push where it has been made and only the answer was lost."""
    for revision in sorted(_pull_requests(to) - requests) if to.create_pr else [to.revision]:
        now = _listing(to, revision)
        if now.sha != head.sha and _holds(now, intended, stale):
            url = f"{to.api.endpoint}/{to.repo_id}"
            return CommitInfo(
                commit_url=f"{url}/commit/{now.sha}",
                commit_message="",
                commit_description="",
                oid=now.sha,
                pr_url=f"{url}/discussions/{str(revision).rpartition('/')[2]}" if to.create_pr else None,
            )
    return None


def _holds(listing: Listing, intended: dict[str, RemoteFile], stale: list[str]) -> bool:
    same = all(
        name in listing.files
        and (found := listing.files[name]).size == file.size
        and (found.sha256 == file.sha256 if found.sha256 else found.git_sha1 == file.git_sha1)
        for name, file in intended.items()
    )
    return same and not set(stale) & set(listing.files)


def _described(path: Path) -> RemoteFile:
    """Return size and checksums of a file that is here."""
    size = path.stat().st_size
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            sha256.update(piece)
            sha1.update(piece)
    return RemoteFile(size, sha256.hexdigest(), sha1.hexdigest())


def _listing(to: Destination, revision: str | None) -> Listing:
    found = resolve(SourceRef(to.repo_id, revision), token=to.token)
    if found is None:
        raise PushError(f"'{to.repo_id}' could not be written on the Hub: it cannot be reached; push again later")
    return found


def _pull_requests(to: Destination) -> set[str]:
    refs = retry(lambda: to.api.list_repo_refs(to.repo_id, include_pull_requests=True), "listing pull requests")
    return {ref.ref for ref in refs.pull_requests or []}


def tag_version(to: Destination, sha: str) -> str | None:
    """Tag a commit with the next version, `v1`, `v2`, …, unless it has one; return the tag.

    A tag that cannot be made is a warning: the model is there.
    """
    try:
        with _pushing(to):
            tags = retry(lambda: to.api.list_repo_refs(to.repo_id), "listing tags").tags
            versions = {int(tag.name[1:]): tag.target_commit for tag in tags if re.fullmatch(r"v\d+", tag.name)}
            if known := [f"v{number}" for number, commit in versions.items() if commit == sha]:
                return known[0]
            name = f"v{max(versions, default=0) + 1}"
            retry(lambda: to.api.create_tag(to.repo_id, tag=name, revision=sha, exist_ok=True), "tagging")
            return name
    except PushError as error:
        logger.warning("the commit %s was pushed, but has no version tag: %s", sha, error)
        return None


@contextmanager
def _pushing(to: Destination) -> Iterator[None]:
    """Give every request a time limit, which the client has not, and name the repository in errors."""
    try:
        with time_limit(TIMEOUT):
            yield
    except OfflineModeIsEnabled as error:
        raise PushError(
            f"'{to.repo_id}' could not be written on the Hub: {error}; unset HF_HUB_OFFLINE, and push again"
        ) from error
    except (HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError) as error:
        raise PushError(
            f"'{to.repo_id}' could not be written on the Hub: {error}; log in with `hf auth login` or pass a token that "
            "may write there, and push again: what has arrived is not uploaded twice"
        ) from error
    except SourceNotFoundError as error:
        raise PushError(f"'{to.repo_id}' could not be written on the Hub: {error}") from error
    except (ConnectionError, TimeoutError) as error:  # as Xet raises them
        if isinstance(error, PushError):
            raise
        raise PushError(f"'{to.repo_id}' could not be written on the Hub: {error}; push again") from error
