"""What can go wrong, named. Every error of this package is a `GraspError`; a user's mistake is also a `ValueError`."""

from collections.abc import Sequence


class GraspError(Exception):
    """Base of every error that this package raises."""


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


def shortened(names: Sequence[str], limit: int = 5) -> str:
    """Return the first `limit` names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
