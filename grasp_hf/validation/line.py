"""The line between the weights before and after a fine-tuning, and how far to go on it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Subset

from ..record.entries import EVALUATION_DATA, FinetuneReport
from ..tensors.mixing import interpolate_
from ..tensors.placing import overwrite_
from .changes import paired_change
from .labels import halves
from .losses import SampleLosses, concatenate

FRACTIONS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)

Train = Callable[[Any, int], None]  # fine-tunes the model in place on samples, with a seed
Evaluate = Callable[[Any], SampleLosses]  # returns the losses of the present model on samples
Weights = Mapping[str, Tensor]


@dataclass
class Line:
    """The weights of a model on the line between two sets of weights, evaluated at `FRACTIONS` of the way.

    The line is that of WiSE-FT (arXiv:2109.01903).

    Args:
        tensors: The tensors of the model; changed in place.
        end: Buffer for the weights after a fine-tuning.
        train: Fine-tunes the model.
        evaluate: Returns the losses of the present model.
    """

    tensors: Weights
    end: Weights
    train: Train
    evaluate: Evaluate

    def finetune_(self, start: Weights, samples: Any, seed: int) -> None:
        """Change the model: fine-tune it from `start`; `end` holds the result."""
        overwrite_(self.tensors, start)
        self.train(samples, seed)
        overwrite_(self.end, self.tensors)

    def set_interpolated_(self, start: Weights, fraction: float) -> None:
        """Change the model: put it at `fraction` of the way from `start` to `end`."""
        for name, tensor in self.tensors.items():
            interpolate_(tensor, start[name], self.end[name], fraction)

    def losses_from_(self, start: Weights, parts: Sequence[tuple[Any, Any]], seed: int) -> dict[float, SampleLosses]:
        """Change the model: fine-tune it from `start` once for each part, and return the losses at each fraction.

        Args:
            start: Weights before the fine-tuning.
            parts: Pairs of samples that teach and samples that validate.
            seed: Seeds the first fine-tuning; each later one gets the next number.

        Returns:
            Fraction -> losses of all validation samples, those of each part in the model of that part.
        """
        lines = []
        for number, (samples, validation) in enumerate(parts):
            self.finetune_(start, samples, seed + number)
            points = []
            for fraction in FRACTIONS:
                self.set_interpolated_(start, fraction)
                points.append(self.evaluate(validation))
            lines.append(points)
        return {
            fraction: concatenate(*points)
            for fraction, points in zip(FRACTIONS, zip(*lines, strict=True), strict=True)
        }


def finetune_on_line_(
    tensors: Weights,
    buffers: Sequence[Weights],
    train: Train,
    evaluate: Evaluate,
    labels: Any,
    validation: Any,
    seed: int,
    alone: Weights | None = None,
) -> FinetuneReport:
    """Change the model: fine-tune it, then move it back on the line to the weights before, as far as the losses require.

    Few samples cannot tell neighbouring points of the line apart, so the training gets the benefit of the doubt. The
    farthest point is kept whose loss is not above the lowest one by more than half of the 95 % interval of their
    difference. That loss is not calibrated, because a fine-tuning changes the scale of the logits too. A point where both
    losses, calibrated and not, are above those of the start is never kept: there, the training has taught only confidence.

    Evaluation data validate where there are any. Otherwise the labels are cut into two halves at random. Each half trains
    a model, which the other half validates along its line. A third training, on all labels, is then moved to the point
    that both halves together allow. In this cross-validation, each half makes as many passes over its labels as the whole.

    A merge can be the better model and yet the worse start of a training. So `alone`, the weights without any source, is
    fine-tuned and validated in the same way, and the start whose point has the lower loss is kept. A merge is then never
    worse than fine-tuning alone on the samples that validate. This doubles the trainings that serve validation only.

    Args:
        tensors: The tensors of the model; changed in place.
        buffers: Two buffers, each for a whole set of tensors.
        train: Fine-tunes the model.
        evaluate: Returns the losses of the present model.
        labels: Samples to train on.
        validation: Evaluation data; `None` validates by the labels.
        seed: Seeds the training and the choice of the halves.
        alone: Weights fine-tuned without any source; kept if their loss is lower.

    Returns:
        The mean loss at each point, the point kept, what validated, and the gain over `alone`.
    """
    start, end = buffers
    overwrite_(start, tensors)
    line = Line(tensors, end, train, evaluate)
    if validation is not None:
        validated_by, parts = EVALUATION_DATA, [(labels, validation)]
    elif len(labels) < 2:
        validated_by, parts = "the label that it learned", [(labels, labels)]
    else:
        validated_by = "two halves of the labels"
        one, other = (Subset(labels, half) for half in halves(range(len(labels)), seed))
        parts = [(one, other), (other, one)]
    points_alone = None if alone is None else line.losses_from_(alone, parts, seed)
    points = line.losses_from_(start, parts, seed)
    fraction = kept = farthest_fraction(points)
    origin, is_trained = start, len(parts) == 1
    loss_alone = gain = None
    without_sources = False
    if alone is not None and points_alone is not None:
        fraction_alone = farthest_fraction(points_alone)
        without, merged = points_alone[fraction_alone], points[fraction]
        loss_alone, gain = without.loss, paired_change(without, merged, calibrated=False).report()
        if without.loss < merged.loss:
            without_sources, kept, origin, is_trained = True, fraction_alone, alone, False
    if kept and not is_trained:
        line.finetune_(origin, labels, seed)
    line.set_interpolated_(origin, kept)
    return FinetuneReport(
        fraction=fraction,
        losses={str(at): point.loss for at, point in points.items()},
        validated_by=validated_by,
        alone=loss_alone,
        gain=gain,
        without_sources=without_sources,
    )


def farthest_fraction(points: Mapping[float, SampleLosses]) -> float:
    """Return the largest fraction whose loss the samples cannot tell from the lowest, and that is not worse than 0.

    It is worse if both of its losses, calibrated and not, are above those of the start.
    """
    start, lowest = points[0.0], min(points.values(), key=lambda point: point.loss)

    def is_allowed(point: SampleLosses) -> bool:
        from_lowest = paired_change(lowest, point, calibrated=False)
        is_worse = point.loss > start.loss and point.calibrated_loss > start.calibrated_loss
        return not is_worse and from_lowest.mean <= from_lowest.half_interval

    return max(fraction for fraction, point in points.items() if is_allowed(point))
