"""The noise of a comparison: the scores of single test samples, and intervals over runs and test samples."""

import base64
import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from ..validation.losses import SampleLosses

Coded = dict[str, str]  # base64 text of an array, by its name


@dataclass(frozen=True)
class SampleScores:
    """The scores of a model on each test sample, in one measure.

    Attributes:
        sums: Score of each sample, summed over its terms; float64, shape `(n,)`.
        terms: Number of terms of each sample: 1 for a class, the number of labelled tokens for a text; shape `(n,)`.
    """

    sums: np.ndarray
    terms: np.ndarray

    def minus(self, other: "SampleScores") -> "SampleScores":
        """Return the differences to the scores of another model on the same samples."""
        return SampleScores(self.sums - other.sums, self.terms)


def encode(losses: SampleLosses) -> Coded:
    """Return the losses and terms of all samples, and which of them a classifier got right, as text for a JSON file."""
    arrays = {"loss": losses.losses.numpy().astype("<f4")}
    if not bool((losses.terms == 1).all()):
        arrays["terms"] = losses.terms.numpy().astype("<u4")
    if losses.correct is not None:
        arrays["correct"] = np.packbits(losses.correct.numpy())
    return {name: base64.b64encode(array.tobytes()).decode() for name, array in arrays.items()}


def decode(coded: Coded, measure: str) -> SampleScores:
    """Return the scores that `encode` wrote, by `measure`: `loss` or `accuracy`."""
    raw = {name: base64.b64decode(text) for name, text in coded.items()}
    losses = np.frombuffer(raw["loss"], "<f4").astype(float)
    if measure == "accuracy":
        right = np.unpackbits(np.frombuffer(raw["correct"], np.uint8), count=len(losses))
        return SampleScores(right.astype(float), np.ones(len(losses)))
    terms = np.frombuffer(raw["terms"], "<u4").astype(float) if "terms" in raw else np.ones(len(losses))
    return SampleScores(losses, terms)


def half_interval(values: Sequence[float], samples: Collection[SampleScores] = ()) -> float | None:
    """Return half of the 95 % interval of the mean over runs; `None` for fewer than two runs.

    All runs have the same test samples, so more runs do not average out the noise of these. The variance of the mean is
    the sum of two parts, as that of a bootstrap that draws runs and, for all runs together, test samples. This is its
    closed form, with Student's t for each part, because a bootstrap of two or three runs is too narrow. The noise that a
    run has on a single sample is in both parts, so that the interval is rather too wide.

    Args:
        values: Score of each run, or its difference to ours.
        samples: The scores (or differences) of the test samples in each run. Without any, the interval is over runs only.
    """
    runs = len(values)
    if runs < 2:
        return None
    over_runs = float(stdtrit(runs - 1, 0.975)) * statistics.stdev(values) / math.sqrt(runs)
    return math.hypot(over_runs, _half_interval_over_samples(samples) if samples else 0.0)


def _half_interval_over_samples(samples: Collection[SampleScores]) -> float:
    """Return half of the 95 % interval, over test samples, of the mean `sum(s) / sum(m)` over runs.

    Its standard error is that of a ratio of sums, linearised, as in `paired_change`.
    """
    sums, terms = (np.mean([getattr(run, name) for run in samples], axis=0) for name in ("sums", "terms"))
    number = len(sums)
    residuals = sums - terms * sums.sum() / terms.sum()
    error = math.sqrt(float((residuals**2).sum()) * number / (number - 1)) / float(terms.sum())
    return float(stdtrit(number - 1, 0.975)) * error
