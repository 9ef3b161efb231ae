"""What a report says of a merge, and that it comes back from its file."""

import math
from dataclasses import replace
from pathlib import Path

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.record.entries import DOUBT, ChangeReport, FinetuneReport, UnitReport, unit_reports
from grasp_hf.record.report import MergeReport, StepReport
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


def test_a_line_says_how_many_samples_would_tell_a_change_from_nothing(tmp_path: Path) -> None:
    noisy = StepReport("org/a", "sha", "full", reason=DOUBT, validated_by="labels", before={"loss": 1.0})
    noisy.after_transfer, noisy.change = {"loss": 0.9}, Change(-0.1, 0.2, 10).report()
    expected = math.ceil(10 * (1.96 * 0.2 / 0.1) ** 2)
    assert (
        f"nothing moved ({DOUBT}), coefficient 0.000, loss 1.000 -> 0.900 (-0.100 ± 0.452 calibrated; {expected} "
        in (noisy.line())
    )
    sure = replace(noisy, change=Change(-0.1, 0.01, 10).report())
    assert "(-0.100 ± 0.023 calibrated) on labels" in sure.line()
    report = MergeReport("org/base", steps=[noisy])
    report.to_json(tmp_path / "report.json")
    assert MergeReport.from_json(tmp_path / "report.json").steps[0].reason == DOUBT


def test_a_report_names_the_sources_that_stay_in_doubt_and_what_is_kept_beside_them() -> None:
    doubtful = step_of("org/a", accepted=True, reason=DOUBT, change=ChangeReport(-0.01, 0.05, 64, 1600))
    sure = step_of("org/b", accepted=True, reason="lowers the loss", change=ChangeReport(-0.1, 0.05, 64, 16))
    unmoved = step_of("org/c", {"query": 0.1}, accepted=True, reason=DOUBT)
    assert report_of(doubtful, sure, unmoved).conclusions() == [
        "2 of 3 sources merged; within the noise, so kept: org/a: 1600 samples would tell that from nothing"
    ]
    units = [UnitReport("a", 30, 0.5, 0.25, "moved", 0.5), UnitReport("b", 10, 0.5, 0.25, "moved")]
    row = StepReport("org/a", "sha", "full", units=units).row()
    assert (row["coefficient"], row["target kept"]) == ("0.250", "0.562")  # (30 * 0.5 + 10 * 0.75) / 40


def test_a_line_says_why_the_lowest_loss_is_not_taken() -> None:
    losses = {"blend": 0.5, "average": 0.51}
    clear, noisy = (step_of(candidates=losses, chosen=chosen).line() for chosen in losses)
    assert "calibrated: 0.500 blend or 0.510 average (average, as the difference is within the noise)" in noisy
    assert "calibrated: 0.500 blend or 0.510 average" in clear and "within the noise" not in clear


def test_a_source_that_brings_nothing_is_not_merged_where_what_was_there_is_rescaled() -> None:
    mixes = {"a": Mix(0.5, 0.0), "b": Mix(0.9, 0.0004), "c": Mix(1.0, 0.0), "d": Mix(0.9, 0.001)}
    units = unit_reports(dict.fromkeys(mixes, 1), mixes, dict.fromkeys(mixes, 0.1), True)
    assert [unit.decision for unit in units] == ["rescaled", "rescaled", "kept", "moved"]
    one = StepReport("org/a", "sha", "full", units=units[:3])
    assert one.changed and not one.moved and one.decision == "nothing taken, what was merged before rescaled"
    assert MergeReport("org/base", steps=[one]).conclusions() == ["0 of 1 sources merged"]
    one.undo("worse")
    assert not one.changed and [unit.decision for unit in one.units] == ["undone", "undone", "kept"]
    taken_back = unit_reports(dict.fromkeys(mixes, 1), mixes, dict.fromkeys(mixes, 0.1), False)
    assert [unit.decision for unit in taken_back] == ["undone", "undone", "kept", "undone"]
    table = StepReport("org/a", "sha", "full", units=taken_back).unit_table().splitlines()
    assert [cell.strip() for cell in table[3].split("|")[4:6]] == ["0.000", "0.900"]


def test_a_report_tells_how_heads_were_matched_and_by_whom_sources_were_judged() -> None:
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


def test_a_table_has_no_columns_without_a_value() -> None:
    measured, unmeasured = step_of("org/a"), StepReport("org/b", "sha", "full")
    assert {"loss before", "change (calibrated)"} <= {*measured.row()}
    columns = [cell.strip() for cell in report_of(unmeasured).table().splitlines()[0].strip("|").split("|")]
    assert "decision" in columns and not {"loss before", "transferred", "accuracy"} & {*columns}
    columns = [cell.strip() for cell in report_of(measured, unmeasured).table().splitlines()[0].strip("|").split("|")]
    assert "loss before" in columns
