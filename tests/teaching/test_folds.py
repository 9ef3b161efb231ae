"""Fine-tuning on folds: the mean of the fold models, and the held-out losses on the line to it."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from grasp_hf.teaching.folds import FRACTIONS, FoldModels, finetune_on_folds_, fold_indices
from grasp_hf.validation.losses import Outputs, SampleLosses, losses_of

Losses = Callable[[float, Sequence[float]], list[float]]


class Line:
    """A model of one weight, whose training jumps to the mean of its samples."""

    def __init__(self, losses: Losses, start: float = 0.0) -> None:
        self.losses = losses
        self.tensors = {"w": torch.tensor([start]), "count": torch.tensor(3)}
        self.start = {name: value.clone() for name, value in self.tensors.items()}
        self.mean, self.buffer = ({n: torch.full_like(v, 9) for n, v in self.tensors.items()} for _ in range(2))
        self.trained: list[list[float]] = []
        self.evaluated: list[tuple[float, list[float]]] = []

    def train(self, samples: Any, seed: int) -> None:
        """Set the weight to the mean of the samples."""
        assert torch.equal(self.tensors["w"], self.start["w"])
        self.trained.append([*samples])
        self.tensors["w"].fill_(sum(samples) / len(samples))

    def evaluate(self, samples: Any) -> SampleLosses:
        """Return the losses, and note the weight and the samples."""
        self.evaluated.append((float(self.tensors["w"]), [*samples]))
        found = torch.tensor(self.losses(float(self.tensors["w"]), [*samples]), dtype=torch.float64)
        return SampleLosses(found, torch.ones_like(found), found, None)

    def finetune(self, labels: Sequence[float], held_out: Sequence[float] | None = None) -> FoldModels:
        """Fine-tune on folds."""
        return finetune_on_folds_(
            self.tensors, self.start, self.mean, self.buffer, self.train, self.evaluate, labels, held_out, 7
        )


def distance(weight: float, samples: Sequence[float]) -> list[float]:
    """Return the squared distance of the weight to each sample."""
    return [(weight - sample) ** 2 for sample in samples]


def test_each_fold_is_evaluated_in_the_model_of_the_other_labels() -> None:
    labels = [1.0, 2.0, 5.0, 10.0, 20.0]
    line = Line(distance)
    found = line.finetune(labels)
    folds = fold_indices(5, 7)
    assert sorted(index for fold in folds for index in fold) == [0, 1, 2, 3, 4]
    means = []
    for fold, trained in zip(folds, line.trained, strict=True):
        assert trained == [labels[index] for index in range(5) if index not in fold]
        means.append(sum(trained) / len(trained))
    assert float(line.mean["w"]) == pytest.approx(sum(means) / 2)
    assert found.order == [index for fold in folds for index in fold]
    for fraction in FRACTIONS:
        expected = [
            (fraction * mean - labels[index]) ** 2 for fold, mean in zip(folds, means, strict=True) for index in fold
        ]
        assert found.points[fraction].losses.tolist() == pytest.approx(expected)
    assert found.fraction == min(FRACTIONS, key=lambda fraction: float(found.points[fraction].losses.sum()))


def test_evaluation_data_validates_the_mean_of_the_folds() -> None:
    line = Line(distance)
    found = line.finetune([4.0, 4.0], [2.1, 1.9])
    assert (found.fraction, found.validated_by, found.order) == (0.5, "evaluation data", None)
    assert [weight for weight, _ in line.evaluated] == [0.0, 2.0, 3.0, 4.0]


def test_a_training_that_harms_is_not_kept() -> None:
    found = Line(lambda weight, samples: [abs(weight)] * len(samples)).finetune([4.0] * 8)
    assert found.fraction == 0.0


def test_a_single_label_validates_its_own_training_and_the_report_names_it() -> None:
    found = Line(distance).finetune([4.0])
    assert (found.fraction, found.validated_by, found.order) == (1.0, "the label that it learned", None)


def test_held_out_logits_come_in_the_order_of_the_labels() -> None:
    # two samples with two terms and one, seen in the order 1, 0
    outputs = Outputs(torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(3, 1), torch.tensor([0, 0, 1]), "identity")
    found = FoldModels(dict.fromkeys((0.0, 0.5), losses_of(outputs)), "2 folds of the labels", [1, 0])
    logits = found.held_out([0, 1])
    assert logits is not None and logits.tolist() == [[3.0], [1.0], [2.0]]
    assert FoldModels(found.points, "", None).held_out([0]) is None
