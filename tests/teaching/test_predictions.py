"""The predictions of the sources: in files, by name, and weighed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from grasp_hf.teaching.predictions import Predictions
from grasp_hf.validation.losses import Outputs, SampleLosses, losses_of


def predicted(seed: int, strength: float) -> SampleLosses:
    """Return the losses of a classifier that is right by `strength`."""
    truth = torch.nn.functional.one_hot(torch.arange(40) % 2, 2).float()
    noise = torch.randn(40, 2, generator=torch.Generator().manual_seed(seed))
    return losses_of(Outputs(strength * truth + noise, truth, torch.arange(40), "softmax"))


def test_a_better_source_has_a_larger_weight_and_the_mean_is_1(tmp_path: Path) -> None:
    predictions = Predictions(tmp_path / "files")
    for name, strength in {"weak": 0.5, "good": 4.0, "none": 0.0}.items():
        predictions.add(name, predicted(len(name), strength))
    weights = predictions.weights()
    assert sum(weights.values()) == pytest.approx(3) and weights["good"] == max(weights.values())


def test_a_source_that_comes_twice_keeps_the_files_of_the_others(tmp_path: Path) -> None:
    predictions = Predictions(tmp_path / "files")
    given = {name: predicted(seed, 1.0) for seed, name in enumerate(("a", "b"))}
    for name in ("a", "b", "a"):
        predictions.add(name, given[name], unlabeled=torch.full((3, 2), float(ord(name))))
    members = predictions.members()
    assert [member.name for member in members] == ["a", "b"]
    for member in members:
        outputs = given[member.name].outputs
        assert outputs is not None and np.array_equal(member.labelled, outputs.logits.double().numpy())
        assert member.unlabeled is not None and (member.unlabeled == ord(member.name)).all()
    predictions.keep(["b"])
    assert [member.name for member in predictions.members()] == ["b"] and len(predictions) == 1
    assert len([*(tmp_path / "files").iterdir()]) == 2


def test_a_language_model_leaves_one_number_for_each_token(tmp_path: Path) -> None:
    predictions = Predictions(tmp_path / "files")
    for name, loss in {"good": 1.0, "poor": 3.0}.items():
        tokens = torch.full((7,), loss, dtype=torch.float64)
        predictions.add(name, SampleLosses(tokens[:2], torch.tensor([3.0, 4.0]), tokens[:2], None, None, tokens))
    weights = predictions.weights()
    assert weights["good"] > 1.5 and predictions.truth is None and not (tmp_path / "files").exists()
