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

# Settings that change what a model computes from the same weights; the shapes of the weights do not show them.
WITHOUT_SHAPE = (
    "num_hidden_layers",  # the layers of an ALBERT share their weights
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
    """The result of the comparison of a source with the target.

    Attributes:
        tensors: The source's tensors, without those of a head that does not fit.
        rows: The row matches by tensor name, for tensors whose rows are matched by label name or token.
        notes: Remarks on the matches, for the report.
        problems: The reasons why the source cannot be merged; empty if it can.
    """

    tensors: dict[str, Tensor]
    rows: dict[str, RowMatch]
    notes: list[str]
    problems: list[str]


@dataclass
class SourceFiles:
    """The content of a source's files.

    Attributes:
        tensors: The source's own tensors by runtime name.
        candidates: Names of the tensors that may move.
        labels: Label names by class id; `None` if the classes have no names.
        problems: Problems that were found while reading.
        ranks: Rank of the difference to the base, for each tensor that a LoRA adapter changes.
        notes: Remarks for the report.
    """

    tensors: dict[str, Tensor]
    candidates: set[str]
    labels: list[str] | None
    problems: list[str] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def fit_source(source: Source, files: SourceFiles, target: PreTrainedModel, processing_class: Any) -> Fit:
    """Match head and vocabulary of a source with the target's, and list the problems that keep it from being merged.

    The tensors may be on the meta device.
    """
    targets = movable_tensors(target)
    brings_head = source.kind == "full" or bool(files.candidates & head_tensors(target))
    head = match_head(target, files.tensors, files.labels, brings=brings_head)
    tokens = match_vocabularies(source, files.tensors, target, processing_class)
    tensors = {name: tensor.detach() for name, tensor in files.tensors.items() if name not in head.left_out}
    matches = {name: match for name, match in (head.rows | tokens.rows).items() if name in tensors}
    missing = [name for name in targets if name not in tensors and name not in head.left_out]
    problems = [*files.problems, *tensor_problems(targets, tensors, {*missing, *head.left_out, *matches})]
    problems += head.problems + tokens.problems
    missing = [name for name in missing if not is_computed(target, name)]
    if missing and source.kind == "full":
        problems.append(f"{len(missing)} tensors are not in its files, starting with {min(missing)}")
    return Fit(tensors, matches, [*files.notes, *head.notes, *tokens.notes], problems)


def match_vocabularies(
    source: Source, tensors: Mapping[str, Tensor], target: PreTrainedModel, processing_class: Any
) -> RowMatches:
    """Match the tokens of `source` with the target's by their strings; by number if the target's tokenizer is unknown.

    `tensors` are the tensors of `source`; `processing_class` is the target's tokenizer or processor.
    """
    expected = vocabulary(processing_class)
    if source.kind == "adapter" or not token_tensors(target):  # an adapter has the vocabulary of its base model
        return RowMatches()
    if expected is None:
        return RowMatches(
            notes=["vocabulary: tokens matched by their numbers, because the target's tokenizer is unknown"]
        )
    return match_tokens(target, expected, tensors, vocabulary(load_processing_class(source)))


def architecture_problems(config: PretrainedConfig, target: PreTrainedModel) -> list[str]:
    """List the problems in a source's config that keep it from being merged into `target`."""
    problems = []
    if config.model_type != target.config.model_type:
        return [f"different architecture: got {config.model_type}, expected {target.config.model_type}"]
    for key in WITHOUT_SHAPE:
        got, expected = getattr(config, key, None), getattr(target.config, key, None)
        if got != expected:
            problems.append(f"different {key}: got {got}, expected {expected}")
    return problems


def tie_problems(target: PreTrainedModel, source: PreTrainedModel) -> list[str]:
    """Return a problem that lists the weights that are tied in only one of two models; empty if there are none."""
    ties, others = (tied_names(model) for model in (target, source))
    pairs = sorted(f"{a} = {b}" for a, b in set(ties.items()) ^ set(others.items()))
    return [f"weights are tied in one model but not in the other: {first_few(pairs)}"] if pairs else []


def tensor_problems(
    target: Mapping[str, Tensor], source: Mapping[str, Tensor], ignored: Collection[str] = ()
) -> list[str]:
    """List the names and shapes that keep the tensors of a source from replacing the target's.

    `ignored` are names of target tensors that need no counterpart of the same shape.
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
