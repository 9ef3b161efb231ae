"""The gate: how much of a source and of a fine-tuning is kept."""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.errors import ConfigError
from grasp_hf.record.entries import ChangeReport, Reason
from grasp_hf.record.report import MergeReport
from grasp_hf.tensors.units import movable_tensors
from grasp_hf.validation.changes import Change, paired_change
from grasp_hf.validation.gate import choose_candidate
from grasp_hf.validation.losses import SampleLosses
from tests.support.models import NO_TUNING, perturbed, saved, tiny_data, tiny_model
from tests.support.plain import calibrated_losses, halves

HELPS, HARMS, NO_EFFECT, ALONE = Reason.HELPS, Reason.HARMS, Reason.NO_EFFECT, Reason.BETTER_ALONE
Losses = Callable[[float, Sequence[float]], Sequence[float]]  # weight of a model, samples -> losses


def losses_of(losses: Sequence[float]) -> SampleLosses:
    found = torch.tensor(losses, dtype=torch.float64)
    return SampleLosses(found, torch.ones_like(found), found, None)


@pytest.mark.parametrize(
    ("mean", "error", "samples", "verdict"),
    [
        (-0.1, 0.01, 10, HELPS),
        (-0.227, 0.1, 10, HELPS),  # half of the interval of ten samples is 2.262 standard errors
        (-0.226, 0.1, 10, NO_EFFECT),
        (0.226, 0.1, 10, NO_EFFECT),
        (0.227, 0.1, 10, HARMS),
        (0.0, 0.0, 10, NO_EFFECT),
        (-0.5, 0.0, 1, NO_EFFECT),  # a single sample has no interval
    ],
)
def test_one_interval_decides_on_a_source(mean: float, error: float, samples: int, verdict: Reason) -> None:
    assert Change(mean, error, samples).verdict == verdict


@pytest.mark.parametrize("seed", range(20))
def test_the_printed_interval_and_the_verdict_never_contradict_each_other(seed: int) -> None:
    torch.manual_seed(seed)
    before = torch.rand(12).tolist()
    after = (torch.tensor(before) + 0.3 * torch.randn(12) + (seed - 10) / 20).tolist()
    change = paired_change(losses_of(before), losses_of(after))
    printed = change.report()
    assert printed.half_interval is not None
    low, high = printed.loss - printed.half_interval, printed.loss + printed.half_interval
    differences = [b - a for a, b in zip(before, after, strict=True)]
    expected = 2.201 * torch.tensor(differences).double().std() / 12**0.5  # Student's t with 11 degrees of freedom
    assert printed.half_interval == pytest.approx(float(expected), rel=1e-3)
    assert printed.verdict == change.verdict == (HELPS if high < 0 else HARMS if low > 0 else NO_EFFECT)


@pytest.mark.parametrize("scale", [1e-12, 1e-5, 1e-3, 1.0, 50.0])
def test_the_interval_as_printed_shows_the_verdict(scale: float) -> None:
    """A reader who knows only the printed text comes to the same verdict, also close to the border."""
    draw = random.Random(0)
    seen = set()
    for _ in range(3000):
        half = scale * draw.random()
        loss = draw.choice((-1, 1)) * draw.choice((half, half * (1 + draw.gauss(0, 1e-4)), scale * draw.random()))
        change = ChangeReport(loss, half, 10, None)
        found = re.fullmatch(r"([-+]\S+) ± (\S+)", str(change))
        assert found
        shown, spread = float(found[1]), float(found[2])
        verdict = HELPS if shown + spread < 0 else HARMS if shown - spread > 0 else NO_EFFECT
        assert change.verdict == verdict, str(change)
        seen.add(verdict)
    assert seen == {HELPS, HARMS, NO_EFFECT}
    assert str(ChangeReport(-0.0451, 0.0449, 10, None)) == "-0.0451 ± 0.0449"
    assert str(ChangeReport(-0.0449, 0.0451, 10, None)) == "-0.045 ± 0.045"


@pytest.mark.parametrize(
    ("differences", "half", "verdict", "more"),
    [
        # Mean -2, standard deviation 1, so a standard error of 0.577; Student's t with 2 degrees of freedom is 4.303.
        ([-1.0, -2.0, -3.0], 2.484, NO_EFFECT, 4),
        # One sample more: a standard deviation of 0.816, a standard error of 0.408, and a t of 3.182.
        ([-1.0, -2.0, -3.0, -2.0], 1.299, HELPS, None),
        ([1.0, 2.0, 3.0, 2.0], 1.299, HARMS, None),
        # Mean 0.25, standard deviation 1.5, standard error 0.75: 4 (1.96 * 0.75 / 0.25)^2 = 138.3 samples.
        ([1.0, -2.0, 1.0, 1.0], 2.387, NO_EFFECT, 139),
    ],
)
def test_a_verdict_by_hand(differences: list[float], half: float, verdict: Reason, more: int | None) -> None:
    change = paired_change(losses_of([5.0] * len(differences)), losses_of([5.0 + d for d in differences])).report()
    mean = sum(differences) / len(differences)
    assert (change.verdict, str(change)) == (verdict, f"{mean:+.3f} ± {half:.3f}")
    assert change.doubt == (f"{more} samples would tell this change from none" if more else "")


def test_a_change_that_is_seen_leaves_no_doubt() -> None:
    """With very many samples, the t of the interval is a little below the rounded 1.96 of the number of samples."""
    change = Change(-1.95998e-3, 1e-3, 2_000_000).report()
    assert change.samples_to_see and change.samples_to_see > change.samples
    assert (change.verdict, change.doubt) == (HELPS, "")


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        ({}, "plain"),
        ({"a": (-0.1, 0.01)}, "a"),
        ({"a": (-0.1, 0.11)}, "plain"),  # within one standard error of the difference
        ({"a": (-0.1, 0.09)}, "a"),
        ({"a": (0.1, 0.01)}, "plain"),
        ({"a": (-0.3, 0.4), "b": (-0.1, 0.01)}, "b"),  # only the second lowest is clearly below the plain one
        ({"a": (-0.2, 0.1), "b": (-0.3, 0.1)}, "b"),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_the_plain_candidate_is_chosen_unless_another_is_better_beyond_the_noise(
    others: dict[str, tuple[float, float]], chosen: str, first: bool
) -> None:
    """Each difference has this mean and this standard error; the losses of the samples vary much more."""
    plain = [1.0, 5.0, 2.0, 8.0]
    signs = [math.sqrt(3) * sign for sign in (1, -1, -1, 1)]  # a standard deviation of 2, and so a standard error of 1

    def candidate(mean: float, error: float) -> SampleLosses:
        return losses_of([loss + mean + error * sign for loss, sign in zip(plain, signs, strict=True)])

    found = {name: candidate(*values) for name, values in others.items()}
    simple = {"plain": losses_of(plain)}
    assert choose_candidate({**simple, **found} if first else {**found, **simple}, "plain") == chosen


def test_without_a_plain_candidate_the_lowest_loss_decides() -> None:
    assert choose_candidate({"a": losses_of([1.0, 2.0]), "b": losses_of([0.0, 2.9])}, "plain") == "b"


LEARNING: dict[str, Any] = {"batch_size": 8, "training_arguments": {"learning_rate": 0.01}}


def learned(kind: str, folder: Path, epochs: int = 15) -> str:
    """Save a model that has learned the data, and return its folder."""
    return saved(expert_of(kind, epochs), folder)


@cache
def expert_of(kind: str, epochs: int) -> PreTrainedModel:
    config = GraspConfig(gate=False, initial_epochs=epochs, final_epochs=0, order="given", **LEARNING)
    expert = GraspMerger(tiny_model(kind), config)
    expert.merge([], train_dataset=tiny_data(kind, 48, seed=1))
    return expert.model


@pytest.mark.parametrize("evaluates", [False, True])
def test_where_no_source_helps_the_result_is_that_of_fine_tuning_alone(evaluates: bool, tmp_path: Path) -> None:
    base = learned("resnet", tmp_path / "base")
    noise = []
    for seed in (1, 2):
        model = GraspMerger.from_pretrained(base).model
        noise.append(saved(perturbed(model, seed, scale=1.0), tmp_path / f"noise-{seed}"))
    config = GraspConfig(order="given", final_epochs=2, **LEARNING)
    first = GraspConfig(order="given", initial_epochs=2, final_epochs=0, **LEARNING)
    data = {"train_dataset": tiny_data("resnet", 24, seed=1)}
    data |= {"eval_dataset": tiny_data("resnet", 24, seed=2)} if evaluates else {}
    merger, alone = (GraspMerger.from_pretrained(base, config=settings) for settings in (config, first))
    report = merger.merge(noise, **data)
    alone.merge([], **data)
    for name, value in movable_tensors(alone.model).items():
        assert torch.equal(value, movable_tensors(merger.model)[name]), name
    assert [step.accepted for step in report.steps] == [False, False]
    for step in report.steps:
        row = step.row()
        assert row["decision"] == "rejected" and step.moved == 0
        assert step.after_transfer["loss"] > step.before["loss"] == step.after["loss"]
        assert isinstance(step.change, ChangeReport) and step.change.loss > (step.change.half_interval or 0)
        assert row["change"] == f"{step.change.loss:+.3f} ± {step.change.half_interval:.3f}"
        losses = f"loss {row['loss before']} -> {row['loss after']}, calibrated {step.change}"
        assert step.reason == HARMS and step.summary_line() == f"{step.name}: rejected (harms), {losses}"
        labels = "labels"
        assert step.validated_by == (f"{labels} and evaluation data" if evaluates else labels)
        assert step.change.samples == (48 if evaluates else 24)
    rejected = "rejected: noise-1 (harms), noise-2 (harms)"
    assert report.conclusions()[:2] == ["0 of 2 sources merged", rejected]


def dead(model: Any) -> Any:
    """Change a ViT so that all images get the same logits and only the classifier's bias has a gradient; return it."""
    for name in ("vit.layernorm", "classifier"):
        for parameter in model.get_submodule(name).parameters():
            parameter.data.zero_()
    return model


@pytest.mark.parametrize("method", ["average", "weighted"])
@pytest.mark.parametrize("evaluates", [True, False])
def test_sources_that_only_make_a_worse_start_are_undone(method: Any, evaluates: bool, tmp_path: Path) -> None:
    """The source is the better model before the fine-tuning, and the worse one after it."""
    model = GraspMerger.from_pretrained(learned("vit", tmp_path / "expert")).model
    for parameter in model.get_submodule("classifier").parameters():
        parameter.data = parameter.data.roll(1, 0)  # sure of the wrong class, which a short fine-tuning corrects
    base = saved(model, tmp_path / "base")
    source = saved(dead(model), tmp_path / "source")
    config = GraspConfig(method=method, order="given", final_epochs=12, **LEARNING)
    data = {"train_dataset": tiny_data("vit", 32, seed=1)}
    data |= {"eval_dataset": tiny_data("vit", 24, seed=2)} if evaluates else {}
    merger, alone = (GraspMerger.from_pretrained(base, config=config) for _ in range(2))
    samples = tiny_data("vit", 24, seed=2)
    found = alone.finetuned_alone(1, samples, **data)
    report = merger.merge([source], **data)
    (step,) = report.steps
    assert step.after_transfer["loss"] < step.before["loss"], "the source is better before the fine-tuning"
    assert report.run.final is not None and report.run.final.without_sources and report.run.final.alone is not None
    assert torch.equal(merger.judge(samples).losses, found.losses), "fine-tuning alone is better in the end"
    merged, gain = report.run.final.losses[str(report.run.final.fraction)], report.run.final.gain
    assert report.run.final.alone < merged and report.run.final.loss == report.run.final.alone
    assert gain is not None and gain.samples == (24 if evaluates else 32) and gain.half_interval is not None
    assert gain.loss == pytest.approx(merged - report.run.final.alone)
    undone = "at the end: fine-tuned without the sources of this merge, which were undone"
    assert any(sentence.startswith(undone) for sentence in report.conclusions())
    assert report.outcome()[0].startswith(
        f"{gain.of_sources()}: from fine-tuning alone to the merge, calibrated loss {report.run.final.alone:.3f} -> {merged:.3f} "
        f"({gain}), on {gain.samples} samples of {report.run.final.validated_by}"
    )
    assert (step.decision, step.reason, step.moved) == ("rejected", ALONE, 0)
    assert {unit.decision for unit in step.units} <= {"undone", "kept", "undefined"}
    assert report.conclusions()[:2] == ["0 of 1 sources merged", f"rejected: source ({ALONE})"]
    report.to_json(tmp_path / "report.json")
    assert MergeReport.from_json(tmp_path / "report.json") == report
    if evaluates:
        assert report.run.final.alone <= found.loss == report.run.final.after["loss"]


def test_a_regression_is_validated_too(tmp_path: Path) -> None:
    """The model returns one loss for a whole batch, and there is only one batch."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**size, intermediate_size=16, id2label={0: ""}))
    texts = [[n, n + 1, n + 2] for n in range(24)]
    data = Dataset.from_dict({"input_ids": texts, "labels": [n / 24 for n in range(24)]}).with_format("torch")
    expert = GraspMerger(model, GraspConfig(gate=False, initial_epochs=20, final_epochs=0, **LEARNING))
    expert.merge([], train_dataset=data)
    base = saved(model, tmp_path / "base")
    noise = saved(perturbed(model, 1, scale=1.0), tmp_path / "noise")
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(final_epochs=0, order="given", batch_size=32))
    report = merger.merge([noise, base], train_dataset=data)
    assert [step.accepted for step in report.steps] == [False, True]
    assert report.steps[0].change is not None and report.steps[0].change.samples == 24


def test_a_source_that_has_learned_the_task_is_merged_and_noise_is_not(tmp_path: Path) -> None:
    expert = learned("vit", tmp_path / "expert")
    noise = saved(perturbed(tiny_model("vit"), 3, scale=1.0), tmp_path / "noise")
    merger = GraspMerger(tiny_model("vit"), GraspConfig(final_epochs=0, **LEARNING))
    report = merger.merge([noise, expert], train_dataset=tiny_data("vit", 24, seed=5))
    assert [step.name for step in report.steps] == ["expert", "noise"] and report.steps[0].accepted
    assert report.steps[1].weight < report.steps[0].weight / 5
    helped = report.steps[0].change
    assert helped is not None and report.steps[0].chosen == "average", "the average of one source is that source"
    labels = tiny_data("vit", 24, seed=5)
    before, after = (
        calibrated_losses(model, labels) for model in (tiny_model("vit"), GraspMerger.from_pretrained(expert).model)
    )
    assert helped.loss == pytest.approx(float((after - before).mean()), abs=1e-5)
    assert report.steps[0].reason == HELPS and report.steps[1].reason in (HARMS, NO_EFFECT)


def test_without_the_gate_noise_stays(tmp_path: Path) -> None:
    base = learned("resnet", tmp_path / "base")
    noise = saved(perturbed(GraspMerger.from_pretrained(base).model, 1, scale=1.0), tmp_path / "noise")
    config = GraspConfig(method="average", gate=False, batch_size=8, **NO_TUNING)
    merger = GraspMerger.from_pretrained(base, config=config)
    merger.merge([noise], train_dataset=tiny_data("resnet", 24), eval_dataset=tiny_data("resnet", 24, seed=2))
    assert merger.report.steps[0].accepted and merger.report.steps[0].reason == ""
    expected = movable_tensors(GraspMerger.from_pretrained(noise).model)
    for name, value in movable_tensors(merger.model).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("seed", range(3))
def test_no_step_leaves_the_model_above_the_loss_that_it_started_from(seed: int, tmp_path: Path) -> None:
    base, expert = learned("resnet", tmp_path / "base", epochs=2), learned("resnet", tmp_path / "expert", epochs=6)
    sources = []
    for number, scale in enumerate((0.02, 5.0, 0.05, 0.1)):
        model = GraspMerger.from_pretrained(expert).model
        sources.append(saved(perturbed(model, 10 * seed + number, scale=scale), tmp_path / str(number)))
    config = GraspConfig(order="given", final_epochs=1, **LEARNING)
    merger, twin = (GraspMerger.from_pretrained(base, config=config) for _ in range(2))
    samples = tiny_data("resnet", 24, seed=2)
    parts = [samples.select(half) for half in halves(24, config.seed)] + [samples]

    def loss() -> float:
        return float(torch.cat([calibrated_losses(twin.model, part) for part in parts]).mean())

    floor = loss()
    for source in sources:
        twin.merge_source(source, train_dataset=samples, eval_dataset=samples)
        assert loss() <= floor + 1e-6
    start = merger.judge(samples).calibrated_loss
    report = merger.merge(sources, train_dataset=samples, eval_dataset=samples)
    assert 0 < sum(step.accepted for step in report.steps) < 4
    for step in report.steps:
        if not step.accepted:
            assert step.after == step.before
    last = [step.change for step in report.steps if step.accepted and step.change]
    assert start + sum(change.loss for change in last) <= start + 1e-9
    assert report.run.final is not None
    after = merger.judge(samples)
    assert (
        after.calibrated_loss <= start + sum(change.loss for change in last) + 1e-9
        or after.loss <= report.run.final.losses["0.0"]
    )


def test_labels_that_the_model_has_learned_do_not_validate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = learned("resnet", tmp_path / "base")
    noise = saved(perturbed(GraspMerger.from_pretrained(base).model, 1, scale=1.0), tmp_path / "noise")
    config = GraspConfig(finetune_epochs=1, final_epochs=0, order="given", **LEARNING)
    merger = GraspMerger.from_pretrained(base, config=config)
    report = merger.merge([noise, noise], train_dataset=tiny_data("resnet", 12))
    assert "the gate is off for this merge" in caplog.text
    assert [(bool(step.before), step.validated_by) for step in report.steps] == [
        (True, "labels"),
        (False, ""),
    ]
    assert report.steps[1].accepted and report.steps[1].change is None


def test_labels_validate_sources_that_are_appended_to_a_merge_without_fine_tuning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, average = learned("resnet", tmp_path / "good"), GraspConfig(method="average", **NO_TUNING)
    noise = saved(perturbed(GraspMerger.from_pretrained(good).model, 1, scale=5.0), tmp_path / "noise")
    for name, epochs in {"average": 0, "tuned": 1}.items():
        merger = GraspMerger.from_pretrained(good, config=replace(average, final_epochs=epochs))
        merger.merge([good], **({"train_dataset": tiny_data("resnet", 12)} if epochs else {}))
        merger.save_pretrained(tmp_path / name)
    again = GraspMerger.from_pretrained(str(tmp_path / "average"), config=average)
    again.merge([good])
    again.save_pretrained(tmp_path / "again")
    config = GraspConfig(final_epochs=0, order="given", **LEARNING)
    assert "the gate is off for this merge" not in caplog.text
    for name, validated_by in {
        "average": "labels",
        "again": "labels",
        "tuned": "",
    }.items():
        merger = GraspMerger.from_pretrained(str(tmp_path / name), config=config)
        step = merger.merge([noise], train_dataset=tiny_data("resnet", 60)).steps[-1]
        assert (step.validated_by, step.accepted) == (validated_by, not validated_by), name
    assert caplog.text.count("the gate is off for this merge") == 1


def test_a_control_has_as_many_steps_as_the_merge_or_is_refused() -> None:
    config = GraspConfig(finetune_epochs=1, training_arguments={"num_train_epochs": 3})
    with pytest.raises(ConfigError, match=r"training_arguments.num_train_epochs: .*expected none"):
        GraspMerger(tiny_model("resnet"), config).finetuned_alone(
            2, tiny_data("resnet", 8), train_dataset=tiny_data("resnet", 8)
        )


def test_fine_tuning_alone_is_that_of_a_merger_of_its_own_and_changes_nothing(tmp_path: Path) -> None:
    base = learned("resnet", tmp_path / "base", epochs=2)
    config, test = GraspConfig(order="given", final_epochs=2, **LEARNING), tiny_data("resnet", 30, seed=3)
    data = {"train_dataset": tiny_data("resnet", 24, seed=1)}
    first = GraspConfig(initial_epochs=2, final_epochs=0, **LEARNING)
    merger, other = (GraspMerger.from_pretrained(base, config=settings) for settings in (config, first))
    before = {name: value.clone() for name, value in movable_tensors(merger.model).items()}
    found = merger.finetuned_alone(5, test, **data)
    for name, value in movable_tensors(merger.model).items():
        assert torch.equal(value, before[name]), name
    other.merge([], **data)
    assert torch.equal(found.losses, other.judge(test).losses)
    assert found.loss < merger.judge(test).loss
