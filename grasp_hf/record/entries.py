"""The entries of a record: a unit, a change of the loss, a fine-tuning, a control."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from ..tensors.mixing import Mix
from .text import format_number

Evaluation = dict[str, float]
Decision = Literal["moved", "rescaled", "kept", "undefined", "undone"]
SMALLEST_COEFFICIENT = 5e-4  # a smaller coefficient is printed as 0.000
EVALUATION_DATA = "evaluation data"  # `validated_by` if held-out samples validate
TEST_DATA = "test data"
ALONE = "fine-tuning alone"
BEST_SOURCE = "the best source, fine-tuned,"
PLACEBO = "a merge of placebo sources"


class Reason(StrEnum):
    """Why a source stays in the model, or does not; code compares the members, and readers see their values.

    The first three are verdicts on a change of the loss: its 95 % interval lies below 0, above 0, or holds 0.
    """

    HELPS = "helps"
    HARMS = "harms"
    NO_EFFECT = "no measurable effect"
    NONE = ""  # the gate decided nothing: it is off, nothing validates, or nothing moved
    NOT_FINITE = "loss NaN or infinite"
    BETTER_ALONE = "better without any source"
    EARLIER_RULE = "by the rule of an earlier version"  # only in earlier records: undone, but the interval holds 0


@dataclass
class UnitReport:
    """What was measured and decided for one unit.

    Attributes:
        name: The module or parameter.
        elements: Number of elements of the unit's tensors.
        score: In [-1, 1]. With `copy` the cosine of the two models' gradients; with `blend` the cosine between the change
            that the source learned and the direction of descent. `None` if it is undefined: a gradient is missing or zero.
        coefficient: How much of the source was to be merged: 0 is nothing, 1 is everything that it changed.
        decision: `moved` units took something from the source. `rescaled` ones took nothing from it, only more or less of
            what was merged before. `kept` and `undefined` ones did not change. `undone` ones changed, and the gate
            undid the change.
        keep: How much of the target was to stay, on the same scale. `1 - coefficient` is a point between the two models.
    """

    name: str
    elements: int
    score: float | None
    coefficient: float
    decision: Decision
    keep: float | None = None

    @property
    def kept(self) -> float:
        """How much of the target was to stay."""
        return 1 - self.coefficient if self.keep is None else self.keep


def unit_reports(
    sizes: Mapping[str, int],
    mixes: Mapping[str, Mix],
    scores: Mapping[str, float | None],
    accepted: bool,
) -> list[UnitReport]:
    """Return the decision on each unit.

    Args:
        sizes: Number of elements of each unit.
        mixes: The mix of each unit.
        scores: The score of each unit.
        accepted: `False` if the gate undid the source.
    """

    def decision(unit: str) -> Decision:
        if not mixes[unit].moves:
            return "undefined" if scores[unit] is None else "kept"
        if not accepted:
            return "undone"
        return "moved" if mixes[unit].take >= SMALLEST_COEFFICIENT else "rescaled"

    return [
        UnitReport(unit, size, scores[unit], mixes[unit].take, decision(unit), mixes[unit].keep)
        for unit, size in sizes.items()
    ]


# The shortest of these that shows the verdict is printed; the last one shows every digit of a float.
CHANGE_FORMATS = (".3f", ".4f", ".5f", ".6f", ".3e", ".17g")


@dataclass(frozen=True)
class ChangeReport:
    """How the mean loss changed on the validation samples: by a source, or from fine-tuning alone to the merge.

    Attributes:
        loss: Difference of the mean; below 0 is better.
        half_interval: Half of its 95 % interval over samples; `None` for a single sample.
        samples: Number of samples.
        samples_to_see: Number of samples that would tell a change of this size from none.
        calibrated: Whether the logits of both models were scaled to fit the samples best before their losses were compared.
        verdict: The verdict that follows from the interval.
    """

    loss: float
    half_interval: float | None
    samples: int
    samples_to_see: int | None
    calibrated: bool = False
    verdict: Reason = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "verdict", verdict_on(self.loss, self.half_interval))

    @property
    def doubt(self) -> str:
        """The number of samples that would tell this change from none; empty if the samples are enough."""
        if self.verdict != Reason.NO_EFFECT or self.samples_to_see is None:
            return ""
        return f"{self.samples_to_see} samples would tell this change from none"

    def append_doubt(self, sentence: str) -> str:
        """Return `sentence` with the doubt after it, if there is one."""
        return f"{sentence}; {self.doubt}" if self.doubt else sentence

    def of_sources(self) -> str:
        """Return the verdict on the sources, for a change from a model without them to the merge."""
        verb = {Reason.HELPS: "help", Reason.HARMS: "harm"}.get(self.verdict, "have no measurable effect")
        return f"the sources {verb}"

    def __str__(self) -> str:
        """Return the change and half of its interval, in as many digits as it takes to show the verdict."""
        if self.half_interval is None:
            return f"{self.loss:+.3f} ± ?"
        loss = half = ""
        for form in CHANGE_FORMATS:
            loss, half = format(self.loss, f"+{form}"), format(self.half_interval, form)
            if verdict_on(float(loss), float(half)) == self.verdict:
                break
        return f"{loss} ± {half}"


def verdict_on(loss: float, half_interval: float | None) -> Reason:
    """Return the verdict on a change of the loss; without an interval, as for a single sample, there is no effect."""
    if half_interval is None or abs(loss) <= half_interval:
        return Reason.NO_EFFECT
    return Reason.HELPS if loss < 0 else Reason.HARMS


@dataclass
class TeacherReport:
    """The teacher of a fine-tuning: a pool of the sources' predictions, stacked by the labels.

    Attributes:
        worth: Coefficient of each source in the pool, and of the merge before and after its fine-tuning, by name. All
            predictions are scaled to the same size, so that the coefficients can be compared.
        loss: Calibrated loss of the pool on labels, each held out from the fit that predicts it.
        loss_before: Loss of the model on the same labels before it was taught, held out too; `None` if it is not known.
        ridge: Strength of the pull towards equal coefficients, chosen by cross-validation.
        labels: Number of labelled samples.
        unlabeled: Number of unlabelled inputs.
        used: Whether the model was taught. A teacher that predicts held-out labels worse than the model teaches nothing.
    """

    worth: dict[str, float]
    loss: float
    loss_before: float | None
    ridge: float
    labels: int
    unlabeled: int
    used: bool

    def sentence(self) -> str:
        """Return what the teacher is worth, and whether it was used."""
        before = "" if self.loss_before is None else f", the model {format_number(self.loss_before)}"
        verb = "taught by" if self.used else "not taught by"
        worth = ", ".join(f"{name} {value:.2f}" for name, value in self.worth.items())
        return (
            f"{verb} the stacked predictions of the sources on {self.labels} labelled and {self.unlabeled} unlabelled "
            f"inputs: held-out loss of the teacher {format_number(self.loss)}{before}; worth of each: {worth}"
        )


@dataclass
class FinetuneReport:
    """One fine-tuning, and how much of it was kept.

    Attributes:
        fraction: Where the model is on the line from the weights before (0) to the mean of the fold models (1).
        losses: Mean loss at points of that line, by fraction; calibrated where there are classes. Where folds of the labels
            validate, each is evaluated in a model that did not train on it.
        validated_by: The samples of these losses; empty if nothing validated, so that all of the fine-tuning was kept.
        after: Loss (and accuracy) on the evaluation data at the end; empty without evaluation data.
        note: Why unlabelled inputs taught nothing, if there were some; otherwise empty.
        temperature: Divides the logits of the result; it is in the weights of the head. `None` if it was not fitted.
        teacher: The teacher, if there were unlabelled inputs.
        alone: Loss of the same fine-tuning without any source; `None` if that was not tried.
        gain: Change from that loss to the loss of the merge. Below 0 the sources helped.
        without_sources: Whether the sources did not help, so that the model is the one without them. `fraction` and
            `losses` are those of the merge then.
    """

    fraction: float = 1.0
    losses: dict[str, float] = field(default_factory=dict)
    validated_by: str = ""
    after: Evaluation = field(default_factory=dict)
    note: str = ""
    temperature: float | None = None
    teacher: TeacherReport | None = None
    alone: float | None = None
    gain: ChangeReport | None = None
    without_sources: bool = False

    @property
    def loss(self) -> float | None:
        """The loss of the model that was kept, on the samples of `validated_by`; `None` if nothing validated."""
        return self.alone if self.without_sources else self.losses.get(str(self.fraction))

    def sentences(self) -> list[str]:
        """Return how much of the fine-tuning was kept, and what the model was taught."""
        if not self.losses:
            return ["fine-tuned"]
        before, there = self.losses["0.0"], self.losses[str(self.fraction)]
        end = self.losses[max(self.losses, key=float)]
        if self.without_sources:
            first = "fine-tuned without the sources of this merge, which were undone"
        else:
            kept = f"kept {100 * self.fraction:.0f} % of the way" if self.fraction else "undone"
            first = (
                f"fine-tuned, {kept}: loss {format_number(before)} before, {format_number(there)} there, "
                f"{format_number(end)} at the end of the way, on {self.validated_by}"
            )
        if self.temperature is not None:
            first += f", temperature {self.temperature:.2f}"
        taught = [self.teacher.sentence()] if self.teacher else [self.note] if self.note else []
        return [first, *taught]

    def against_alone(self) -> str | None:
        """Return the gain over the same fine-tuning without any source as a sentence; `None` if that was not tried."""
        if self.gain is None:
            return None
        there = format_number(self.losses[str(self.fraction)])
        what = "calibrated loss" if self.gain.calibrated else "loss"
        sentence = self.gain.append_doubt(
            f"{self.gain.of_sources()}: from {ALONE} to the merge, {what} {format_number(self.alone)} -> {there} "
            f"({self.gain}), on {self.gain.samples} samples of {self.validated_by}"
        )
        undone = "; the sources were undone" if self.without_sources else ""
        return f"{sentence}; these samples also chose what was kept{undone}"


@dataclass
class AdapterReport:
    """The adapter that a merge has made.

    Attributes:
        rank: Largest rank of a layer.
        exact_rank: Largest rank of a layer before the adapter was compressed.
        base: Type of the weights of the base during the merge, such as `bfloat16` or `4 bits`.
        error: Frobenius norm of the change by the compression over that of the adapter, over all layers; 0 without one.
        worst: The layer with the largest relative error.
        worst_error: Its relative error.
        before: Loss (and accuracy) before the compression; empty if nothing was measured.
        after: Loss (and accuracy) after it, on the same samples.
    """

    rank: int
    exact_rank: int
    base: str = ""
    error: float = 0.0
    worst: str = ""
    worst_error: float = 0.0
    before: Evaluation = field(default_factory=dict)
    after: Evaluation = field(default_factory=dict)

    def sentence(self) -> str:
        """Return the rank and the error as a sentence."""
        if not self.rank:
            return "the adapter changes no layer"
        base = f", made on the base in {self.base}" if self.base else ""
        if self.rank == self.exact_rank:
            return f"the adapter is exact: its rank is {self.rank}{base}"
        text = (
            f"the adapter was compressed from rank {self.exact_rank} to {self.rank}: relative error {self.error:.2g}, at "
            f"most {self.worst_error:.2g} ({self.worst}){base}"
        )
        if self.before and self.after:
            text += f"; loss {format_number(self.before['loss'])} before, {format_number(self.after['loss'])} after"
        return text


@dataclass
class ControlReport:
    """The gain of the merge over a control: another model from the same start, labels and number of epochs.

    Attributes:
        validated_by: The samples that both were evaluated on: `evaluation data` or `test data`.
        alone: Loss (and accuracy) of the control.
        merged: Loss (and accuracy) of the merge.
        change: Change from `alone` to `merged`.
        name: The control: `ALONE` (the start, fine-tuned without any source), `BEST_SOURCE` (the source with the lowest
            loss on the labels, fine-tuned by the same procedure) or `PLACEBO` (a merge of sources whose changes are random).
    """

    validated_by: str
    alone: Evaluation
    merged: Evaluation
    change: ChangeReport
    name: str = ALONE

    def sentence(self) -> str:
        """Return the gain as a sentence."""
        values = ", ".join(
            f"{name} {format_number(self.alone[name])} -> {format_number(self.merged[name])}" for name in self.alone
        )
        verdict = self.change.of_sources()
        if self.name != ALONE:
            verdict = {Reason.HELPS: "the merge is better", Reason.HARMS: "the merge is worse"}.get(
                self.change.verdict, "no measurable difference"
            )
        what = "calibrated loss" if self.change.calibrated else "change of the loss"
        text = self.change.append_doubt(
            f"{verdict}: from {self.name} to the merge, {values}, {what} {self.change}, evaluated on "
            f"{self.change.samples} samples of the {self.validated_by}"
        )
        if self.validated_by == EVALUATION_DATA:
            text += "; these samples also chose what was kept, so both losses are too low: add a split 'test'"
        return text
