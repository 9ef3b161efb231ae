"""Fine-tuning on folds of the labels: the mean of the fold models, validated by the labels that each did not see."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from ..record.entries import EVALUATION_DATA, Reason
from ..tensors.mixing import interpolate_
from ..tensors.placing import overwrite_
from ..validation.changes import paired_change
from ..validation.losses import SampleLosses, concatenate

FRACTIONS = (0.0, 0.5, 0.75, 1.0)
FOLDS = 2

Train = Callable[[Any, int], None]  # fine-tunes the model in place on samples, with a seed
Evaluate = Callable[[Any], SampleLosses]  # returns the losses of the present model on samples
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class FoldModels:
    """Models that were fine-tuned on folds of the labels, and the losses on the line to their mean.

    Attributes:
        points: For each of `FRACTIONS`, the losses on that point of the way from the start. Without evaluation data, each
            label is evaluated in the model of a fold that did not train on it.
        validated_by: The samples of these losses.
        order: Index of the label behind each sample of `points`; `None` if the labels did not validate.
    """

    points: Mapping[float, SampleLosses]
    validated_by: str
    order: Sequence[int] | None

    @property
    def fraction(self) -> float:
        """The trained point with the lowest loss, calibrated where there are classes; 0 if that point harms.

        The labels have weighed and validated the sources, so they favour the start. It must be better beyond chance (by the
        95 % interval) to undo the training.
        """
        start = self.points[0.0]
        trained = {fraction: point for fraction, point in self.points.items() if fraction > 0}
        best = min(trained, key=lambda fraction: trained[fraction].calibrated_loss)
        change = paired_change(start, trained[best])
        return 0.0 if change.verdict == Reason.HARMS else best

    @property
    def losses(self) -> SampleLosses:
        """The losses at `fraction`."""
        return self.points[self.fraction]

    def held_out(self, indices: Sequence[int]) -> Tensor | None:
        """Return the held-out logits at `fraction` for these labels, shape `(terms, classes)`; `None` if there are none."""
        outputs = self.losses.outputs
        if self.order is None or outputs is None:
            return None
        counts = outputs.samples.bincount()
        if len(counts) != len(self.order):  # a sample without a labelled token has no outputs
            return None
        pieces = dict(zip(self.order, outputs.logits.split(counts.tolist()), strict=True))
        return torch.cat([pieces[index] for index in indices])


def finetune_on_folds_(
    tensors: Weights,
    start: Weights,
    mean: Weights,
    buffer: Weights,
    train: Train,
    evaluate: Evaluate,
    labels: Any,
    validation: Any,
    seed: int,
) -> FoldModels:
    """Change the model: fine-tune it once on the other labels of each fold; `mean` gets the mean of the results.

    The mean of models that were trained on different parts of the labels is a soup (arXiv:2203.05482), and a point
    between it and the start is that of WiSE-FT (arXiv:2109.01903). With two folds, all trainings together take as many
    steps as one on all labels.

    Args:
        tensors: The tensors of the model; changed in place.
        start: Their values to start from.
        mean: Buffer for the mean of the fold models.
        buffer: Buffer for one fold model.
        train: Fine-tunes the model.
        evaluate: Returns the losses of the present model.
        labels: Samples to train on.
        validation: Evaluation data, which validate the mean; `None` validates by the held-out labels.
        seed: Seeds the training and the folds.

    Returns:
        The losses on the line. The model holds some point of it.
    """
    folds = fold_indices(len(labels), seed)
    by_labels = validation is None and len(folds) > 1
    lines: list[list[SampleLosses]] = []
    for number, fold in enumerate(folds):
        others = sorted(set(range(len(labels))) - set(fold)) or fold
        overwrite_(tensors, start)
        train(Subset(labels, others), seed + number)
        overwrite_(buffer, tensors)
        if by_labels:
            lines.append(_losses_on_line_(tensors, start, buffer, evaluate, Subset(labels, fold)))
        for name, values in buffer.items():
            interpolate_(mean[name], values if number == 0 else mean[name], values, 1 / (number + 1))
    if by_labels:
        points = [concatenate(*losses) for losses in zip(*lines, strict=True)]
        validated_by, order = f"{len(folds)} folds of the labels", [index for fold in folds for index in fold]
    else:
        points = _losses_on_line_(tensors, start, mean, evaluate, labels if validation is None else validation)
        validated_by, order = EVALUATION_DATA if validation is not None else "the label that it learned", None
    return FoldModels(dict(zip(FRACTIONS, points, strict=True)), validated_by, order)


def _losses_on_line_(
    tensors: Weights, start: Weights, end: Weights, evaluate: Evaluate, samples: Any
) -> list[SampleLosses]:
    """Change the model, and return its losses on `samples` at each of `FRACTIONS` of the way."""
    found = []
    for fraction in FRACTIONS:
        set_interpolated_(tensors, start, end, fraction)
        found.append(evaluate(samples))
    return found


def fold_indices(count: int, seed: int) -> list[list[int]]:
    """Return the indices of each fold: random, sorted, and of sizes that differ by at most 1."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return [sorted(order[number::FOLDS]) for number in range(min(FOLDS, count))]


def set_interpolated_(tensors: Weights, start: Weights, end: Weights, fraction: float) -> None:
    """Change `tensors` to the point at `fraction` of the way from `start` to `end`."""
    for name, tensor in tensors.items():
        interpolate_(tensor, start[name], end[name], fraction)
