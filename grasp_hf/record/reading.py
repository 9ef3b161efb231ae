"""Entries of a record from its file; files of version 0.1 have other names for some fields."""

from typing import Any

from .entries import ChangeReport, FinetuneReport, Reason, TeacherReport, UnitReport
from .step import StepReport

# Names of fields in records of version 0.1.
_EARLIER_NAMES = {"judged_by": "validated_by", "options": "candidates", "taken": "chosen", "share": "fraction"}

# Reasons in records of earlier versions, which had other rules: harm was a rise by more than a standard error.
_EARLIER_REASONS = {
    "lowers the loss": Reason.HELPS,
    "within the noise": Reason.NO_EFFECT,
    "within the noise: kept": Reason.NO_EFFECT,
    "raises the loss": Reason.HARMS,
    "worse than the start": Reason.EARLIER_RULE,
    "the calibrated loss rises by more than its standard error": Reason.HARMS,
    "worse than before the first source": Reason.EARLIER_RULE,
    "the loss is NaN or infinite": Reason.NOT_FINITE,
    "fine-tuning without any source is better": Reason.BETTER_ALONE,
}


def with_present_names(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an entry under their present names."""
    return {_EARLIER_NAMES.get(name, name): value for name, value in values.items()}


def read_step(values: dict[str, Any]) -> StepReport:
    """Return a step from the dictionary that `asdict` made; in records of earlier versions some fields are missing."""
    change = read_change(values.get("change"), calibrated="accuracy" in values.get("before", {}))
    return StepReport(
        **{
            **with_present_names(values),
            "units": [UnitReport(**unit) for unit in values["units"]],
            "reason": _read_reason(values.get("reason", ""), change),
            "change": change,
            "finetuned": read_finetuned(values.get("finetuned")),
        }
    )


def read_change(values: dict[str, Any] | None, *, calibrated: bool) -> ChangeReport | None:
    """Return a change from what `asdict` made of it; the verdict is derived again.

    Args:
        values: The fields; `None` if there was no change.
        calibrated: Whether the losses were calibrated, for an earlier record, which does not say so.
    """
    if values is None:
        return None
    return ChangeReport(**{"calibrated": calibrated, **{key: values[key] for key in values if key != "verdict"}})


def _read_reason(text: str, change: ChangeReport | None) -> Reason:
    reason = Reason(_EARLIER_REASONS.get(text, text))
    if reason == Reason.HARMS and change is not None and change.verdict != Reason.HARMS:
        return Reason.EARLIER_RULE
    return reason


def read_finetuned(values: dict[str, Any] | None) -> FinetuneReport | None:
    """Return a fine-tuning from what `asdict` made of it; `None` if there was none."""
    if values is None:
        return None
    gain, teacher = values.get("gain"), values.get("teacher")
    return FinetuneReport(
        **{
            **with_present_names(values),
            "gain": read_change(gain, calibrated=False),
            "teacher": teacher and TeacherReport(**teacher),
        }
    )
