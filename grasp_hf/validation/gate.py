"""First, do no harm: what a transfer or a fine-tuning changed is kept only as far as the labels speak for it."""

from collections.abc import Mapping

from ..record.entries import DOUBT
from .changes import Change, change
from .losses import Judgement


def verdict(change: Change, floor: float, *after: Judgement) -> tuple[bool, str]:
    """Return whether a transfer stays, and why.

    It stays where it harms by no more than its standard error, and nothing is worse than the `floor`.

    Few labels cannot prove that one source helps, and a mean of sources that each seem to do no harm is better than the
    few that seem to help (see the README's trials); so the doubt is in favour of the source. The floor, the loss before
    the first source since the last fine-tuning, keeps many small doubts from adding up.

    Args:
        change: Between the model without the source and with it.
        floor: A mean calibrated loss.
        after: The model with it, in each of the ways that it was judged in.
    """
    if change.harms:
        return False, "the calibrated loss rises by more than its standard error"
    if not all(judgement.calibrated_loss <= floor for judgement in after):
        return False, "worse than before the first source"
    if change.samples > 1 and change.mean < -change.half_interval:
        return True, "lowers the loss"
    return True, DOUBT


def plainest(options: Mapping[str, Judgement], plain: str) -> str:
    """Return which of several models to take: the `plain` one, unless another is ahead of it beyond its standard error.

    Of those, the one with the lowest calibrated loss. The lowest of several noisy losses is often the luckiest one, so that
    a model that chose more has to show it: the one-standard-error rule of Breiman et al. (Classification and Regression
    Trees, 1984, section 3.4.3), with the standard error of the paired difference.

    Args:
        options: The losses of each model on the same samples.
        plain: The name of the one that needs no proof; where it is none of them, the lowest loss decides alone.
    """
    simple = options.get(plain)
    ahead = {name: own for name, own in options.items() if simple is None or change(own, simple).harms}
    return min(ahead, key=lambda name: ahead[name].calibrated_loss, default=plain)
