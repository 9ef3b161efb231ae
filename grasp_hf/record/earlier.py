"""A merge that continues a saved or pushed one."""

from copy import deepcopy
from dataclasses import replace

from ..errors import GraspError, IncompatibleSourceError, SourceNotFoundError
from ..files import find_folder
from ..hub.download import locate
from ..hub.reference import Source
from .report import MergeReport, RunReport


class EarlierMerge:
    """An earlier merge that this one continues: its record, its version on the Hub, and the base of its adapters.

    Args:
        record: The record of the earlier merge.
        merged: The folder or the version on the Hub that the earlier merge was loaded from.
        token: Hub token for the base of the earlier merge.

    Attributes:
        pushed: Repository and commit of the pushed version that the model continues; `None` if none was pushed.
    """

    def __init__(self, record: MergeReport, merged: Source, token: str | None) -> None:
        self._record, self._token = record, token
        self._name = str(replace(merged.ref, revision=merged.sha) if merged.sha else merged.ref)
        self._base: Source | None = None
        self._begun: MergeReport | None = None
        # A folder can hold a merge that continues a pushed version, but was never pushed itself.
        name, _, sha = ((self._name if merged.sha else record.continues) or "").rpartition("@")
        self.pushed = (name, sha) if name else None

    def begin(self, run: RunReport) -> MergeReport:
        """Return the record to continue: the earlier steps, and a new run with the settings and versions of `run`."""
        begun = replace(
            deepcopy(self._record),
            run=self._record.run.next(run.config, run.versions),
            continues=self._name,
            continued_steps=len(self._record.steps),
        )
        self._begun = deepcopy(begun)
        return begun

    def record_to_save(self, report: MergeReport) -> MergeReport:
        """Return the record to save: `report`, or the earlier record if nothing has been merged since."""
        return self._record if report == self._begun else report

    def base(self) -> Source:
        """Return the model that the earlier merge started from; the first call looks it up.

        Raises:
            IncompatibleSourceError: The model cannot be found.
        """
        if self._base is None:
            reference = self._record.base_reference
            try:
                # A reference without a commit is a folder. The Hub may have another model of that name.
                if "@" not in reference and not find_folder(reference):
                    raise SourceNotFoundError(f"it was the folder '{reference}', which does not exist here")
                self._base = locate(reference, token=self._token)
            except GraspError as error:
                raise IncompatibleSourceError(
                    f"an adapter needs the model that the merge started from, and that model cannot be found: {error}"
                ) from error
        return self._base
