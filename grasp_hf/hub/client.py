"""Requests to the Hub: time limits, retries, and errors that say what is wrong."""

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
ATTEMPTS = 4
PAUSES = (1.0, 2.0, 4.0)  # seconds between them
BUSY = (408, 425, 429, 500, 502, 503, 504)

Answer = TypeVar("Answer")


class Stopped(Exception):
    """The download is not wanted any more."""


def stoppable_progress(stop: threading.Event) -> type[hub_tqdm]:
    """Return the client's progress bar as a class that ends a download with `Stopped` once `stop` is set."""

    class Progress(hub_tqdm):
        def update(self, n: float | None = 1) -> Any:
            if stop.is_set():
                raise Stopped
            return super().update(n)

    return Progress


_limits: list[tuple[Any, Any]] = []  # per open block, what the client had before the first
_limits_lock = threading.Lock()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Let no request of the client wait longer for the other side, in sessions that it makes meanwhile too.

    It has no limit of its own where a call names none, and makes a new session when a connection was refused. Blocks in
    several threads share the limit of the first.
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
    """A file arrived with another content than the Hub lists."""


def retry(ask: Callable[[], Answer], doing: str) -> Answer:
    """Return the answer of `ask`, which is called again a few times where the network or the Hub failed for a moment."""
    for pause in (*PAUSES, None):
        try:
            return ask()
        except (HTTPError, HfHubHTTPError, OSError) as error:
            if pause is None or not _passing(error):
                raise
            logger.info("%s failed (%s), trying again in %.0f s", doing, first_line(error), pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _passing(error: Exception) -> bool:
    """Tell whether trying again may help: the client itself gives up on much that passes."""
    if isinstance(error, HfHubHTTPError):
        if error.response is None:
            return False
        # The address in the Hub's storage holds for a while only; the next attempt asks the Hub for another one.
        expired = error.response.status_code == 403 and not str(error.response.url).startswith(
            f"{constants.ENDPOINT}/"
        )
        return expired or error.response.status_code in BUSY
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):  # the client has tried for a while
        return False
    return isinstance(error, (HTTPError, ConnectionError, TimeoutError, Corrupt)) or "onsistency check" in str(error)


@contextmanager
def hub_errors(ref: SourceRef, token: str | None = None, file: str = "") -> Iterator[None]:
    """Turn the client's errors into one that says which reference and which file of it it was, and what to do."""
    try:
        yield
    except GatedRepoError as error:
        problem = "is gated: accept its conditions on its page, then log in with `hf auth login` or pass a token"
        raise SourceNotFoundError(f"'{ref}' {problem}") from error
    except RepositoryNotFoundError as error:
        raise SourceNotFoundError(_what_it_is(ref, token), subject=ref) from error
    except RevisionNotFoundError as error:
        raise SourceNotFoundError(
            f"'{ref.name}' has no revision '{ref.revision}': expected a branch, tag or sha"
        ) from error
    except HFValidationError as error:
        raise SourceNotFoundError(f"'{ref}' is not a Hub id: {error}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        folder = "" if "@" in str(ref) else "; there is no folder of that name either"
        why = "HF_HUB_OFFLINE is set, unset it" if constants.HF_HUB_OFFLINE else first_line(error)
        raise DownloadError(
            f"'{ref}' could not be downloaded, and no complete copy is cached: {why}{folder}"
        ) from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status == 401:
            problem = "the Hub refused the token: log in again with `hf auth login`, or pass another one"
            raise SourceNotFoundError(problem, subject=ref) from error
        if 400 <= status < 500 and status not in BUSY:
            raise SourceNotFoundError(f"the Hub refused it: {first_line(error)}", subject=ref) from error
        advice = "" if isinstance(error, Corrupt) else "; run it again when the network and the disk allow"
        which = f"{file}: " if file and not isinstance(error, Corrupt) else ""
        raise DownloadError(f"'{ref}' could not be downloaded: {which}{first_line(error)}{advice}") from error


def _what_it_is(ref: SourceRef, token: str | None) -> str:
    """Say why there is no such model: it may be something else."""
    for kind, name in (("dataset", "a data set"), ("space", "a Space")):
        try:
            HfApi(token=token).repo_info(ref.name, repo_type=kind, timeout=TIMEOUT)
        except (HTTPError, HfHubHTTPError):
            continue
        return f"it is {name} on the Hub, expected a model or an adapter"
    return "no such model on the Hub, or it is private: check the spelling, or pass a token that may read it"
