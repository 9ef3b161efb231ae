"""The entries of a record: a unit, a change of the loss, a fine-tuning, a control."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..tensors.mixing import Mix
from .text import format_number

Evaluation = dict[str, float]
Decision = Literal["moved", "rescaled", "kept", "undefined", "undone"]
LEAST_TAKEN = 5e-4  # a coefficient that is shown as 0.000
DOUBT = "within the noise: kept"  # the reason where the samples cannot tell whether a transfer helps or harms


@dataclass
class UnitReport:
    """What was measured and decided for one unit.

    Attributes:
        name: The module or parameter.
        elements: Number of numbers in the unit's tensors.
        score: In [-1, 1]: with `copy`, the cosine of the two models' gradients; with `blend`, the cosine between what
            the source changed and the way down. `None` is undefined: a gradient was missing or zero.
        coefficient: How much of the source was to go in: 0 is nothing, 1 is all of what it changed; of an average by
            Fisher information, the mean over the unit's elements.
        decision: `undefined` units stay as they are; `rescaled` ones took nothing from the source, only less or more of
            what was merged before; `undone` ones changed and were taken back by the gate.
        keep: How much of the target was to stay, likewise; `1 - coefficient` is a point between the two.
    """

    name: str
    elements: int
    score: float | None
    coefficient: float
    decision: Decision
    keep: float | None = None


def unit_reports(
    sizes: Mapping[str, int],
    mixes: Mapping[str, Mix],
    scores: Mapping[str, float | None],
    accepted: bool,
) -> list[UnitReport]:
    """Return what was decided on each unit of `sizes`; `accepted` is `False` where the gate took everything back."""

    def decision(unit: str) -> Decision:
        if mixes[unit].moves:
            changed: Decision = "moved" if mixes[unit].take >= LEAST_TAKEN else "rescaled"
            return changed if accepted else "undone"
        return "undefined" if scores[unit] is None else "kept"

    return [
        UnitReport(unit, size, scores[unit], mixes[unit].take, decision(unit), mixes[unit].keep)
        for unit, size in sizes.items()
    ]


@dataclass
class ChangeReport:
    """How the loss changed on the samples that judge: by a transfer, or from fine-tuning alone to a merge.

    Attributes:
        loss: Difference of the mean; below 0 is better. Calibrated, that is after the logits of either model were scaled
            to fit the samples best, but in `FinetuneReport.gain`.
        half_interval: Half of its 95 % interval, over samples; `None` for a single one.
        samples: How many judged.
        samples_to_see: How many would tell a change of this size from none.
    """

    loss: float
    half_interval: float | None
    samples: int
    samples_to_see: int | None

    @property
    def doubt(self) -> str:
        """What it would take to be sure, to be put behind a statement; empty where the samples are enough."""
        more = self.samples_to_see
        return f"; {more} samples would tell that from nothing" if more and more > self.samples else ""

    def __str__(self) -> str:
        return f"{self.loss:+.3f} ± {'?' if self.half_interval is None else f'{self.half_interval:.3f}'}"


@dataclass
class FinetuneReport:
    """One fine-tuning, and how much of it was kept.

    Attributes:
        fraction: Where the model is now on the line from the weights before (0) to those after (1).
        losses: Mean loss at points of that line, by share; where halves of the labels judged, of each in the
            other's model.
        validated_by: What these losses are of; empty where nothing judged, so that all of it was kept.
        after: Held-out loss (and accuracy) at the end; empty without evaluation data.
        alone: Loss of the same without any source; `None` where that was not tried.
        gain: From that to the merge, sample by sample, not calibrated: where the change is below 0, the sources helped.
        without_sources: Whether they did not, so that the model is that one; share and losses are of the merge then.
    """

    fraction: float = 1.0
    losses: dict[str, float] = field(default_factory=dict)
    validated_by: str = ""
    after: Evaluation = field(default_factory=dict)
    alone: float | None = None
    gain: ChangeReport | None = None
    without_sources: bool = False

    @property
    def loss(self) -> float | None:
        """The loss of the model that was kept, of those that `validated_by` names; `None` where nothing judged."""
        return self.alone if self.without_sources else self.losses.get(str(self.fraction))

    def line(self) -> str:
        """Return one line of text for the terminal."""
        if not self.losses:
            return "fine-tuned"
        if self.without_sources:
            return f"fine-tuned without the sources of this merge, which were taken back{self._against_alone()}"
        kept = f"kept {100 * self.fraction:.0f} % of the way" if self.fraction else "taken back whole"
        last = self.losses[max(self.losses, key=float)]
        return (
            f"fine-tuned, {kept}: loss {format_number(self.losses['0.0'])} before, {format_number(self.losses[str(self.fraction)])} "
            f"there, {format_number(last)} at its end, on {self.validated_by}{self._against_alone()}"
        )

    def _against_alone(self) -> str:
        """Say what the sources are worth to the fine-tuning, where that was tried."""
        if self.gain is None:
            return ""
        return (
            f"; fine-tuning alone against the merge, on {self.gain.samples} samples of {self.validated_by}: loss "
            f"{format_number(self.alone)} -> {format_number(self.losses[str(self.fraction)])} ({self.gain}{self.gain.doubt})"
        )


@dataclass
class ControlReport:
    """What the merge gained over fine-tuning the start alone, with the same labels and as many epochs.

    Attributes:
        validated_by: The samples that both were judged by: `evaluation data`, or `test data`.
        alone: Loss (and accuracy) of the start, fine-tuned without any source.
        merged: The same of the merge.
        change: From the one to the other, sample by sample.
    """

    validated_by: str
    alone: Evaluation
    merged: Evaluation
    change: ChangeReport

    def line(self) -> str:
        """Return one line of text for the terminal."""
        values = ", ".join(
            f"{name} {format_number(self.alone[name])} -> {format_number(self.merged[name])}" for name in self.alone
        )
        doubt = self.change.doubt
        if self.validated_by == "evaluation data":
            doubt += "; they also chose what was kept, which flatters both: add a split 'test'"
        return (
            f"against fine-tuning alone, on {self.change.samples} samples of the {self.validated_by}: {values}; calibrated loss "
            f"{self.change}{doubt}"
        )
