"""The state of the test Hub: files, repositories, users, and the rights of each user."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from tests.support.hub.xet import download_from_xet

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".npz")
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}
PIECE = 2**18  # Bodies and files are read and sent in pieces of this many bytes.


class HubError(Exception):
    """An error answer; the client picks its exception class by `code` (the `X-Error-Code` header)."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Build the answer's headers."""
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class Entry:
    """One file of a commit: `oid` is its git sha1 (of the pointer for LFS), `sha256` is set for LFS files only."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def key(self) -> str:
        """Name of the stored object, and the ETag that clients see."""
        return self.sha256 or self.oid

    def lfs(self, hash_name: str) -> dict[str, Any]:
        """Return the `lfs` field of an answer, empty for other files; endpoints differ in the name of the hash."""
        if self.sha256 is None:
            return {}
        pointer_size = len(LFS_POINTER.format(self.sha256, self.size))
        return {"lfs": {hash_name: self.sha256, "size": self.size, "pointerSize": pointer_size}}


@dataclass
class Repo:
    """A repository: whole trees (path to `Entry`) and log entries by commit sha, and the shas of all refs.

    `repo_id` starts with "datasets/" or "spaces/" if it is not a model, as in addresses. `gated` is False, "auto" or
    "manual"; a gated repository shows its files only to its owners and the users in `allowed`.
    """

    repo_id: str
    private: bool
    gated: bool | str = False
    allowed: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    history: dict[str, dict[str, Any]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    pull_authors: dict[str, str | None] = field(default_factory=dict)

    def resolve(self, revision: str) -> str:
        """Return the sha of a branch, a tag, a pull request ("refs/pr/1") or a full sha."""
        known = {**self.pulls, **self.tags, **self.branches}
        sha = known.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def commit(
        self, branch: str, tree: dict[str, Entry], title: str, message: str = "", author: str | None = None
    ) -> str:
        """Move a branch or pull request to a new commit of `tree`.

        The sha depends on parent, title and content, not on time.
        """
        refs = self.pulls if branch.startswith("refs/pr/") else self.branches
        parent = refs.get(branch)
        identity = [self.repo_id, parent, title, sorted((path, tree[path].oid) for path in tree)]
        sha = hashlib.sha1(json.dumps(identity).encode()).hexdigest()
        self.history[sha] = {
            "id": sha,
            "title": title,
            "message": message,
            "authors": [{"user": author or "system"}],
            "parent": parent,
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
        }
        self.commits[sha], refs[branch] = tree, sha
        return sha

    def open_pull(self, sha: str, author: str | None) -> str:
        """Open a pull request on a commit, and return its ref, which ends in its number."""
        ref = f"refs/pr/{len(self.pulls) + 1}"
        self.pulls[ref], self.pull_authors[ref] = sha, author
        return ref


class Store:
    """The stored state of the Hub; `server.HubServer` documents the arguments.

    `repos` has the repositories by id. Hold `lock` while you change one.
    """

    def __init__(
        self,
        root: str | Path,
        users: Mapping[str, str] | None = None,
        orgs: Mapping[str, list[str]] | None = None,
        lfs_threshold: int = 10 * 2**20,
        xet: bool = False,
    ) -> None:
        """Keep the content of files in the folder `root`."""
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        self.users, self.orgs, self.lfs_threshold, self.xet = dict(users or {}), orgs or {}, lfs_threshold, xet
        self.roles: dict[str, str] = {}
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.xet_hashes: dict[str, str] = {}
        self.xet_url = f"local://{self.root.resolve()}/xet"
        self.lock = threading.RLock()

    def add_token(self, token: str, user: str, role: str = "write") -> None:
        """Give `user` one more token; with the role "read" it may write nothing."""
        self.users[token], self.roles[token] = user, role

    def add_repo(
        self,
        repo_id: str,
        folder: str | Path,
        *,
        private: bool = False,
        tag: str | None = None,
        repo_type: str = "model",
        gated: bool | str = False,
        allowed: Collection[str] = (),
    ) -> str:
        """Publish `folder` as the next commit on `main`, without HTTP, and return the commit's sha.

        The commit holds the files of `folder` and `.gitattributes` only; `private`, `gated` ("auto" or "manual") and
        `allowed` (the users who may read a gated repository besides its owners) count for a new repository only.
        """
        repo_id = PREFIXES[repo_type] + repo_id
        with self.lock:
            repo = self.repos.get(repo_id) or self.create_repo(repo_id, private, gated, allowed)
            if tag in repo.tags:
                raise ValueError(f"got tag '{tag}', which '{repo_id}' has already: choose another name")
            sha = repo.commit("main", self._tree_of(Path(folder)), "Publish a folder")
            if tag is not None:
                repo.tags[tag] = sha
            return sha

    def _tree_of(self, folder: Path) -> dict[str, Entry]:
        tree = {".gitattributes": self.store(".gitattributes", io.BytesIO(GIT_ATTRIBUTES))}
        for path in filter(Path.is_file, folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            with path.open("rb") as content:
                tree[name] = self.store(name, content)
        return tree

    def create_repo(
        self, repo_id: str, private: bool, gated: bool | str = False, allowed: Collection[str] = ()
    ) -> Repo:
        """Create a repository with the Hub's initial commit."""
        repo = self.repos[repo_id] = Repo(repo_id, private, gated, set(allowed))
        self.renamed.pop(repo_id, None)
        tree = {".gitattributes": self.store(".gitattributes", io.BytesIO(GIT_ATTRIBUTES))}
        repo.commit("main", tree, "initial commit")
        return repo

    def rename(self, repo_id: str, new_id: str) -> None:
        """Move a repository; requests for the old id are redirected. Ids are those of `repos`."""
        with self.lock:
            repo = self.repos[new_id] = self.repos.pop(repo_id)
            repo.repo_id, self.renamed[repo_id] = new_id, new_id
            self.renamed = {old: new_id if new == repo_id else new for old, new in self.renamed.items()}

    def owns(self, user: str | None, repo_id: str) -> bool:
        """Whether `user` may write to `repo_id`, and read it if it is private."""
        namespace = bare(repo_id).split("/")[0]
        return user is not None and (user == namespace or user in self.orgs.get(namespace, []))

    def is_lfs(self, path: str, size: int) -> bool:
        """Whether a file is stored as LFS."""
        return path.endswith(LFS_SUFFIXES) or size > self.lfs_threshold

    def store(self, path: str, content: IO[bytes]) -> Entry:
        """Store the content of a file."""
        size = content.seek(0, os.SEEK_END)
        if self.is_lfs(path, size):
            return self.store_lfs(sha256_of(content), content)
        content.seek(0)
        data = content.read()
        entry = Entry(git_hash(data), size)
        (self.root / entry.key).write_bytes(data)
        return entry

    def store_lfs(self, sha256: str, content: IO[bytes]) -> Entry:
        """Store the content of an LFS file; a concurrent reader sees all of it or nothing."""
        content.seek(0)
        with tempfile.NamedTemporaryFile(dir=self.root, delete=False) as copy:
            shutil.copyfileobj(content, copy)
        os.replace(copy.name, self.root / sha256)
        return self.stored_lfs(sha256)

    def stored_lfs(self, sha256: str) -> Entry:
        """Return the entry of an LFS file whose content is stored."""
        if self.xet and sha256 not in self.xet_hashes:
            self._copy_from_xet(sha256)
        if not (self.root / sha256).exists():
            raise HubError(400, f"LFS object {sha256} does not exist")
        size = (self.root / sha256).stat().st_size
        return Entry(git_hash(LFS_POINTER.format(sha256, size).encode()), size, sha256)

    def _copy_from_xet(self, sha256: str) -> None:
        """Store a file that was uploaded by Xet as a plain file too, for clients without Xet."""
        xet_hash = download_from_xet(self.root / "xet", sha256, self.root / sha256)
        if xet_hash is not None:
            self.xet_hashes[sha256] = xet_hash


def bare(repo_id: str) -> str:
    """Return an id without the prefix of datasets and spaces."""
    return re.sub("^(?:datasets|spaces)/", "", repo_id)


def git_hash(data: bytes) -> str:
    """Return the name that git gives to the content of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256_of(content: IO[bytes]) -> str:
    """Return the hash of a file, read in pieces."""
    content.seek(0)
    digest = hashlib.sha256()
    while piece := content.read(PIECE):
        digest.update(piece)
    return digest.hexdigest()
