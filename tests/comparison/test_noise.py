"""Intervals over runs and test samples: the reference is a bootstrap over both, and t-tests where one has no noise."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp, ttest_rel

from grasp_hf.comparison.noise import SampleScores, decode, encode, half_interval
from grasp_hf.comparison.results import OURS, Comparison, Result
from grasp_hf.validation.losses import SampleLosses


def classified(losses: np.ndarray, right: np.ndarray) -> SampleLosses:
    found = torch.from_numpy(losses)
    return SampleLosses(found, torch.ones_like(found), found, torch.from_numpy(right))


def scores(table: np.ndarray, terms: np.ndarray | None = None) -> list[SampleScores]:
    terms = np.ones(table.shape[1]) if terms is None else terms
    return [SampleScores(row * terms, terms) for row in table]


def test_the_scores_of_samples_survive_a_file() -> None:
    random = np.random.default_rng(0)
    losses, right = random.exponential(size=203), random.random(203) < 0.7
    coded = json.loads(json.dumps(encode(classified(losses, right))))
    assert set(coded) == {"loss", "correct"} and sum(map(len, coded.values())) < 6 * 203
    loss, accuracy = decode(coded, "loss"), decode(coded, "accuracy")
    np.testing.assert_allclose(loss.sums, losses, rtol=1e-7)
    assert accuracy.sums.tolist() == right.tolist() and loss.terms.tolist() == accuracy.terms.tolist() == [1.0] * 203
    texts = SampleLosses(torch.tensor([9.0, 4.0]).double(), torch.tensor([3.0, 2.0]).double(), torch.zeros(2), None)
    found = decode(encode(texts), "loss")
    assert (found.sums.tolist(), found.terms.tolist()) == ([9.0, 4.0], [3.0, 2.0])


@pytest.mark.parametrize("texts", [False, True])
def test_the_interval_is_that_of_a_bootstrap_over_runs_and_test_samples(texts: bool) -> None:
    """With forty runs, a bootstrap is right too. A draw takes the same test samples in all runs, as the runs do."""
    random = np.random.default_rng(1)
    runs, samples = 40, 300
    table = 0.03 * random.standard_normal((runs, 1)) + 0.1 * random.standard_normal((1, samples)) + 0.2
    terms = random.integers(5, 60, samples).astype(float) if texts else np.ones(samples)
    values = [float((row * terms).sum() / terms.sum()) for row in table]
    means = []
    for _ in range(8000):
        drawn, which = random.integers(runs, size=runs), random.integers(samples, size=samples)
        means.append((table[np.ix_(drawn, which)] * terms[which]).sum() / (runs * terms[which].sum()))
    whole, over_runs = half_interval(values, scores(table, terms)), half_interval(values)
    assert whole == pytest.approx(1.96 * np.std(means), rel=0.05)
    assert over_runs == pytest.approx(2.023 * np.std(values, ddof=1) / math.sqrt(runs), rel=1e-3)
    assert over_runs and whole and over_runs < 0.9 * whole


def test_noise_of_one_kind_gives_the_interval_of_a_t_test() -> None:
    random = np.random.default_rng(2)
    first, second = random.exponential(size=(2, 200))
    same = [SampleScores(first - second, np.ones(200))] * 2
    half = ttest_rel(first, second).confidence_interval(0.95).high - (first - second).mean()
    assert half_interval([(first - second).mean()] * 2, same) == pytest.approx(half)
    table = np.tile([[0.1], [0.3], [0.25]], 200)
    half = ttest_1samp([0.1, 0.3, 0.25], 0).confidence_interval(0.95).high - table.mean()
    assert half_interval([0.1, 0.3, 0.25], scores(table)) == pytest.approx(half)
    assert half_interval([0.1], scores(table[:1])) is None and half_interval([]) is None


def comparison(**rows: np.ndarray) -> Comparison:
    """Return the results of classifiers in two runs, from which samples each gets right."""
    results = []
    for method, right in rows.items():
        losses = {"final": classified(np.where(right, 0.1, 2.0), right)}
        results += [Result.of(method, 64, seed, losses, 1.0) for seed in (0, 1)]
    return Comparison(results, {})


def cells(found: Comparison) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found.table(64).splitlines()]


def test_equal_accuracies_on_two_hundred_samples_are_not_certain() -> None:
    right = np.arange(200) % 2 == 0
    found = comparison(base=right, average=~right, ours=right)
    table = {row[0]: row[1:] for row in cells(found)}
    error = math.sqrt(0.5 * 0.5 / 199)
    assert table["average of all (uniform soup)"] == [
        *("2", "–", f"0.500 ± {1.972 * error:.3f}", f"+0.000 ± {1.972 * 2 * error:.3f}"),  # of ±1, twice 0.5
    ]
    assert table["base model"][3] == "+0.000 ± 0.000", "the same model"
    assert table[""] == ["runs", "merged", "final", "vs ours"]
    assert "runs only" not in str(found) and "over runs and test samples" in str(found)


def test_a_column_with_results_of_an_earlier_version_is_over_runs_only() -> None:
    right = np.arange(200) % 2 == 0
    found = comparison(base=right, average=~right, ours=right)
    found.results[0].samples = {}
    table = cells(found)
    assert table[0] == ["", "runs", "merged", "final (runs)", "vs ours (runs)"]
    assert [row[3] for row in table[2:]] == ["0.500 ± 0.000"] * 3
    assert "\n(runs): the intervals are over runs only" in str(found)
    assert max(map(len, str(found).splitlines())) <= 100


def test_a_record_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    comparison(base=np.arange(200) % 2 == 0).save(tmp_path)
    record = json.loads((tmp_path / "comparison.json").read_text())
    for result in record["results"]:
        del result["samples"]
    (tmp_path / "comparison.json").write_text(json.dumps(record))
    found = Comparison.load(tmp_path)
    assert [result.samples for result in found.results] == [{}, {}]
    assert found.spread("base", 64) == 0 and not found.holds_samples(64)


def test_a_difference_is_of_the_same_samples_and_of_the_runs_that_both_have() -> None:
    random = np.random.default_rng(3)
    right = {(method, seed): random.random(200) < 0.6 for method in ("base", OURS) for seed in range(4)}
    results = [
        Result.of(method, 64, seed, {"final": classified(random.exponential(size=200), found)}, 1.0)
        for (method, seed), found in right.items()
        if (method, seed) != (OURS, 3)
    ]
    differences = [right["base", s].astype(float) - right[OURS, s] for s in range(3)]
    runs = 4.303 * np.std([d.mean() for d in differences], ddof=1) / math.sqrt(3)
    samples = 1.972 * np.std(np.mean(differences, axis=0), ddof=1) / math.sqrt(200)
    found = Comparison(results, {})
    assert found.spread("base", 64, paired=True) == pytest.approx(math.hypot(runs, samples), rel=1e-3)
