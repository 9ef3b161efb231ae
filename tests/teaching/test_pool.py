"""Pools of predictions, against a plain reference that is written apart."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from grasp_hf.teaching.pool import FOLDS, RIDGES, LogPool, fit_pool, fit_scale, mean_loss, mixture_weights


def drawn(seed: int, terms: int = 60, classes: int = 3) -> tuple[list[Any], Any, Any]:
    """Return the logits of a good, a weak and a random model, the labels and their one-hot rows."""
    rng = np.random.RandomState(seed)
    truth = rng.randint(classes, size=terms)
    targets = np.eye(classes)[truth]
    members = [
        2 * targets + rng.randn(terms, classes),
        5 * targets + 9 * rng.randn(terms, classes),
        rng.randn(terms, 3),
    ]
    return members, truth, targets


def plain_loss(logits: Any, truth: Any) -> float:
    """Return the cross-entropy as torch computes it."""
    return float(torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(truth)))


def test_a_pool_is_the_lowest_point_of_its_penalised_loss() -> None:
    members, truth, targets = drawn(0)
    found = fit_pool(members, targets, np.arange(60), "softmax", seed=0)
    assert found.ridge in RIDGES
    centered = [one - one.mean(1, keepdims=True) for one in members]
    scaled = [one / one.std() for one in centered]

    def objective(values: Any) -> float:
        scale, differences, biases = np.exp(values[0]), values[1:4], values[4:]
        logits = sum((scale / 3 + d) * one for d, one in zip(differences, scaled, strict=True)) + biases
        penalty = found.ridge * (3 * (differences**2).sum() + (biases**2).sum() / 4) + values[0] ** 2 / 20
        return plain_loss(logits, truth) + penalty / 60

    best = minimize(objective, np.zeros(7), method="BFGS").x
    coefficients = np.exp(best[0]) / 3 + best[1:4]
    assert found.pool.coefficients == pytest.approx(coefficients, abs=5e-3)
    assert found.pool.biases == pytest.approx(best[4:], abs=5e-3)
    expected = sum(c * one for c, one in zip(found.pool.coefficients, scaled, strict=True)) + found.pool.biases
    assert found.pool.logits(members) == pytest.approx(expected)


def test_held_out_predictions_do_not_know_their_own_label() -> None:
    members, _, targets = drawn(1)
    found = fit_pool(members, targets, np.arange(60), "softmax", seed=0)
    changed = targets.copy()
    changed[7] = np.roll(changed[7], 1)
    other = fit_pool(members, changed, np.arange(60), "softmax", seed=0)
    if found.ridge == other.ridge:  # the fold of sample 7 has the same fit, the other folds have not
        assert found.held_out[7] == pytest.approx(other.held_out[7], abs=1e-6)
        assert abs(found.held_out - other.held_out).max() > 1e-3
    assert found.ridge == other.ridge
    assert FOLDS == 8


def test_a_good_model_is_worth_more_than_a_random_one_and_the_pool_beats_both() -> None:
    members, truth, targets = drawn(2, terms=200)
    found = fit_pool(members, targets, np.arange(200), "softmax", seed=0)
    assert found.pool.coefficients[0] > found.pool.coefficients[1] > abs(found.pool.coefficients[2])
    assert found.loss < min(plain_loss(one, truth) for one in members)


def test_terms_of_one_sample_stay_in_one_fold() -> None:
    members, _, targets = drawn(3)
    groups = np.repeat(np.arange(10), 6)
    found = fit_pool(members, targets, groups, "softmax", seed=0)
    changed = targets.copy()
    changed[groups == 4] = np.roll(changed[groups == 4], 1, axis=1)
    other = fit_pool(members, changed, groups, "softmax", seed=0)
    if found.ridge == other.ridge:
        assert found.held_out[groups == 4] == pytest.approx(other.held_out[groups == 4], abs=1e-6)


def test_several_labels_and_numbers_have_their_own_losses() -> None:
    logits, targets = np.array([[2.0, -1.0]]), np.array([[1.0, 0.0]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(logits), torch.tensor(targets), reduction="sum"
    )
    assert mean_loss(logits, targets, "sigmoid") == pytest.approx(float(expected))
    rng = np.random.RandomState(0)
    numbers = rng.randn(80, 1) * 5
    found = fit_pool([numbers + rng.randn(80, 1), 3 * rng.randn(80, 1)], numbers, np.arange(80), "identity", seed=0)
    assert found.pool.coefficients[0] > 0.8 and abs(found.pool.coefficients[1]) < 0.2
    several = (rng.randn(80, 2) > 0).astype(float)
    both = fit_pool([several * 4 - 2, rng.randn(80, 2)], several, np.arange(80), "sigmoid", seed=0)
    assert both.pool.coefficients[0] > abs(both.pool.coefficients[1]) and both.loss < 0.5


def test_mixture_weights_are_those_of_the_most_likely_mixture() -> None:
    rng = np.random.RandomState(0)
    likelihoods = np.log(rng.dirichlet([1, 1, 1], 500).T)
    weights = mixture_weights(likelihoods)
    assert weights.sum() == pytest.approx(1) and (weights > 0).all()

    def objective(values: Any) -> float:
        own = np.exp(values) / np.exp(values).sum()
        return float(-np.log(own @ np.exp(likelihoods)).sum() - np.log(own).sum())

    best = minimize(objective, np.zeros(3), method="Nelder-Mead").x
    assert weights == pytest.approx(np.exp(best) / np.exp(best).sum(), abs=2e-3)


def test_a_scale_undoes_a_wrong_one_unless_labels_are_few() -> None:
    rng = np.random.RandomState(0)
    logits = rng.randn(5000, 4)
    truth = np.array([rng.choice(4, p=np.exp(row) / np.exp(row).sum()) for row in logits])
    assert fit_scale(3 * logits, np.eye(4)[truth], "softmax") == pytest.approx(1 / 3, rel=0.1)
    assert 1 / 3 < fit_scale(3 * logits[:3], np.eye(4)[truth[:3]], "softmax") < 1.6


def test_a_pool_of_one_member_is_its_scaled_and_biased_self() -> None:
    pool = LogPool(np.array([2.0]), np.array([0.0, 1.0]), np.array([4.0]), "sigmoid")
    assert pool.logits([np.array([[4.0, 8.0]])]).tolist() == [[2.0, 5.0]]
