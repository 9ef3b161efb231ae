"""How the loss differs between two models on the same samples, and whether that is more than noise."""

import math
from dataclasses import dataclass

from scipy.special import stdtrit

from ..record.entries import ChangeReport
from .losses import SampleLosses

NORMAL_95 = 1.96
ROUNDING = 1e-6  # a mean of no more than this part of its standard error is none
LEAST_SAMPLES = 100  # with fewer, a difference of 14 points drowns in noise


@dataclass(frozen=True)
class Change:
    """How the mean loss differs between two models on the same samples.

    Attributes:
        mean: Of the second minus the first; below 0 is better.
        standard_error: Of that mean, over samples; 0 for a single one, which shows no noise.
        samples: Number of pairs.
    """

    mean: float
    standard_error: float
    samples: int

    @property
    def half_interval(self) -> float:
        """Half of the 95 % interval (Student's t over samples)."""
        return self.standard_error * float(stdtrit(self.samples - 1, 0.975)) if self.samples > 1 else 0.0

    @property
    def harms(self) -> bool:
        """Whether the loss rises by more than its standard error."""
        return self.mean > self.standard_error

    def report(self) -> ChangeReport:
        """Return it for a report."""
        half = self.half_interval if self.samples > 1 else None
        return ChangeReport(self.mean, half, self.samples, self.samples_to_see())

    def samples_to_see(self) -> int | None:
        """Return how many samples would put a change of this size outside its 95 % interval; `None` for no change."""
        if self.samples < 2 or abs(self.mean) <= ROUNDING * self.standard_error:
            return None
        found = math.ceil(self.samples * (NORMAL_95 * self.standard_error / self.mean) ** 2)
        return max(found, self.samples + 1) if abs(self.mean) <= self.half_interval else found


def paired_change(before: SampleLosses, after: SampleLosses, *, calibrated: bool = True) -> Change:
    """Return the difference of the mean loss, calibrated or not, with the standard error of a ratio of sums (linearised)."""
    difference = after.calibrated - before.calibrated if calibrated else after.losses - before.losses
    terms = before.terms
    samples, total = len(terms), float(terms.sum())
    mean = float(difference.sum()) / total
    if samples < 2:
        return Change(mean, 0.0, samples)
    residuals = difference - mean * terms
    variance = float((residuals**2).sum()) * samples / (samples - 1)
    return Change(mean, math.sqrt(variance) / total, samples)


def detectable_difference(samples: int, least: int = LEAST_SAMPLES) -> str:
    """Return what a number of samples shows of two classifiers that disagree on every second of them, and what it takes.

    Where the two answer alike more often, less is enough.
    """
    points, needed = 100 * NORMAL_95 * math.sqrt(0.5 / samples), round(0.5 * (NORMAL_95 / 0.05) ** 2)
    return (
        f"{samples} samples: two models would have to differ by about {points:.0f} points to be told apart; expected at "
        f"least {least}, and {needed} show 5 points"
    )
