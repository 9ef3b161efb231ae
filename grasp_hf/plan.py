"""What a merge would do, and all that stands in its way, before any weight is read."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from . import hub
from .adapters import adapter_problems, load_adapter_config
from .config import Recipe
from .errors import GraspError
from .loading import (
    adapter_labels,
    architecture_problems,
    is_headless,
    load_config,
    load_processing_class,
    match_vocabularies,
    model_class,
)
from .matching import head_tensors, movable_tensors, partition, tensor_problems, tie_problems
from .prepare import check_prepared, labelled_splits, required_processing_class
from .report import markdown_table
from .rows import label_names, match_head
from .sources import Source


@dataclass
class PlannedSource:
    """What is known of one reference without its weights.

    Attributes:
        reference: As the user gave it.
        role: `base` or `source`.
        kind: `full` or `adapter`; empty where it was not found.
        sha: Commit on the Hub.
        architecture: The model type, or the type of the adapter.
        num_bytes: Size of its weights.
        problems: Everything that keeps it from being merged.
        notes: What will happen to its head and its vocabulary, where there is something to say.
        partition: Of the base: the units that are decided together, those that differ in a number only on one line.
    """

    reference: str
    role: str
    kind: str = ""
    sha: str | None = None
    architecture: str = ""
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    partition: list[str] = field(default_factory=list)

    def row(self) -> dict[str, str]:
        """Return its line of the plan."""
        name = Path(self.reference).name if Path(self.reference).is_dir() else self.reference
        return {
            "": self.role,
            "model": name,
            "kind": self.kind or "–",
            "architecture": self.architecture or "–",
            "revision": (self.sha or "local")[:7],
            "MB": f"{self.num_bytes / 1e6:.1f}",
            "problems": str(len(self.problems) or "none"),
        }


def plan(recipe: Recipe, *, token: str | None = None) -> list[PlannedSource]:
    """Look up the base model and every source of `recipe` and list all problems of each; no weight is read.

    Models are built on the meta device from their configurations, so shapes are compared at no cost. The shapes of an
    adapter are known only when it is loaded.
    """
    references = [recipe.base_model, *recipe.sources] if recipe.base_model else recipe.sources
    rows: list[PlannedSource] = []
    target: _Target | None = None
    for reference in map(recipe.locate, references):
        planned = PlannedSource(reference, role="source" if rows else "base")
        rows.append(planned)
        try:
            source, planned.num_bytes = hub.look_up(reference, token=token)
            planned.kind, planned.sha = source.kind, source.sha
            if planned.role == "base":
                target = _plan_base(planned, source, recipe)
            elif source.kind == "adapter":
                _plan_adapter(planned, source, target)
            else:
                _plan_full(planned, source, target)
        except GraspError as error:
            planned.problems.append(str(error))
    return rows


def plan_table(rows: list[PlannedSource]) -> str:
    """Return the plan as a Markdown table; below it the units, every note and every problem in full."""
    blocks = [
        [markdown_table([row.row() for row in rows])],
        [line for row in rows for line in row.partition],
        [f"- {row.reference}: {note}" for row in rows for note in row.notes],
        problem_list(rows),
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def partition_lines(model: PreTrainedModel, unit: str) -> list[str]:
    """Return one line per kind of unit: its name, with a range where units differ in numbers only, and its size."""
    tensors = movable_tensors(model)
    kinds: dict[tuple[str, int], list[str]] = {}
    units = partition(model, unit)
    for part in units:
        elements = sum(tensors[name].numel() for name in part.tensors)
        kinds.setdefault((re.sub(r"(?<=\.)\d+", "*", part.name), elements), []).append(part.name)
    lines = [f"{len(units)} units of {sum(t.numel() for t in tensors.values()):,} numbers (unit: {unit}):"]
    for (kind, elements), names in kinds.items():
        name = names[0] if len(names) == 1 else f"{len(names)} × {kind}"
        lines.append(f"  {name}: {elements:,}")
    return lines


def problem_list(rows: list[PlannedSource]) -> list[str]:
    """Return every problem of the plan as a line that names its model."""
    return [f"- {row.reference}: {problem}" for row in rows for problem in row.problems]


@dataclass
class _Target:
    """What sources are compared with: the base, as a model without weights, and what the recipe wants of it."""

    base: Source
    model: PreTrainedModel
    has_labels: bool  # of the data; where that cannot be read, label names are not compared
    processing_class: Any
    accepted_bases: list[str]


def _without_weights(target: _Target, config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return type(target.model)(config)


def _plan_base(planned: PlannedSource, base: Source, recipe: Recipe) -> _Target:
    config = load_config(base)
    planned.architecture = config.model_type
    cls = model_class(config, recipe.task, str(base.ref))
    has_labels, processor = False, load_processing_class(base)
    if recipe.data or recipe.config.needs_data:
        try:
            check_prepared(cls, base)
            required_processing_class(base)
            _, labels = labelled_splits(recipe, config, cls)
            config.update(labels)
            has_labels = True
        except GraspError as error:
            planned.problems.append(str(error))
    with torch.device("meta"):
        model = cls(config)
    planned.partition = partition_lines(model, recipe.config.unit)
    return _Target(base, model, has_labels, processor, recipe.config.accepted_bases)


def _plan_adapter(planned: PlannedSource, adapter: Source, target: _Target | None) -> None:
    config = load_adapter_config(adapter)
    planned.architecture = str(getattr(config.peft_type, "value", config.peft_type))
    if target is None:
        return
    planned.problems += adapter_problems(config, adapter, target.base, target.accepted_bases)
    heads = {name.partition(".")[0] for name in head_tensors(target.model)}
    if target.has_labels and heads & set(getattr(config, "modules_to_save", None) or ()):
        labels = adapter_labels(adapter, target.base)
        model = _without_weights(target, load_config(target.base))
        planned.notes += match_head(target.model, movable_tensors(model), labels).notes


def _plan_full(planned: PlannedSource, source: Source, target: _Target | None) -> None:
    config = load_config(source)
    planned.architecture = config.model_type
    if source.ref.is_local:
        source.dtypes()  # raises where a file is damaged
    if target is None:
        return
    planned.problems += architecture_problems(config, target.model)
    if planned.problems:
        return
    model = _without_weights(target, config)
    lacking = head_tensors(model) if is_headless(config) else set()
    tensors = {name: tensor for name, tensor in movable_tensors(model).items() if name not in lacking}
    labels = label_names(config if target.has_labels else target.model.config)
    head = match_head(target.model, tensors, labels)
    tokens = match_vocabularies(source, tensors, target.model, target.processing_class)
    matched = set(head.rows) | set(tokens.rows) | head.left_out
    planned.problems += head.problems + tokens.problems + tie_problems(target.model, model)
    planned.problems += tensor_problems(movable_tensors(target.model), tensors, ignored=matched)
    planned.notes += head.notes + tokens.notes
