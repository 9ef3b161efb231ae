"""What can go wrong, named. Every error of this package is a `GraspError`; a user's mistake is also a `ValueError`."""

from collections.abc import Sequence
from typing import Self


class GraspError(Exception):
    """Base of every error that this package raises.

    Args:
        message: What went wrong; with `problems` the heading of their list.
        subject: The reference that the message is about; it is named in front of it.
        problems: What went wrong, where there may be several things.

    Attributes:
        subject: As given, as text; `None` where the message is about no reference, or names it itself.

    Example:
        >>> print(ConfigError("the configuration has problems", problems=["top: got 0", "seed: got -1"]))
        the configuration has problems:
        - top: got 0
        - seed: got -1
    """

    def __init__(self, message: str = "", *, subject: object = None, problems: Sequence[str] = ()) -> None:
        text = f"{message}:\n- " + "\n- ".join(problems) if problems else message
        super().__init__(text if subject is None else f"'{subject}': {text}")
        self.subject = None if subject is None else str(subject)
        self._without_subject = text
        self._listed = list(problems)

    @property
    def problems(self) -> list[str]:
        """Every problem by itself; of an error that lists none, its message."""
        return [*self._listed] or [str(self)]

    def problems_of(self, subject: str) -> list[str]:
        """Return the problems for a line that begins with `subject`: a message about it does not name it again."""
        return [*self._listed] or [self._without_subject if self.subject == subject else str(self)]

    def reworded(self, message: str) -> Self:
        """Return an error of the same class with another message and the same list of problems, to raise `from` this."""
        error = type(self)(message)
        error._listed = self._listed
        return error


class ConfigError(GraspError, ValueError):
    """A recipe or configuration holds unknown keys or wrong values; all of them are listed."""


class DataError(GraspError, ValueError):
    """A data set is empty, has no labels, or holds labels that the model does not know."""


class IncompatibleSourceError(GraspError, ValueError):
    """A source cannot be merged into the target; all of its problems are listed."""


class NonFiniteError(GraspError, ValueError):
    """A weight, a loss or a gradient is NaN or infinite."""


class NonFiniteLossError(NonFiniteError):
    """The loss of a batch is NaN or infinite; what made it so can be taken back."""


class DiskFullError(GraspError, OSError):
    """The temporary directory has no room for the files of a step; the model is as it was before the step."""


class DownloadError(GraspError, ConnectionError):
    """A file of a source did not arrive whole; nothing of it is left behind, and a new run may succeed."""


class OutputExistsError(GraspError, FileExistsError):
    """The output folder already holds something that this package did not write."""


class PushError(GraspError, ConnectionError):
    """The Hub did not take the merged model; it is still in memory, or in the folder that it was saved to."""


class StaleMergeError(PushError):
    """The repository has a newer version than the one that was appended to."""


class SourceNotFoundError(GraspError, FileNotFoundError):
    """A model, an adapter, a revision or its weights are not where the reference says."""


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or what kind it is where it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def first_few(names: Sequence[str], limit: int = 5) -> str:
    """Return the first `limit` names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
