"""The record of a merge: every source, unit by unit, as data, tables and sentences."""

import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, describe, first_few
from ..files import write_whole
from ..hub.reference import SourceRef
from .checks import check_record
from .entries import (
    ALONE,
    BEST_SOURCE,
    EVALUATION_DATA,
    AdapterReport,
    ControlReport,
    Evaluation,
    FinetuneReport,
    Reason,
)
from .reading import read_change, read_finetuned, read_step, with_present_names
from .redaction import names_of_paths
from .step import Row, StepReport
from .text import WIDTH, format_number, markdown_table, shorten, wrap


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
        adapter: The adapter that the merge has made; `None` if it makes a whole model.
        controls: The gain over each control; empty if none was asked for.
        test: Loss (and accuracy) on the test data; empty without test data.
        planned: All sources that the run was to merge, in order; empty for a run source by source.
        complete: Whether the run came to its end.
    """

    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    ranking: list[dict[str, Any]] = field(default_factory=list)
    final: FinetuneReport | None = None
    adapter: AdapterReport | None = None
    controls: list[ControlReport] = field(default_factory=list)
    test: Evaluation = field(default_factory=dict)
    planned: list[str] = field(default_factory=list)
    complete: bool = True

    def next(self, config: dict[str, Any], versions: dict[str, str]) -> "RunReport":
        """Return the report of a new run with the recipe and data of this one; later calls may replace them."""
        return RunReport(config, versions, deepcopy(self.recipe), deepcopy(self.data))

    def after_source(self, data: dict[str, Any]) -> "RunReport":
        """Return the report after one more source, which used `data`, without the results of an earlier end."""
        return replace(self, data=data, final=None, adapter=None, controls=[], test={})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunReport":
        """Return the report from the dictionary that `dataclasses.asdict` made."""
        values = dict(values)
        earlier = values.pop("control", None)  # records of version 0.1 have at most one
        controls = [
            ControlReport(
                **{
                    **with_present_names(control),
                    "change": read_change(control["change"], calibrated="accuracy" in control["alone"]),
                }
            )
            for control in values.get("controls", [earlier] if earlier else [])
        ]
        final, adapter = read_finetuned(values.get("final")), values.get("adapter")
        return cls(**{**values, "final": final, "adapter": adapter and AdapterReport(**adapter), "controls": controls})

    @property
    def control(self) -> ControlReport | None:
        """The gain over fine-tuning alone; `None` if it was not asked for."""
        return next((control for control in self.controls if control.name == ALONE), None)

    @property
    def verdict(self) -> Reason:
        """The verdict on all sources together, against fine-tuning alone; `NONE` if nothing compared them."""
        change = self.control.change if self.control else self.final.gain if self.final else None
        return change.verdict if change else Reason.NONE


RUN_FIELDS = (*RunReport.__dataclass_fields__, "control")


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
    def base_name(self) -> str:
        """The base for a reader: a Hub id as given, of a local folder its last part."""
        return self.base if self.base_sha else Path(self.base).name

    @property
    def makes_adapter(self) -> bool:
        """Whether the result is an adapter of the base."""
        return self.run.config.get("output") == "adapter"

    @property
    def base_id(self) -> str:
        """The base without a revision: a Hub id, or a folder."""
        return SourceRef.parse(self.base).name if self.base_sha else self.base

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
        continues = self.continues
        if continues and not re.fullmatch(r".+@[0-9a-f]{40}", continues):
            continues = Path(continues).name
        steps = [replace(step, source=step.name) for step in self.steps]
        ranking = [
            row if row.get("sha") else {**row, "reference": Path(str(row["reference"])).name}
            for row in self.run.ranking
        ]
        config, recipe = names_of_paths(self.run.config), names_of_paths(self.run.recipe)
        planned = [StepReport(name, self._sha(name), "").name for name in self.run.planned]
        run = replace(self.run, config=config, recipe=recipe, ranking=ranking, planned=planned)
        return replace(self, base=self.base_name, continues=continues, steps=steps, run=run)

    @property
    def missing(self) -> list[str]:
        """The sources that an interrupted run did not come to."""
        return [] if self.run.complete else self.run.planned[len(self.steps) - self.continued_steps :]

    def incompleteness(self) -> str:
        """Return what an interrupted run lacks; empty for a complete one."""
        if self.run.complete:
            return ""
        done, planned = len(self.steps) - self.continued_steps, len(self.run.planned)
        if self.missing:
            names = [StepReport(name, self._sha(name), "").name for name in self.missing]
            return f"incomplete: {done} of {planned} sources were merged; missing: {first_few(names)}"
        return f"incomplete: all {planned} sources were merged, but the end of the merge is missing"

    def _sha(self, source: str) -> str | None:
        """Return the commit of a source, if the ranking knows it."""
        return next((row.get("sha") for row in self.run.ranking if row.get("reference") == source), None)

    def configuration(self) -> str:
        """Return the last run as a recipe in YAML, every Hub reference pinned to its commit, with a record of the run.

        A run that continues an earlier merge starts from that merge. Ranked sources are listed in their final order.
        """
        start = {"base_model": self.continues or self.base_reference}
        sources = [_pinned(step.source, step.sha) for step in self.steps[self.continued_steps :]]
        sources += [_pinned(name, self._sha(name)) for name in self.missing]
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

    def outcome(self) -> list[str]:
        """Return what all sources together are worth, and the scores of the merge, a sentence each."""
        gain = self.run.final.against_alone() if self.run.final else None
        found = [control.sentence() for control in self.run.controls] + ([gain] if gain else [])
        compared = {control.name for control in self.run.controls} | ({ALONE} if gain else set())
        missing = [name.rstrip(",") for name in (ALONE, BEST_SOURCE) if name not in compared]
        if text := self.incompleteness():
            found.insert(0, text)
        elif self.steps and not any(step.changed for step in self.steps):
            found.append("no source is in the model")
        elif self.steps and missing:
            found.append(f"not compared with {' and '.join(missing)}: `grasp-hf merge --control` does that")
        scores, on_test, count = self.scores()
        if scores:
            values = ", ".join(f"{name} {format_number(value)}" for name, value in scores.items())
            number = f", {count} samples" if count else ""
            found.append(
                f"test: {values}{number}, which chose nothing"
                if on_test
                else f"{EVALUATION_DATA}: {values}{number}, which also chose what was kept; add test data for an unbiased score"
            )
        return found

    def scores(self) -> tuple[Evaluation, bool, int | None]:
        """Return the scores of the finished merge, whether they are on test data, and the number of samples.

        Without test data they are on the evaluation data, which also chose what was kept; without those they are empty.
        """
        run, last = self.run, self.steps[-1] if self.steps else None
        if run.test:
            return run.test, True, _count(run.data.get("test"))
        if run.final:
            return run.final.after, False, _count(run.data.get("eval"))
        if last and last.validated_by == EVALUATION_DATA:
            return last.after, False, _count(run.data.get("eval"))
        return {}, False, None

    def conclusions(self) -> list[str]:
        """Return the decisions of the merge, a sentence each."""
        merged = sum(step.moved > 0 for step in self.steps)
        found = [f"{merged} of {len(self.steps)} sources merged"]
        if self.continued_steps and self.run.config.get("method") == "weighted":
            found.append(
                f"the first {self.continued_steps} sources keep the weights that they had; their predictions were not kept, so "
                "the later ones were weighed among themselves"
            )
        averaged = [step.name for step in self.steps if step.was_averaged]
        if averaged:
            found.append(f"averaged, because learned coefficients were not clearly better: {', '.join(averaged)}")
        unclear = [step for step in self.steps if step.accepted and step.moved and step.reason == Reason.NO_EFFECT]
        if unclear:
            found.append(f"no measurable effect, so kept: {_names_with_doubts(unclear)}")
        rejected = [f"{step.name} ({step.reason})" for step in self.steps if not step.accepted]
        if rejected:
            found.append(f"rejected: {', '.join(rejected)}")
        found += [f"{step.name}: {note}" for step in self.steps for note in step.notes]
        if self.run.final:
            first, *rest = self.run.final.sentences()
            found += [f"at the end: {first}", *rest]
        if self.run.adapter:
            found.append(self.run.adapter.sentence())
        return found

    def short_table(self) -> str:
        """Return one line per source as a table that fits in a terminal; the names are shortened to the space left."""
        rows = [step.short_row() for step in self.steps]
        narrow = _table_of([{**row, "source": ""} for row in rows]).partition("\n")[0]
        left = max(WIDTH - len(narrow) + len("source"), len("source"))
        return _table_of([{**row, "source": shorten(str(row["source"]), left)} for row in rows])

    def __str__(self) -> str:
        loss = f", loss {format_number(self.start['loss'])}" if self.start else ""
        start = f"start: {shorten(self.base_name, 70)}{loss}"
        outcome, conclusions = (
            [wrap(text, "- ", "  ") for text in texts] for texts in (self.outcome(), self.conclusions())
        )
        return "\n".join([*outcome, *([""] if outcome else []), start, "", self.short_table(), "", *conclusions])

    def to_json(self, path: Path, *, files: Sequence[str] = ()) -> None:
        """Write everything to `path`; the first entry is the outcome in words.

        Args:
            path: The file.
            files: Names of all files and folders of the merge, which a later merge into the same folder may remove.
        """
        values = {"outcome": self.outcome(), **asdict(self), **({"files": list(files)} if files else {})}
        write_whole(path, json.dumps(values, indent=2) + "\n")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MergeReport":
        """Return the record from the dictionary that `dataclasses.asdict` made, or from that of an earlier version."""
        values = dict(values)
        for name in ("outcome", "files"):  # the outcome follows from the rest
            values.pop(name, None)
        steps = [read_step(step) for step in values.pop("steps")]
        # In a record of version 0.1, the fields of the run are fields of the whole record.
        run = values.pop("run", None) or {name: values.pop(name) for name in RUN_FIELDS if name in values}
        return cls(**values, steps=steps, run=RunReport.from_dict(run))

    @classmethod
    def from_json(cls, path: Path) -> "MergeReport":
        """Return the record from a file that `to_json` wrote.

        Raises:
            ConfigError: The file holds something else.
        """
        try:
            record = cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
            check_record(record)
        except ConfigError as error:
            raise error.reworded(f"'{path.name}' is not the record of a merge by grasp_hf: {error}") from error
        except Exception as error:  # a stranger may have written the file
            raise ConfigError(f"'{path.name}' is not the record of a merge by grasp_hf: {describe(error)}") from error
        return record


def _table_of(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table, without the columns that hold no value."""
    if not rows:
        return "no source merged"
    columns = [column for column in rows[0] if any(row[column] is not None for row in rows)]
    return markdown_table([{column: row[column] for column in columns} for row in rows])


def _names_with_doubts(steps: Sequence[StepReport]) -> str:
    """Return the names of sources, each with the number of samples that would tell its effect; the first says so."""
    texts, unit = [], " samples would tell"
    for step in steps:
        if step.change and step.change.doubt:
            texts.append(f"{step.name} ({step.change.samples_to_see}{unit})")
            unit = ""
        else:
            texts.append(step.name)
    return ", ".join(texts)


def _count(description: dict[str, Any] | None) -> int | None:
    """Return the number of samples of a data set from its description in the record."""
    return (description or {}).get("samples")


def _pinned(name: str, sha: str | None) -> str:
    return f"{name.partition('@')[0]}@{sha}" if sha else name
