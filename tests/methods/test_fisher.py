"""A mean of models that come one at a time, weighted by Fisher information."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.errors import DataError, NonFiniteError
from grasp_hf.methods.fisher import _draw_labels, fisher_, running_fisher
from grasp_hf.models.batches import Batch, keep_model_columns, sample_batches
from grasp_hf.tensors.mapped import MappedTensors
from grasp_hf.tensors.mixing import Mix, blend_
from grasp_hf.tensors.scratch import Scratch
from grasp_hf.tensors.units import movable_tensors, partition
from tests.support.models import NO_TUNING, perturbed, saved, tiny_data, tiny_model
from tests.support.plain import calibrated_losses, halves, mean_loss

Tensors = dict[str, Tensor]
CLASSES = 3
LABELS = tiny_data("resnet", 24, seed=1)


def batches_of(kind: str, samples: int = 8, size: int = 4) -> list[Batch]:
    rows = tiny_data(kind, samples, seed=1).with_format("torch")
    return [rows[start : start + size] for start in range(0, samples, size)]


def sure(model: PreTrainedModel, label: int, logit: float = 12.0) -> PreTrainedModel:
    """Change `model` so that it is sure of one class and no other label is drawn; return it. Its gradients are small."""
    with torch.no_grad():
        model.get_parameter("classifier.bias").copy_(torch.where(torch.arange(CLASSES) == label, logit, -2.0))
    return model


def naive_fisher(model: PreTrainedModel, batches: list[Batch], label: int) -> Tensors:
    """Return the sum over batches of the squared gradient with that label, in double precision."""
    found = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        labels = torch.full_like(batch["labels"], label)
        (len(labels) * model(**{**batch, "labels": labels}).loss).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[name] += parameter.grad.double() ** 2
    return found


class Mean:
    """A mean of models that come one at a time."""

    def __init__(self, model: PreTrainedModel, directory: Path) -> None:
        self.model, self.tensors = model, movable_tensors(model)
        self.scratch = Scratch(directory, self.tensors)
        self.units = partition(model, "layer")

    def measure(self, source: PreTrainedModel, average: float, batches: list[Batch]) -> dict[str, Mix]:
        """Measure a model of which a plain mean takes `average`."""
        self.scratch.start.copy_(self.tensors)
        fractions = dict.fromkeys((unit.name for unit in self.units), average)
        values = movable_tensors(source)
        return running_fisher(self.scratch).measure(
            self.model, values, self.scratch.start, self.units, fractions, batches, seed=0
        )

    def add(self, source: PreTrainedModel, average: float, batches: list[Batch]) -> None:
        """Merge the model into the mean."""
        mixes = self.measure(source, average, batches)
        values, fisher = movable_tensors(source), running_fisher(self.scratch)
        blend_(self.tensors, self.scratch.start, values, self.units, mixes, fractions=fisher.fractions)
        fisher.add()

    def fraction(self, name: str) -> Tensor | None:
        """Return the fraction of the measured model for each element of a tensor; `None` for a statistic."""
        found = running_fisher(self.scratch).fractions(name)
        return None if found is None else torch.cat([*found])


@pytest.mark.parametrize("kind", ["bert", "resnet"])
def test_models_that_come_one_at_a_time_give_the_mean_of_all(kind: str, tmp_path: Path) -> None:
    batches, sources = batches_of(kind), []
    for label in range(CLASSES):
        sources.append(perturbed(tiny_model(kind), label + 1, scale=0.1).eval())
        if kind == "bert":
            sure(sources[-1], label)
    mean = Mean(tiny_model(kind).eval(), tmp_path)
    for number, source in enumerate(sources, start=1):
        mean.add(source, 1 / number, batches)
    if kind == "bert":
        fishers = [naive_fisher(source, batches, label) for label, source in enumerate(sources)]
    else:
        fishers = []
        for source in sources:
            buffer = {name: torch.zeros_like(tensor) for name, tensor in source.named_parameters()}
            fisher_(buffer, source, batches, buffer, seed=0)
            fishers.append({name: tensor.double() for name, tensor in buffer.items()})
    for name, found in mean.model.named_parameters():
        values = [source.get_parameter(name).double() for source in sources]
        total = sum(fisher[name] for fisher in fishers) + 3e-30
        expected = sum((f[name] + 1e-30) * v for f, v in zip(fishers, values, strict=True)) / total
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4, msg=name)
        assert name.startswith("bert.embeddings") or not torch.allclose(found.double(), sum(values) / 3, atol=1e-4)


def test_an_element_without_fisher_information_gets_the_plain_mean(tmp_path: Path) -> None:
    batches, sources = batches_of("bert"), [perturbed(tiny_model("bert"), n).eval() for n in range(3)]
    mean = Mean(tiny_model("bert").eval(), tmp_path)
    for number, source in enumerate(sources, start=1):
        mean.add(source, 1 / number, batches)
    unused = "bert.embeddings.position_embeddings.weight"  # no text is longer than 8 tokens
    plain = torch.stack([source.get_parameter(unused) for source in sources]).mean(0)
    torch.testing.assert_close(mean.model.get_parameter(unused)[8:], plain[8:])
    assert not torch.allclose(mean.model.get_parameter(unused)[:8], plain[:8])


def test_statistics_are_mixed_as_the_weights_of_their_unit(tmp_path: Path) -> None:
    batches, (one, other) = batches_of("resnet"), [perturbed(tiny_model("resnet"), n).eval() for n in range(2)]
    mean = Mean(one, tmp_path)
    before = {name: tensor.clone() for name, tensor in mean.tensors.items()}
    mixes, fraction = mean.measure(other, 0.5, batches), running_fisher(mean.scratch).fractions
    blend_(mean.tensors, mean.scratch.start, movable_tensors(other), mean.units, mixes, fractions=fraction)
    seen = 0
    for unit in mean.units:
        weights = [fraction for fraction in map(mean.fraction, unit.tensors) if fraction is not None]
        take = torch.cat([fraction.flatten() for fraction in weights]).mean().item()
        assert mixes[unit.name] == pytest.approx((1 - take, take)) and 0.01 < take < 0.99
        for name in unit.tensors:
            if name.endswith("running_mean"):
                expected = torch.lerp(before[name], movable_tensors(other)[name], take)
                torch.testing.assert_close(mean.tensors[name], expected)
                seen += 1
    assert seen


def test_a_mean_of_unknown_models_counts_as_often_as_it_has_models(tmp_path: Path) -> None:
    batches = batches_of("bert")
    target, source = (sure(perturbed(tiny_model("bert"), n).eval(), n) for n in range(2))
    mean = Mean(target, tmp_path)
    mean.measure(source, 0.25, batches)
    own, other = naive_fisher(target, batches, 0), naive_fisher(source, batches, 1)
    for name in ("classifier.weight", "bert.encoder.layer.0.output.dense.weight"):
        expected = other[name] / (other[name] + 3 * own[name])
        torch.testing.assert_close(mean.fraction(name), expected.float(), rtol=1e-3, atol=1e-4)


def test_only_models_that_were_added_count(tmp_path: Path) -> None:
    batches, name = batches_of("bert"), "classifier.weight"
    target, rejected, source = (perturbed(tiny_model("bert"), n).eval() for n in range(3))

    def fraction(*others: PreTrainedModel, plain: float = 0.5, add: bool = False, forget: bool = False) -> Tensor:
        directory = tmp_path / f"{len(others)}-{plain}-{add}-{forget}"
        directory.mkdir()
        mean = Mean(deepcopy(target), directory)
        for other in others:
            mean.measure(other, plain, batches)
            if add:
                running_fisher(mean.scratch).add()
            if forget:
                mean.scratch.make_room()
        mean.measure(source, 0.5, batches)
        found = mean.fraction(name)
        assert found is not None
        return found

    alone = fraction()
    assert torch.equal(fraction(rejected), alone)
    assert torch.equal(fraction(rejected, plain=1.0), alone)
    assert (fraction(rejected, add=True) < alone).all()
    assert not torch.equal(fraction(rejected, plain=1.0, add=True), alone)
    assert torch.equal(fraction(rejected, add=True, forget=True), alone)


def test_the_fisher_of_the_mean_is_measured_once(tmp_path: Path) -> None:
    batches, (target, *others) = batches_of("bert"), [perturbed(tiny_model("bert"), n).eval() for n in range(4)]
    mean, passes = Mean(target, tmp_path), []
    target.register_forward_hook(lambda *_: passes.append(1))
    counts = []
    for other in others:
        mean.measure(other, 0.5, batches)
        counts.append(len(passes))
        passes.clear()
    assert counts == [8, 4, 4]  # two batches, labels drawn and learned, of the mean and of each model


def test_half_precision_weighs_as_single_precision_does(tmp_path: Path) -> None:
    """The squares of most gradients are too small for float16."""
    batches, fractions = batches_of("bert"), []
    for dtype in (torch.float32, torch.float16):
        pair = (sure(perturbed(tiny_model("bert"), n, scale=0.1).eval(), n, logit=5.0) for n in range(2))
        target, source = (model.half().to(dtype) for model in pair)
        (directory := tmp_path / str(dtype)).mkdir()
        mean = Mean(target, directory)
        mean.measure(source, 0.5, batches)
        found = [mean.fraction(name) for name, _ in target.named_parameters()]
        fractions.append(torch.cat([fraction.flatten() for fraction in found if fraction is not None]))
    assert (
        float((fractions[1] - fractions[0]).abs().median()) < 0.05 < 0.3 < float((fractions[0] - 0.5).abs().median())
    )


def test_a_fisher_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    model = tiny_model("bert").eval()
    buffer = MappedTensors(tmp_path / "buffer", dict(model.named_parameters()))
    model.get_parameter("classifier.weight").register_hook(lambda gradient: gradient * 1e30)
    with pytest.raises(NonFiniteError, match="Fisher information of classifier.weight"):
        fisher_(buffer, model, batches_of("bert"), buffer, seed=0)


def test_labels_that_are_not_classes_are_an_error(tmp_path: Path) -> None:
    model = tiny_model("bert").eval()
    buffer = MappedTensors(tmp_path / "buffer", dict(model.named_parameters()))
    batches = [{**batch, "labels": batch["labels"].float()[:, None].expand(-1, 3)} for batch in batches_of("bert")]
    with pytest.raises(DataError, match="expected one class id"):
        fisher_(buffer, model, batches, buffer, seed=0)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and three sources that have learned something."""
    folder = tmp_path_factory.mktemp("world")
    base = perturbed(tiny_model("resnet"), 1, scale=0.1)
    saved(base, folder / "base")
    for number in (1, 2, 3):
        settings: dict[str, Any] = {"batch_size": 8, "training_arguments": {"learning_rate": 0.003, "use_cpu": True}}
        source = GraspMerger(deepcopy(base), GraspConfig(gate=False, initial_epochs=3, seed=20 + number, **settings))
        source.merge([], train_dataset=tiny_data("resnet", 48, seed=1 + number))
        saved(source.model, folder / str(number))
    return folder


def merged(world: Path, sources: str = "12", **settings: Any) -> GraspMerger:
    """Merge those sources into the base."""
    config: dict[str, Any] = {**NO_TUNING, "method": "blend", "unit": "layer", "gate": True, "batch_size": 4}
    config |= {"num_batches": 3, "coefficient_lr": 1.0} | settings  # at that rate learned coefficients are unreliable
    merger = GraspMerger.from_pretrained(str(world / "base"), config=GraspConfig(**config))
    merger.merge([str(world / name) for name in sources], train_dataset=LABELS)
    return merger


def fisher_of(source: PreTrainedModel, merger: GraspMerger, seed: int) -> Tensors:
    """Return the Fisher information of a source on the batches of the step with that seed."""
    collate = keep_model_columns(merger.model, None)
    batches = [*sample_batches(LABELS, collate, Accelerator(), merger.config, seed=seed)]
    buffer = {name: torch.zeros_like(tensor) for name, tensor in source.named_parameters()}
    fisher_(buffer, source, batches, buffer, seed=seed)
    return {name: tensor + 1e-30 for name, tensor in buffer.items()}


def calibrated(merger: GraspMerger) -> float:
    """Return the loss of the present model by which candidates are compared."""
    parts = [LABELS.select(half) for half in halves(len(LABELS), merger.config.seed)]
    return float(torch.cat([calibrated_losses(merger.model, part) for part in parts]).mean())


def test_the_fisher_average_is_merged_if_its_loss_on_the_labels_is_clearly_lower(world: Path) -> None:
    merger = merged(world)
    first, second = merger.report.steps
    assert list(first.candidates) == ["blend", "average"] and first.chosen == "average"  # the mean of one model
    assert list(second.candidates) == ["blend", "average", "fisher"] and second.chosen == "fisher" and second.accepted
    assert second.decision == "averaged by Fisher" and f"fisher {second.candidates['fisher']:.3f}" in " ".join(
        second.details()
    )
    assert "averaged, because learned coefficients were not clearly better: 1, 2" in merger.report.conclusions()

    sources = [GraspMerger.from_pretrained(str(world / name)).model.eval() for name in "12"]
    fishers = [fisher_of(source, merger, merger.config.seed + 2) for source in sources]
    for name, found in merger.model.named_parameters():
        (a, b), (f, g) = ([s.get_parameter(name) for s in sources], [fisher[name] for fisher in fishers])
        torch.testing.assert_close(found, (f * a + g * b) / (f + g), rtol=1e-4, atol=1e-5, msg=name)
    assert second.candidates["fisher"] == pytest.approx(calibrated(merger), abs=1e-6)
    assert second.after["loss"] == pytest.approx(mean_loss(merger.model, LABELS), abs=1e-6)
    takes = {name: fishers[1][name] / (fishers[0][name] + fishers[1][name]) for name in fishers[0]}
    for unit in second.units:
        own = [take.flatten() for name, take in takes.items() if name.startswith(f"{unit.name}.")]
        assert unit.coefficient == pytest.approx(float(torch.cat(own).mean()), abs=1e-5)
        assert unit.keep == pytest.approx(1 - unit.coefficient)


def test_the_next_source_is_weighed_against_the_sum_of_those_before(world: Path) -> None:
    merger, sources = merged(world), [GraspMerger.from_pretrained(str(world / name)).model.eval() for name in "123"]
    step = merged(world, sources="123").report.steps[2]
    seed = merger.config.seed
    f, g, h = (fisher_of(source, merger, seed + at) for source, at in zip(sources, (2, 2, 3), strict=True))
    takes = {name: h[name] / (f[name] + g[name] + h[name]) for name in f}
    sizes = {unit.name: unit.tensors for unit in partition(merger.model, "layer")}
    tensors, third = movable_tensors(merger.model), movable_tensors(sources[2])
    for names in sizes.values():
        mean = float(torch.cat([takes[name].flatten() for name in names if name in takes]).mean())
        for name in names:
            if tensors[name].is_floating_point():
                fraction = takes.get(name, torch.tensor(mean))
                tensors[name].data.copy_(torch.lerp(tensors[name].detach(), third[name].detach(), fraction))
    assert step.candidates["fisher"] == pytest.approx(calibrated(merger), rel=1e-3)


def test_fine_tuning_makes_the_mean_forget_its_models(world: Path) -> None:
    """After a fine-tuning, a merge measures as if each source came in a merge of its own."""
    settings: dict[str, Any] = {"finetune_epochs": 1, "training_arguments": {"learning_rate": 0.003, "use_cpu": True}}
    held_out = tiny_data("resnet", 24, seed=3)
    merger, other = (merged(world, sources="", **settings) for _ in range(2))
    names = [str(world / name) for name in "123"]
    steps = merger.merge(names, train_dataset=LABELS, eval_dataset=held_out).steps
    for name in names:
        other.merge_source(name, train_dataset=LABELS, eval_dataset=held_out)
    # Later sources differ, because the coefficients of `blend` count from the start of each merge.
    assert steps[1].candidates["fisher"] == other.report.steps[1].candidates["fisher"]


def test_without_the_gate_no_average_is_a_candidate(world: Path) -> None:
    assert [step.candidates for step in merged(world, gate=False).report.steps] == [{}, {}]


def test_a_model_without_classes_has_no_fisher_average(tmp_path: Path) -> None:
    base = tiny_model("bert", labels=["rating"])
    rows = tiny_data("bert", 12, seed=1)
    numbers = [float(label) for label in rows["labels"]]
    data = rows.remove_columns("labels").add_column("labels", numbers)
    saved(base, tmp_path / "base")
    for name in "12":
        source = GraspMerger(deepcopy(base), GraspConfig(gate=False, initial_epochs=4, seed=int(name), batch_size=4))
        source.merge([], train_dataset=data)
        saved(source.model, tmp_path / name)
    merger = GraspMerger.from_pretrained(
        str(tmp_path / "base"), config=GraspConfig(method="blend", **NO_TUNING, num_batches=2, batch_size=4)
    )
    report = merger.merge([str(tmp_path / "1"), str(tmp_path / "2")], train_dataset=data)
    assert [set(step.candidates) for step in report.steps] == [{"blend", "average"}] * 2
    assert report.steps[0].accepted


def test_labels_of_an_encoder_decoder_are_drawn_for_the_prefix_that_they_are_learned_with() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 12, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    sizes |= {"decoder_start_token_id": 0, "pad_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    perturbed(model, 1, scale=0.5)
    tokens = torch.randint(1, 12, (2, 4, 6), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens[0], "labels": tokens[1]}
    with torch.no_grad():
        drawn = _draw_labels(model, batch)
        assert not torch.equal(drawn["labels"], batch["labels"])
        assert torch.equal(model(**drawn).logits, model(**batch).logits)
        given = _draw_labels(model, {**batch, "decoder_input_ids": tokens[0]})
    assert torch.equal(given["decoder_input_ids"], tokens[0])
