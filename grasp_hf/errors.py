"""The errors of this package. Each is a `GraspError`; an error for a mistake of the user is also a `ValueError`.

Their messages quote files and answers of strangers. They show no control character and no secret.
"""

import re
import sys
from collections.abc import Sequence
from typing import Self

LONGEST_NAME = 200  # characters
MOST_PROBLEMS = 50  # shown in a message; the others are in `problems`
LONGEST = 2_000  # characters of a problem; a stranger's file may name a tensor in megabytes
# Control characters, those that change the direction of writing, line separators and halves of characters.
CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
SECRETS = (
    (re.compile(r"(\w://)[^/\s@'\"]+@"), r"\1"),  # name and password in an address
    (re.compile(r"([?&][^=&\s]*(?:auth|cred|key|pass|secret|sig|token)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE), r"\1…"),
    (re.compile(r"\bhf_[A-Za-z0-9]{30,}"), "hf_…"),
)


def redact(text: str) -> str:
    """Return `text` without the passwords, tokens and signatures in it."""
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return text


def printable(text: str) -> str:
    """Return `text` as a terminal may show it: control characters are written as escapes, and secrets are removed."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), redact(text.replace("\t", " ")))


def one_line(text: object, limit: int = LONGEST) -> str:
    """Return the text of a stranger in one line of at most about `limit` characters that a terminal may show."""
    line = printable(" ".join(str(text)[: 10 * limit].split()))
    return line if len(line) <= limit else f"{line[:limit]} …"


def _redact_causes_(error: BaseException | None) -> None:
    """Change `error`, its causes and contexts: remove the secrets from their messages, which a traceback shows."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        try:
            error.args = tuple(redact(value) if isinstance(value, str) else value for value in error.args)
        except (AttributeError, TypeError):
            pass
        error = error.__cause__ or error.__context__


class GraspError(Exception):
    """Base class of every error of this package.

    Args:
        message: Description of the error. With `problems`, it is the heading of their list.
        subject: Reference that the message is about. The text of the error begins with it.
        problems: One text per problem, if there can be several.

    Attributes:
        subject: The subject as text; `None` if the message is about no reference, or contains it already.

    Example:
        >>> print(ConfigError("the configuration has problems", problems=["top: got 0", "seed: got -1"]))
        the configuration has problems:
        - top: got 0
        - seed: got -1
    """

    def __init__(self, message: str = "", *, subject: object = None, problems: Sequence[str] = ()) -> None:
        _redact_causes_(sys.exception())
        problems = [printable(problem)[:LONGEST] for problem in problems]
        message = printable(message)
        listed = problems[:MOST_PROBLEMS]
        if len(problems) > MOST_PROBLEMS:
            listed.append(f"and {len(problems) - MOST_PROBLEMS} more")
        text = f"{message}:\n- " + "\n- ".join(listed) if problems else message
        text = text[: 10 * LONGEST]
        super().__init__(text if subject is None else f"'{one_line(subject)}': {text}")
        self.subject = None if subject is None else str(subject)
        self._without_subject = text
        self._listed = problems

    @property
    def problems(self) -> list[str]:
        """The problems, one text each. An error without a list has one problem, its message."""
        return [*self._listed] or [str(self)]

    def problems_of(self, subject: str) -> list[str]:
        """Return the problems for a line that already begins with `subject`, without repeating it."""
        return [*self._listed] or [self._without_subject if self.subject == subject else str(self)]

    def reworded(self, message: str) -> Self:
        """Return an error of the same class with another message and the same problems; raise it `from` this error."""
        error = type(self)(message)
        error._listed = self._listed
        return error


class ConfigError(GraspError, ValueError):
    """A recipe or configuration has unknown keys or wrong values. The error lists all of them."""


class DataError(GraspError, ValueError):
    """A data set is empty, has no labels, or has labels that the model does not know."""


class IncompatibleSourceError(GraspError, ValueError):
    """A source cannot be merged into the target. The error lists all reasons."""


class NonFiniteError(GraspError, ValueError):
    """A weight, a loss or a gradient is NaN or infinite."""


class NonFiniteLossError(NonFiniteError):
    """The loss of a batch is NaN or infinite. The merged source or the fine-tune behind it can be undone."""


class DiskFullError(GraspError, OSError):
    """The temporary directory has no space for the files of a step. The model has its weights from before the step."""


class DownloadError(GraspError, ConnectionError):
    """The download of a file failed. Its parts are removed, and a new run may succeed."""


class OutputExistsError(GraspError, FileExistsError):
    """The output folder contains files that this package did not write."""


class StateError(GraspError, RuntimeError):
    """The state of an interrupted merge belongs to another merge, is damaged, or is in use by another process."""


class PushError(GraspError, ConnectionError):
    """The merged model could not be pushed to the Hub. It is still in memory, or in its output folder."""


class StaleMergeError(PushError):
    """The repository has a newer version than the one that this merge continues."""


class SourceNotFoundError(GraspError, FileNotFoundError):
    """The model, the revision or the weights of a reference do not exist, or the token has no access to them."""


def describe(error: BaseException, limit: int = 500) -> str:
    """Return the class of an error and its message in one line of at most about `limit` characters."""
    text = one_line(error, limit)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def first_line(error: Exception) -> str:
    """Return the first line of the message of an error, or the name of its class if there is no message."""
    return one_line(str(error).strip().split("\n")[0]) or type(error).__name__


def first_few(names: Sequence[str], limit: int = 5) -> str:
    """Return the first `limit` names and the number of the others, as one text; long names are cut."""
    text = ", ".join(one_line(name, LONGEST_NAME) for name in names[:limit])
    return f"{text} and {len(names) - limit} more" if len(names) > limit else text
