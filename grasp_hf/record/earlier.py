"""A merge that continues a saved or pushed one."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from ..errors import GraspError, IncompatibleSourceError, SourceNotFoundError
from ..hub.download import locate
from ..hub.reference import Source
from .report import MergeReport, RunReport


class EarlierMerge:
    """An earlier merge that this one continues: its record, its version on the Hub, and the base of its adapters.

    Args:
        record: The record that was saved with it.
        merged: Where it was loaded from.
        token: Hub token for its base.

    Attributes:
        pushed: Repository and commit of the version that the model is of; `None` if it was never pushed.
    """

    def __init__(self, record: MergeReport, merged: Source, token: str | None) -> None:
        self._record, self._token = record, token
        self._name = str(replace(merged.ref, revision=merged.sha) if merged.sha else merged.ref)
        self._base: Source | None = None
        self._begun: MergeReport | None = None
        # A folder may hold a merge that was appended to a pushed version, but could not be pushed itself.
        name, _, sha = ((self._name if merged.sha else record.continues) or "").rpartition("@")
        self.pushed = (name, sha) if name else None

    def begin(self, run: RunReport) -> MergeReport:
        """Return the record to continue: the steps so far, and a new run with the settings and versions of `run`."""
        begun = replace(
            deepcopy(self._record),
            run=self._record.run.next(run.config, run.versions),
            continues=self._name,
            continued_steps=len(self._record.steps),
        )
        self._begun = deepcopy(begun)
        return begun

    def record_to_save(self, report: MergeReport) -> MergeReport:
        """Return the record to save: the one that was loaded, if nothing was merged since."""
        return self._record if report == self._begun else report

    def base(self) -> Source:
        """Return the model that the merge started from; it is looked up when it is first needed.

        Raises:
            IncompatibleSourceError: It cannot be found.
        """
        if self._base is None:
            reference = self._record.base_reference
            try:
                if "@" not in reference and not Path(reference).is_dir():  # nor is it a model of that name on the Hub
                    raise SourceNotFoundError(f"it was the folder '{reference}', which is not here")
                self._base = locate(reference, token=self._token)
            except GraspError as error:
                raise IncompatibleSourceError(
                    f"an adapter needs the model that the merge started from, which cannot be found: {error}"
                ) from error
        return self._base
