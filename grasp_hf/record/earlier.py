"""A merge that goes on where a saved or pushed one ended."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from ..errors import GraspError, IncompatibleSourceError, SourceNotFoundError
from ..hub.download import locate
from ..hub.reference import Source
from .report import MergeReport


class Continuation:
    """The merge that another one goes on from: its record, the version that it is, and the base of its adapters.

    Args:
        record: What was saved with it.
        merged: Where it was loaded from.
        token: Hub token for its base.

    Attributes:
        published: The repository and the commit that it is of, if it was pushed.
    """

    def __init__(self, record: MergeReport, merged: Source, token: str | None) -> None:
        self._record, self._token = record, token
        self._name = str(replace(merged.ref, revision=merged.sha) if merged.sha else merged.ref)
        self._base: Source | None = None
        self._began: MergeReport | None = None
        # A folder may hold what was appended to a published version, and could not be pushed.
        name, _, sha = ((self._name if merged.sha else record.continues) or "").rpartition("@")
        self.published = (name, sha) if name else None

    def begun(self, fresh: MergeReport) -> MergeReport:
        """Return the record to go on with: what was merged so far, by the configuration and versions of `fresh`."""
        begun = replace(
            deepcopy(self._record),
            config=fresh.config,
            versions=fresh.versions,
            ranking=[],
            final=None,
            control=None,
            test={},
            continues=self._name,
            continued_steps=len(self._record.steps),
        )
        self._began = deepcopy(begun)
        return begun

    def saved(self, report: MergeReport) -> MergeReport:
        """Return the record to save: the one that was loaded, where nothing was merged since."""
        return self._record if report == self._began else report

    def base(self) -> Source:
        """Return the model that the merge started from; it is looked for when it is needed first.

        Raises:
            IncompatibleSourceError: It is not to be had.
        """
        if self._base is None:
            reference = self._record.base_reference
            try:
                if "@" not in reference and not Path(reference).is_dir():  # nor is it a model of that name on the Hub
                    raise SourceNotFoundError(f"it was the folder '{reference}', which is not here")
                self._base = locate(reference, token=self._token)
            except GraspError as error:
                raise IncompatibleSourceError(
                    f"an adapter needs the model that the merge started from, which is not to be had: {error}"
                ) from error
        return self._base
