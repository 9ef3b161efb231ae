"""The choice between several ways to merge one source."""

from collections.abc import Mapping

from .changes import paired_change
from .losses import SampleLosses


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
    better = {name: own for name, own in losses.items() if simple is None or _leads(own, simple)}
    return min(better, key=lambda name: better[name].calibrated_loss, default=plain)


def _leads(losses: SampleLosses, other: SampleLosses) -> bool:
    """Return whether `losses` are lower than `other` by more than the standard error of their difference."""
    change = paired_change(losses, other)
    return change.mean > change.standard_error
