"""Pools of predictions: how much the predictions of each model are worth on labelled samples.

The arithmetic is that of small tables, in float64, with one column per class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, logsumexp

Array = NDArray[np.float64]
Link = Literal["softmax", "sigmoid", "identity"]

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
FOLDS = 8  # of the cross-validation that chooses the ridge
LEAST_DEVIATION = 1e-9
EM_STEPS = 500
EM_TOLERANCE = 1e-9  # change of a weight, below which the weights have settled
TEMPERATURE_PENALTY = 10.0


@dataclass(frozen=True)
class LogPool:
    """A pool of models: a weighted sum of their logits, with a bias for each class.

    With the link `softmax` this is a logarithmic opinion pool (Genest and Zidek, 1986) with class biases. Its
    coefficients are stacked (Wolpert, 1992; Breiman, 1996): they are fitted on labels. The links `sigmoid` (several
    labels per sample) and `identity` (regression) have the same sum.

    Attributes:
        coefficients: One for each model, shape `(models,)`.
        biases: One for each class, shape `(classes,)`.
        deviations: Standard deviations that divide the logits of each model, shape `(models,)`.
        link: How the sum becomes a prediction.
    """

    coefficients: Array
    biases: Array
    deviations: Array
    link: Link

    def logits(self, members: Sequence[Array]) -> Array:
        """Return the logits of the pool, shape `(terms, classes)`; those of each model have the same shape."""
        return _combine(self.coefficients, self.biases, _scaled(members, self.deviations, self.link))


@dataclass(frozen=True)
class FittedPool:
    """A pool that was fitted on labels.

    Attributes:
        pool: The fit on all labels.
        held_out: Logits for each labelled term, of a fit that did not see its sample; shape `(terms, classes)`.
        ridge: The strength of the pull towards equal coefficients, chosen by cross-validation.
        loss: Mean loss of `held_out`, in nats (for the identity: half the squared error, in variances of the labels).
    """

    pool: LogPool
    held_out: Array
    ridge: float
    loss: float


def fit_pool(members: Sequence[Array], targets: Array, groups: NDArray[np.int64], link: Link, seed: int) -> FittedPool:
    """Fit a pool on labelled terms, with the ridge that has the lowest loss in cross-validation.

    With `K` models, `c_k = exp(t) / K + d_k` is the coefficient of model `k`, and `b` are the biases. The fit minimises
    the mean loss plus `[ridge (K |d|^2 + |b|^2 / 4) + t^2 / 20] / N` over the `N` terms. A large ridge gives the equal
    pool at a fitted scale.

    Args:
        members: Logits of each model, shape `(terms, classes)`.
        targets: The labels, shape `(terms, classes)`: one-hot rows, 0 and 1 for several labels, or numbers.
        groups: Sample of each term, shape `(terms,)`. The terms of a sample stay in one fold.
        link: How the sum becomes a prediction.
        seed: Seeds the folds.
    """
    deviations = _deviations(members, targets, link)
    scaled = _scaled(members, deviations, link)
    folds = _folds(groups, seed)
    results = []
    for ridge in RIDGES:
        held_out = np.zeros_like(targets)
        for fold in folds:
            fitted = _fit(scaled[:, ~fold], targets[~fold], ridge, link, deviations)
            held_out[fold] = _combine(fitted.coefficients, fitted.biases, scaled[:, fold])
        results.append((mean_loss(held_out, targets, link), ridge, held_out))
    loss, ridge, held_out = min(results, key=lambda result: result[0])
    return FittedPool(_fit(scaled, targets, ridge, link, deviations), held_out, ridge, loss)


def mean_loss(logits: Array, targets: Array, link: Link) -> float:
    """Return the mean loss over terms; the sum over the classes of a term that has several labels."""
    if link == "softmax":
        losses = -(log_softmax(logits, axis=1) * targets).sum(1)
    elif link == "sigmoid":
        losses = (np.logaddexp(0.0, logits) - logits * targets).sum(1)
    else:
        losses = 0.5 * ((logits - targets) ** 2).sum(1) / max(float(targets.var()), LEAST_DEVIATION)
    return float(losses.mean())


def probabilities(logits: Array, link: Link) -> Array:
    """Return what the logits predict: probabilities, or for the identity the numbers themselves."""
    if link == "softmax":
        return np.exp(log_softmax(logits, axis=1))
    return expit(logits) if link == "sigmoid" else logits


def mixture_weights(log_likelihoods: Array) -> Array:
    """Return the weights of a linear pool, which sum to 1: those of a mixture of the models, fitted on labels.

    Expectation maximisation (Dempster, Laird and Rubin, 1977) with one pseudo-count for each model, so that no weight
    is 0.

    Args:
        log_likelihoods: Log-probability that each model gives to each label, shape `(models, terms)`.
    """
    models, terms = log_likelihoods.shape
    weights = np.full(models, 1 / models)
    for _ in range(EM_STEPS):
        joint = np.log(weights)[:, None] + log_likelihoods
        shares = np.exp(joint - logsumexp(joint, axis=0))
        before, weights = weights, (shares.sum(1) + 1) / (terms + models)
        if np.abs(weights - before).max() < EM_TOLERANCE:
            break
    return weights


def fit_scale(logits: Array, targets: Array, link: Link) -> float:
    """Return the factor of the logits with the lowest loss: the inverse of a temperature (arXiv:1706.04599).

    The penalty `10 (ln s)^2 / N` keeps the factor near 1 where few labels say little.
    """

    def objective(log_scale: float) -> float:
        penalty = TEMPERATURE_PENALTY * log_scale**2 / len(targets)
        return mean_loss(logits * np.exp(log_scale), targets, link) + penalty

    found = minimize(lambda values: objective(float(values[0])), [0.0], method="Nelder-Mead")
    return float(np.exp(found.x[0]))


def _deviations(members: Sequence[Array], targets: Array, link: Link) -> Array:
    """Return the standard deviation of each model's logits; numbers keep the unit of the labels."""
    if link == "identity":
        return np.ones(len(members))
    return np.array([max(float(_centered(own, link).std()), LEAST_DEVIATION) for own in members])


def _centered(logits: Array, link: Link) -> Array:
    return logits - logits.mean(1, keepdims=True) if link == "softmax" else logits


def _scaled(members: Sequence[Array], deviations: Array, link: Link) -> Array:
    return np.stack([_centered(own, link) / deviation for own, deviation in zip(members, deviations, strict=True)])


def _combine(coefficients: Array, biases: Array, scaled: Array) -> Array:
    found: Array = np.tensordot(coefficients, scaled, 1) + biases
    return found


def _folds(groups: NDArray[np.int64], seed: int) -> list[NDArray[np.bool_]]:
    """Return a mask for each fold; every sample is in one fold, and no fold is empty."""
    samples = np.random.RandomState(seed).permutation(np.unique(groups))
    return [np.isin(groups, part) for part in np.array_split(samples, min(FOLDS, len(samples)))]


def _fit(scaled: Array, targets: Array, ridge: float, link: Link, deviations: Array) -> LogPool:
    models, terms, classes = scaled.shape
    # The identity keeps the unit of the labels: its errors are measured in their variance.
    variance = max(float(targets.var()), LEAST_DEVIATION) if link == "identity" and terms else 1.0

    def split(values: Array) -> tuple[float, Array, Array]:
        scale = float(np.exp(values[0])) if link != "identity" else 1.0
        return scale, values[1 : 1 + models], values[1 + models :]

    def objective(values: Array) -> tuple[float, Array]:
        scale, differences, biases = split(values)
        logits = _combine(scale / models + differences, biases, scaled)
        errors = (probabilities(logits, link) - targets) / variance
        penalty = ridge * (models * differences @ differences + biases @ biases / (4 * variance)) + values[0] ** 2 / 20
        slopes = np.einsum("ktc,tc->k", scaled, errors)
        gradient = np.concatenate(
            [
                [slopes.sum() * scale / models * (link != "identity") + values[0] / 10],
                slopes + 2 * ridge * models * differences,
                errors.sum(0) + ridge * biases / (2 * variance),
            ]
        )
        return mean_loss(logits, targets, link) + penalty / max(terms, 1), gradient / max(terms, 1)

    start = np.zeros(1 + models + classes)
    values = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x if terms else start
    scale, differences, biases = split(values)
    return LogPool(scale / models + differences, biases, deviations, link)
