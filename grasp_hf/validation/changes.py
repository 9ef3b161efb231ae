"""The change of the loss between two models on the same samples, and its noise."""

import math
from dataclasses import dataclass

from scipy.special import stdtrit

from ..record.entries import ChangeReport, Reason
from .losses import SampleLosses

NORMAL_95 = 1.96
ROUNDING = 1e-6  # a mean change below this fraction of its standard error is a rounding error
LEAST_SAMPLES = 100  # with fewer samples, even a difference of 14 points can be noise


@dataclass(frozen=True)
class Change:
    """The change of the mean loss from one model to another on the same samples.

    Attributes:
        mean: Mean loss of the second model minus that of the first; below 0 is better.
        standard_error: Standard error of `mean` over samples; 0 for a single sample, which shows no noise.
        samples: Number of samples.
        calibrated: Whether the losses are calibrated.
    """

    mean: float
    standard_error: float
    samples: int
    calibrated: bool = False

    @property
    def half_interval(self) -> float:
        """Half of the 95 % interval of the mean (Student's t over samples)."""
        return self.standard_error * float(stdtrit(self.samples - 1, 0.975)) if self.samples > 1 else 0.0

    @property
    def verdict(self) -> Reason:
        """The verdict that follows from the 95 % interval; a single sample has none, and shows no effect."""
        return self.report().verdict

    def report(self) -> ChangeReport:
        """Return the change as an entry of a report."""
        half = self.half_interval if self.samples > 1 else None
        return ChangeReport(self.mean, half, self.samples, self.samples_to_see(), self.calibrated)

    def samples_to_see(self) -> int | None:
        """Return the number of samples with which 0 would be outside the 95 % interval; `None` if there is no change."""
        if self.samples < 2 or abs(self.mean) <= ROUNDING * self.standard_error:
            return None
        found = math.ceil(self.samples * (NORMAL_95 * self.standard_error / self.mean) ** 2)
        return max(found, self.samples + 1) if abs(self.mean) <= self.half_interval else found


def paired_change(before: SampleLosses, after: SampleLosses, *, calibrated: bool = True) -> Change:
    """Return the change of the mean loss `sum(d) / sum(m)`, where `d` is the difference and `m` the terms of each sample.

    Its standard error is that of a ratio of sums, linearised: the residuals are `d - mean * m`.

    Args:
        before: Losses of the first model.
        after: Losses of the second model on the same samples.
        calibrated: Whether to compare the calibrated losses.
    """
    difference = after.calibrated - before.calibrated if calibrated else after.losses - before.losses
    calibrated = calibrated and after.outputs is not None and after.outputs.link != "identity"
    terms = before.terms
    samples, total = len(terms), float(terms.sum())
    mean = float(difference.sum()) / total
    if samples < 2:
        return Change(mean, 0.0, samples, calibrated)
    residuals = difference - mean * terms
    variance = float((residuals**2).sum()) * samples / (samples - 1)
    return Change(mean, math.sqrt(variance) / total, samples, calibrated)


def detectable_difference(samples: int, least: int = LEAST_SAMPLES) -> str:
    """Return, in words, the smallest difference in accuracy that `samples` can show, and how many samples show 5 points.

    The two classifiers are taken to disagree on every second sample. Fewer samples are enough if they agree more often.
    """
    points = 100 * NORMAL_95 * math.sqrt(0.5 / samples)
    needed = round(0.5 * (NORMAL_95 / 0.05) ** 2)
    return (
        f"{samples} samples: two models must differ by about {points:.0f} points of accuracy to be told apart; expected "
        f"at least {least} samples ({needed} samples tell 5 points apart)"
    )
