"""What a merge would do, and all that stands in its way, before any weight is read."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from . import hub
from .adapters import adapter_problems, load_adapter_config
from .config import Recipe
from .errors import GraspError
from .loading import architecture_problems, load_config, model_class
from .matching import head_tensors, label_problem, tensor_problems
from .prepare import labelled_splits
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
    rows, target, base = [], None, None
    for position, reference in enumerate(recipe.locate(name) for name in references):
        planned = PlannedSource(reference, role="source" if position else "base")
        rows.append(planned)
        try:
            source, planned.num_bytes = hub.look_up(reference, token=token)
            planned.kind, planned.sha = source.kind, source.sha
            if position == 0:
                target, base = _meta_model(source, recipe), source
                planned.architecture = target.config.model_type
            else:
                _check(planned, source, target, base, keep_head=recipe.config.head == "keep")
        except GraspError as error:
            planned.problems.append(str(error))
    return rows


def plan_table(rows: list[PlannedSource]) -> str:
    """Return the plan as a Markdown table, and below it every problem in full."""
    problems = [f"- {row.reference}: {problem}" for row in rows for problem in row.problems]
    return "\n".join([markdown_table([row.row() for row in rows]), *([""] if problems else []), *problems])


def _check(
    planned: PlannedSource, source: Source, target: PreTrainedModel | None, base: Source | None, *, keep_head: bool
) -> None:
    if source.kind == "adapter":
        config = load_adapter_config(source)
        planned.architecture = str(getattr(config.peft_type, "value", config.peft_type))
        planned.problems += adapter_problems(config, base)
        return
    model_config = load_config(source)
    planned.architecture = model_config.model_type
    if target is None:
        return
    planned.problems += architecture_problems(model_config, target)
    if planned.problems:
        return
    with torch.device("meta"):
        model = type(target)(model_config)
    labels = label_problem(target, model)
    if labels and not keep_head:
        planned.problems.append(labels)
    planned.problems += tensor_problems(target, model, ignored=head_tensors(target) if labels else ())


def _meta_model(source: Source, recipe: Recipe) -> PreTrainedModel:
    """Return the target without weights, with the label names that the data gives it."""
    config = load_config(source)
    cls = model_class(config, recipe.task, str(source.ref))
    if recipe.data:
        _, labels = labelled_splits(recipe, config, cls)
        config.update(labels)
    with torch.device("meta"):
        return cls(config)
