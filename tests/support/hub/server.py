"""The server of the test Hub: two ports and the stored state.

Clients run with `HF_HUB_DISABLE_XET=1` and transfer by the classic LFS protocol, unless the server has
`xet=True`. LFS content has its own port, because on the Hub it has another origin too, and the client must not send
its token there. Tests can break any answer and any transfer, see `HubServer.fault`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.hub.faults import Traffic, hang_up
from tests.support.hub.handler import HubHandler
from tests.support.hub.store import Store


class Listener(ThreadingHTTPServer):
    """A port whose open connections can be cut."""

    request_queue_size = 128

    def __init__(self, port: int, handler: type[HubHandler]) -> None:
        """Listen on `port`, or on a free one for 0."""
        super().__init__(("127.0.0.1", port), handler)
        self.connections: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Note a connection and serve it in its own thread."""
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print errors of the server, except for connections cut by a client, a fault or `HubServer.stop`."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        """Accept no more connections and cut those that are open."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            hang_up(connection)


class HubServer(Store, Traffic):
    """A Hugging Face Hub on the loopback, as a context manager.

    `users` maps tokens to user names, `orgs` organizations to their members. Users own the namespace of their name
    and the namespaces of their organizations. Files are LFS by `store.LFS_SUFFIXES` or above `lfs_threshold` bytes.
    With `xet`, clients use hf_xet, which writes to a local folder instead of a Xet server. Only one process at a time
    can do so.
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
        Store.__init__(self, root, users, orgs, lfs_threshold, xet)
        Traffic.__init__(self)
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
        handler = type("BoundHandler", (HubHandler,), {"hub": self, "body_folder": self.root})
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
