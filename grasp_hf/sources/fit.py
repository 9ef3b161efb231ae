"""Whether a source fits the target: tensors, ties, architecture, labels and tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import first_few
from ..hub.reference import Source
from ..internals import tied_names
from ..models.processors import load_processing_class
from ..models.target import is_computed
from ..tensors.units import head_tensors, movable_tensors
from .rows import RowMatch, RowMatches, match_head, match_tokens, token_tensors, vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Settings that change what the same weights mean, and that no shape tells.
WITHOUT_SHAPE = (
    "num_hidden_layers",  # an ALBERT shares them
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "activation_function",
    "window_size",
    "rope_theta",
    "rope_parameters",
)


@dataclass
class Fit:
    """How a source meets the target.

    Attributes:
        tensors: The source's tensors, without those of a head that does not fit.
        rows: Where rows are matched by label name or token, the matches by tensor.
        notes: What a reader should know of them.
        problems: Everything that keeps it from being merged.
    """

    tensors: dict[str, Tensor]
    rows: dict[str, RowMatch]
    notes: list[str]
    problems: list[str]


@dataclass
class SourceFiles:
    """What the files of a source hold: its own tensors by runtime name, which may move, and what its classes mean."""

    tensors: dict[str, Tensor]
    candidates: set[str]
    labels: list[str] | None  # None where the classes have no names
    problems: list[str] = field(default_factory=list)


def fit_source(source: Source, read: SourceFiles, target: PreTrainedModel, processing_class: Any) -> Fit:
    """Match heads and vocabularies, and list what keeps a source from being merged; its tensors may be on the meta device."""
    targets = movable_tensors(target)
    brings_head = source.kind == "full" or bool(read.candidates & head_tensors(target))
    head = match_head(target, read.tensors, read.labels, brings=brings_head)
    tokens = match_vocabularies(source, read.tensors, target, processing_class)
    tensors = {name: tensor.detach() for name, tensor in read.tensors.items() if name not in head.left_out}
    matches = {name: match for name, match in (head.rows | tokens.rows).items() if name in tensors}
    lacking = [name for name in targets if name not in tensors and name not in head.left_out]
    problems = [*read.problems, *tensor_problems(targets, tensors, {*lacking, *head.left_out, *matches})]
    problems += head.problems + tokens.problems
    lacking = [name for name in lacking if not is_computed(target, name)]
    if lacking and source.kind == "full":
        problems.append(f"{len(lacking)} tensors are not in its files, starting with {min(lacking)}")
    return Fit(tensors, matches, [*head.notes, *tokens.notes], problems)


def match_vocabularies(
    source: Source, tensors: Mapping[str, Tensor], target: PreTrainedModel, processing_class: Any
) -> RowMatches:
    """Match the tokens of `source`, which holds `tensors`, with the target's; by number where its tokenizer is not known.

    An adapter has the vocabulary of its base model.
    """
    expected = vocabulary(processing_class)
    if source.kind == "adapter" or not token_tensors(target):
        return RowMatches()
    if expected is None:
        return RowMatches(
            notes=["vocabulary: tokens matched by their numbers, for the target's tokenizer is not known"]
        )
    return match_tokens(target, expected, tensors, vocabulary(load_processing_class(source)))


def architecture_problems(config: PretrainedConfig, target: PreTrainedModel) -> list[str]:
    """List what a source's config alone says against merging it into `target`."""
    problems = []
    if config.model_type != target.config.model_type:
        return [f"another architecture: got {config.model_type}, expected {target.config.model_type}"]
    for key in WITHOUT_SHAPE:
        got, expected = getattr(config, key, None), getattr(target.config, key, None)
        if got != expected:
            problems.append(f"another {key}: got {got}, expected {expected}")
    return problems


def tie_problems(target: PreTrainedModel, source: PreTrainedModel) -> list[str]:
    """Say where weights are tied in one of two models only."""
    ties, others = (tied_names(model) for model in (target, source))
    pairs = sorted(f"{a} = {b}" for a, b in set(ties.items()) ^ set(others.items()))
    return [f"weights are tied in one model and not in the other: {first_few(pairs)}"] if pairs else []


def tensor_problems(
    target: Mapping[str, Tensor], source: Mapping[str, Tensor], ignored: Collection[str] = ()
) -> list[str]:
    """List what keeps the tensors of a source from taking the place of the target's: names and shapes.

    `ignored` names tensors of the target that stay whatever the source holds.
    """
    problems = []
    missing = [name for name in target if name not in source and name not in ignored]
    extra = [name for name in source if name not in target]
    if missing:
        problems.append(f"{len(missing)} tensors of the target are not in the source: {first_few(missing)}")
    if extra:
        problems.append(f"{len(extra)} tensors of the source are not in the target: {first_few(extra)}")
    problems += [
        f"{name}: got shape {tuple(source[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in target.items()
        if name in source and name not in ignored and source[name].shape != tensor.shape
    ]
    return problems
