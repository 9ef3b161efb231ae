"""What a merge would do, and all that stands in its way, before any weight is read."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from . import hub
from .adapters import adapter_problems, load_adapter_config
from .config import Recipe
from .errors import GraspError
from .loading import architecture_problems, is_headless, load_config, model_class
from .matching import head_tensors, label_problem, tensor_problems
from .prepare import check_prepared, labelled_splits, required_processing_class
from .report import markdown_table
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
    """

    reference: str
    role: str
    kind: str = ""
    sha: str | None = None
    architecture: str = ""
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)

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
    """Return the plan as a Markdown table, and below it every problem in full."""
    problems = problem_list(rows)
    return "\n".join([markdown_table([row.row() for row in rows]), *([""] if problems else []), *problems])


def problem_list(rows: list[PlannedSource]) -> list[str]:
    """Return every problem of the plan as a line that names its model."""
    return [f"- {row.reference}: {problem}" for row in rows for problem in row.problems]


@dataclass
class _Target:
    """What sources are compared with: the base, as a model without weights, and what the recipe wants of it."""

    base: Source
    model: PreTrainedModel
    has_labels: bool  # of the data; where that cannot be read, label names are not compared
    keep_head: bool

    def label_problem(self, source: PreTrainedModel) -> str | None:
        return label_problem(self.model, source) if self.has_labels else None

    def without_weights(self, config: PretrainedConfig) -> PreTrainedModel:
        with torch.device("meta"):
            return type(self.model)(config)


def _plan_base(planned: PlannedSource, base: Source, recipe: Recipe) -> _Target:
    config = load_config(base)
    planned.architecture = config.model_type
    cls = model_class(config, recipe.task, str(base.ref))
    has_labels = False
    try:
        check_prepared(cls, base)
        required_processing_class(base)
        _, labels = labelled_splits(recipe, config, cls)
        config.update(labels)
        has_labels = True
    except GraspError as error:
        planned.problems.append(str(error))
    with torch.device("meta"):
        return _Target(base, cls(config), has_labels, keep_head=recipe.config.head == "keep")


def _plan_adapter(planned: PlannedSource, adapter: Source, target: _Target | None) -> None:
    config = load_adapter_config(adapter)
    planned.architecture = str(getattr(config.peft_type, "value", config.peft_type))
    if target is None:
        return
    planned.problems += adapter_problems(config, adapter, target.base)
    heads = {name.partition(".")[0] for name in head_tensors(target.model)}
    if heads & set(getattr(config, "modules_to_save", None) or ()) and not target.keep_head:
        labels = target.label_problem(target.without_weights(load_config(target.base)))
        planned.problems += [labels] if labels else []


def _plan_full(planned: PlannedSource, source: Source, target: _Target | None) -> None:
    config = load_config(source)
    planned.architecture = config.model_type
    if source.ref.is_local:
        source.dtypes()  # raises where a file is damaged
    if target is None:
        return
    planned.problems += architecture_problems(config, target.model)
    if is_headless(config) and not target.keep_head:
        planned.problems.append("it has no head, only a base model; use head='keep' to merge the rest")
    if planned.problems:
        return
    model = target.without_weights(config)
    labels = target.label_problem(model)
    if labels and not target.keep_head:
        planned.problems.append(labels)
    planned.problems += tensor_problems(target.model, model, ignored=head_tensors(target.model) if labels else ())
