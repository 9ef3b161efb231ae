"""Scores and coefficients on real models, against plain autograd and finite differences."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from grasp_hf import GraspConfig, GraspMerger, gradient_alignment
from grasp_hf.errors import DataError, NonFiniteError
from grasp_hf.methods.blend import learn_coefficients
from grasp_hf.tensors.mixing import Mix
from grasp_hf.tensors.placing import overwrite_
from grasp_hf.tensors.scratch import Scratch
from grasp_hf.tensors.units import movable_tensors, partition
from tests.support.models import KINDS, LABELS, NO_TUNING, perturbed, saved, tiny_data, tiny_model

CONFIG = GraspConfig(num_batches=3, batch_size=8)


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
def test_a_model_compared_with_itself_scores_one_everywhere(kind: str) -> None:
    model = tiny_model(kind)
    scores = gradient_alignment(model, model, tiny_data(kind, 20), config=CONFIG)
    assert scores == pytest.approx(dict.fromkeys(scores, 1.0), abs=1e-5)


@pytest.mark.parametrize("kind", ["resnet", "vit", "bert"])
def test_by_the_paper_a_model_compared_with_itself_scores_far_from_one(kind: str) -> None:
    """The paper compares train mode with eval mode; the default does not."""
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


def measured(
    kind: str, lr: float, number: int, directory: Path, fraction: float = 0.0, base: Any = None
) -> tuple[Any, Any, Any, Any, Any]:
    target, source = perturbed(tiny_model(kind), 1).eval(), perturbed(tiny_model(kind), 2)
    units, batch = partition(target, "module"), tiny_data(kind, 12)[:12]
    scratch = Scratch(directory, movable_tensors(target))
    scratch.start.copy_(movable_tensors(target))
    scratch.base.copy_(movable_tensors(target if base is None else base))
    batches, average = [batch] * number, dict.fromkeys((unit.name for unit in units), fraction)
    values = movable_tensors(source)
    found = learn_coefficients(target, values, units, batches, average, scratch=scratch, lr=lr, steps=number)
    return target, source, units, batch, found


def blended(
    target: Any, source: Any, units: Any, mixes: dict[str, Mix], *, base: Any = None, statistics: bool = True
) -> Any:
    """Return a mix of `base`, `target` and `source`, computed tensor by tensor."""
    model, ends, origin = copy.deepcopy(target), movable_tensors(source), movable_tensors(base or target)
    tensors, parameters = movable_tensors(model), dict(model.named_parameters())
    with torch.no_grad():
        for unit in units:
            keep, take = mixes[unit.name]
            for name in unit.tensors:
                if name in parameters:
                    own, given = tensors[name] - origin[name], ends[name] - origin[name]
                    tensors[name].copy_(origin[name] + keep * own + take * given)
                elif statistics and tensors[name].is_floating_point():
                    tensors[name].add_(take / (keep + take) * (ends[name] - tensors[name]))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_sign_of_the_first_step_is_that_of_the_finite_difference(kind: str, tmp_path: Path) -> None:
    base = perturbed(tiny_model(kind), 3)
    found = measured(kind, lr=0.05, number=1, directory=tmp_path, fraction=0.25, base=base)
    target, source, units, batch, (mixes, _) = found
    average = {unit.name: Mix(0.75, 0.25) for unit in units}
    start = blended(target, source, units, average)  # the slopes are taken with the statistics of the average
    with torch.no_grad():
        before, checked = float(start(**batch).loss), 0
        for unit in units:
            for place, step in enumerate([Mix(0.76, 0.25), Mix(0.75, 0.26)]):
                # Statistics have no gradient: the slope is that of the parameters alone.
                moved = blended(target, source, units, {**average, unit.name: step}, base=base, statistics=False)
                for name, tensor in movable_tensors(moved).items():
                    if name not in dict(moved.named_parameters()):
                        tensor.copy_(movable_tensors(start)[name])
                difference = float(moved(**batch).loss) - before
                if abs(difference) > 1e-5:
                    checked += 1
                    assert (mixes[unit.name][place] > average[unit.name][place]) == (difference < 0), unit.name
    assert checked >= 6


@pytest.mark.parametrize("kind", KINDS)
def test_learned_coefficients_lower_the_loss_and_leave_the_model_alone(kind: str, tmp_path: Path) -> None:
    before = state_of(perturbed(tiny_model(kind), 1))
    target, source, units, batch, (mixes, scores) = measured(kind, lr=0.05, number=8, directory=tmp_path)
    assert all(0 <= value <= 2 for mix in mixes.values() for value in mix) and any(mix.take for mix in mixes.values())
    assert all(score is None or -1 - 1e-6 <= score <= 1 + 1e-6 for score in scores.values())
    with torch.no_grad():
        after = blended(target, source, units, mixes)
        assert float(after(**batch).loss) < float(target(**batch).loss)
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_learning_starts_from_the_average(tmp_path: Path) -> None:
    for fraction in (0.25, 1.0):
        *_, (mixes, _) = measured("vit", lr=1e-6, number=3, directory=tmp_path, fraction=fraction)
        assert {name: mix.take for name, mix in mixes.items()} == pytest.approx(
            dict.fromkeys(mixes, fraction), abs=1e-5
        )
        assert any(mix.take != fraction for mix in mixes.values()), "they were learned"
        assert {mix.keep for mix in mixes.values()} == {1 - fraction}, (
            "the target is the base, so its coefficient has no slope"
        )


def test_a_failing_measurement_leaves_the_model_alone(tmp_path: Path) -> None:
    target, source = tiny_model("vit"), perturbed(tiny_model("vit"), 2)
    before, batch = state_of(target), tiny_data("vit", 12)[:12]
    scratch = Scratch(tmp_path, movable_tensors(target))
    scratch.start.copy_(movable_tensors(target))
    scratch.base.copy_(movable_tensors(target))
    units = partition(target, "module")
    batches = iter([batch, batch, {"pixel_values": batch["pixel_values"]}])
    with pytest.raises(DataError, match="returned no loss"):
        learn_coefficients(
            target,
            movable_tensors(source),
            units,
            batches,
            dict.fromkeys((unit.name for unit in units), 0.5),
            scratch=scratch,
            lr=0.5,
            steps=3,
        )
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name]), name


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


@pytest.mark.parametrize("method", ["blend", "copy"])
def test_an_infinite_gradient_is_named_and_the_target_restored(method: Any, tmp_path: Path) -> None:
    target = tiny_model("vit")
    before = state_of(target)
    source = saved(perturbed(target, 1), tmp_path / "source")
    overwrite_(movable_tensors(target), before)
    target.get_parameter("classifier.weight").register_hook(lambda gradient: gradient * float("inf"))
    config = GraspConfig(method=method, **NO_TUNING, batch_size=4, num_batches=2)
    with pytest.raises(NonFiniteError, match="the gradient of classifier.weight is NaN or infinite"):
        GraspMerger(target, config).merge([source], train_dataset=tiny_data("vit", 8))
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", ["vit", "bert", "gpt2"])
def test_accumulated_gradients_give_the_cosine_of_one_large_batch(kind: str) -> None:
    """20 samples in batches of 8, 8 and 4, against all 20 at once."""
    source, target, data = perturbed(tiny_model(kind), 1), perturbed(tiny_model(kind), 2), tiny_data(kind, 20)
    if kind == "gpt2":  # rows with another number of labels each
        rows = [
            [t if i < 2 + n % 6 else -100 for i, t in enumerate(row.tolist())]
            for n, row in enumerate(data[:]["labels"])
        ]
        data = data.remove_columns("labels").add_column("labels", rows).with_format("torch")
    small = GraspConfig(method="copy", accumulate_gradients=True, num_batches=3, batch_size=8)
    large = GraspConfig(method="copy", num_batches=1, batch_size=20)
    scores, expected = (gradient_alignment(source, target, data, config=config) for config in (small, large))
    assert scores == pytest.approx(expected, abs=1e-4)
    means = gradient_alignment(source, target, data, config=GraspConfig(method="copy", num_batches=3, batch_size=8))
    assert max(abs((means[name] or 0) - (score or 0)) for name, score in scores.items()) > 1e-3


def test_a_merge_with_accumulated_gradients_copies_what_agrees(tmp_path: Path) -> None:
    source, target = perturbed(tiny_model("vit"), 1), perturbed(tiny_model("vit"), 2)
    settings: dict[str, Any] = {**NO_TUNING, "gate": False, "num_batches": 3, "batch_size": 8}
    config = GraspConfig(method="copy", accumulate_gradients=True, threshold=0.08, unit="module", **settings)
    data, gradients = tiny_data("vit", 20), list[dict[str, Any]]()
    for model in (target, source):
        model.eval()(**data[:]).loss.backward()  # 20 samples in batches of 8, 8 and 4: each of them once
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    step = GraspMerger(target, config).merge([saved(source, tmp_path / "source")], train_dataset=data).steps[0]
    for unit in step.units:
        names = [name for name in gradients[0] if name.rpartition(".")[0] == unit.name or name == unit.name]
        one, other = (torch.cat([own[name].flatten() for name in names]) for own in gradients)
        cosine = float(torch.cosine_similarity(one, other, dim=0))
        assert unit.score == pytest.approx(cosine, abs=1e-4), unit.name
        assert unit.decision == ("moved" if cosine > 0.08 else "kept"), unit.name
    assert {unit.decision for unit in step.units} == {"moved", "kept"}
