"""Plans a merge: looks up every model and lists all problems, before any weight is read."""

import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..config.grasp import GraspConfig
from ..config.recipe import Recipe
from ..config.sources import NO_OPTIONS
from ..errors import ConfigError, GraspError
from ..hub.download import cached_bytes, look_up
from ..hub.licenses import strictest
from ..hub.listing import Listing
from ..hub.reference import Source
from ..models.classes import is_headless, load_config, model_class
from ..models.processors import load_processing_class, required_processing_class
from ..models.target import fresh_problems, fresh_tensors, untie_
from ..record.card import declared_license
from ..record.saving import read_record
from ..record.text import markdown_table
from ..sources.adapters import adapter_problems, load_adapter_config
from ..sources.architecture import architecture_problems
from ..sources.checkpoint import fill_tied_, runtime_tensors
from ..sources.fit import SourceFiles, fit_source, tie_problems
from ..sources.headers import header_tensors
from ..sources.load import adapter_labels, saves_head, training_problems
from ..sources.rows import label_names, match_head
from ..tensors.units import head_tensors, movable_tensors, partition
from .costs import cost_lines
from .planned import PlannedSource

LOOK_UPS = 8  # in parallel


@dataclass
class _Found:
    """A model that was found; its configuration files are on this machine, and the headers of its weights are read.

    Attributes:
        source: The model, without its weights.
        listing: Its files on the Hub; `None` for a folder.
        headers: Its tensors by name, without storage; `None` if the weights are pickled.
    """

    source: Source
    listing: Listing | None
    headers: dict[str, Tensor] | None


def plan(recipe: Recipe, *, token: str | None = None) -> list[PlannedSource]:
    """Look up the base model and every source of `recipe`, and list all problems of each; no weight is read.

    Models are built on the meta device from their configurations, and compared with the shapes in the headers of their
    files, so nothing large is read. The tensors of an adapter are checked later, when it is loaded.

    Args:
        recipe: The recipe of the merge.
        token: Hub token.

    Returns:
        The facts about the base, and then about each source.
    """
    references = [recipe.base_model, *recipe.sources] if recipe.base_model else recipe.sources
    rows = [
        PlannedSource(reference, role="source" if index else "base")
        for index, reference in enumerate(map(recipe.locate, references))
    ]
    for number, row in enumerate(rows):
        if row.reference in (earlier.reference for earlier in rows[:number]):
            row.notes.append("the recipe names it twice, so it counts twice in a mean")
    with ThreadPoolExecutor(max_workers=LOOK_UPS) as threads:
        found = list(threads.map(lambda row: _find(row, token, recipe.config.trust_remote_code), rows))
    target: _Target | None = None
    for planned, one in zip(rows, found, strict=True):
        if one is None:
            continue
        try:
            if planned.role == "base":
                target = _plan_base(planned, one, recipe, token)
            elif one.source.kind == "adapter":
                _plan_adapter(planned, one.source, target)
            else:
                _plan_full(planned, one, target)
        except GraspError as error:
            planned.problems += error.problems_of(planned.reference)
    return rows


def _find(planned: PlannedSource, token: str | None, trusted: Collection[str]) -> _Found | None:
    """Look up a reference on the Hub or in its folder, and record the facts in `planned`; `None` if that fails."""
    try:
        source, listing = look_up(planned.reference, token=token, trusted=trusted)
        planned.kind, planned.sha = source.kind, source.sha
        planned.num_bytes = listing.num_bytes if listing else source.num_bytes
        planned.cached_bytes = cached_bytes(listing) if listing else planned.num_bytes
        planned.license = listing.license if listing else declared_license(source.folder)
        planned.gated = listing.gated if listing else False
        headers = header_tensors(source, listing, token=token)
        if headers is not None:
            planned.dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in headers.values()})
            planned.parameters = sum(tensor.numel() for tensor in headers.values())
        else:
            planned.notes.append(
                "its weights are pickled, so their shapes are unknown until the merge reads them (weights_only=True)"
            )
        return _Found(source, listing, headers)
    except GraspError as error:
        planned.problems += error.problems_of(planned.reference)
        return None


def plan_table(rows: list[PlannedSource], recipe: Recipe | None = None, *, verbose: bool = False) -> str:
    """Return the plan as text: a Markdown table, the costs, the units, and every note and every problem.

    Args:
        rows: The plan.
        recipe: The recipe, without which the costs are left out.
        verbose: Whether to add all other facts about each model, such as licence, revision and data type.
    """
    blocks = [
        [markdown_table([row.row() for row in rows])],
        *([row.detail_lines() for row in rows] if verbose else []),
        cost_lines(rows, recipe.config) if recipe and rows[0].kind else [],
        [line for row in rows for line in row.partition],
        [f"- {row.reference}: {note}" for row in rows for note in row.notes],
        licence_lines(rows),
        [f"- {problem}" for problem in problem_list(rows)],
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def licence_lines(rows: list[PlannedSource]) -> list[str]:
    """Return the licence that a merge of the models on the Hub would declare, and a line for each warning about it."""
    licenses = {row.reference: row.license for row in rows if row.sha}
    declared, warnings = strictest(licenses) if licenses else (None, [])
    lines = [f"licence of the merge: {declared}"] if declared else []
    return lines + [f"- {warning}" for warning in warnings]


def partition_lines(model: PreTrainedModel, unit: str) -> list[str]:
    """Return a line per kind of unit with its name and size; units whose names differ only in numbers share a line."""
    tensors = movable_tensors(model)
    kinds: dict[tuple[str, int], list[str]] = {}
    units = partition(model, unit)
    for part in units:
        elements = sum(tensors[name].numel() for name in part.tensors)
        kinds.setdefault((re.sub(r"(?<=\.)\d+", "*", part.name), elements), []).append(part.name)
    total = sum(tensor.numel() for tensor in tensors.values())
    lines = [f"{len(units)} units with {total:,} parameters (unit: {unit}):"]
    for (kind, elements), names in kinds.items():
        name = names[0] if len(names) == 1 else f"{len(names)} × {kind}"
        lines.append(f"  {name}: {elements:,}")
    return lines


def problem_list(rows: list[PlannedSource]) -> list[str]:
    """Return every problem of the plan as a line that names its model or the data."""
    return [problem for row in rows for problem in row.problem_lines()]


@dataclass
class _Target:
    """The target that sources are compared with, without its weights.

    Attributes:
        base: The base model.
        model: The target on the meta device.
        has_labels: Whether its label names are those of the merge; not if the data cannot be read.
        processing_class: Tokenizer or image processor of the base; `None` if it has none.
        settings: Settings of the recipe.
        token: Hub token.
    """

    base: Source
    model: PreTrainedModel
    has_labels: bool
    processing_class: Any
    settings: GraspConfig
    token: str | None = field(repr=False)

    @property
    def adapters_base(self) -> Source:
        """The model whose adapters can be merged; if the base is a merge, the model that this merge started from."""
        record = read_record(self.base.folder)
        return look_up(record.base_reference, token=self.token)[0] if record else self.base


def _without_weights(target: _Target, config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return type(target.model)(config)


def _plan_base(planned: PlannedSource, found: _Found, recipe: Recipe, token: str | None) -> _Target:
    base = found.source
    config = load_config(base, recipe.config.options_of(str(base.ref)).labels)
    planned.architecture = config.model_type
    cls = model_class(config, recipe.task, str(base.ref))
    _describe(planned, config, generates=cls.can_generate())
    needs_data = bool(recipe.data) or recipe.config.needs_data
    if needs_data:
        planned.data_problems = _take_labels_(config, recipe, base, cls)
    with torch.device("meta"):
        model = cls(config)
    planned.problems += fresh_problems(model, _missing_tensors(found, model, config), needs_head=not needs_data)
    if recipe.config.untie:
        untie_(model)
    planned.partition = partition_lines(model, recipe.config.unit)
    has_labels = not planned.data_problems
    return _Target(base, model, has_labels, load_processing_class(base), recipe.config, token)


def _take_labels_(config: PretrainedConfig, recipe: Recipe, base: Source, cls: type[PreTrainedModel]) -> list[str]:
    """Change `config` to the label names of the data; if the data has problems, return them and change nothing."""
    from ..data.section import DataSection  # imports datasets, which a merge without data does not need
    from ..data.splits import labelled_splits
    from ..data.tasks import check_prepared

    try:
        DataSection.from_recipe(recipe)
    except ConfigError as error:
        return error.problems  # each problem names its key, such as data.path
    try:
        check_prepared(cls, base)
        required_processing_class(base)
        _, labels = labelled_splits(recipe, config, cls)
    except GraspError as error:
        return [f"data: {problem}" for problem in error.problems]
    config.update(labels)
    return []


def _missing_tensors(found: _Found, model: PreTrainedModel, config: PretrainedConfig) -> dict[str, str]:
    """Return the tensors that `model` would initialise; for pickled weights, those that the configuration lacks."""
    if found.headers is None:
        return dict.fromkeys(head_tensors(model), "") if is_headless(config) else {}
    return fresh_tensors(model, runtime_tensors(found.headers, model, Path())[0])


def _generates(config: PretrainedConfig) -> bool:
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    return isinstance(cls, type) and issubclass(cls, PreTrainedModel) and bool(cls.can_generate())


def _describe(planned: PlannedSource, config: PretrainedConfig, *, generates: bool) -> None:
    planned.labels = None if generates else label_names(config)
    planned.vocabulary = getattr(config.get_text_config(), "vocab_size", None)


def _plan_adapter(planned: PlannedSource, adapter: Source, target: _Target | None) -> None:
    config = load_adapter_config(adapter)
    planned.architecture = str(getattr(config.peft_type, "value", config.peft_type))
    planned.adapter_of = config.base_model_name_or_path
    if target is None:
        return
    planned.problems += adapter_problems(
        config, adapter, target.adapters_base, target.settings.accepted_bases, token=target.token
    )
    options = target.settings.options_of(str(adapter.ref))
    planned.problems += training_problems(adapter, target.model, options)
    if target.has_labels and saves_head(config, target.model):
        labels = options.labels or adapter_labels(adapter, target.adapters_base)
        model = _without_weights(target, load_config(target.adapters_base))
        planned.notes += match_head(target.model, movable_tensors(model), labels).notes


def _plan_full(planned: PlannedSource, found: _Found, target: _Target | None) -> None:
    source = found.source
    options = target.settings.options_of(str(source.ref)) if target else NO_OPTIONS
    config = load_config(source, options.labels)
    planned.architecture = config.model_type
    _describe(planned, config, generates=_generates(target.model.config if target else config))
    if target is None:
        return
    planned.problems += architecture_problems(config, target.model, str(source.ref), options.accept)
    if planned.problems:
        return
    model = _without_weights(target, config)
    labels = label_names(config if target.has_labels else target.model.config)
    if found.headers is None:  # pickled weights: only the configuration shows the tensors
        lacking = head_tensors(model) if is_headless(config) else set()
        tensors = {name: tensor for name, tensor in movable_tensors(model).items() if name not in lacking}
        read = SourceFiles(tensors, set(tensors), labels)
    else:
        tensors, problems, notes = runtime_tensors(found.headers, target.model, Path())
        fill_tied_(tensors, model, movable_tensors(target.model))
        read = SourceFiles(tensors, set(tensors), labels, problems, notes=notes, problem_type=config.problem_type)
    fit = fit_source(source, read, target.model, target.processing_class, options)
    planned.problems += fit.problems + tie_problems(target.model, model)
    planned.notes += fit.notes
