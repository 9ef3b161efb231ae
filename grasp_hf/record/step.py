"""The report of one source."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .entries import ChangeReport, Evaluation, FinetuneReport, Reason, UnitReport
from .text import WIDTH, escape_markdown, format_number, markdown_table, shorten

Row = dict[str, str | None]  # column -> text; `None` if the report holds no value


@dataclass
class StepReport:
    """One source: its origin, the measurements, the decision, and the change of the loss.

    Attributes:
        source: The reference as the user gave it.
        sha: Commit of its files; `None` for a local folder.
        kind: `full` or `adapter`.
        num_bytes: Size of its weight files, in bytes.
        license: The licence that its card declares.
        gated: Whether its files on the Hub are gated.
        accepted: `False` if the gate undid the source.
        reason: The verdict of the gate, or another reason why the source was undone.
        notes: How its head and its vocabulary were matched with the target's, if they differ.
        units: One entry per unit that could have moved.
        weight: Weight of the source in the mean of all sources; 1 unless sources were weighed.
        other_units: Number of units that could not move because an adapter lacks them, or because a head does not fit.
        validated_by: The samples of the next losses: `evaluation data`, `labels` that the model has not been fine-tuned
            on, or both; empty if there are none. Of `two halves of the labels`, each half validates the coefficients that
            the other half taught; the losses before the source and at the end of the step are on both halves.
        candidates: Calibrated loss of each candidate: that of the method and, if coefficients were learned, the
            `average`; in earlier records also an average weighted by Fisher information (`fisher`).
        chosen: The candidate that was chosen: the average, unless another is better by more than the standard error of
            their difference; then the one with the lowest loss.
        before: Loss (and accuracy) before the source.
        after_transfer: Loss (and accuracy) with the source, before the decision of the gate.
        change: Change from `before` to `after_transfer`.
        finetuned: The fine-tuning after the source; `None` if there was none.
        after: Loss (and accuracy) at the end of the step.
        seconds: Duration of the step.
        peak_memory: Largest memory of the process until the end of the step, in bytes; on a GPU, of its memory.
    """

    source: str
    sha: str | None
    kind: str
    num_bytes: int = 0
    license: str | None = None
    gated: bool = False
    accepted: bool = True
    reason: Reason = Reason.NONE
    notes: list[str] = field(default_factory=list)
    units: list[UnitReport] = field(default_factory=list)
    weight: float = 1.0
    other_units: int = 0
    validated_by: str = ""
    candidates: dict[str, float] = field(default_factory=dict)
    chosen: str = ""
    before: Evaluation = field(default_factory=dict)
    after_transfer: Evaluation = field(default_factory=dict)
    change: ChangeReport | None = None
    finetuned: FinetuneReport | None = None
    after: Evaluation = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory: int = 0

    def undo(self, reason: Reason) -> None:
        """Record that the source was undone later."""
        self.accepted, self.reason = False, reason
        for unit in self.units:
            if unit.decision in ("moved", "rescaled"):
                unit.decision = "undone"

    @property
    def name(self) -> str:
        """The source for a reader: a Hub id as given, of a local folder its last part.

        All checkpoints of the Trainer have the same names, so one of them is named by its last two parts.
        """
        if self.sha:
            return self.source
        path = Path(self.source)
        return str(Path(path.parent.name, path.name)) if path.name.startswith("checkpoint-") else path.name

    @property
    def moved(self) -> int:
        """Number of units that took something from the source."""
        return sum(unit.decision == "moved" for unit in self.units)

    @property
    def changed(self) -> bool:
        """Whether the step left anything in the model."""
        return any(unit.decision in ("moved", "rescaled") for unit in self.units)

    @property
    def was_averaged(self) -> bool:
        """Whether a mean was chosen instead of learned coefficients."""
        return self.accepted and self.moved > 0 and len(self.candidates) > 1 and self.chosen in _MEANS

    @property
    def mean_coefficient(self) -> float:
        """Mean coefficient over the elements of all units that could have moved, even if the gate undid it."""
        return self._mean(lambda unit: unit.coefficient, default=0.0)

    @property
    def mean_kept(self) -> float:
        """Mean fraction of the target that was to stay, over the same elements; with `blend` the two need not sum to 1."""
        return self._mean(lambda unit: unit.kept, default=1.0)

    def _mean(self, value: Callable[[UnitReport], float], default: float) -> float:
        total = sum(unit.elements for unit in self.units)
        return sum(value(unit) * unit.elements for unit in self.units) / total if total else default

    @property
    def decision(self) -> str:
        """The decision on the source, for a reader."""
        if not self.accepted:
            return "rejected"
        if not self.moved:
            return "only rescaled" if self.changed else "nothing moved"
        return _MEANS[self.chosen] if self.was_averaged else "merged"

    @property
    def verdict(self) -> str:
        """The decision, and its reason or the verdict on the source, for a reader."""
        reason = self.reason or (self.change.verdict if self.change else "")
        return f"{self.decision} ({reason})" if reason else self.decision

    def row(self) -> Row:
        """Return the line of the source in the table of the card."""
        scores = [unit.score for unit in self.units if unit.score is not None]
        accuracies = [evaluation.get("accuracy") for evaluation in (self.before, self.after_transfer)]
        return {
            "source": escape_markdown(self.name),
            "kind": self.kind,
            "score": _format_known(sum(scores) / len(scores) if scores else None),
            "moved": f"{self.moved}/{len(self.units)}",
            "undefined": str(sum(unit.decision == "undefined" for unit in self.units)),
            "coefficient": format_number(self.mean_coefficient),
            "target kept": format_number(self.mean_kept),
            "decision": self.decision,
            "verdict": str(self.change.verdict) if self.change else None,
            "loss before": _format_known(self.before.get("loss")),
            "loss after": _format_known(self.after_transfer.get("loss")),
            "change": str(self.change) if self.change else None,
            "accuracy": None if accuracies == [None, None] else " → ".join(map(format_number, accuracies)),
            "fine-tuned": _format_known(self.after.get("loss")) if self.finetuned else None,
            "seconds": f"{self.seconds:.1f}",
        }

    def short_row(self) -> Row:
        """Return the line of the source in the table for a terminal; the table shortens its name."""
        return {
            "source": self.name,
            "decision": self.decision,
            "verdict": str(self.change.verdict) if self.change else None,
            "change": str(self.change) if self.change else None,
            "coefficient": format_number(self.mean_coefficient),
        }

    def summary_line(self, width: int = WIDTH) -> str:
        """Return one line of at most `width` columns: the source, the verdict and, if something validated, three numbers."""
        numbers = f"coefficient {format_number(self.mean_coefficient)}"
        if self.before:
            losses = [format_number(evaluation.get("loss")) for evaluation in (self.before, self.after_transfer)]
            numbers = f"loss {' -> '.join(losses)}"
        if self.change:
            numbers += f", {'calibrated' if self.change.calibrated else 'change'} {self.change}"
        text = f": {self.verdict}, {numbers}"
        return shorten(self.name, max(width - len(text), 8)) + text

    def details(self) -> list[str]:
        """Return the facts that the summary line leaves out, a sentence each."""
        found = [
            f"{self.kind}, {self.moved} of {len(self.units)} units moved, {self.other_units} others could not, mean "
            f"coefficient {format_number(self.mean_coefficient)}, target kept {format_number(self.mean_kept)}, "
            f"{self.seconds:.1f} s"
        ]
        if self.change:
            found.append(self.change.append_doubt(f"validated on {self.change.samples} samples: {self.validated_by}"))
        if len(self.candidates) > 1:
            losses = ", ".join(f"{name} {format_number(loss)}" for name, loss in self.candidates.items())
            calibrated = self.change.calibrated if self.change else "accuracy" in self.before
            text = f"{'calibrated losses' if calibrated else 'losses'} of the candidates: {losses}"
            if self.chosen and self.candidates[self.chosen] > min(self.candidates.values()):
                text += f"; {self.chosen} was chosen because the difference is within the noise"
            found.append(text)
        return found + (self.finetuned.sentences() if self.finetuned else [])

    def unit_table(self) -> str:
        """Return the decision on every unit as a Markdown table."""
        return markdown_table(
            [
                {
                    "unit": shorten(unit.name, 32),
                    "elements": str(unit.elements),
                    "score": format_number(unit.score),
                    "coefficient": format_number(unit.coefficient),
                    "target kept": format_number(unit.kept),
                    "decision": unit.decision,
                }
                for unit in self.units
            ]
        )


_MEANS = {"average": "averaged", "fisher": "averaged by Fisher"}


def _format_known(value: float | None) -> str | None:
    return None if value is None else format_number(value)
