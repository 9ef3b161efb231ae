"""The line between the weights before and after a fine-tuning, and how far to go on it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Subset

from ..record.entries import FinetuneReport
from ..tensors.mixing import interpolate_
from ..tensors.placing import overwrite_
from .changes import change
from .labels import halves
from .losses import Judgement, joined

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)

Train = Callable[[Any, int], None]  # fine-tunes the model in place: on which samples, with which seed
Judge = Callable[[Any], Judgement]


def finetune_on_line_(
    tensors: Mapping[str, Tensor],
    rooms: Sequence[Mapping[str, Tensor]],
    train: Train,
    judge: Judge,
    labels: Any,
    held_out: Any,
    seed: int,
    alone: Mapping[str, Tensor] | None = None,
) -> FinetuneReport:
    """Fine-tune, then go back on the line between the weights before and after (WiSE-FT, arXiv:2109.01903) if need be.

    Few samples cannot tell neighbouring points apart, and the doubt is in favour of the training: taken is the farthest
    point whose loss is not above the lowest one beyond the 95 % interval of their difference. That loss is not calibrated,
    because fine-tuning also mends the scale of the logits, or spoils it. But a point where both losses, calibrated and
    not, are above those of the start is never taken: such a training has taught nothing but confidence.

    With held-out samples they judge. Without, the labels are cut into two halves at random: each half trains a model,
    which the other half judges along its line, and the point that both together allow is taken on the line of a third
    training, on all labels. That is a cross-validation: the halves make as many steps as the training itself.

    A merge may be the better model, and yet the worse one to start a training from. With `alone`, the weights without any
    source, the same is done from there, and the model is that of the start whose point has the lower loss: a merge is
    never worse on the samples that judge than fine-tuning alone. That costs as many trainings again to judge by.

    Args:
        tensors: The model's, changed in place.
        rooms: Room for two sets of them.
        train: Fine-tunes the model.
        judge: Returns the losses of the model as it is now.
        labels: Samples to train on.
        held_out: Samples to judge by; `None` judges by the labels.
        seed: Of the training, and of the halves.
        alone: See above.

    Returns:
        The mean loss at each point, the point taken, what judged, and how much better that is than the start alone.
    """
    before, after = rooms
    overwrite_(before, tensors)

    def train_from(start: Mapping[str, Tensor], samples: Any, seed: int) -> None:
        overwrite_(tensors, start)
        train(samples, seed)
        overwrite_(after, tensors)

    def trained_line(start: Mapping[str, Tensor], samples: Any, judges: Any, seed: int) -> list[Judgement]:
        train_from(start, samples, seed)
        line = []
        for share in SHARES:
            _go(tensors, start, after, share)
            line.append(judge(judges))
        return line

    if held_out is not None or len(labels) < 2:
        judged_by = "the label that it learned" if held_out is None else "evaluation data"
        parts = [(labels, labels if held_out is None else held_out)]
    else:
        judged_by = "two halves of the labels"
        one, other = (Subset(labels, half) for half in halves(range(len(labels)), seed))
        parts = [(one, other), (other, one)]

    def line_from(start: Mapping[str, Tensor]) -> list[Judgement]:
        lines = [trained_line(start, *part, seed + number) for number, part in enumerate(parts)]
        return [joined(*points) for points in zip(*lines, strict=True)]

    other_line = line_from(alone) if alone is not None else None
    line = line_from(before)
    share = _farthest(line)
    report = FinetuneReport(share, {str(at): point.loss for at, point in zip(SHARES, line, strict=True)}, judged_by)
    start, trained = before, len(parts) == 1
    if alone is not None and other_line is not None:
        at = _farthest(other_line)
        without, merged = other_line[SHARES.index(at)], line[SHARES.index(share)]
        report.alone, report.gain = without.loss, change(without, merged, calibrated=False).report()
        if without.loss < merged.loss:
            report.without_sources, share, start, trained = True, at, alone, False
    if share and not trained:
        train_from(start, labels, seed)
    _go(tensors, start, after, share)
    return report


def _farthest(line: Sequence[Judgement]) -> float:
    """Return the largest share that the samples do not tell from the best, and that is no worse than the start."""
    lowest = min(line, key=lambda judgement: judgement.loss)

    def allowed(point: Judgement) -> bool:
        to_it = change(lowest, point, calibrated=False)
        better = point.loss <= line[0].loss or point.calibrated_loss <= line[0].calibrated_loss
        return better and to_it.mean <= to_it.half_interval

    return max(share for share, point in zip(SHARES, line, strict=True) if allowed(point))


def _go(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> None:
    for name, tensor in tensors.items():
        interpolate_(tensor, start[name], end[name], share)
