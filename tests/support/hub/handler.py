"""The endpoints of the test Hub, one method each, with their access checks."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

import yaml

from tests.support.hub.faults import FaultyHandler, Reply
from tests.support.hub.store import PREFIXES, Entry, HubError, Repo, bare, sha256_of

if TYPE_CHECKING:
    from tests.support.hub.server import HubServer

PUBLIC_FILES = ("README.md", ".gitattributes")  # Gated repositories show these to everyone.
ROUTES: list[tuple[list[str], re.Pattern[str], Callable[..., Reply]]] = []
REPO = r"(?P<repo_id>[^/]+(?:/[^/]+)?)"
API = rf"/api/(?P<kind>models/|datasets/|spaces/){REPO}"
SITE = rf"/(?P<kind>datasets/|spaces/)?{REPO}"
REVISION = r"(?P<revision>[^/]+)"


def route(methods: str, pattern: str) -> Callable[[Callable[..., Reply]], Callable[..., Reply]]:
    """Register a method of `HubHandler`, which is called with the unquoted groups of `pattern`.

    The groups `kind` and `repo_id` are joined to an id of `HubServer.repos`. A route for GET also answers HEAD.
    """

    def register(method: Callable[..., Reply]) -> Callable[..., Reply]:
        ROUTES.append((methods.replace("GET", "GET HEAD").split(), re.compile(pattern), method))
        return method

    return register


class HubHandler(FaultyHandler):
    """Answers one request from the stored state."""

    hub: HubServer

    def answer(self, path: str) -> Reply:
        """Call the endpoint of a request, or redirect if its repository was renamed."""
        for methods, pattern, method in ROUTES:
            match = pattern.fullmatch(path)
            if match is None or self.command not in methods:
                continue
            # Unquote after the match: a quoted revision may hold slashes.
            groups = {name: unquote(value or "") for name, value in match.groupdict().items()}
            if "kind" in groups:
                groups["repo_id"] = groups.pop("kind").replace("models/", "") + groups["repo_id"]
                if groups["repo_id"] in self.hub.renamed:
                    return self._redirect(*match.span("repo_id"), self.hub.renamed[groups["repo_id"]])
            return method(self, **groups)
        raise HubError(501, f"HubServer has no endpoint {self.command} {path}")

    def _redirect(self, start: int, end: int, new_id: str) -> Reply:
        self._repo(new_id)
        return Reply(b"", 307, {"Location": self.path[:start] + bare(new_id) + self.path[end:]})

    def _user(self, *, write: bool = False) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        if write and not token:
            raise HubError(401, "Invalid username or password.")
        if write and self.hub.roles.get(token) == "read":
            raise HubError(403, "Forbidden: your token may only read: it needs the role 'write'")
        return self.hub.users.get(token)

    def _repo(self, repo_id: str, *, write: bool = False, propose: bool = False, path: str | None = None) -> Repo:
        """Return a repository if the user may see it.

        With `write`, `propose` or `path`, the user must also be allowed to write to the repository, to open a pull
        request on it, or to read the file `path`.
        """
        user, repo = self._user(), self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.hub.owns(user, repo_id)):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write or propose:
            self._user(write=True)
        if write and not self.hub.owns(user, repo_id):
            raise HubError(403, f"You don't have the rights to write to '{repo_id}'")
        if path is not None and repo.gated and path not in PUBLIC_FILES and not self.hub.owns(user, repo_id):
            if user not in repo.allowed:
                raise HubError(403 if user else 401, f"Access to '{repo_id}' is restricted", "GatedRepo")
        return repo

    def _file(self, key: str, headers: Mapping[str, str]) -> Reply:
        if not (self.hub.root / key).exists():
            raise HubError(404, f"no content {key}")
        content = (self.hub.root / key).open("rb")
        size = content.seek(0, os.SEEK_END)
        headers = {"ETag": f'"{key}"', "Accept-Ranges": "bytes", **headers}
        part = self._asked_part(size)
        if part is None:
            content.seek(0)
            return Reply(content, 200, headers, size)
        if not part:
            content.close()
            return Reply(b"", 416, {"Content-Range": f"bytes */{size}"})
        content.seek(part.start)
        headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
        return Reply(content, 206, headers, len(part))

    def _asked_part(self, size: int) -> range | None:
        """Return the byte range in the `Range` header, or None for the whole file of `size` bytes."""
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if match is None or self.kind == "norange":
            return None
        first, last = match.groups()
        start = int(first) if first else max(0, size - int(last))
        return range(start, min(size, int(last) + 1) if first and last else size)

    @route("GET", "/api/agent-harnesses|/api/telemetry/.*")
    def _nothing(self) -> Reply:
        return Reply({})

    @route("GET", "/api/whoami-v2")
    def _whoami(self) -> Reply:
        user = self._user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        role = self.hub.roles.get(self.headers["Authorization"].removeprefix("Bearer "), "write")
        orgs = [{"name": org} for org, members in self.hub.orgs.items() if user in members]
        return Reply({"type": "user", "name": user, "orgs": orgs, "auth": {"accessToken": {"role": role}}})

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self) -> Reply:
        return Reply({"errors": [], "warnings": []})

    @route("POST", "/api/repos/create")
    def _create_repo(self) -> Reply:
        request, user = json.load(self.body), self._user(write=True)
        kind, name = request.get("type") or "model", f"{request.get('organization') or user}/{request['name']}"
        repo_id = PREFIXES[kind] + name
        created = {"url": f"{self.hub.url}/{repo_id}", "name": name, "id": name}
        if not self.hub.owns(user, repo_id):
            raise HubError(403, f"You don't have the rights to create '{repo_id}'")
        with self.hub.lock:
            if repo_id in self.hub.repos:
                return Reply({"error": f"You already created this {kind} repo", **created}, 409)
            self.hub.create_repo(repo_id, request.get("visibility") == "private")
        return Reply(created)

    @route("GET", rf"{API}/auth-check(?P<write>/write)?")
    def _auth_check(self, repo_id: str, write: str) -> Reply:
        self._repo(repo_id, write=bool(write), path="")
        return Reply({})

    @route("GET", API)
    @route("GET", rf"{API}/revision/{REVISION}")
    def _info(self, repo_id: str, revision: str = "main") -> Reply:
        repo = self._repo(repo_id)
        sha = repo.resolve(revision)
        siblings: list[dict[str, Any]] = []
        for path, entry in sorted(repo.commits[sha].items()):
            sizes = {"size": entry.size, "blobId": entry.oid, **entry.lfs("sha256")}
            siblings.append({"rfilename": path, **(sizes if self.query.get("blobs") == "true" else {})})
        name, card = bare(repo_id), self._card(repo.commits[sha].get("README.md"))
        info = {
            "id": name,
            "author": name.split("/")[0],
            "sha": sha,
            "lastModified": repo.history[sha]["date"],
            "private": repo.private,
            "gated": repo.gated,
            "disabled": False,
            "tags": card.get("tags") or [],
            "siblings": siblings,
        }
        return Reply({**info, "cardData": card} if card else info)

    def _card(self, readme: Entry | None) -> dict[str, Any]:
        """Return the metadata in a model card, if any."""
        text = (self.hub.root / readme.key).read_text(encoding="utf-8") if readme else ""
        match = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        try:
            card = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError:
            card = {}
        # JSON has no dates, so YAML's become strings.
        return json.loads(json.dumps(card, default=str)) if isinstance(card, dict) else {}

    def _item(self, path: str, entry: Entry | None) -> dict[str, Any]:
        """Describe a file, or a folder if there is no entry."""
        if entry is None:
            return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        item = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size, **entry.lfs("oid")}
        if entry.key in self.hub.xet_hashes:
            item["xetHash"] = self.hub.xet_hashes[entry.key]
        return item

    def _items(self, repo: Repo, revision: str) -> dict[str, dict[str, Any]]:
        """Describe the files and folders of a revision, by path."""
        items: dict[str, dict[str, Any]] = {}
        for path, entry in sorted(repo.commits[repo.resolve(revision)].items()):
            items |= {parent: self._item(parent, None) for parent in map(str, PurePosixPath(path).parents[:-1])}
            items[path] = self._item(path, entry)
        return items

    @route("GET", rf"{API}/tree/{REVISION}(?:/(?P<folder>.*))?")
    def _tree(self, repo_id: str, revision: str, folder: str) -> Reply:
        items = self._items(self._repo(repo_id), revision)
        prefix = f"{folder}/" if folder else ""
        inside = [path for path in items if path.startswith(prefix)]
        if folder and not inside:
            raise HubError(404, f"'{folder}' does not exist on '{revision}'", "EntryNotFound")
        recursive = self.query.get("recursive") == "true"
        return Reply([items[path] for path in inside if recursive or "/" not in path.removeprefix(prefix)])

    @route("POST", rf"{API}/paths-info/{REVISION}")
    def _paths_info(self, repo_id: str, revision: str) -> Reply:
        items, body = self._items(self._repo(repo_id), revision), self.body.read()
        asked = json.loads(body) if "json" in self.headers.get("Content-Type", "") else parse_qs(body.decode())
        return Reply([items[path] for path in asked["paths"] if path in items])

    @route("GET", rf"{API}/commits/{REVISION}")
    def _commits(self, repo_id: str, revision: str) -> Reply:
        repo, log = self._repo(repo_id), []
        sha: str | None = repo.resolve(revision)
        while sha is not None:
            log.append(repo.history[sha])
            sha = repo.history[sha]["parent"]
        return Reply(log)

    @route("GET", rf"{API}/refs")
    def _refs(self, repo_id: str) -> Reply:
        repo = self._repo(repo_id)
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in repo.branches.items()]
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": sha} for n, sha in repo.tags.items()]
        pulls = [{"name": n, "ref": n, "targetCommit": sha} for n, sha in repo.pulls.items()]
        refs: dict[str, Any] = {"branches": branches, "tags": tags, "converts": []}
        return Reply({**refs, "pullRequests": pulls} if "include_prs" in self.query else refs)

    @route("POST DELETE", rf"{API}/tag/{REVISION}")
    def _tag(self, repo_id: str, revision: str) -> Reply:
        repo = self._repo(repo_id, write=True)
        if self.command == "DELETE":
            return self._remove_ref(repo.tags, revision)
        return self._add_ref(repo.tags, json.load(self.body)["tag"], repo.resolve(revision))

    @route("POST DELETE", rf"{API}/branch/(?P<branch>[^/]+)")
    def _branch(self, repo_id: str, branch: str) -> Reply:
        repo = self._repo(repo_id, write=True)
        if self.command == "DELETE":
            return self._remove_ref(repo.branches, branch)
        start = json.loads(self.body.read() or b"{}").get("startingPoint") or "main"
        return self._add_ref(repo.branches, branch, repo.resolve(start))

    def _add_ref(self, refs: dict[str, str], name: str, sha: str) -> Reply:
        with self.hub.lock:
            if name in refs:
                raise HubError(409, f"Reference already exists: {name}")
            refs[name] = sha
        return Reply({})

    def _remove_ref(self, refs: dict[str, str], name: str) -> Reply:
        if refs.pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return Reply({})

    @route("GET", rf"{SITE}/resolve/{REVISION}/(?P<path>.+)")
    def _download(self, repo_id: str, revision: str, path: str) -> Reply:
        repo = self._repo(repo_id, path=path)
        sha = repo.resolve(revision)
        entry, headers = repo.commits[sha].get(path), {"X-Repo-Commit": sha}
        if entry is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        if entry.sha256 is None:
            return self._file(entry.key, headers)
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        if entry.sha256 in self.hub.xet_hashes:
            kind = "models/" if repo_id == bare(repo_id) else ""
            token_url = f"{self.hub.url}/api/{kind}{repo_id}/xet-read-token/{sha}"
            headers |= {"X-Xet-Hash": self.hub.xet_hashes[entry.sha256], "Link": f'<{token_url}>; rel="xet-auth"'}
        return Reply(b"", 302, {**headers, "Location": f"{self.hub.cdn_url}/lfs/{entry.sha256}"})

    @route("GET PUT", r"/lfs/(?P<sha256>[0-9a-f]{64})")
    def _lfs_content(self, sha256: str) -> Reply:
        if "Authorization" in self.headers:  # A presigned URL refuses a second credential.
            raise HubError(400, "Only one auth mechanism allowed")
        if self.command != "PUT":
            return self._file(sha256, {})
        if sha256_of(self.body) != sha256:
            raise HubError(400, f"content does not hash to {sha256}")
        self.hub.store_lfs(sha256, self.body)
        return Reply(b"")

    @route("POST", rf"{SITE}\.git/info/lfs/objects/batch")
    def _lfs_batch(self, repo_id: str) -> Reply:
        self._repo(repo_id, propose=True)
        objects = json.load(self.body)["objects"]
        for item in objects:
            if not (self.hub.root / item["oid"]).exists():  # Without actions the client skips the upload.
                upload = {"href": f"{self.hub.cdn_url}/lfs/{item['oid']}", "header": {}}
                verify = {"href": f"{self.hub.url}/{repo_id}.git/info/lfs/objects/verify"}
                item["actions"] = {"upload": upload, "verify": verify}
        return Reply({"objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    @route("POST", rf"{SITE}\.git/info/lfs/objects/verify")
    def _lfs_verify(self, repo_id: str) -> Reply:
        self._repo(repo_id, propose=True)
        self.hub.stored_lfs(json.load(self.body)["oid"])
        return Reply({})

    @route("GET", rf"{API}/xet-(?P<right>read|write)-token/{REVISION}")
    def _xet_token(self, repo_id: str, right: str, revision: str) -> Reply:
        self._repo(repo_id, propose=right == "write", path="")
        if not self.hub.xet:
            raise HubError(404, "this Hub has no Xet storage")
        url, expiry = self.hub.xet_url, int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "t", "X-Xet-Token-Expiration": str(expiry)}
        return Reply({"casUrl": url, "accessToken": "t", "exp": expiry}, headers=headers)

    @route("POST", rf"{API}/discussions")
    def _open_pull(self, repo_id: str) -> Reply:
        repo = self._repo(repo_id, propose=True, path="")
        with self.hub.lock:
            ref = repo.open_pull(repo.resolve("main"), self._user())
        return Reply({"num": int(ref.rsplit("/", 1)[1])})

    @route("GET", rf"{API}/discussions/(?P<number>\d+)")
    def _pull(self, repo_id: str, number: str) -> Reply:
        repo, ref = self._repo(repo_id), f"refs/pr/{number}"
        if ref not in repo.pulls:
            raise HubError(404, f"no discussion {number}")
        kind = next(kind for kind, prefix in reversed(PREFIXES.items()) if repo_id.startswith(prefix))
        discussion = {
            "num": int(number),
            "title": ref,
            "isPullRequest": True,
            "status": "draft",
            "events": [],
            "repo": {"name": bare(repo_id), "type": kind},
            "changes": {"base": "main"},
            "filesWithConflicts": [],
            "author": {"name": repo.pull_authors[ref]},
            "createdAt": repo.history[repo.pulls[ref]]["date"],
        }
        return Reply(discussion)

    def _writable(self, repo_id: str, revision: str) -> Repo:
        """Return a repository if the user may commit to `revision` or open a pull request on it."""
        repo = self._repo(repo_id, propose=True, path="")
        mine = revision in repo.pulls and repo.pull_authors[revision] == self._user()
        return repo if mine or "create_pr" in self.query else self._repo(repo_id, write=True)

    @route("POST", rf"{API}/preupload/{REVISION}")
    def _preupload(self, repo_id: str, revision: str) -> Reply:
        repo = self._writable(repo_id, revision)
        tree, files = repo.commits[repo.resolve(revision)], []
        for path, size in ((file["path"], file["size"]) for file in json.load(self.body)["files"]):
            mode = "lfs" if self.hub.is_lfs(path, size) else "regular"
            stored = {"oid": tree[path].key} if path in tree else {}  # The client skips a file with this hash.
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **stored})
        return Reply({"files": files})

    @route("POST", rf"{API}/commit/{REVISION}")
    def _commit(self, repo_id: str, revision: str) -> Reply:
        repo, author = self._writable(repo_id, revision), self._user()
        header, *operations = (json.loads(line) for line in self.body.read().splitlines())
        asked, answer = header["value"], dict[str, Any](success=True)
        with self.hub.lock:
            head = repo.resolve(revision)
            if (asked.get("parentCommit") or head) != head:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            if revision not in {**repo.branches, **repo.pulls}:
                raise HubError(400, f"'{revision}' is not a branch")
            tree = dict(repo.commits[head])
            for operation in operations:
                self._apply_(tree, operation["key"], operation["value"])
            if "create_pr" in self.query:
                revision = repo.open_pull(head, author)
                answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{revision.rsplit('/', 1)[1]}"
            sha = repo.commit(revision, tree, asked["summary"], asked.get("description") or "", author)
        return Reply({**answer, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"})

    def _apply_(self, tree: dict[str, Entry], key: str, operation: dict[str, Any]) -> None:
        """Change `tree` by one operation of a commit."""
        path = operation["path"]
        inside = [name for name in tree if name.startswith(f"{path.rstrip('/')}/")]
        if key == "file":
            tree[path] = self.hub.store(path, io.BytesIO(base64.b64decode(operation["content"])))
        elif key == "lfsFile":
            tree[path] = self.hub.stored_lfs(operation["oid"])
        elif key == "deletedFile" and path in tree:
            del tree[path]
        elif key == "deletedFolder" and inside:
            for name in inside:
                del tree[name]
        else:
            raise HubError(400, f"HubServer cannot apply '{key}' to '{path}'")
