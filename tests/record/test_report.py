"""The text of a report, and its way to JSON and back."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.record.entries import (
    ALONE,
    BEST_SOURCE,
    ChangeReport,
    ControlReport,
    FinetuneReport,
    Reason,
    UnitReport,
    unit_reports,
)
from grasp_hf.record.report import MergeReport, RunReport, StepReport
from grasp_hf.tensors.mixing import Mix
from grasp_hf.validation.changes import Change
from tests.support.models import perturbed, saved, tiny_data, tiny_model
from tests.support.reports import report_of
from tests.support.reports import step as step_of


def test_a_report_comes_back_from_json_as_it_was(tmp_path: Path) -> None:
    source = saved(perturbed(tiny_model("resnet"), 1), tmp_path / "source")
    config = GraspConfig(order="given", initial_epochs=1, finetune_epochs=1, final_epochs=1, batch_size=8)
    merger = GraspMerger(tiny_model("resnet"), config)
    report = merger.merge([source], train_dataset=tiny_data("resnet", 12), eval_dataset=tiny_data("resnet", 6, seed=2))
    report.to_json(tmp_path / "report.json")
    again = MergeReport.from_json(tmp_path / "report.json")
    assert again == report and str(again) == str(report)
    assert isinstance(again.steps[0].change, ChangeReport) and isinstance(again.steps[0].finetuned, FinetuneReport)
    assert isinstance(again.run.final, FinetuneReport) and again.run.final.losses


def test_the_details_say_how_many_samples_would_tell_a_change_from_none(tmp_path: Path) -> None:
    noisy = StepReport("org/a", "sha", "full", reason=Reason.NO_EFFECT, validated_by="labels", before={"loss": 1.0})
    noisy.after_transfer, noisy.change = {"loss": 0.9}, Change(-0.1, 0.2, 10).report()
    expected = math.ceil(10 * (1.96 * 0.2 / 0.1) ** 2)
    line = "org/a: nothing moved (no measurable effect), loss 1.000 -> 0.900, change -0.100 ± 0.452"
    assert noisy.summary_line() == line
    assert f"validated on 10 samples: labels; {expected} samples would tell this change from none" in noisy.details()
    sure = replace(noisy, change=Change(-0.1, 0.01, 10).report())
    assert "validated on 10 samples: labels" in sure.details()
    report = MergeReport("org/base", steps=[noisy])
    report.to_json(tmp_path / "report.json")
    assert MergeReport.from_json(tmp_path / "report.json").steps[0].reason is Reason.NO_EFFECT


def test_a_report_names_the_sources_that_were_kept_in_doubt() -> None:
    doubtful = step_of("org/a", accepted=True, reason=Reason.NO_EFFECT, change=ChangeReport(-0.01, 0.05, 64, 1600))
    sure = step_of("org/b", accepted=True, reason=Reason.HELPS, change=ChangeReport(-0.1, 0.05, 64, 16))
    unmoved = step_of("org/c", {"query": 0.1}, accepted=True, reason=Reason.NO_EFFECT)
    single = step_of("org/d", accepted=True, reason=Reason.NO_EFFECT, change=ChangeReport(-0.01, None, 1, None))
    other = step_of("org/e", accepted=True, reason=Reason.NO_EFFECT, change=ChangeReport(-0.01, 0.02, 64, 250))
    assert report_of(single, doubtful, sure, unmoved, other).conclusions() == [
        "4 of 5 sources merged",
        "no measurable effect, so kept: org/d, org/a (1600 samples would tell), org/e (250)",
    ]
    units = [UnitReport("a", 30, 0.5, 0.25, "moved", 0.5), UnitReport("b", 10, 0.5, 0.25, "moved")]
    row = StepReport("org/a", "sha", "full", units=units).row()
    assert (row["coefficient"], row["target kept"]) == ("0.250", "0.562")  # (30 * 0.5 + 10 * 0.75) / 40


def test_the_details_say_why_the_lowest_loss_is_not_chosen() -> None:
    losses = {"blend": 0.5, "average": 0.51}
    clear, noisy = (step_of(candidates=losses, chosen=chosen).details() for chosen in losses)
    text = "losses of the candidates: blend 0.500, average 0.510"
    calibrated = ChangeReport(-0.1, 0.05, 64, 16, calibrated=True)
    assert f"calibrated {text}" in step_of(candidates=losses, chosen="blend", change=calibrated).details()
    assert text in clear and f"{text}; average was chosen because the difference is within the noise" in noisy


def test_a_source_that_only_rescales_the_merge_does_not_count_as_merged() -> None:
    mixes = {"a": Mix(0.5, 0.0), "b": Mix(0.9, 0.0004), "c": Mix(1.0, 0.0), "d": Mix(0.9, 0.001)}
    units = unit_reports(dict.fromkeys(mixes, 1), mixes, dict.fromkeys(mixes, 0.1), True)
    assert [unit.decision for unit in units] == ["rescaled", "rescaled", "kept", "moved"]
    one = StepReport("org/a", "sha", "full", units=units[:3])
    assert one.changed and not one.moved and one.decision == "only rescaled"
    assert MergeReport("org/base", steps=[one]).conclusions() == ["0 of 1 sources merged"]
    one.undo(Reason.BETTER_ALONE)
    assert not one.changed and [unit.decision for unit in one.units] == ["undone", "undone", "kept"]
    undone = unit_reports(dict.fromkeys(mixes, 1), mixes, dict.fromkeys(mixes, 0.1), False)
    assert [unit.decision for unit in undone] == ["undone", "undone", "kept", "undone"]
    table = StepReport("org/a", "sha", "full", units=undone).unit_table().splitlines()
    assert [cell.strip() for cell in table[3].split("|")[4:6]] == ["0.000", "0.900"]


def test_a_report_holds_the_notes_and_all_validation_samples() -> None:
    first = step_of("org/a", notes=["the head stays: no label in common"])
    later = step_of("org/b")
    first.validated_by = "two halves of the labels"
    report = report_of(first, later, later)
    assert "org/a: the head stays: no label in common" in report.conclusions()
    assert report.validated_by == "two halves of the labels, later on evaluation data"
    assert report_of().validated_by == ""


def test_checkpoints_of_two_trainings_have_two_names() -> None:
    names = [
        StepReport(source, None, "full").name for source in ("/runs/a/checkpoint-5", "/runs/b/checkpoint-5", "/x/c")
    ]
    assert names == ["a/checkpoint-5", "b/checkpoint-5", "c"]
    report = MergeReport("org/base", steps=[StepReport("/runs/a/checkpoint-5", None, "full")]).without_paths()
    assert report.steps[0].name == "a/checkpoint-5" == report.without_paths().steps[0].name
    assert StepReport("checkpoint-5", None, "full").name == "checkpoint-5"


@pytest.mark.parametrize(("method", "says"), [("weighted", True), ("average", False)])
def test_a_merge_that_continues_another_says_that_earlier_predictions_are_gone(method: str, says: bool) -> None:
    run = RunReport(config={"method": method})
    report = MergeReport("org/base", steps=[step_of("org/a"), step_of("org/b")], run=run, continued_steps=1)
    assert any("the first 1 sources keep the weights" in text for text in report.conclusions()) is says


def test_a_table_has_no_columns_without_a_value() -> None:
    measured, unmeasured = step_of("org/a"), StepReport("org/b", "sha", "full")
    assert {"loss before", "change"} <= {*measured.row()}
    columns = [cell.strip() for cell in report_of(unmeasured).table().splitlines()[0].strip("|").split("|")]
    assert "decision" in columns and not {"loss before", "loss after", "accuracy"} & {*columns}
    columns = [cell.strip() for cell in report_of(measured, unmeasured).table().splitlines()[0].strip("|").split("|")]
    assert "loss before" in columns


def test_no_printed_line_is_wider_than_a_terminal() -> None:
    name = "an-organisation-with-a-long-name/a-model-with-a-name-that-is-even-longer-than-its-organisation"
    change = ChangeReport(-0.123, 0.045, 512, 100_000)
    long = step_of(
        name,
        accepted=False,
        reason=Reason.BETTER_ALONE,
        change=change,
        candidates={"blend": 0.5, "average": 0.51, "fisher": 0.52},
        chosen="average",
        notes=["the head has other labels than the target: " + ", ".join(f"label-{number}" for number in range(30))],
    )
    final = FinetuneReport(
        0.75, {"0.0": 1.0, "0.75": 0.9, "1.0": 0.95}, "two halves of 512 of the labels", alone=0.95, gain=change
    )
    report = report_of(long, step_of("org/b"), final=final)
    report.base, report.base_sha = f"/home/me/models/{name}", None
    units = [UnitReport(name, 10**9, -0.123, 0.123, "undefined"), UnitReport("head", 10, None, 0.0, "undone")]
    tables = [str(report), StepReport("org/a", "sha", "full", units=units).unit_table()]
    doubtful = step_of(name, reason=Reason.NO_EFFECT, change=ChangeReport(-10.0449, 10.0451, 64, 1600))
    doubtful.candidates, doubtful.chosen = {"blend": 0.5, "fisher": 0.52}, "fisher"
    tables.append(str(report_of(long, doubtful)))
    printed = [*"\n".join(tables).splitlines(), long.summary_line(), long.summary_line(94)]
    assert max(map(len, printed)) <= 100 and len(long.summary_line(94)) <= 94
    assert long.summary_line().startswith("an-") and "…" in long.summary_line()
    assert name in report.table() and "label-29" in str(report), "the card and the sentences hold the full names"


def test_the_outcome_leads_the_report_and_its_json(tmp_path: Path) -> None:
    helps, unclear = ChangeReport(-0.3, 0.1, 90, 12), ChangeReport(-0.01, 0.05, 90, 2305)
    scores = {"loss": 0.7, "accuracy": 0.8}, {"loss": 0.4, "accuracy": 0.9}
    controls = [
        ControlReport("test data", *scores, helps),
        ControlReport("test data", *scores, unclear, BEST_SOURCE),
    ]
    data = {"test": {"samples": 90}}
    source = step_of("org/a", reason=Reason.HELPS, change=helps)
    report = report_of(source, controls=controls, test=scores[1], data=data)
    assert report.outcome() == [
        "the sources help: from fine-tuning alone to the merge, loss 0.700 -> 0.400, accuracy 0.800 -> 0.900, change of "
        "the loss -0.300 ± 0.100, evaluated on 90 samples of the test data",
        "no measurable difference: from the best source, fine-tuned, to the merge, loss 0.700 -> 0.400, accuracy 0.800 "
        "-> 0.900, change of the loss -0.010 ± 0.050, evaluated on 90 samples of the test data; 2305 samples would "
        "tell this change from none",
        "test: loss 0.400, accuracy 0.900, 90 samples, which chose nothing",
    ]
    text = str(report)
    places = [text.index(part) for part in ("the sources help", "- test: ", "start: ", "| source", "- 1 of 1 sources")]
    assert places == sorted(places) and places[0] == len("- ")
    assert [cell.strip() for cell in text.splitlines()[-3].strip("|").split("|")][1:4] == [
        "merged",
        "helps",
        "-0.300 ± 0.100",
    ]
    report.to_json(tmp_path / "report.json")
    values = json.loads((tmp_path / "report.json").read_text())
    assert next(iter(values)) == "outcome" and values["outcome"] == report.outcome()
    assert [own["change"]["verdict"] for own in values["run"]["controls"]] == ["helps", "no measurable effect"]
    assert values["steps"][0]["change"]["verdict"] == "helps"
    assert MergeReport.from_json(tmp_path / "report.json") == report


def test_the_outcome_says_what_was_not_compared() -> None:
    change = ChangeReport(-0.3, 0.1, 24, 12)
    losses = {"0.0": 1.0, "1.0": 0.5}
    final = FinetuneReport(1.0, losses, "labels", alone=0.8, gain=change)
    with_gain, nothing, undone = report_of(step_of(), final=final), report_of(step_of()), report_of()
    undone.steps = [step_of(accepted=False)]
    how = "`grasp-hf merge --control` does that"
    assert with_gain.outcome() == [
        "the sources help: from fine-tuning alone to the merge, loss 0.800 -> 0.500 (-0.300 ± 0.100), on 24 samples of "
        "labels; these samples also chose what was kept",
        f"not compared with the best source, fine-tuned: {how}",
    ]
    assert nothing.outcome()[0] == f"not compared with fine-tuning alone and the best source, fine-tuned: {how}"
    assert undone.outcome()[0] == "no source is in the model"
    assert report_of().outcome() == []


def test_without_test_data_the_scores_say_that_their_samples_chose() -> None:
    report = report_of(step_of("org/a", losses=(1.0, 0.8, 0.6)), data={"eval": {"samples": 24}})
    assert report.scores() == ({"loss": 0.6}, False, 24)
    assert report.outcome()[-1] == (
        "evaluation data: loss 0.600, 24 samples, which also chose what was kept; add test data for an unbiased score"
    )
    report.run.test, report.run.data["test"] = {"loss": 0.7}, {"samples": 90}
    assert report.scores() == ({"loss": 0.7}, True, 90)
    only_labels = report_of(step_of("org/a"))
    only_labels.steps[0].validated_by = "labels"
    assert only_labels.scores() == ({}, False, None)


@pytest.mark.parametrize(
    ("reason", "loss", "expected"),
    [
        ("raises the loss", 0.05, Reason.EARLIER_RULE),  # more than a standard error, but the interval holds 0
        ("raises the loss", 0.2, Reason.HARMS),
        ("worse than the start", 0.05, Reason.EARLIER_RULE),
        ("within the noise", 0.01, Reason.NO_EFFECT),
        ("lowers the loss", -0.2, Reason.HELPS),
        ("better without any source", -0.2, Reason.BETTER_ALONE),
    ],
)
@pytest.mark.parametrize("classes", [False, True])
def test_reasons_of_earlier_versions_do_not_contradict_the_interval(
    reason: str, loss: float, expected: Reason, classes: bool, tmp_path: Path
) -> None:
    source = step_of("org/a", accepted=loss < 0.02, change=ChangeReport(loss, 0.1, 64, 200))
    source.before = {"loss": 1.0, **({"accuracy": 0.5} if classes else {})}
    gain = ChangeReport(-0.1, 0.05, 9, 3)
    values = asdict(report_of(source, final=FinetuneReport(1.0, {"0.0": 1.0, "1.0": 0.5}, alone=0.6, gain=gain)))
    values["steps"][0]["reason"] = reason
    old_change = asdict(gain)
    control = {"validated_by": "test data", "alone": {"loss": 1.0}, "merged": {"loss": 0.9}, "change": old_change}
    del values["run"]["controls"]
    values["run"]["control"] = control
    for change in (values["steps"][0]["change"], values["run"]["final"]["gain"], old_change):
        del change["verdict"], change["calibrated"]  # earlier versions wrote neither
    (tmp_path / "report.json").write_text(json.dumps(values))
    report = MergeReport.from_json(tmp_path / "report.json")
    (step,) = report.steps
    assert step.reason is expected and step.change and step.change.calibrated is classes
    assert report.run.final and report.run.final.gain == gain
    assert [(own.name, own.change) for own in report.run.controls] == [(ALONE, gain)]


def test_a_record_of_version_0_1_is_read(tmp_path: Path) -> None:
    """The fields of the run were fields of the whole record, and some fields had other names."""
    step, final = (
        step_of("org/a", reason=Reason.NO_EFFECT, candidates={"blend": 0.5}, chosen="blend"),
        FinetuneReport(0.5),
    )
    report = report_of(step, final=final, ranking=[{"reference": "org/a", "sha": None}], test={"loss": 0.5})
    values = asdict(report)
    old = {**{key: value for key, value in values.items() if key != "run"}, **values["run"]}
    entry = old["steps"][0]
    entry |= {"options": entry.pop("candidates"), "taken": entry.pop("chosen"), "judged_by": entry.pop("validated_by")}
    entry["reason"] = "within the noise: kept"
    old["final"] = {**values["run"]["final"], "share": 0.5}
    del old["final"]["fraction"]
    old["final"]["judged_by"] = old["final"].pop("validated_by")
    (tmp_path / "report.json").write_text(json.dumps(old))
    assert MergeReport.from_json(tmp_path / "report.json") == report
