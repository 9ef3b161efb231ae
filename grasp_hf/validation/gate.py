"""The gate: which candidate is chosen, and whether it stays in the model."""

from collections.abc import Mapping

from ..record.entries import Reason
from .changes import Change, paired_change
from .losses import SampleLosses


def verdict(change: Change, floor: float, *after: SampleLosses) -> tuple[bool, Reason]:
    """Return whether a source stays, and the reason.

    It stays if it does not raise the loss by more than the standard error of the change, and if no loss is above the
    `floor`. Few labels cannot prove that one source helps, and a mean of many sources that do no visible harm is better
    than a mean of the few that seem to help. So the source gets the benefit of the doubt. The floor is the loss before the
    first source since the last fine-tuning; it keeps many small doubts from adding up.

    Args:
        change: Change from the model without the source to the model with it.
        floor: Largest mean calibrated loss that is allowed.
        after: Losses with the source, both as validated and as merged.
    """
    if change.harms:
        return False, Reason.HARMS
    if not all(losses.calibrated_loss <= floor for losses in after):
        return False, Reason.WORSE_THAN_START
    if change.samples > 1 and change.mean < -change.half_interval:
        return True, Reason.HELPS
    return True, Reason.UNCLEAR


def choose_candidate(losses: Mapping[str, SampleLosses], plain: str) -> str:
    """Return the name of the candidate to merge: `plain`, unless another is better by more than a standard error.

    Among several such candidates it is the one with the lowest calibrated loss. The lowest of several noisy losses is
    often only the luckiest, so a candidate that chose more has to prove its lead. This is the one-standard-error rule of
    Breiman et al. (Classification and Regression Trees, 1984, section 3.4.3), with the standard error of the paired
    difference.

    Args:
        losses: The losses of each candidate on the same samples.
        plain: Name of the candidate that needs no proof. If it is missing, the lowest loss decides alone.
    """
    simple = losses.get(plain)
    better = {name: own for name, own in losses.items() if simple is None or paired_change(own, simple).harms}
    return min(better, key=lambda name: better[name].calibrated_loss, default=plain)
