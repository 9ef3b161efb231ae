"""Requests to the Hub: time limits, retries, and errors that name the cause."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from huggingface_hub.utils import tqdm as hub_tqdm

from ..errors import DownloadError, SourceNotFoundError, first_line
from ..internals import client_factory, replace_client_factory
from .reference import SourceRef

logger = logging.getLogger(__name__)

TIMEOUT = 30.0  # seconds
PAUSES = (1.0, 2.0, 4.0)  # seconds between attempts
BUSY = (408, 425, 429, 500, 502, 503, 504)  # status codes that may change when a request is repeated

Answer = TypeVar("Answer")


class Stopped(Exception):
    """A download was stopped because nobody needs it any more."""


def stoppable_progress(stop: threading.Event) -> type[hub_tqdm]:
    """Return a progress bar class for the client that raises `Stopped` in the download once `stop` is set."""

    class Progress(hub_tqdm):
        def update(self, n: float | None = 1) -> Any:
            if stop.is_set():
                raise Stopped
            return super().update(n)

    return Progress


# Factory and timeout of the client before the first open block, once for each open block.
_limits: list[tuple[Any, Any]] = []
_limits_lock = threading.Lock()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Limit how long each request of the client waits for an answer, also in new sessions.

    The client has no limit of its own if a call sets none, and makes a new session after a refused connection. If
    several threads are in such blocks at the same time, the limit of the first block holds for all.

    Args:
        seconds: The limit.
    """
    with _limits_lock:
        make = client_factory()

        def limited() -> Any:
            client = make()
            client.timeout = seconds
            return client

        if _limits:
            _limits.append(_limits[0])
        else:
            _limits.append((make, get_session().timeout))
            replace_client_factory(limited)
            get_session().timeout = seconds
    try:
        yield
    finally:
        with _limits_lock:
            before = _limits.pop()
            if not _limits:
                replace_client_factory(before[0])
                get_session().timeout = before[1]


class Corrupt(OSError):
    """The checksum of a downloaded file differs from the one that the Hub lists."""


def retry(ask: Callable[[], Answer], name: str) -> Answer:
    """Return the answer of `ask`, and repeat the call a few times if it fails for a reason that may pass.

    Args:
        ask: Makes the request.
        name: Name of the request in the log, such as `"listing tags"`.
    """
    for pause in (*PAUSES, None):
        try:
            return ask()
        except (HTTPError, HfHubHTTPError, OSError) as error:
            if pause is None or not _may_pass(error):
                raise
            logger.info("%s failed (%s); next attempt in %.0f s", name, first_line(error), pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed after `error`; the client itself repeats fewer requests."""
    if isinstance(error, HfHubHTTPError):
        if error.response is None:
            return False
        # An address in the storage of the Hub expires. The next attempt asks the Hub for a new address.
        expired = error.response.status_code == 403 and not str(error.response.url).startswith(
            f"{constants.ENDPOINT}/"
        )
        return expired or error.response.status_code in BUSY
    # The client has already repeated a request that ends with one of these.
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return False
    return isinstance(error, (HTTPError, ConnectionError, TimeoutError, Corrupt)) or "onsistency check" in str(error)


@contextmanager
def hub_errors(ref: SourceRef, token: str | None = None, file: str = "") -> Iterator[None]:
    """Turn an error of the client into one that names the reference and the file, and says what to do.

    Args:
        ref: The reference.
        token: Hub token.
        file: The file of the reference, if the block is about one file.

    Raises:
        SourceNotFoundError: The reference does not exist, or the Hub refuses access to it.
        DownloadError: The network, the Hub or the disk failed.
    """
    try:
        yield
    except GatedRepoError as error:
        problem = "is gated: accept the conditions on its page, then log in with `hf auth login` or pass a token"
        raise SourceNotFoundError(f"'{ref}' {problem}") from error
    except RepositoryNotFoundError as error:
        raise SourceNotFoundError(_explain_missing(ref, token), subject=ref) from error
    except RevisionNotFoundError as error:
        raise SourceNotFoundError(
            f"'{ref.name}' has no revision '{ref.revision}': expected a branch, tag or sha"
        ) from error
    except HFValidationError as error:
        raise SourceNotFoundError(f"'{ref}' is not a Hub id: {error}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        folder = "" if "@" in str(ref) else "; there is no folder with this name either"
        why = "HF_HUB_OFFLINE is set; unset it" if constants.HF_HUB_OFFLINE else first_line(error)
        raise DownloadError(
            f"'{ref}' could not be downloaded, and no complete copy is cached: {why}{folder}"
        ) from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status == 401:
            problem = "the Hub refused the token: log in again with `hf auth login`, or pass another token"
            raise SourceNotFoundError(problem, subject=ref) from error
        if 400 <= status < 500 and status not in BUSY:
            raise SourceNotFoundError(f"the Hub refused access: {first_line(error)}", subject=ref) from error
        if isinstance(error, Corrupt):  # its message already names the file
            raise DownloadError(f"'{ref}' could not be downloaded: {first_line(error)}; run it again") from error
        which = f"{file}: " if file else ""
        advice = "check the network and the free disk space, and run it again"
        raise DownloadError(f"'{ref}' could not be downloaded: {which}{first_line(error)}; {advice}") from error


def _explain_missing(ref: SourceRef, token: str | None) -> str:
    """Return the reason why the Hub has no such model: it may have a data set or a Space of that name."""
    for kind, name in (("dataset", "a data set"), ("space", "a Space")):
        try:
            HfApi(token=token).repo_info(ref.name, repo_type=kind, timeout=TIMEOUT)
        except (HTTPError, HfHubHTTPError):
            continue
        return f"got {name} on the Hub, expected a model or an adapter"
    return "no such model on the Hub, or it is private: check the spelling, or pass a token that may read it"
