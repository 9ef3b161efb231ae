"""The record of a merge: every source, unit by unit, as data, tables and sentences."""

import json
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from ..files import write_whole
from .entries import ChangeReport, ControlReport, Evaluation, FinetuneReport, Reason, UnitReport
from .redaction import names_of_paths
from .text import WIDTH, format_number, markdown_table, shorten, wrap

Row = dict[str, str | None]  # column -> text; `None` where the report holds no value


@dataclass
class StepReport:
    """One source: where it came from, the measurements, the decision, and how the loss changed.

    Attributes:
        source: The reference as the user gave it.
        sha: Commit of its files; `None` for a local folder.
        kind: `full` or `adapter`.
        num_bytes: Size of its weight files, in bytes.
        license: The licence that its card declares.
        gated: Whether its files on the Hub are gated.
        accepted: `False` if the gate undid the source.
        reason: Why the gate undid it, or did not.
        notes: How its head and its vocabulary were matched with the target's, if they differ.
        units: One entry per unit that could have moved.
        other_units: Number of units that could not move because an adapter lacks them, or because a head does not fit.
        validated_by: The samples of the next losses: `evaluation data`, `labels` that the model has not been fine-tuned
            on, or both; empty if there are none. Of `two halves of the labels`, each half validates the coefficients that
            the other half taught; the losses before the source and at the end of the step are on both halves.
        candidates: Calibrated loss of each candidate: that of the method and, where coefficients were learned, the
            `average` and the average weighted by Fisher information (`fisher`).
        chosen: The candidate that was chosen: the average, unless another is better by more than the standard error of
            their difference; then the one with the lowest loss.
        before: Loss (and accuracy) before the source.
        after_transfer: Loss (and accuracy) with the source, before the decision of the gate.
        change: Change from `before` to `after_transfer`.
        finetuned: The fine-tuning after the source; `None` if there was none.
        after: Loss (and accuracy) at the end of the step.
        seconds: Duration of the step.
        peak_memory: Largest memory of the process until the end of the step, in bytes; on a GPU, of its memory.
    """

    source: str
    sha: str | None
    kind: str
    num_bytes: int = 0
    license: str | None = None
    gated: bool = False
    accepted: bool = True
    reason: Reason = Reason.NONE
    notes: list[str] = field(default_factory=list)
    units: list[UnitReport] = field(default_factory=list)
    other_units: int = 0
    validated_by: str = ""
    candidates: dict[str, float] = field(default_factory=dict)
    chosen: str = ""
    before: Evaluation = field(default_factory=dict)
    after_transfer: Evaluation = field(default_factory=dict)
    change: ChangeReport | None = None
    finetuned: FinetuneReport | None = None
    after: Evaluation = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory: int = 0

    def undo(self, reason: Reason) -> None:
        """Record that the source was undone later."""
        self.accepted, self.reason = False, reason
        for unit in self.units:
            if unit.decision in ("moved", "rescaled"):
                unit.decision = "undone"

    @property
    def name(self) -> str:
        """The source for a reader: a Hub id as given, of a local folder its last part.

        All checkpoints of the Trainer have the same names, so one of them is named by its last two parts.
        """
        if self.sha:
            return self.source
        path = Path(self.source)
        return str(Path(path.parent.name, path.name)) if path.name.startswith("checkpoint-") else path.name

    @property
    def moved(self) -> int:
        """Number of units that took something from the source."""
        return sum(unit.decision == "moved" for unit in self.units)

    @property
    def changed(self) -> bool:
        """Whether the step left anything in the model."""
        return any(unit.decision in ("moved", "rescaled") for unit in self.units)

    @property
    def was_averaged(self) -> bool:
        """Whether a mean was chosen instead of learned coefficients."""
        return self.accepted and self.moved > 0 and len(self.candidates) > 1 and self.chosen in _MEANS

    @property
    def mean_coefficient(self) -> float:
        """Mean coefficient over the elements of all units that could have moved, even if the gate undid it."""
        return self._mean(lambda unit: unit.coefficient, default=0.0)

    @property
    def mean_kept(self) -> float:
        """Mean fraction of the target that was to stay, over the same elements; with `blend` the two need not sum to 1."""
        return self._mean(lambda unit: unit.kept, default=1.0)

    def _mean(self, value: Callable[[UnitReport], float], default: float) -> float:
        total = sum(unit.elements for unit in self.units)
        return sum(value(unit) * unit.elements for unit in self.units) / total if total else default

    @property
    def decision(self) -> str:
        """The decision on the source, for a reader."""
        if not self.accepted:
            return "rejected"
        if not self.moved:
            return "only rescaled" if self.changed else "nothing moved"
        return _MEANS[self.chosen] if self.was_averaged else "merged"

    @property
    def verdict(self) -> str:
        """The decision and its reason, for a reader."""
        return f"{self.decision} ({self.reason})" if self.reason else self.decision

    def row(self) -> Row:
        """Return the line of the source in the table of the card."""
        scores = [unit.score for unit in self.units if unit.score is not None]
        accuracies = [evaluation.get("accuracy") for evaluation in (self.before, self.after_transfer)]
        return {
            "source": self.name,
            "kind": self.kind,
            "score": _format_known(sum(scores) / len(scores) if scores else None),
            "moved": f"{self.moved}/{len(self.units)}",
            "undefined": str(sum(unit.decision == "undefined" for unit in self.units)),
            "coefficient": format_number(self.mean_coefficient),
            "target kept": format_number(self.mean_kept),
            "decision": self.decision,
            "loss before": _format_known(self.before.get("loss")),
            "loss after": _format_known(self.after_transfer.get("loss")),
            "change (calibrated)": str(self.change) if self.change else None,
            "accuracy": None if accuracies == [None, None] else " → ".join(map(format_number, accuracies)),
            "fine-tuned": _format_known(self.after.get("loss")) if self.finetuned else None,
            "seconds": f"{self.seconds:.1f}",
        }

    def short_row(self) -> Row:
        """Return the line of the source in the table for a terminal."""
        losses = [format_number(evaluation.get("loss")) for evaluation in (self.before, self.after_transfer)]
        return {
            "source": shorten(self.name, 28),
            "decision": self.decision,
            "coefficient": format_number(self.mean_coefficient),
            "loss": " → ".join(losses) if self.before else None,
            "calibrated": str(self.change) if self.change else None,
        }

    def summary_line(self, width: int = WIDTH) -> str:
        """Return one line of at most `width` columns: the source, the verdict and, if something validated, three numbers."""
        numbers = f"coefficient {format_number(self.mean_coefficient)}"
        if self.before:
            losses = [format_number(evaluation.get("loss")) for evaluation in (self.before, self.after_transfer)]
            numbers = f"loss {' -> '.join(losses)}"
        if self.change:
            numbers += f", calibrated {self.change}"
        text = f": {self.verdict}, {numbers}"
        return shorten(self.name, max(width - len(text), 8)) + text

    def details(self) -> list[str]:
        """Return the facts that the summary line leaves out, a sentence each."""
        found = [
            f"{self.kind}, {self.moved} of {len(self.units)} units moved, {self.other_units} others could not, mean "
            f"coefficient {format_number(self.mean_coefficient)}, target kept {format_number(self.mean_kept)}, "
            f"{self.seconds:.1f} s"
        ]
        if self.change:
            found.append(self.change.append_doubt(f"validated on {self.change.samples} samples: {self.validated_by}"))
        if len(self.candidates) > 1:
            losses = ", ".join(f"{name} {format_number(loss)}" for name, loss in self.candidates.items())
            text = f"calibrated losses of the candidates: {losses}"
            if self.chosen and self.candidates[self.chosen] > min(self.candidates.values()):
                text += f"; {self.chosen} was chosen because the difference is within the noise"
            found.append(text)
        return found + (self.finetuned.sentences() if self.finetuned else [])

    def unit_table(self) -> str:
        """Return the decision on every unit as a Markdown table."""
        return markdown_table(
            [
                {
                    "unit": unit.name,
                    "elements": str(unit.elements),
                    "score": format_number(unit.score),
                    "coefficient": format_number(unit.coefficient),
                    "target kept": format_number(unit.kept),
                    "decision": unit.decision,
                }
                for unit in self.units
            ]
        )


_MEANS = {"average": "averaged", "fisher": "averaged by Fisher"}


@dataclass
class RunReport:
    """The last run of a merge. A merge that continues an earlier one has several runs, and its record keeps the last.

    Attributes:
        config: The settings.
        versions: Versions of the packages.
        recipe: Task and data of the recipe; empty without a recipe.
        data: Number of samples of each data set, and a digest of their content.
        ranking: The sources in the order of their estimated gain or loss; empty if they were not ranked.
        final: The fine-tuning after the last source; `None` if there was none.
        control: The gain over fine-tuning alone; `None` if it was not asked for.
        test: Loss (and accuracy) on the test data; empty without test data.
    """

    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    ranking: list[dict[str, Any]] = field(default_factory=list)
    final: FinetuneReport | None = None
    control: ControlReport | None = None
    test: Evaluation = field(default_factory=dict)

    def next(self, config: dict[str, Any], versions: dict[str, str]) -> "RunReport":
        """Return the report of a new run with the recipe and data of this one; later calls may replace them."""
        return RunReport(config, versions, deepcopy(self.recipe), deepcopy(self.data))

    def after_source(self, data: dict[str, Any]) -> "RunReport":
        """Return the report after one more source, which used `data`, without the results of an earlier end."""
        return replace(self, data=data, final=None, control=None, test={})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunReport":
        """Read what `dataclasses.asdict` made."""
        control = values.get("control")
        if control:
            control = ControlReport(**{**_renamed(control), "change": ChangeReport(**control["change"])})
        return cls(**{**values, "final": _read_finetuned(values.get("final")), "control": control})


RUN_FIELDS = tuple(RunReport.__dataclass_fields__)


@dataclass
class MergeReport:
    """The whole merge, in order.

    Attributes:
        base: The model that the merge started from.
        base_sha: Commit of its files; `None` for a local folder or a model object.
        base_license: The licence that its card declares.
        base_gated: Whether its files on the Hub are gated.
        start: Loss (and accuracy) on the validation samples before the first source; empty if nothing validated.
        starts_from_source: Whether the base is itself the first source, so that an average counts it.
        finetuned: Whether the model was fine-tuned on labels, in this merge or in one that it continues.
        steps: One entry per source.
        run: The last run.
        continues: The merge that this one was appended to: a Hub reference with its commit, or a folder.
        continued_steps: Number of steps of that merge.
    """

    base: str
    base_sha: str | None = None
    base_license: str | None = None
    base_gated: bool = False
    start: Evaluation = field(default_factory=dict)
    starts_from_source: bool = False
    finetuned: bool = False
    steps: list[StepReport] = field(default_factory=list)
    run: RunReport = field(default_factory=RunReport)
    continues: str | None = None
    continued_steps: int = 0

    def as_base(self, run: RunReport) -> "MergeReport":
        """Return the record of a new merge that starts from the model of this one."""
        return replace(self, start={}, starts_from_source=False, finetuned=False, steps=[], run=run, continued_steps=0)

    @property
    def gated(self) -> list[str]:
        """Names of the gated parents."""
        return [*([self.base] if self.base_gated else []), *(step.source for step in self.steps if step.gated)]

    @property
    def base_reference(self) -> str:
        """Where the first version of this merge started, pinned to its commit."""
        return _pinned(self.base, self.base_sha)

    @property
    def validated_by(self) -> str:
        """The samples of the steps' losses; if they changed during the merge, all of them in order."""
        return ", later on ".join(dict.fromkeys(step.validated_by for step in self.steps if step.validated_by))

    def without_paths(self) -> "MergeReport":
        """Return a copy for other readers, which names local folders by their last part."""
        base = self.base if self.base_sha else Path(self.base).name
        continues = self.continues
        if continues and not re.fullmatch(r".+@[0-9a-f]{40}", continues):
            continues = Path(continues).name
        steps = [replace(step, source=step.name) for step in self.steps]
        ranking = [
            row if row.get("sha") else {**row, "reference": Path(str(row["reference"])).name}
            for row in self.run.ranking
        ]
        config, recipe = names_of_paths(self.run.config), names_of_paths(self.run.recipe)
        run = replace(self.run, config=config, recipe=recipe, ranking=ranking)
        return replace(self, base=base, continues=continues, steps=steps, run=run)

    def configuration(self) -> str:
        """Return the last run as a recipe in YAML, every Hub reference pinned to its commit, with a record of the run.

        A run that continues an earlier merge starts from that merge. Ranked sources are listed in their final order.
        """
        start = {"base_model": self.continues or self.base_reference}
        sources = [_pinned(step.source, step.sha) for step in self.steps[self.continued_steps :]]
        if self.starts_from_source and not self.continues:
            start, sources = {}, [self.base_reference, *sources]
        values = {
            **start,
            "sources": sources,
            **self.run.recipe,
            **self.run.config,
            **({"order": "given", "top": None} if self.run.config else {}),
            "record": {"data": self.run.data, "versions": self.run.versions},
        }
        return yaml.safe_dump(values, sort_keys=False)

    def table(self) -> str:
        """Return one line per source as a Markdown table for the card; a column without a value is left out."""
        return _table_of([step.row() for step in self.steps])

    def conclusions(self) -> list[str]:
        """Return the outcome of the merge, a sentence each."""
        merged = sum(step.moved > 0 for step in self.steps)
        found = [f"{merged} of {len(self.steps)} sources merged"]
        averaged = [step.name for step in self.steps if step.was_averaged]
        if averaged:
            found.append(f"averaged, because learned coefficients were not clearly better: {', '.join(averaged)}")
        doubted = [
            f"{step.name}: {step.change.doubt}" if step.change and step.change.doubt else step.name
            for step in self.steps
            if step.accepted and step.moved and step.reason == Reason.UNCLEAR
        ]
        if doubted:
            found.append(f"within the noise, so kept: {', '.join(doubted)}")
        rejected = [f"{step.name} ({step.reason})" for step in self.steps if not step.accepted]
        if rejected:
            found.append(f"rejected: {', '.join(rejected)}")
        found += [f"{step.name}: {note}" for step in self.steps for note in step.notes]
        if self.run.final:
            first, *rest = self.run.final.sentences()
            found += [f"at the end {first}", *rest]
        if self.run.control:
            found.append(self.run.control.sentence())
        if self.run.test:
            scores = ", ".join(f"{name} {format_number(value)}" for name, value in self.run.test.items())
            found.append(f"test: {scores}")
        return found

    def __str__(self) -> str:
        loss = f", loss {format_number(self.start['loss'])}" if self.start else ""
        start = f"start: {self.base}{loss}"
        table = _table_of([step.short_row() for step in self.steps])
        return "\n".join([start, "", table, "", *(wrap(text, "- ", "  ") for text in self.conclusions())])

    def to_json(self, path: Path) -> None:
        """Write everything to `path`."""
        write_whole(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def from_json(cls, path: Path) -> "MergeReport":
        """Read what `to_json` wrote.

        Raises:
            ConfigError: The file holds something else.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            steps = [_read_step(step) for step in values.pop("steps")]
            # In a record of version 0.1, the fields of the run are fields of the whole record.
            run = values.pop("run", None) or {name: values.pop(name) for name in RUN_FIELDS if name in values}
            return cls(**values, steps=steps, run=RunReport.from_dict(run))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"'{path.name}' is not the record of a merge by grasp_hf {error}") from error


# Names of fields in records of version 0.1.
_EARLIER_NAMES = {"judged_by": "validated_by", "options": "candidates", "taken": "chosen", "share": "fraction"}

_EARLIER_REASONS = {
    "within the noise: kept": Reason.UNCLEAR,
    "the calibrated loss rises by more than its standard error": Reason.HARMS,
    "worse than before the first source": Reason.WORSE_THAN_START,
    "the loss is NaN or infinite": Reason.NOT_FINITE,
    "fine-tuning without any source is better": Reason.BETTER_ALONE,
}


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an entry under their present names."""
    return {_EARLIER_NAMES.get(name, name): value for name, value in values.items()}


def _read_step(values: dict[str, Any]) -> StepReport:
    """Return a step from the dictionary that `asdict` made; in records of earlier versions some fields are missing."""
    change = values.get("change")
    return StepReport(
        **{
            **_renamed(values),
            "units": [UnitReport(**unit) for unit in values["units"]],
            "reason": _read_reason(values.get("reason", "")),
            "change": change and ChangeReport(**change),
            "finetuned": _read_finetuned(values.get("finetuned")),
        }
    )


def _read_reason(text: str) -> Reason:
    return Reason(_EARLIER_REASONS.get(text, text))


def _read_finetuned(values: dict[str, Any] | None) -> FinetuneReport | None:
    if values is None:
        return None
    gain = values.get("gain")
    return FinetuneReport(**{**_renamed(values), "gain": gain and ChangeReport(**gain)})


def _table_of(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table, without the columns that hold no value."""
    if not rows:
        return "no source merged"
    columns = [column for column in rows[0] if any(row[column] is not None for row in rows)]
    return markdown_table([{column: row[column] for column in columns} for row in rows])


def _format_known(value: float | None) -> str | None:
    return None if value is None else format_number(value)


def _pinned(name: str, sha: str | None) -> str:
    return f"{name.partition('@')[0]}@{sha}" if sha else name
