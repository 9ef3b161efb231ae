"""The traffic of the test Hub: a record of all requests, and the faults that break requests and transfers."""

from __future__ import annotations

import io
import json
import re
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import IO, Any, NoReturn
from urllib.parse import parse_qsl, urlsplit

from tests.support.hub.store import PIECE, HubError

CUTS = ("cut", "reset", "stall")  # These end the connection within a body.
BODY_FAULTS = (*CUTS, "slow", "short", "corrupt", "norange")
FAULTS = ("status", "status_after", "close", "drop", *BODY_FAULTS)


@dataclass
class Fault:
    """A fault for requests whose "METHOD /path" matches `pattern`; `Traffic.fault` explains the kinds and options."""

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
        """Whether the fault applies to a request; a HEAD request has no body to break."""
        breakable = method != "HEAD" or self.kind not in BODY_FAULTS
        return breakable and re.search(self.pattern, f"{method} {path}") is not None


@dataclass
class Exchange:
    """One request and its answer; `sent` and `received` count the bytes of the bodies that were transferred."""

    method: str
    path: str
    range: str | None
    authorized: bool
    fault: str | None = None
    status: int | None = None
    sent: int = 0
    received: int = 0


class Traffic:
    """The requests so far, and the faults for later requests.

    `requests` lists (method, path without query) of all requests to both ports, and `exchanges` has more about the
    same requests at the same indices. `failures` holds the faults until they are used up.
    """

    def __init__(self) -> None:
        """Start with no request and no fault."""
        self.requests: list[tuple[str, str]] = []
        self.exchanges: list[Exchange] = []
        self.failures: list[Fault] = []
        self._traffic_lock = threading.Lock()

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

        The kinds about the body do not apply to HEAD requests; `cut`, `reset` and `stall` of a PUT count the bytes
        received. If several faults match, the oldest is used.
        """
        fault = Fault(pattern, kind, times, skip, **options)
        with self._traffic_lock:
            self.failures.append(fault)
        return fault

    def fail(self, pattern: str, status: int, times: int = 1) -> None:
        """Answer `status` to the next `times` requests whose "METHOD /path" matches the regular expression."""
        self.fault(pattern, "status", times, status=status)

    def take_fault(self, method: str, path: str) -> Fault | None:
        """Use up one turn of the first fault that matches a request."""
        with self._traffic_lock:
            for fault in filter(lambda fault: fault.matches(method, path), list(self.failures)):
                if fault.skip == 0:
                    fault.times -= 1
                    self.failures[:] = [other for other in self.failures if other.times > 0]
                    return fault
                fault.skip -= 1
        return None

    def record(self, exchange: Exchange) -> None:
        """Add a request, whose answer may still be on its way."""
        with self._traffic_lock:
            self.requests.append((exchange.method, exchange.path))
            self.exchanges.append(exchange)

    def sent(self, pattern: str = "", since: int = 0) -> int:
        """Count the bytes of the bodies sent to requests from index `since` on whose "METHOD /path" matches."""
        return sum(exchange.sent for exchange in self._matching(pattern, since))

    def received(self, pattern: str = "", since: int = 0) -> int:
        """Count the bytes of the bodies received with requests from index `since` on whose "METHOD /path" matches."""
        return sum(exchange.received for exchange in self._matching(pattern, since))

    def _matching(self, pattern: str, since: int) -> list[Exchange]:
        return [
            exchange for exchange in self.exchanges[since:] if re.search(pattern, f"{exchange.method} {exchange.path}")
        ]


@dataclass
class Reply:
    """One HTTP answer: bytes, or an open file (`size` bytes from its position on), or anything that becomes JSON."""

    payload: bytes | IO[bytes] | dict[str, Any] | list[Any]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    size: int = 0

    def open(self) -> tuple[IO[bytes], int]:
        """Return the body and its size in bytes."""
        if not isinstance(self.payload, (bytes, dict, list)):
            return self.payload, self.size
        content = self.payload if isinstance(self.payload, bytes) else json.dumps(self.payload).encode()
        return io.BytesIO(content), len(content)


class FaultyHandler(BaseHTTPRequestHandler):
    """Receives one request and sends its answer, broken by the fault that matches it; a subclass finds the answer."""

    hub: Traffic
    body_folder: Path  # for request bodies too large for memory
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self, path: str) -> Reply:
        """Do the work of a request and return the answer, or raise `HubError`."""
        raise NotImplementedError

    def log_message(self, *args: object) -> None:
        """Print nothing: tests read `Traffic.requests`."""

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = dict(parse_qsl(url.query))
        found = self.hub.take_fault(self.command, url.path)
        self.fault, self.kind = found or Fault("", "status", 0), found.kind if found else None
        authorized = "Authorization" in self.headers
        self.exchange = Exchange(self.command, url.path, self.headers.get("Range"), authorized, self.kind)
        self.hub.record(self.exchange)
        try:
            with tempfile.SpooledTemporaryFile(2**20, dir=str(self.body_folder)) as self.body:
                self._receive()
                self._respond(url.path)
        except OSError:  # The client left, or a fault ends the connection.
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _receive(self) -> None:
        """Read the body of the request."""
        for piece in self._received_pieces():
            self.exchange.received += len(piece)
            self.body.write(piece)
            if self.command == "PUT" and self.exchange.received >= self.fault.after:
                self._break()
        self.body.seek(0)

    def _received_pieces(self) -> Iterator[bytes]:
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

    def _respond(self, path: str) -> None:
        """Do the work of the request and send the answer, as far as the fault allows."""
        if self.kind == "drop":
            self._hang_up()
        try:
            if self.kind != "status":
                reply = self.answer(path)
            if self.kind in ("status", "status_after"):
                raise HubError(self.fault.status, "failure set by the test", self.fault.code, self.fault.headers)
        except HubError as error:
            reply = Reply({"error": error.message}, error.status, error.headers)
        if self.kind == "close":
            self._hang_up()
        body, size = reply.open()
        with body:
            size = min(size, self.fault.after) if self.kind == "short" else size
            self._send_head(reply, size)
            if self.command != "HEAD":
                self._send_body(body, size)

    def _send_head(self, reply: Reply, size: int) -> None:
        self.exchange.status = reply.status
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(size), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_body(self, body: IO[bytes], size: int) -> None:
        limit = min(size, self.fault.after) if self.kind in CUTS else size
        rate = self.fault.bytes_per_second if self.kind == "slow" else None
        step = max(1, min(PIECE, rate // 10)) if rate else PIECE
        while self.exchange.sent < limit:
            piece = body.read(min(step, limit - self.exchange.sent))
            if self.kind == "corrupt":
                piece = _flip(piece, self.fault.at % size - self.exchange.sent)
            self.exchange.sent += len(piece)  # Before it is sent: a fast client could ask for the count.
            self.wfile.write(piece)
            if rate:
                time.sleep(len(piece) / rate)
        if limit < size:
            self._break()

    def _break(self) -> None:
        """End the connection within a body, if the fault is of such a kind."""
        if self.kind == "stall":
            time.sleep(self.fault.seconds)
        if self.kind == "reset":
            time.sleep(0.1)  # A reset discards the bytes that are still on their way.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            raise ConnectionAbortedError
        if self.kind in CUTS:
            self._hang_up()

    def _hang_up(self) -> NoReturn:
        hang_up(self.connection)
        raise ConnectionAbortedError


def _flip(piece: bytes, index: int) -> bytes:
    """Return `piece` with the bits of one byte flipped, if it has that byte."""
    if not 0 <= index < len(piece):
        return piece
    return piece[:index] + bytes([piece[index] ^ 0xFF]) + piece[index + 1 :]


def hang_up(connection: socket.socket) -> None:
    """End a connection at once, for both sides."""
    with suppress(OSError):  # The client was faster.
        connection.shutdown(socket.SHUT_RDWR)
