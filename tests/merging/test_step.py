"""Labels that teach the coefficients of a source and validate it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification

import grasp_hf.models.finetune
import grasp_hf.validation.labels
from grasp_hf import GraspConfig, GraspMerger, MergeReport
from grasp_hf.data.samples import Samples
from grasp_hf.errors import DataError, NonFiniteError
from grasp_hf.merging.mixed import MixedModel
from grasp_hf.methods.candidates import Candidate
from grasp_hf.models.batches import keep_model_columns
from grasp_hf.record.entries import Reason
from grasp_hf.sources.load import LoadedSource
from grasp_hf.teaching.folds import FoldModels
from grasp_hf.tensors.mixing import Mix
from grasp_hf.tensors.scratch import Scratch
from grasp_hf.tensors.units import movable_tensors, partition
from grasp_hf.validation.labels import Labels
from tests.support.models import NO_TUNING, perturbed, saved, tiny_data, tiny_model
from tests.support.plain import calibrated_losses, class_losses, halves, mean_loss, shuffled_batches

CONFIG: dict[str, Any] = {**NO_TUNING, "method": "blend", "unit": "layer", "batch_size": 4, "num_batches": 3}
LABELS = tiny_data("resnet", 21, seed=1)
HELD_OUT = tiny_data("resnet", 6, seed=2)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, two sources near it, two that have learned the labels, and one after a short training."""
    folder = tmp_path_factory.mktemp("world")
    training: dict[str, Any] = {"batch_size": 8, "training_arguments": {"learning_rate": 0.01}}
    base = perturbed(tiny_model("resnet"), 1, scale=0.3)
    saved(base, folder / "base")
    for number in (1, 2):
        saved(perturbed(deepcopy(base), number, scale=0.2), folder / str(number))
    for name, seed, epochs in (("expert-1", 1, 15), ("expert-2", 2, 15), ("beginner", 1, 3)):
        source = GraspMerger(deepcopy(base), GraspConfig(gate=False, initial_epochs=epochs, seed=seed, **training))
        source.merge([], train_dataset=tiny_data("resnet", 48, seed=1))
        saved(source.model, folder / name)
    return folder


def merger_of(world: Path, **settings: Any) -> GraspMerger:
    return GraspMerger.from_pretrained(str(world / "base"), config=GraspConfig(**{**CONFIG, "gate": True, **settings}))


def unit_of(tensor: str, units: Iterable[str]) -> str:
    return next(unit for unit in units if tensor.startswith(f"{unit}."))


def naive_mix(base: Any, source: Any, mixes: Mapping[str, tuple[float, float]]) -> Any:
    """Return `base + take * (source - base)` by unit: the target is the base, so `keep` only counts for statistics."""
    model = deepcopy(base)
    parameters, ends = dict(model.named_parameters()), source.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            keep, take = mixes[unit_of(name, mixes)]
            if name in parameters:
                tensor.add_(take * (ends[name] - tensor))
            elif tensor.is_floating_point():  # the point of the line with the same proportions
                tensor.add_(take / (keep + take) * (ends[name] - tensor))
            else:
                tensor.copy_(ends[name])
    return model


def naive_coefficients(base: Any, source: Any, units: Sequence[str], labels: Any, seed: int) -> dict[str, Any]:
    """Learn the coefficient of each unit by plain autograd, with three steps of Adam."""
    model, ends = deepcopy(base).eval(), source.state_dict()
    starts, parameters = model.state_dict(), dict(model.named_parameters())
    takes = torch.ones(len(units), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([takes], lr=0.1)
    for step, batch in enumerate(shuffled_batches(labels, 4, 3, seed)):
        adam.param_groups[0]["lr"] = 0.1 * (1 - step / 3)
        mixed = {name: ends[name] for name in starts if name not in parameters}  # all statistics are the source's
        for name in parameters:
            take = takes[units.index(unit_of(name, units))].float()
            mixed[name] = starts[name] + take * (ends[name] - starts[name])
        adam.zero_grad()
        torch.func.functional_call(model, mixed, kwargs=batch).loss.backward()
        adam.step()
        with torch.no_grad():
            takes.clamp_(0, 2)
    return {unit: (0.0, take) for unit, take in zip(units, takes.tolist(), strict=True)}


@pytest.mark.parametrize("evaluates", [False, True])
def test_each_half_of_the_labels_validates_the_coefficients_of_the_other(evaluates: bool, world: Path) -> None:
    merger = merger_of(world)
    base, source = deepcopy(merger.model), GraspMerger.from_pretrained(str(world / "beginner")).model
    held_out = {"eval_dataset": HELD_OUT} if evaluates else {}
    step = merger.merge([str(world / "beginner")], train_dataset=LABELS, **held_out).steps[0]
    assert step.accepted and step.chosen == "blend"

    one, other = (LABELS.select(half) for half in halves(21, merger.config.seed))
    units = [unit.name for unit in step.units]
    fits = [naive_coefficients(base, source, units, half, merger.config.seed + 1) for half in (other, one)]
    mean = {unit: (0.0, (fits[0][unit][1] + fits[1][unit][1]) / 2) for unit in units}
    assert {unit.name: (unit.keep, unit.coefficient) for unit in step.units} == {
        unit: pytest.approx(mix, abs=1e-4) for unit, mix in mean.items()
    }
    assert fits[0] != fits[1] != mean, "each half taught different coefficients"

    samples = [one, other, *held_out.values()]
    mixed = [naive_mix(base, source, mixes) for mixes in (*fits, mean)]
    blend, average = (
        torch.cat([calibrated_losses(model, part) for model, part in zip(models, samples, strict=False)])
        for models in (mixed, [source] * 3)
    )
    assert step.candidates["blend"] == pytest.approx(float(blend.mean()), abs=1e-5)
    assert step.candidates["average"] == pytest.approx(float(average.mean()), abs=1e-5)
    assert len(blend) == (27 if evaluates else 21)
    ahead = average - blend
    assert float(ahead.mean()) > float(ahead.std()) / math.sqrt(len(ahead)), "so the blend is chosen"
    parts = [class_losses(model, part) for model, part in zip(mixed, samples, strict=False)]
    assert step.after_transfer["loss"] == pytest.approx(float(torch.cat(parts).mean()), abs=1e-5)
    before = torch.cat([calibrated_losses(base, part) for part in samples])
    assert step.change is not None and step.change.samples == len(blend)
    assert step.change.loss == pytest.approx(float((blend - before).mean()), abs=1e-5)
    for name, value in naive_mix(base, source, mean).state_dict().items():
        torch.testing.assert_close(merger.model.state_dict()[name], value, atol=1e-4, rtol=1e-4)
    assert step.after["loss"] == pytest.approx(mean_loss(mixed[2], *samples), abs=1e-5)


def test_coefficients_that_fail_on_the_other_half_give_way_to_the_average(world: Path) -> None:
    sources = [str(world / "expert-1"), str(world / "expert-2")]
    labels = [(int(label) + (index % 7 == 0)) % 3 for index, label in enumerate(LABELS["labels"])]
    # Only few labels are wrong, so that the average is not undone.
    data = LABELS.remove_columns("labels").add_column("labels", labels)
    merger = merger_of(world, method="average")
    merger.merge(sources[:1], train_dataset=data)
    plain = deepcopy(merger).merge(sources[1:], train_dataset=data).steps[-1]
    assert list(plain.candidates) == ["average"] and plain.row()["decision"] == "merged"
    wild = merger.with_config(GraspConfig(**{**CONFIG, "gate": True, "coefficient_lr": 1.0}))
    step = wild.merge(sources[1:], train_dataset=data).steps[-1]
    assert step.candidates["average"] < step.candidates["blend"] and step.chosen == "average"
    assert step.row()["decision"] == "averaged" and f"blend {step.candidates['blend']:.3f}" in " ".join(step.details())
    assert "averaged, because learned coefficients were not clearly better: expert-2" in wild.report.conclusions()
    assert {(unit.keep, unit.coefficient) for unit in step.units} == {(0.5, 0.5)}


def test_one_mix_after_another_leaves_nothing_of_the_first(world: Path, tmp_path: Path) -> None:
    merger = merger_of(world)
    tensors, source = movable_tensors(merger.model), movable_tensors(perturbed(tiny_model("resnet"), 5))
    before = {name: value.clone() for name, value in tensors.items()}
    scratch = Scratch(tmp_path, tensors)
    for buffer in (scratch.start, scratch.base):
        buffer.copy_(tensors)
    units = partition(merger.model, "layer")
    one, other = units[0].name, units[1].name
    stay = {unit.name: Mix.on_line(0.0) for unit in units}
    samples, collate = Samples(LABELS), keep_model_columns(merger.model, None)
    labels = Labels(merger.model, samples, collate, merger.config, learned=False)
    loaded = LoadedSource(source, {*source})
    mixed = MixedModel(tensors, loaded, units, labels, start=scratch.start, base=scratch.base)

    def put(mixes: dict[str, Mix]) -> None:
        mixed.put(Candidate(mixes, [], {}))

    put({**stay, one: Mix(0.3, 1.2)})
    assert not torch.equal(tensors[units[0].tensors[0]], before[units[0].tensors[0]])
    put({**stay, other: Mix.on_line(1.0)})
    for unit in units:
        for name in unit.tensors:
            assert torch.equal(tensors[name], (source if unit.name == other else before)[name]), name
    mixed.undo()
    assert all(torch.equal(value, before[name]) for name, value in tensors.items())


def test_a_mean_of_fits_that_is_worse_than_they_counts_as_such(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each half validates its own fit only, so the mean of the fits needs a check of its own."""
    merger, broken = merger_of(world), merger_of(world)
    step = merger.merge([str(world / "beginner")], train_dataset=LABELS).steps[0]
    monkeypatch.setattr(Mix, "mean", classmethod(lambda cls, mixes: cls(0.0, -30.0)))
    undone = broken.merge([str(world / "beginner")], train_dataset=LABELS).steps[0]
    assert step.chosen == undone.chosen == "blend" and step.candidates == undone.candidates
    assert step.reason == Reason.HELPS and undone.reason == Reason.NO_EFFECT


def test_where_the_model_has_learned_the_labels_only_evaluation_data_validate(world: Path) -> None:
    merger = merger_of(world, initial_epochs=1)
    step = merger.merge([str(world / "1")], train_dataset=LABELS, eval_dataset=HELD_OUT).steps[0]
    assert step.validated_by == "evaluation data" and set(step.candidates) == {"blend", "average"}
    assert step.change is not None and step.change.samples == len(HELD_OUT)
    assert merger.judge(HELD_OUT).loss == pytest.approx(step.after["loss"])


def teachers(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """Return a list that gets, for each set of batches, the labels that they are drawn from."""
    taught: list[set[int]] = []
    original = Labels.batches

    def batches(self: Labels, labels: Any, seed: int) -> Any:
        taught.append({*getattr(labels, "indices", range(len(labels)))})
        return original(self, labels, seed)

    monkeypatch.setattr(Labels, "batches", batches)
    return taught


def test_without_the_gate_all_labels_teach_and_none_validates(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taught = teachers(monkeypatch)
    step = merger_of(world, gate=False).merge([str(world / "1")], train_dataset=LABELS).steps[0]
    assert step.candidates == {} and step.change is None and step.moved
    assert taught[-1] == {*range(len(LABELS))}


def test_a_single_label_teaches_and_does_not_validate(world: Path) -> None:
    step = merger_of(world).merge([str(world / "1")], train_dataset=LABELS.select([0])).steps[0]
    assert step.validated_by == "" and step.change is None and step.moved


def test_some_of_many_labels_validate_and_all_others_teach(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grasp_hf.validation.labels, "MOST_VALIDATION_LABELS", 9)
    taught = teachers(monkeypatch)
    step = merger_of(world).merge([str(world / "1")], train_dataset=LABELS).steps[0]
    assert step.change is not None and step.change.samples == 9
    assert step.validated_by == "two halves of 9 of the labels"
    first, second = taught[-2:]
    assert len(first) == 17 and len(second) == 16, "21 without one half of the 9"
    assert first | second == {*range(21)} and len(first & second) == 12


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings of the steps since the last call."""
    found = [record.getMessage() for record in caplog.records if record.name == "grasp_hf.validation.labels"]
    caplog.clear()
    return found


def test_a_merge_warns_once_of_few_validation_samples(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    sources = [str(world / "1"), str(world / "2")]
    merger_of(world, method="average").merge(sources, train_dataset=LABELS, eval_dataset=HELD_OUT)
    assert warnings_of(caplog) == [
        "the sources are validated by labels and evaluation data, 27 samples: two models must differ by about 27 points of "
        "accuracy to be told apart; expected at least 100 samples (768 samples tell 5 points apart)"
    ]
    merger_of(world, method="average", initial_epochs=1).merge(sources, train_dataset=LABELS, eval_dataset=HELD_OUT)
    (warning,) = warnings_of(caplog)
    assert warning.startswith("the sources are validated by evaluation data, 6 samples: ")
    merger_of(world, method="average", gate=False).merge(sources, train_dataset=LABELS, eval_dataset=HELD_OUT)
    assert warnings_of(caplog) == [], "they decide nothing"
    merger_of(world, method="average").merge(sources, train_dataset=tiny_data("resnet", 100, seed=1))
    assert warnings_of(caplog) == []


def test_labels_that_were_learned_validate_no_further_fine_tuning(
    world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merger = merger_of(world, final_epochs=2, training_arguments={"learning_rate": 0.01})
    first = merger.merge([str(world / "1")], train_dataset=LABELS).run.final
    assert first is not None and first.validated_by == "2 folds of the labels" and merger.report.finetuned
    before = merger.judge(HELD_OUT).losses
    report = merger.merge([str(world / "expert-1")], train_dataset=LABELS)
    assert report.run.final is not None and (report.run.final.fraction, report.run.final.validated_by) == (1.0, "")
    assert report.run.final.alone is None and report.steps[1].moved and not report.steps[1].validated_by
    assert not torch.equal(merger.judge(HELD_OUT).losses, before)
    assert "the gate is off for this merge" in caplog.text
    last = merger.merge([str(world / "2")], train_dataset=LABELS, eval_dataset=HELD_OUT)
    assert (
        last.run.final is not None and last.run.final.validated_by == last.steps[2].validated_by == "evaluation data"
    )


def test_labels_of_a_fine_tuning_that_was_undone_still_validate(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(sample: dict[str, Any]) -> dict[str, Any]:
        return {"labels": (sample["labels"] + 1) % 3}

    wrong_data, rate = HELD_OUT.map(wrong), {"learning_rate": 0.02}
    knowing = merger_of(world, gate=False, initial_epochs=15, training_arguments=rate)
    knowing.merge([], train_dataset=LABELS.map(wrong))
    before = {name: tensor.clone() for name, tensor in knowing.model.state_dict().items()}
    merger = GraspMerger(knowing.model, GraspConfig(**{**CONFIG, "initial_epochs": 4}, training_arguments=rate))
    monkeypatch.setattr(FoldModels, "fraction", 0.0)
    merger.merge([], train_dataset=LABELS, eval_dataset=wrong_data)
    assert all(torch.equal(before[name], tensor) for name, tensor in merger.model.state_dict().items())
    assert not merger.report.finetuned
    step = merger.merge([str(world / "1")], train_dataset=LABELS, eval_dataset=wrong_data).steps[0]
    assert step.validated_by == "two halves of the labels and evaluation data"


def test_without_the_gate_fine_tuning_keeps_no_weights_to_go_back_to(world: Path) -> None:
    merger = merger_of(world, gate=False)
    with merger.open_run(Samples(LABELS)) as run, run.step() as step:
        assert step.finetune(1, seed=0) is not None
        assert not [*run.scratch.directory.glob("line*")] and run.labels.learned


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_source_with_which_no_loss_is_finite_is_rejected(evaluates: bool, world: Path, tmp_path: Path) -> None:
    source = perturbed(tiny_model("resnet"), 1, scale=0.3)
    source.get_buffer("resnet.embedder.embedder.normalization.running_var").fill_(-50)  # its root is NaN
    data: dict[str, Any] = {"train_dataset": LABELS, "eval_dataset": HELD_OUT if evaluates else None}
    sources = [saved(source, tmp_path / "huge"), str(world / "expert-1")]
    merger = merger_of(world)
    before = {name: tensor.clone() for name, tensor in merger.model.state_dict().items()}
    step = merger.merge(sources[:1], **data).steps[0]
    assert (step.accepted, step.reason, step.moved) == (False, Reason.NOT_FINITE, 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in merger.model.state_dict().items())
    assert "rejected (loss NaN or infinite)" in step.summary_line() and "None" not in step.summary_line()
    merger.merge(sources[1:], **data)
    assert merger.report.steps[1].accepted and merger.report.steps[1].moved
    merger.save_pretrained(tmp_path / "merged")
    assert MergeReport.from_json(tmp_path / "merged" / "grasp_report.json") == merger.report
    with pytest.raises(NonFiniteError, match="while merging source 1/1"):
        merger_of(world, gate=False).merge(sources[:1], **data)


def test_halves_of_the_labels_make_as_many_passes_over_them(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    train = grasp_hf.models.finetune.finetune_

    def counted(model: Any, samples: Any, held_out: Any, collator: Any, config: GraspConfig, **rest: Any) -> None:
        made.append((len(samples), config.training_arguments["max_steps"]))
        train(model, samples, held_out, collator, config, **rest)

    monkeypatch.setattr("grasp_hf.models.finetune.finetune_", counted)
    merger = merger_of(world, training_arguments={"max_steps": 21})
    with merger.open_run(Samples(LABELS)) as run, run.step() as step:
        step.finetune(1, seed=0)
    assert sorted(made) == [(10, 10), (11, 11)]


def test_a_batch_that_the_model_cannot_take_is_named_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model("bert")
    merger = GraspMerger(model, GraspConfig(num_batches=1, batch_size=4, **NO_TUNING))
    longer = [{"input_ids": torch.ones(600, dtype=torch.long), "labels": 0} for _ in range(4)]
    expected = r"^train_dataset: the BertForSequenceClassification cannot take a batch of input_ids \(4, 600\), labels"
    with pytest.raises(DataError, match=expected):
        merger.merge([], train_dataset=longer)
    columns = [{"input_ids": torch.ones(3, dtype=torch.long), "labels": 1.0} for _ in range(4)]  # of pandas, say
    with pytest.raises(
        DataError, match="^train_dataset: the BertFor.* cannot take a batch of input_ids .4, 3., labels"
    ):
        merger.merge([], train_dataset=columns)
    assert model.config.problem_type is None
    merger.merge([], train_dataset=tiny_data("bert", 8))
    model.state_dict()["classifier.weight"].fill_(math.inf)
    with pytest.raises(NonFiniteError, match="^the loss is nan on a batch"):
        merger.merge([], train_dataset=tiny_data("bert", 8))
    model.config.return_dict = False
    with pytest.raises(DataError, match="BertForSequenceClassification cannot take a batch .*: 'tuple' object has no"):
        merger.merge([], train_dataset=tiny_data("bert", 8))


def test_a_forward_that_does_not_name_its_inputs_takes_all() -> None:
    class Wrapped(BertForSequenceClassification):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    sample = {"input_ids": torch.arange(3), "labels": 1, "row": 7}
    config: Any = tiny_model("bert").config
    models = Wrapped(config), BertForSequenceClassification(config)
    wrapped, plain = (keep_model_columns(model, None) for model in models)
    assert {*wrapped([sample])} == {"input_ids", "labels", "row"} and {*plain([sample])} == {"input_ids", "labels"}


def test_samples_of_unequal_length_make_no_batch_and_are_named() -> None:
    samples = [{"input_ids": torch.arange(length), "labels": 0} for length in (3, 5, 4, 6)]
    with pytest.raises(DataError, match="^train_dataset: no batch can be made of its samples: .*equal size"):
        GraspMerger(tiny_model("bert"), GraspConfig(**CONFIG)).merge([], train_dataset=samples)
