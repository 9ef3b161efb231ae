"""A Hugging Face Hub on the loopback: tests pull and push models with the real clients and without a network.

Clients run with `HF_HUB_DISABLE_XET=1` and transfer by the classic LFS protocol, unless the server was made with
`xet=True`. LFS content has its own port: as on the Hub, an LFS transfer goes to another origin, where the client must
not send its token. Tests can break any answer, or a transfer in its middle: see `HubServer.fault`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import parse_qs, parse_qsl, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".npz")
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}
PUBLIC_FILES = ("README.md", ".gitattributes")  # Gated repositories show these to everyone.
PIECE = 2**18  # Bodies are sent and received in pieces of this many bytes.
BODY_FAULTS = ("cut", "reset", "stall", "slow", "short", "corrupt", "norange")
FAULTS = ("status", "status_after", "close", "drop", *BODY_FAULTS)


@dataclass
class Reply:
    """One HTTP answer: bytes or an open file (`size` bytes from where it stands) as they are, all else as JSON."""

    payload: bytes | IO[bytes] | dict[str, Any] | list[Any]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    size: int = 0

    def open(self) -> tuple[IO[bytes], int]:
        """Return the body and its size."""
        if not isinstance(self.payload, (bytes, dict, list)):
            return self.payload, self.size
        content = self.payload if isinstance(self.payload, bytes) else json.dumps(self.payload).encode()
        return io.BytesIO(content), len(content)


class HubError(Exception):
    """An error answer; the client picks its exception class by `code` (the `X-Error-Code` header)."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Build the answer."""
        super().__init__(message)
        self.reply = Reply({"error": message}, status, {"X-Error-Message": message, **(headers or {})})
        if code:
            self.reply.headers["X-Error-Code"] = code


@dataclass
class Fault:
    """What the test wants to go wrong with requests whose "METHOD /path" matches `pattern`; see `HubServer.fault`."""

    pattern: str
    kind: str
    times: int = 1
    skip: int = 0
    status: int = 500
    headers: Mapping[str, str] | None = None
    code: str = ""
    after: int = 0
    at: int = 0
    seconds: float = 60
    bytes_per_second: int = 2**20

    def __post_init__(self) -> None:
        if self.kind not in FAULTS:
            raise ValueError(f"got kind '{self.kind}': expected one of {', '.join(FAULTS)}")

    def matches(self, method: str, path: str) -> bool:
        """Tell whether a request is meant; a HEAD request has no body to break."""
        broken = method != "HEAD" or self.kind not in BODY_FAULTS
        return broken and re.search(self.pattern, f"{method} {path}") is not None


@dataclass
class Exchange:
    """One request and its answer; `sent` and `received` count the bytes of the bodies that really went by."""

    method: str
    path: str
    range: str | None
    authorized: bool
    fault: str | None = None
    status: int | None = None
    sent: int = 0
    received: int = 0


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
    """A repository: whole trees (path to `Entry`) and log entries by commit sha, and the shas of all refs.

    `repo_id` starts with "datasets/" or "spaces/" if it is not a model, as in addresses. `gated` is False, "auto" or
    "manual"; then only its owners and the users in `allowed` may read its files.
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
        told = {
            "id": sha,
            "title": title,
            "message": message,
            "authors": [{"user": author or "system"}],
            "parent": parent,
        }
        self.history[sha] = {**told, "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")}
        self.commits[sha], refs[branch] = tree, sha
        return sha

    def open_pull(self, sha: str, author: str | None) -> str:
        """Open a pull request on a commit, and return its ref, which ends in its number."""
        ref = f"refs/pr/{len(self.pulls) + 1}"
        self.pulls[ref], self.pull_authors[ref] = sha, author
        return ref


class Listener(ThreadingHTTPServer):
    """A port whose open connections can be cut."""

    request_queue_size = 128

    def __init__(self, port: int, handler: type[HubHandler]) -> None:
        """Listen on `port`, or on a free one for 0."""
        super().__init__(("127.0.0.1", port), handler)
        self.connections: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take note of a connection and serve it in its own thread."""
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print errors of the server, but not that a client, a fault or `HubServer.stop` cut a connection."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        """Accept no more connections and cut those that are open."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            hang_up(connection)


def hang_up(connection: socket.socket) -> None:
    """End a connection at once, for both sides."""
    with suppress(OSError):  # The client was faster.
        connection.shutdown(socket.SHUT_RDWR)


class HubServer:
    """The state of the Hub and its two listeners, as a context manager.

    `users` maps tokens to user names, `orgs` organizations to their members. Users own the namespace of their name
    and the namespaces of their organizations. Files are LFS by `LFS_SUFFIXES` or above `lfs_threshold` bytes. With
    `xet`, clients that have hf_xet use it: they write to a folder here instead of a Xet server, by their own code;
    only one process at a time can.

    `requests` lists (method, path without query) of all requests to both ports, and `exchanges` has more about the
    same requests at the same indices. `repos` has the repositories by id, `failures` the faults still to come.
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
        self.requests: list[tuple[str, str]] = []
        self.exchanges: list[Exchange] = []
        self.failures: list[Fault] = []
        self.lock = threading.RLock()
        self._ports, self._listeners = [0, 0], list[Listener]()

    def __enter__(self) -> HubServer:
        """Listen on two free loopback ports."""
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop listening."""
        self.stop()

    def start(self) -> None:
        """Listen, on the same ports as before `stop`."""
        handler = type("BoundHandler", (HubHandler,), {"hub": self})
        self._listeners = [Listener(port, handler) for port in self._ports]
        self._ports = [listener.server_port for listener in self._listeners]
        self.url, self.cdn_url = (f"http://127.0.0.1:{port}" for port in self._ports)
        for listener in self._listeners:
            threading.Thread(target=listener.serve_forever, args=[0.05], daemon=True).start()

    def stop(self) -> None:
        """Stop listening and cut all connections; repositories, users and faults stay."""
        while self._listeners:
            self._listeners.pop().stop()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Be out of reach inside the `with` block, and back on the same ports after it."""
        self.stop()
        try:
            yield
        finally:
            self.start()

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
            tree = {".gitattributes": self.store(".gitattributes", io.BytesIO(GIT_ATTRIBUTES))}
            for path in filter(Path.is_file, Path(folder).rglob("*")):
                name = path.relative_to(folder).as_posix()
                with path.open("rb") as content:
                    tree[name] = self.store(name, content)
            sha = repo.commit("main", tree, "Publish a folder")
            if tag is not None:
                repo.tags[tag] = sha
            return sha

    def rename(self, repo_id: str, new_id: str) -> None:
        """Move a repository; requests for the old id are redirected. Ids are those of `repos`."""
        with self.lock:
            repo = self.repos[new_id] = self.repos.pop(repo_id)
            repo.repo_id, self.renamed[repo_id] = new_id, new_id
            self.renamed = {old: new_id if new == repo_id else new for old, new in self.renamed.items()}

    def fault(self, pattern: str, kind: str, times: int = 1, skip: int = 0, **options: Any) -> Fault:
        """Break the next `times` requests whose "METHOD /path" matches the regular expression, after `skip` of them.

        LFS content is "GET /lfs/<sha256>" or "PUT /lfs/<sha256>", on the second port. The kinds and their options:

        - `status`: answer `status` (500), with `headers` and the error `code`, and do nothing.
        - `status_after`: do the work, then answer `status`.
        - `close`: do the work, then close the connection without an answer.
        - `drop`: close the connection, and do nothing.
        - `cut`: close the connection after `after` bytes of the body.
        - `reset`: the same by a TCP reset.
        - `stall`: send nothing for `seconds` (60) after `after` bytes of the body, then close the connection.
        - `slow`: send `bytes_per_second`.
        - `short`: send `after` bytes of the body as if they were all.
        - `corrupt`: flip the bits of the byte `at` of the body; negative counts from the end.
        - `norange`: send all of a file where the client asked for a part.

        The kinds about the body let HEAD requests by; `cut`, `reset` and `stall` of a PUT count the bytes received.
        Of several faults that match, the oldest is used. `failures` holds them until they are used up.
        """
        fault = Fault(pattern, kind, times, skip, **options)
        with self.lock:
            self.failures.append(fault)
        return fault

    def fail(self, pattern: str, status: int, times: int = 1) -> None:
        """Answer `status` to the next `times` requests whose "METHOD /path" matches the regular expression."""
        self.fault(pattern, "status", times, status=status)

    def take_fault(self, method: str, path: str) -> Fault | None:
        """Use up one turn of the first fault that matches a request."""
        with self.lock:
            for fault in filter(lambda fault: fault.matches(method, path), list(self.failures)):
                if fault.skip == 0:
                    fault.times -= 1
                    self.failures[:] = [other for other in self.failures if other.times > 0]
                    return fault
                fault.skip -= 1
        return None

    def sent(self, pattern: str = "", since: int = 0) -> int:
        """Count the bytes of the bodies sent to requests from index `since` on whose "METHOD /path" matches."""
        return sum(done.sent for done in self._matching(pattern, since))

    def received(self, pattern: str = "", since: int = 0) -> int:
        """Count the bytes of the bodies received with requests from index `since` on whose "METHOD /path" matches."""
        return sum(done.received for done in self._matching(pattern, since))

    def _matching(self, pattern: str, since: int) -> list[Exchange]:
        return [done for done in self.exchanges[since:] if re.search(pattern, f"{done.method} {done.path}")]

    def create_repo(
        self, repo_id: str, private: bool, gated: bool | str = False, allowed: Collection[str] = ()
    ) -> Repo:
        """Create a repository with the Hub's initial commit."""
        repo = self.repos[repo_id] = Repo(repo_id, private, gated, set(allowed))
        self.renamed.pop(repo_id, None)
        tree = {".gitattributes": self.store(".gitattributes", io.BytesIO(GIT_ATTRIBUTES))}
        repo.commit("main", tree, "initial commit")
        return repo

    def owns(self, user: str | None, repo_id: str) -> bool:
        """Tell whether `user` may write to `repo_id`, and read it if private."""
        namespace = bare(repo_id).split("/")[0]
        return user is not None and (user == namespace or user in self.orgs.get(namespace, []))

    def is_lfs(self, path: str, size: int) -> bool:
        """Tell whether a file is stored as LFS."""
        return path.endswith(LFS_SUFFIXES) or size > self.lfs_threshold

    def store(self, path: str, content: IO[bytes]) -> Entry:
        """Store the content of a file."""
        size = content.seek(0, os.SEEK_END)
        if self.is_lfs(path, size):
            return self.store_lfs(sha256_of(content), content)
        content.seek(0)
        data = content.read()
        entry = Entry(hashlib.sha1(b"blob %d\0" % size + data).hexdigest(), size)
        (self.root / entry.key).write_bytes(data)
        return entry

    def store_lfs(self, sha256: str, content: IO[bytes]) -> Entry:
        """Store the content of an LFS file; it appears whole, for those who read it meanwhile."""
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
        pointer = LFS_POINTER.format(sha256, size).encode()
        return Entry(hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest(), size, sha256)

    def _copy_from_xet(self, sha256: str) -> None:
        """Store what a client uploaded by Xet as a plain file too, for clients without Xet."""
        import hf_xet

        for xet_hash, content_hash, size in xet_files(self.root / "xet"):
            if content_hash == sha256:
                with tempfile.TemporaryDirectory(dir=self.root) as copy:
                    shutil.copytree(self.root / "xet/xet/xorbs", f"{copy}/xet/xorbs", copy_function=copy_open_store)
                    url, session, expiry = f"local://{copy}", hf_xet.XetSession(), int(time.time()) + 3600
                    with session.new_file_download_group(url, token="t", token_expiry_unix_secs=expiry) as group:
                        group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), f"{copy}/content")
                    os.replace(f"{copy}/content", self.root / sha256)
                self.xet_hashes[sha256] = xet_hash
                return


def copy_open_store(source: str, target: str) -> None:
    """Copy a file of a local Xet store: its database, which the client locks; all else by a link."""
    with suppress(FileNotFoundError):  # The client is still busy with other files.
        (shutil.copy if source.endswith(".redb") else os.link)(source, target)


def xet_files(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Yield (Xet hash, sha256, size) of each file in the shards of a local Xet store.

    A shard lists files in records of 48 bytes: a header (Xet hash, flags, number of segments), the segments, as many
    verification records by flag 31, and one with the sha256 by flag 30. A header of set bits ends the list.
    """
    for shard in folder.glob("xet/xorbs/shards/*.mdb"):
        data, offset = shard.read_bytes(), 48
        while (header := data[offset : offset + 32]) != b"\xff" * 32:
            flags, count = struct.unpack_from("<II", data, offset + 32)
            offset += 48
            size = sum(struct.unpack_from("<I", data, offset + 48 * index + 36)[0] for index in range(count))
            offset += 48 * count * (2 if flags & 1 << 31 else 1)
            if flags & 1 << 30:
                yield xet_hex(header), xet_hex(data[offset : offset + 32]), size
                offset += 48


def xet_hex(digest: bytes) -> str:
    """Return how Xet writes a hash."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


def bare(repo_id: str) -> str:
    """Return an id without the prefix of datasets and spaces."""
    return re.sub("^(?:datasets|spaces)/", "", repo_id)


def sha256_of(content: IO[bytes]) -> str:
    """Return the hash of a file, read in pieces."""
    content.seek(0)
    digest = hashlib.sha256()
    while piece := content.read(PIECE):
        digest.update(piece)
    return digest.hexdigest()


ROUTES: list[tuple[list[str], re.Pattern[str], Callable[..., Reply]]] = []
REPO = r"(?P<repo_id>[^/]+(?:/[^/]+)?)"
API = rf"/api/(?P<kind>models/|datasets/|spaces/){REPO}"
SITE = rf"/(?P<kind>datasets/|spaces/)?{REPO}"
REVISION = r"(?P<revision>[^/]+)"


def route(methods: str, pattern: str) -> Callable[[Callable[..., Reply]], Callable[..., Reply]]:
    """Register a method of `HubHandler`, to be called with the unquoted groups of `pattern`.

    The groups `kind` and `repo_id` are joined to an id of `HubServer.repos`. HEAD is answered wherever GET is.
    """

    def register(method: Callable[..., Reply]) -> Callable[..., Reply]:
        ROUTES.append((methods.replace("GET", "GET HEAD").split(), re.compile(pattern), method))
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
        self.query = dict(parse_qsl(url.query))
        found = self.hub.take_fault(self.command, url.path)
        self.fault, self.kind = found or Fault("", "status", 0), found.kind if found else None
        authorized = "Authorization" in self.headers
        self.exchange = Exchange(self.command, url.path, self.headers.get("Range"), authorized, self.kind)
        with self.hub.lock:
            self.hub.requests.append((self.command, url.path))
            self.hub.exchanges.append(self.exchange)
        try:
            with tempfile.SpooledTemporaryFile(2**20, dir=str(self.hub.root)) as self.body:
                self._receive()
                self._act(url.path)
        except OSError:  # The client left, or a fault ends the connection.
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _dispatch

    def _receive(self) -> None:
        """Read the body of the request."""
        for piece in self._pieces():
            self.exchange.received += len(piece)
            self.body.write(piece)
            if self.command == "PUT" and self.exchange.received >= self.fault.after:
                self._break()
        self.body.seek(0)

    def _pieces(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        left = int(self.headers.get("Content-Length", 0))
        while left:
            piece = self.rfile.read(min(left, PIECE))
            if not piece:
                raise ConnectionResetError
            left -= len(piece)
            yield piece

    def _act(self, path: str) -> None:
        """Answer the request, as far as the fault lets it."""
        if self.kind == "drop":
            self._end()
        try:
            if self.kind != "status":
                reply = self._answer(path)
            if self.kind in ("status", "status_after"):
                raise HubError(self.fault.status, "failure set by the test", self.fault.code, self.fault.headers)
        except HubError as error:
            reply = error.reply
        if self.kind == "close":
            self._end()
        body, size = reply.open()
        with body:
            self._send(reply, body, size)

    def _send(self, reply: Reply, body: IO[bytes], size: int) -> None:
        size = min(size, self.fault.after) if self.kind == "short" else size
        self.exchange.status = reply.status
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(size), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        step = max(1, min(PIECE, self.fault.bytes_per_second // 10)) if self.kind == "slow" else PIECE
        limit = min(size, self.fault.after) if self.kind in ("cut", "reset", "stall") else size
        while self.command != "HEAD" and self.exchange.sent < limit:
            piece = body.read(min(step, limit - self.exchange.sent))
            place = self.fault.at % size - self.exchange.sent
            if self.kind == "corrupt" and 0 <= place < len(piece):
                piece = piece[:place] + bytes([piece[place] ^ 0xFF]) + piece[place + 1 :]
            self.exchange.sent += len(piece)  # first, so that a client that has it finds it counted
            self.wfile.write(piece)
            if self.kind == "slow":
                time.sleep(len(piece) / self.fault.bytes_per_second)
        if limit < size:
            self._break()

    def _break(self) -> None:
        """End the connection in the middle of a body if the fault is of a kind that does."""
        if self.kind == "stall":
            time.sleep(self.fault.seconds)
        elif self.kind == "reset":
            time.sleep(0.1)  # A reset throws away what is still on its way.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            raise ConnectionAbortedError
        if self.kind in ("cut", "stall"):
            self._end()

    def _end(self) -> None:
        hang_up(self.connection)
        raise ConnectionAbortedError

    def _answer(self, path: str) -> Reply:
        for methods, pattern, method in ROUTES:
            match = pattern.fullmatch(path)
            if match is None or self.command not in methods:
                continue
            # Unquoted after the match: a quoted revision may hold slashes.
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
        """Return a repository that the user may see, and write to, open pull requests on or read `path` in."""
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
        start, end, status = 0, size, 200
        headers = {"ETag": f'"{key}"', "Accept-Ranges": "bytes", **headers}
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if match and self.kind != "norange":
            first, last = match.groups()
            start, status = int(first) if first else max(0, size - int(last)), 206
            end = min(size, int(last) + 1) if first and last else size
            if start >= end:
                content.close()
                return Reply(b"", 416, {"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        content.seek(start)
        return Reply(content, status, headers, end - start)

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
        about = {"id": name, "author": name.split("/")[0], "sha": sha, "lastModified": repo.history[sha]["date"]}
        access = {"private": repo.private, "gated": repo.gated, "disabled": False}
        told = {"tags": card.get("tags") or [], **({"cardData": card} if card else {})}
        return Reply({**about, **access, **told, "siblings": siblings})

    def _card(self, readme: Entry | None) -> dict[str, Any]:
        """Return the metadata in a model card, if any."""
        text = (self.hub.root / readme.key).read_text(encoding="utf-8") if readme else ""
        match = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        try:
            card = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError:
            card = {}
        # As JSON has no dates.
        return json.loads(json.dumps(card, default=str)) if isinstance(card, dict) else {}

    def _item(self, path: str, entry: Entry | None) -> dict[str, Any]:
        """Describe a file, or a folder if there is no entry."""
        if entry is None:
            return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        item = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size, **entry.lfs("oid")}
        return {**item, "xetHash": self.hub.xet_hashes[entry.key]} if entry.key in self.hub.xet_hashes else item

    def _items(self, repo: Repo, revision: str) -> dict[str, dict[str, Any]]:
        items: dict[str, dict[str, Any]] = {}
        for path, entry in sorted(repo.commits[repo.resolve(revision)].items()):
            items |= {parent: self._item(parent, None) for parent in map(str, PurePosixPath(path).parents[:-1])}
            items[path] = self._item(path, entry)
        return items

    @route("GET", rf"{API}/tree/{REVISION}(?:/(?P<folder>.*))?")
    def _tree(self, repo_id: str, revision: str, folder: str) -> Reply:
        items, prefix = self._items(self._repo(repo_id), revision), f"{folder}/" if folder else ""
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
        asked = {"pullRequests": pulls} if "include_prs" in self.query else {}
        return Reply({"branches": branches, "tags": tags, "converts": [], **asked})

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
            kind = "" if repo_id != bare(repo_id) else "models/"
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
        about = {"num": int(number), "title": ref, "isPullRequest": True, "status": "draft", "events": []}
        kind = next(kind for kind, prefix in reversed(PREFIXES.items()) if repo_id.startswith(prefix))
        where = {"repo": {"name": bare(repo_id), "type": kind}, "changes": {"base": "main"}, "filesWithConflicts": []}
        made = {"author": {"name": repo.pull_authors[ref]}, "createdAt": repo.history[repo.pulls[ref]]["date"]}
        return Reply({**about, **where, **made})

    def _writable(self, repo_id: str, revision: str) -> Repo:
        """Return a repository where the user may commit to `revision`, or on it to a pull request of their own."""
        repo = self._repo(repo_id, propose=True, path="")
        mine = revision in repo.pulls and repo.pull_authors[revision] == self._user()
        return repo if mine or "create_pr" in self.query else self._repo(repo_id, write=True)

    @route("POST", rf"{API}/preupload/{REVISION}")
    def _preupload(self, repo_id: str, revision: str) -> Reply:
        repo, files = self._writable(repo_id, revision), []
        tree = repo.commits[repo.resolve(revision)]
        for path, size in ((file["path"], file["size"]) for file in json.load(self.body)["files"]):
            mode = "lfs" if self.hub.is_lfs(path, size) else "regular"
            stored = {"oid": tree[path].key} if path in tree else {}  # The client skips files that are equal to it.
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **stored})
        return Reply({"files": files})

    @route("POST", rf"{API}/commit/{REVISION}")
    def _commit(self, repo_id: str, revision: str) -> Reply:
        repo, author = self._writable(repo_id, revision), self._user()
        header, *operations = (json.loads(line) for line in self.body.read().splitlines())
        about, answer = header["value"], dict[str, Any](success=True)
        with self.hub.lock:
            head = repo.resolve(revision)
            if (about.get("parentCommit") or head) != head:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            if revision not in {**repo.branches, **repo.pulls}:
                raise HubError(400, f"'{revision}' is not a branch")
            tree = dict(repo.commits[head])
            for operation in operations:
                self._apply_(tree, operation["key"], operation["value"])
            if "create_pr" in self.query:
                revision = repo.open_pull(head, author)
                answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{revision.rsplit('/', 1)[1]}"
            sha = repo.commit(revision, tree, about["summary"], about.get("description") or "", author)
        return Reply({**answer, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"})

    def _apply_(self, tree: dict[str, Entry], key: str, operation: dict[str, Any]) -> None:
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
