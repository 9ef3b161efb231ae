"""Reports of merges that were never run."""

from typing import Any

from grasp_hf.record.entries import unit_reports
from grasp_hf.record.report import RUN_FIELDS, MergeReport, RunReport, StepReport
from grasp_hf.tensors.mixing import Mix

SHA = "a" * 40
ALL = {"query": 0.5, "dense": 0.1, "classifier": None}


def step(
    source: str = "org/fine",
    scores: dict[str, float | None] = ALL,
    *,
    accepted: bool = True,
    losses: tuple[float, float, float] | None = (1.0, 0.8, 0.6),
    **fields: Any,
) -> StepReport:
    """Return a source that moved the units whose score is above 0.2."""
    mixes = {name: Mix.on_line(float(score is not None and score > 0.2)) for name, score in scores.items()}
    units = unit_reports(dict.fromkeys(scores, 10), mixes, scores, accepted)
    names = ("before", "after_transfer", "after")
    measured: dict[str, Any] = {name: {"loss": loss} for name, loss in zip(names, losses or (), strict=False)}
    measured |= {"validated_by": "evaluation data"} if losses else {}
    return StepReport(source, fields.pop("sha", SHA), "full", accepted=accepted, units=units, **measured, **fields)


def report_of(*steps: StepReport, **fields: Any) -> MergeReport:
    """Return the record of a merge by `copy`; `fields` are those of the merge and of its run."""
    run = {name: fields.pop(name) for name in RUN_FIELDS if name in fields}
    return MergeReport(
        "org/base", SHA, steps=list(steps), run=RunReport(**{"config": {"method": "copy"}, **run}), **fields
    )
