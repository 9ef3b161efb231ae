"""First, do no harm: what a transfer or a fine-tuning changed is kept only as far as the labels speak for it."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.data import Subset

from .evidence import Change, Judgement, change, joined
from .report import FinetuneReport
from .transfer import interpolate_, overwrite_

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)

Train = Callable[[Any, int], None]  # fine-tunes the model in place: on which samples, with which seed
Judge = Callable[[Any], Judgement]


def accepts(change: Change, after: Judgement, floor: float) -> bool:
    """Whether a transfer stays: it harms by no more than its standard error, and nothing is worse than the `floor`.

    Few labels cannot prove that one source helps, and a mean of sources that each seem to do no harm is better than the
    few that seem to help (see the README's trials); so the doubt is in favour of the source. The floor, the loss before
    the first source since the last fine-tuning, keeps many small doubts from adding up.

    Args:
        change: Between the model without the source and with it.
        after: The model with it.
        floor: A mean calibrated loss.
    """
    return not change.harms and after.calibrated_loss <= floor


def finetune_on_line_(
    tensors: Mapping[str, Tensor],
    rooms: Sequence[Mapping[str, Tensor]],
    train: Train,
    judge: Judge,
    labels: Any,
    held_out: Any,
    seed: int,
) -> FinetuneReport:
    """Fine-tune, then go back on the line between the weights before and after (WiSE-FT, arXiv:2109.01903) if need be.

    Few samples cannot tell neighbouring points apart: the middle one is taken of those whose loss is not above the lowest
    one beyond the 95 % interval of their difference. That loss is not calibrated, because fine-tuning also mends
    the scale of the logits, or spoils it. With held-out samples they judge. Without, the labels are cut into two halves
    at random: each half trains a model, which the other half judges along its line, and the point is taken on the line
    to the mean of the two models (a soup, arXiv:2203.05482). Both together make as many steps as one fine-tuning on all
    labels.

    The mean may go further than each of the two. Of the way that a half goes, let a part `r` be what the labels have in
    common and the rest noise of that half. The cosine between the two ways is then `r`, and the mean of both has half
    of the noise; where noise costs as much as it is long, the best point lies `2 / (1 + r)` times as far.

    Args:
        tensors: The model's, changed in place.
        rooms: Room for three sets of them.
        train: Fine-tunes the model.
        judge: Returns the losses of the model as it is now.
        labels: Samples to train on.
        held_out: Samples to judge by; `None` judges by the labels.
        seed: Of the training, and of the halves.

    Returns:
        The mean loss at each point, the point taken, and what judged.
    """
    before, after, other = rooms
    _store(before, tensors)

    def judged(samples: Any, end: Mapping[str, Tensor]) -> list[Judgement]:
        line = []
        for share in SHARES:
            _go(tensors, before, end, share)
            line.append(judge(samples))
        return line

    judges, agreement = "evaluation data" if held_out is not None else "the label that it learned", None
    if held_out is not None or len(labels) < 2:
        train(labels, seed)
        _store(after, tensors)
        line = judged(labels if held_out is None else held_out, after)
    else:
        judges = "two halves of the labels"
        halves = _halves(labels, seed)
        lines = []
        for number, (half, end) in enumerate(zip(halves, (after, other), strict=True)):
            overwrite_(tensors, before)
            train(half, seed + number)
            _store(end, tensors)
            lines.append(judged(halves[1 - number], end))
        line = [joined(*pair) for pair in zip(*lines, strict=True)]
        agreement = _cosine([name for name in tensors if isinstance(tensors[name], Parameter)], before, after, other)
        for name, tensor in after.items():
            interpolate_(tensor, tensor.clone(), other[name], 0.5)
    lowest = min(line, key=lambda judgement: judgement.loss)
    changes = [change(lowest, point, calibrated=False) for point in line]
    as_good = [share for share, to_it in zip(SHARES, changes, strict=True) if to_it.mean <= to_it.half_interval]
    judged_share = as_good[len(as_good) // 2]
    share = judged_share if agreement is None else min(1.0, judged_share * 2 / (1 + max(0.0, agreement)))
    _go(tensors, before, after, share)
    losses = {str(share): point.loss for share, point in zip(SHARES, line, strict=True)}
    return FinetuneReport(share, judged_share, losses, judges, agreement)


def _cosine(
    names: Sequence[str], start: Mapping[str, Tensor], one: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> float:
    """Return the cosine between the ways from `start` to `one` and to `other`; 1 where one of them leads nowhere."""
    products = torch.zeros(3, dtype=torch.float64)
    for name in names:
        a, b = ((end[name].double() - start[name].double()).flatten() for end in (one, other))
        products += torch.stack([a @ b, a @ a, b @ b]).cpu()
    both, *squares = products.tolist()
    return both / math.prod(map(math.sqrt, squares)) if all(squares) else 1.0


def _store(room: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        room[name].copy_(tensor.detach())


def _go(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> None:
    for name, tensor in tensors.items():
        interpolate_(tensor, start[name], end[name], share)


def _halves(labels: Any, seed: int) -> tuple[Any, Any]:
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    middle = len(order) // 2
    return Subset(labels, sorted(order[:middle])), Subset(labels, sorted(order[middle:]))
