"""A Hugging Face Hub on the loopback: tests pull and push models with the real clients and without a network.

Only the classic LFS protocol is spoken, so clients must run with `HF_HUB_DISABLE_XET=1`. LFS content has its own port:
as on the Hub, an LFS transfer goes to another origin, where the client must not send its token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".npz")
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


@dataclass
class Reply:
    """One HTTP answer; anything but bytes is sent as JSON."""

    payload: bytes | dict[str, Any] | list[Any]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """An error answer; the client picks its exception class by `code` (the `X-Error-Code` header)."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Build the answer."""
        super().__init__(message)
        self.reply = Reply({"error": message}, status, {"X-Error-Message": message, **(headers or {})})
        if code:
            self.reply.headers["X-Error-Code"] = code


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
        """Return the `lfs` field of an answer, where endpoints differ in the name of the hash; none if not LFS."""
        if self.sha256 is None:
            return {}
        pointer_size = len(LFS_POINTER.format(self.sha256, self.size))
        return {"lfs": {hash_name: self.sha256, "size": self.size, "pointerSize": pointer_size}}


@dataclass
class Repo:
    """A model repository: whole trees (path to `Entry`) by commit sha, and the shas of branches and tags."""

    repo_id: str
    private: bool
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str:
        """Return the sha of a branch, a tag or a full sha."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def commit(self, branch: str, tree: dict[str, Entry], title: str) -> str:
        """Move `branch` to a new commit of `tree`; the sha depends on parent, title and content, not on time."""
        identity = [self.repo_id, self.branches.get(branch), title, sorted((path, tree[path].oid) for path in tree)]
        sha = hashlib.sha1(json.dumps(identity).encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        return sha


class HubServer:
    """The state of the Hub and its two listeners, as a context manager.

    `users` maps tokens to user names, `orgs` organizations to their members. Users own the namespace of their name
    and the namespaces of their organizations. Files are LFS by `LFS_SUFFIXES` or above `lfs_threshold` bytes.
    `requests` lists (method, path without query) of all requests to both ports.
    """

    def __init__(
        self,
        root: str | Path,
        users: Mapping[str, str] | None = None,
        orgs: Mapping[str, list[str]] | None = None,
        lfs_threshold: int = 10 * 2**20,
    ) -> None:
        """Keep the content of files in the folder `root`."""
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        self.users, self.orgs, self.lfs_threshold = users or {}, orgs or {}, lfs_threshold
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.failures: list[tuple[str, int]] = []
        self.lock = threading.RLock()

    def __enter__(self) -> HubServer:
        """Listen on two free loopback ports."""
        handler = type("BoundHandler", (HubHandler,), {"hub": self})
        self._listeners = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        for listener in self._listeners:
            threading.Thread(target=listener.serve_forever, args=[0.05], daemon=True).start()
        self.url, self.cdn_url = (f"http://127.0.0.1:{listener.server_port}" for listener in self._listeners)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Accept no more connections; those that clients keep alive are still served."""
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()

    def add_repo(self, repo_id: str, folder: str | Path, *, private: bool = False, tag: str | None = None) -> str:
        """Publish `folder` as the next commit on `main`, without HTTP, and return the commit's sha.

        The commit holds the files of `folder` and `.gitattributes` only; `private` counts for a new repository only.
        """
        with self.lock:
            repo = self.repos.get(repo_id) or self.create_repo(repo_id, private)
            if tag in repo.tags:
                raise ValueError(f"got tag '{tag}', which '{repo_id}' has already: choose another name")
            files = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
            tree = {name: self.store(name, path.read_bytes()) for name, path in files.items()}
            tree.setdefault(".gitattributes", self.store(".gitattributes", GIT_ATTRIBUTES))
            sha = repo.commit("main", tree, "Publish a folder")
            if tag is not None:
                repo.tags[tag] = sha
            return sha

    def fail(self, pattern: str, status: int, times: int = 1) -> None:
        """Answer `status` to the next `times` requests whose "METHOD /path" matches the regular expression."""
        self.failures += [(pattern, status)] * times

    def create_repo(self, repo_id: str, private: bool) -> Repo:
        """Create a repository with the Hub's initial commit."""
        repo = self.repos[repo_id] = Repo(repo_id, private)
        repo.commit("main", {".gitattributes": self.store(".gitattributes", GIT_ATTRIBUTES)}, "initial commit")
        return repo

    def owns(self, user: str | None, repo_id: str) -> bool:
        """Tell whether `user` may write to `repo_id`, and read it if private."""
        namespace = repo_id.split("/")[0]
        return user is not None and (user == namespace or user in self.orgs.get(namespace, []))

    def is_lfs(self, path: str, size: int) -> bool:
        """Tell whether a file is stored as LFS."""
        return path.endswith(LFS_SUFFIXES) or size > self.lfs_threshold

    def store(self, path: str, content: bytes) -> Entry:
        """Store the content of a file."""
        if self.is_lfs(path, len(content)):
            return self.store_lfs(hashlib.sha256(content).hexdigest(), content)
        entry = Entry(hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), len(content))
        (self.root / entry.key).write_bytes(content)
        return entry

    def store_lfs(self, sha256: str, content: bytes) -> Entry:
        """Store the content of an LFS file."""
        (self.root / sha256).write_bytes(content)
        return self.stored_lfs(sha256)

    def stored_lfs(self, sha256: str) -> Entry:
        """Return the entry of an LFS file whose content is stored."""
        if not (self.root / sha256).exists():
            raise HubError(400, f"LFS object {sha256} does not exist")
        size = (self.root / sha256).stat().st_size
        pointer = LFS_POINTER.format(sha256, size).encode()
        return Entry(hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest(), size, sha256)


ROUTES: list[tuple[list[str], re.Pattern[str], Callable[..., Reply]]] = []
REPO = r"(?P<repo_id>[^/]+(?:/[^/]+)?)"
API = rf"/api/models/{REPO}"
REVISION = r"(?P<revision>[^/]+)"


def route(methods: str, pattern: str) -> Callable[[Callable[..., Reply]], Callable[..., Reply]]:
    """Register a method of `HubHandler`, to be called with the unquoted groups of `pattern`."""

    def register(method: Callable[..., Reply]) -> Callable[..., Reply]:
        ROUTES.append((methods.split(), re.compile(pattern), method))
        return method

    return register


class HubHandler(BaseHTTPRequestHandler):
    """The HTTP surface: one method for each endpoint."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        """Keep quiet: tests read `HubServer.requests`."""

    def _dispatch(self) -> None:
        url = urlsplit(self.path)
        path, self.query = url.path, dict(parse_qsl(url.query))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append((self.command, path))
        try:
            reply = self._answer(path)
        except HubError as error:
            reply = error.reply
        content = reply.payload if isinstance(reply.payload, bytes) else json.dumps(reply.payload).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch

    def _answer(self, path: str) -> Reply:
        with self.hub.lock:
            for pattern, status in self.hub.failures:
                if re.search(pattern, f"{self.command} {path}"):
                    self.hub.failures.remove((pattern, status))
                    raise HubError(status, "failure set by the test")
        for methods, route_pattern, method in ROUTES:
            match = route_pattern.fullmatch(path)
            if match and self.command in methods:
                # Unquoted after the match: a quoted revision may hold slashes.
                return method(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
        raise HubError(501, f"HubServer has no endpoint {self.command} {path}")

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def _repo(self, repo_id: str, *, write: bool = False) -> Repo:
        user, repo = self._user(), self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.hub.owns(user, repo_id)):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not self.hub.owns(user, repo_id):
            raise HubError(403 if user else 401, f"You don't have the rights to write to '{repo_id}'")
        return repo

    def _file(self, key: str, headers: Mapping[str, str]) -> Reply:
        content = (self.hub.root / key).read_bytes()
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not match:
            return Reply(content, 200, {"ETag": f'"{key}"', **headers})
        first, last = match.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        part = content[start : int(last) + 1 if first and last else None]
        if not part:
            return Reply(b"", 416, {"Content-Range": f"bytes */{len(content)}"})
        content_range = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        return Reply(part, 206, {"ETag": f'"{key}"', "Content-Range": content_range, **headers})

    @route("GET", "/api/whoami-v2")
    def _whoami(self) -> Reply:
        user = self._user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        orgs = [{"name": org} for org, members in self.hub.orgs.items() if user in members]
        return Reply({"type": "user", "name": user, "orgs": orgs, "auth": {"accessToken": {"role": "write"}}})

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self) -> Reply:
        return Reply({"errors": [], "warnings": []})

    @route("POST", "/api/repos/create")
    def _create_repo(self) -> Reply:
        request, user = json.loads(self.body), self._user()
        repo_id = f"{request.get('organization') or user}/{request['name']}"
        created = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if not self.hub.owns(user, repo_id):
            raise HubError(403 if user else 401, f"You don't have the rights to create '{repo_id}'")
        with self.hub.lock:
            if repo_id in self.hub.repos:
                return Reply({"error": "You already created this model repo", **created}, 409)
            self.hub.create_repo(repo_id, request.get("visibility") == "private")
        return Reply(created)

    @route("GET", API)
    @route("GET", rf"{API}/revision/{REVISION}")
    def _model_info(self, repo_id: str, revision: str = "main") -> Reply:
        repo = self._repo(repo_id)
        sha = repo.resolve(revision)
        siblings: list[dict[str, Any]] = []
        for path, entry in sorted(repo.commits[sha].items()):
            sizes = {"size": entry.size, "blobId": entry.oid, **entry.lfs("sha256")}
            siblings.append({"rfilename": path, **(sizes if self.query.get("blobs") == "true" else {})})
        return Reply({"id": repo_id, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings})

    @route("GET", rf"{API}/tree/{REVISION}(?:/(?P<folder>.*))?")
    def _tree(self, repo_id: str, revision: str, folder: str) -> Reply:
        repo, items, prefix = self._repo(repo_id), {}, f"{folder}/" if folder else ""
        for path, entry in sorted(repo.commits[repo.resolve(revision)].items()):
            for parent in map(str, PurePosixPath(path).parents[:-1]):
                items[parent] = {"type": "directory", "path": parent, "oid": "0" * 40, "size": 0}
            items[path] = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size, **entry.lfs("oid")}
        inside = [path for path in items if path.startswith(prefix)]
        if not inside:
            raise HubError(404, f"'{folder}' does not exist on '{revision}'", "EntryNotFound")
        recursive = self.query.get("recursive") == "true"
        return Reply([items[path] for path in inside if recursive or "/" not in path.removeprefix(prefix)])

    @route("GET", rf"{API}/refs")
    def _refs(self, repo_id: str) -> Reply:
        repo = self._repo(repo_id)
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in repo.branches.items()]
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": sha} for n, sha in repo.tags.items()]
        return Reply({"branches": branches, "tags": tags, "converts": []})

    @route("POST", rf"{API}/tag/{REVISION}")
    def _create_tag(self, repo_id: str, revision: str) -> Reply:
        repo = self._repo(repo_id, write=True)
        return self._add_ref(repo.tags, json.loads(self.body)["tag"], repo.resolve(revision))

    @route("POST", rf"{API}/branch/(?P<branch>[^/]+)")
    def _create_branch(self, repo_id: str, branch: str) -> Reply:
        repo = self._repo(repo_id, write=True)
        return self._add_ref(repo.branches, branch, repo.resolve(json.loads(self.body).get("startingPoint", "main")))

    def _add_ref(self, refs: dict[str, str], name: str, sha: str) -> Reply:
        with self.hub.lock:
            if name in refs:
                raise HubError(409, f"Reference already exists: {name}")
            refs[name] = sha
        return Reply({})

    @route("GET HEAD", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)")
    def _download(self, repo_id: str, revision: str, path: str) -> Reply:
        repo = self._repo(repo_id)
        sha = repo.resolve(revision)
        entry, headers = repo.commits[sha].get(path), {"X-Repo-Commit": sha}
        if entry is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        if entry.sha256 is None:
            return self._file(entry.key, headers)
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        return Reply(b"", 302, {**headers, "Location": f"{self.hub.cdn_url}/lfs/{entry.sha256}"})

    @route("GET PUT", r"/lfs/(?P<sha256>[0-9a-f]{64})")
    def _lfs_content(self, sha256: str) -> Reply:
        if "Authorization" in self.headers:  # A presigned URL refuses a second credential.
            raise HubError(400, "Only one auth mechanism allowed")
        if self.command == "GET":
            return self._file(sha256, {})
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise HubError(400, f"content does not hash to {sha256}")
        self.hub.store_lfs(sha256, self.body)
        return Reply(b"")

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def _lfs_batch(self, repo_id: str) -> Reply:
        self._repo(repo_id, write=True)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if not (self.hub.root / item["oid"]).exists():  # Without actions the client skips the upload.
                upload = {"href": f"{self.hub.cdn_url}/lfs/{item['oid']}", "header": {}}
                verify = {"href": f"{self.hub.url}/{repo_id}.git/info/lfs/objects/verify"}
                item["actions"] = {"upload": upload, "verify": verify}
        return Reply({"objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/verify")
    def _lfs_verify(self, repo_id: str) -> Reply:
        self._repo(repo_id, write=True)
        self.hub.stored_lfs(json.loads(self.body)["oid"])
        return Reply({})

    @route("POST", rf"{API}/preupload/{REVISION}")
    def _preupload(self, repo_id: str, revision: str) -> Reply:
        repo, files = self._repo(repo_id, write=True), []
        tree = repo.commits[repo.resolve(revision)]
        for path, size in ((file["path"], file["size"]) for file in json.loads(self.body)["files"]):
            mode = "lfs" if self.hub.is_lfs(path, size) else "regular"
            stored = {"oid": tree[path].key} if path in tree else {}  # The client skips files that are equal to it.
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **stored})
        return Reply({"files": files})

    @route("POST", rf"{API}/commit/{REVISION}")
    def _commit(self, repo_id: str, revision: str) -> Reply:
        repo = self._repo(repo_id, write=True)
        header, *operations = map(json.loads, self.body.splitlines())
        with self.hub.lock:
            head = repo.resolve(revision)
            if header["value"].get("parentCommit", head) != head:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            if revision not in repo.branches:
                raise HubError(400, f"'{revision}' is not a branch")
            tree = dict(repo.commits[head])
            for operation in operations:
                self._apply_(tree, operation["key"], operation["value"])
            sha = repo.commit(revision, tree, header["value"]["summary"])
        return Reply({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"})

    def _apply_(self, tree: dict[str, Entry], key: str, operation: dict[str, Any]) -> None:
        path = operation["path"]
        if key == "file":
            tree[path] = self.hub.store(path, base64.b64decode(operation["content"]))
        elif key == "lfsFile":
            tree[path] = self.hub.stored_lfs(operation["oid"])
        elif key == "deletedFile" and path in tree:
            del tree[path]
        else:
            raise HubError(400, f"HubServer cannot apply '{key}' to '{path}'")
