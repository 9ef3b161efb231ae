"""Scores and coefficients on real models, against plain autograd and finite differences."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from grasp_hf import GraspConfig, gradient_alignment
from grasp_hf.errors import DataError, NonFiniteError
from grasp_hf.matching import movable_tensors, partition
from grasp_hf.measure import blended, learned_coefficients
from grasp_hf.transfer import placed
from tests.models import KINDS, LABELS, perturbed, tiny_data, tiny_model

CONFIG = GraspConfig(num_batches=3, batch_size=8)


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
def test_a_model_compared_with_itself_scores_one_everywhere(kind: str) -> None:
    model = tiny_model(kind)
    scores = gradient_alignment(model, model, tiny_data(kind, 20), config=CONFIG)
    defined = {name: score for name, score in scores.items() if score is not None}
    assert len(defined) > 0.9 * len(scores)
    assert defined == pytest.approx(dict.fromkeys(defined, 1.0), abs=1e-5)


@pytest.mark.parametrize("kind", ["resnet", "vit", "bert"])
def test_published_measurement_of_a_model_with_itself_is_far_from_one(kind: str) -> None:
    """The published mismatch of modes (train against eval): the flaw that our default does not have."""
    model = perturbed(tiny_model(kind), seed=3)
    scores = gradient_alignment(model, model, tiny_data(kind, 64), config=GraspConfig.paper())
    assert min(score for score in scores.values() if score is not None) < 0.9


@pytest.mark.parametrize("config", [CONFIG, GraspConfig.paper(batch_size=8)], ids=["default", "paper"])
@pytest.mark.parametrize("kind", KINDS)
def test_measuring_changes_nothing(kind: str, config: GraspConfig) -> None:
    source, target = perturbed(tiny_model(kind), 1), perturbed(tiny_model(kind), 2).train()
    next(target.parameters()).requires_grad_(False)
    before, source_before = state_of(target), state_of(source)
    random_state = torch.get_rng_state()
    gradient_alignment(source, target, tiny_data(kind, 20), config=config)
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, value in source.state_dict().items():
        assert torch.equal(value, source_before[name]), name
    assert target.training
    assert [p.requires_grad for p in target.parameters()].count(False) == 1
    assert all(p.grad is None for p in target.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_scores_equal_those_of_plain_autograd() -> None:
    source, target = perturbed(tiny_model("resnet"), 1), perturbed(tiny_model("resnet"), 2)
    data = tiny_data("resnet", 8)
    scores = gradient_alignment(source, target, data, config=GraspConfig(num_batches=1, batch_size=8))
    for model in (source, target):
        model.eval()
        model(**data[:8]).loss.backward()
    name = "resnet.embedder.embedder.normalization"
    found, expected = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (source, target))
    a, b = (torch.cat([grads[f"{name}.weight"], grads[f"{name}.bias"]]) for grads in (found, expected))
    assert scores[name] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-6)


def test_a_unit_without_gradient_is_undefined() -> None:
    model = tiny_model("bert")
    model.get_parameter("classifier.weight").data.zero_()  # nothing below the classifier has a gradient then
    scores = gradient_alignment(model, model, tiny_data("bert", 8), config=CONFIG)
    assert scores["bert.embeddings.word_embeddings"] is None
    assert scores["classifier"] == pytest.approx(1.0)


def measured(kind: str, lr: float, batches: int) -> tuple[Any, Any, Any, Any, Any]:
    target, source = perturbed(tiny_model(kind), 1).eval(), perturbed(tiny_model(kind), 2)
    units, batch = partition(target, "module"), tiny_data(kind, 12)[:12]
    found = learned_coefficients(target, movable_tensors(source), units, [batch] * batches, Accelerator(), lr=lr)
    return target, source, units, batch, found


@pytest.mark.parametrize("kind", KINDS)
def test_the_sign_of_the_first_step_is_that_of_the_finite_difference(kind: str) -> None:
    target, source, units, batch, (coefficients, _) = measured(kind, lr=0.05, batches=1)
    tensors, values = movable_tensors(target), movable_tensors(source)
    start = {name: tensor.data for name, tensor in tensors.items()}
    parameters = dict(target.named_parameters())
    with torch.no_grad():
        base = float(target(**batch).loss)
        checked = 0
        for unit in units:
            # Statistics have no gradient: the slope is that of the parameters alone.
            moved = blended(start, values, [unit], {unit.name: 1e-2})
            with placed(tensors, {name: value for name, value in moved.items() if name in parameters}):
                difference = float(target(**batch).loss) - base
            if abs(difference) > 1e-5:
                checked += 1
                assert (coefficients[unit.name] > 0) == (difference < 0), unit.name
    assert checked >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_learned_coefficients_lower_the_loss_and_leave_the_model_alone(kind: str) -> None:
    target, source, units, batch, (coefficients, scores) = measured(kind, lr=0.05, batches=8)
    assert all(0 <= value <= 1 for value in coefficients.values()) and any(coefficients.values())
    assert all(score is None or -1 - 1e-6 <= score <= 1 + 1e-6 for score in scores.values())
    tensors = movable_tensors(target)
    start = {name: tensor.data for name, tensor in tensors.items()}
    with torch.no_grad():
        before = float(target(**batch).loss)
        with placed(tensors, blended(start, movable_tensors(source), units, coefficients)):
            assert float(target(**batch).loss) < before
        assert float(target(**batch).loss) == before


def test_batches_without_labels_are_refused() -> None:
    data = tiny_data("vit", 4).remove_columns("labels")
    model = tiny_model("vit")
    with pytest.raises(DataError, match="no loss for a batch with pixel_values; expected a data set with labels"):
        gradient_alignment(model, model, data, config=CONFIG)


def test_an_empty_data_set_is_refused() -> None:
    model = tiny_model("vit")
    with pytest.raises(DataError, match="dataset is empty"):
        gradient_alignment(model, model, tiny_data("vit", 4).select([]), config=CONFIG)


def test_an_infinite_loss_or_gradient_is_refused_and_the_target_restored() -> None:
    source, target = tiny_model("vit"), tiny_model("vit", seed=1)
    source.get_parameter("classifier.weight").data.fill_(float("inf"))
    before = state_of(target)
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        gradient_alignment(source, target, tiny_data("vit", 4), config=CONFIG)
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert len(LABELS) == target.config.num_labels
