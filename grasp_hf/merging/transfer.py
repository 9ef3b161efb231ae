"""The result of a step for one source, and its entry in the record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..hub.reference import Source
from ..methods.candidates import Candidate
from ..record.card import declared_license
from ..record.entries import FinetuneReport, Reason, unit_reports
from ..record.step import StepReport
from ..tensors.units import Unit
from ..validation.changes import Change
from ..validation.losses import SampleLosses


@dataclass(frozen=True)
class Transfer:
    """The measurements of one source in a step, and the decision on it.

    Attributes:
        units: The units that could have moved.
        candidate: The candidate that was chosen.
        accepted: Whether the source stays in the model.
        reason: The reason of the gate.
        notes: How the head and the vocabulary of the source were matched with the target's.
        other_units: Number of units that could not move.
        validated_by: The samples that validated.
        losses: Mean calibrated loss of each candidate, by name.
        chosen: Name of the chosen candidate; empty if nothing validated.
        before: Losses before the source; `None` if nothing validated.
        after: Losses of the chosen candidate; `None` if there are none.
        change: Change from `before` to `after`, sample by sample.
    """

    units: Sequence[Unit]
    candidate: Candidate
    accepted: bool = True
    reason: Reason = Reason.NONE
    notes: list[str] = field(default_factory=list)
    other_units: int = 0
    validated_by: str = ""
    losses: Mapping[str, float] = field(default_factory=dict)
    chosen: str = ""
    before: SampleLosses | None = None
    after: SampleLosses | None = None
    change: Change | None = None

    def report(
        self, source: Source, weights: Mapping[str, int], finetuned: FinetuneReport | None, **end: Any
    ) -> StepReport:
        """Return the entry of the step for the record.

        Args:
            source: The source.
            weights: Number of weights behind each movable tensor of the target.
            finetuned: The fine-tuning after the source, if any.
            end: The fields `after`, `seconds` and `peak_memory` of the entry, which are known at the end of the step.
        """
        sizes = {unit.name: sum(weights[name] for name in unit.tensors) for unit in self.units}
        return StepReport(
            source=str(source.ref),
            sha=source.sha,
            kind=source.kind,
            num_bytes=source.num_bytes,
            license=declared_license(source.folder),
            gated=source.gated,
            accepted=self.accepted,
            reason=self.reason,
            notes=self.notes,
            units=unit_reports(sizes, self.candidate.mixes, self.candidate.scores, self.accepted),
            other_units=self.other_units,
            validated_by=self.validated_by,
            candidates=dict(self.losses),
            chosen=self.chosen,
            before=self.before.evaluation() if self.before else {},
            after_transfer=self.after.evaluation() if self.after else {},
            change=self.change.report() if self.change else None,
            finetuned=finetuned,
            **end,
        )
