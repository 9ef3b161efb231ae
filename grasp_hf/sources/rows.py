"""Rows that mean the same in two models: classes by their label names, tokens by their strings, by number only without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import first_few
from ..tensors.units import head_tensors, movable_tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class RowMatch:
    """Which row of the source belongs to which row of the target.

    Attributes:
        target: Rows of the target's tensor that have a counterpart.
        source: The counterpart of each, a row of the source's tensor.
        sizes: Number of rows of the target's and of the source's tensor.
    """

    target: Sequence[int]
    source: Sequence[int]
    sizes: tuple[int, int]

    @property
    def is_identity(self) -> bool:
        """Whether every row stays where it is."""
        return self.sizes[0] == self.sizes[1] == len(self.target) and list(self.target) == list(self.source)

    @torch.no_grad()
    def fill_(self, out: Tensor, target: Tensor, source: Tensor) -> None:
        """Change `out` to the source's tensor as the target would hold it: its own rows where there is no counterpart."""
        out.copy_(target)
        out[torch.tensor(self.target)] = source[torch.tensor(self.source)].to(out.dtype)


@dataclass
class RowMatches:
    """How the rows of a source's head or vocabulary were matched with the target's.

    Attributes:
        rows: The match by name of tensor, where rows do not simply stay where they are.
        left_out: Names of the tensors that the source has nothing to say about.
        notes: What was done, for the report.
        problems: What makes the source unfit.
    """

    rows: dict[str, RowMatch] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def match_rows(target: Mapping[str, int], source: Mapping[str, int], sizes: tuple[int, int]) -> RowMatch:
    """Match rows by name, from name to row in each model; a row whose number the tensor does not hold has no match."""
    shared = [
        (row, source[name])
        for name, row in target.items()
        if name in source and row < sizes[0] and source[name] < sizes[1]
    ]
    shared.sort()
    return RowMatch([row for row, _ in shared], [row for _, row in shared], sizes)


def label_names(config: PretrainedConfig) -> list[str]:
    """Return the label names by class id."""
    return [str(name) for _, name in sorted((config.id2label or {}).items(), key=lambda item: int(item[0]))]


def match_labels(target: Sequence[str], source: Sequence[str]) -> RowMatch:
    """Match classes by name; a name that stands for two classes matches nothing."""

    def rows(names: Sequence[str]) -> dict[str, int]:
        return {name: row for row, name in enumerate(names) if list(names).count(name) == 1}

    if list(target) == list(source):
        return RowMatch(range(len(target)), range(len(source)), (len(target), len(source)))
    return match_rows(rows(target), rows(source), (len(target), len(source)))


def class_tensors(head: Mapping[str, Tensor], classes: int) -> set[str] | None:
    """Return the names of a head's tensors that have a row per class; `None` where that cannot be told.

    It cannot be told where a layer inside the head happens to be as wide as there are classes.
    """
    found = {name for name, tensor in head.items() if tensor.ndim and tensor.shape[0] == classes}
    inside = any(head[name].ndim > 1 and head[name].shape[1] == classes for name in found)
    return None if inside or not found else found


def vocabulary(processing_class: Any) -> dict[str, int] | None:
    """Return the token id of each token of a tokenizer or of a processor that holds one; `None` where there is none."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return dict(tokenizer.get_vocab()) if hasattr(tokenizer, "get_vocab") else None


def token_tensors(model: PreTrainedModel) -> set[str]:
    """Return the names of the tensors that have a row per token: the embeddings, and the layer that predicts tokens."""
    if type(model).__name__.endswith("ForCTC"):  # it predicts tokens of sounds
        tensors, rows = movable_tensors(model), model.config.vocab_size
        return {name for name in head_tensors(model) if tensors[name].shape[0] == rows}
    try:
        modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    except NotImplementedError:  # a model of images
        return set()
    if not isinstance(modules[0], torch.nn.Embedding):
        return set()
    tokens = modules[0].num_embeddings
    own = {id(p) for module in modules if module is not None for p in module.parameters(recurse=False)}
    return {name for name, t in movable_tensors(model).items() if id(t) in own and t.shape[0] == tokens}


def match_head(
    target: PreTrainedModel, source: Mapping[str, Tensor], labels: Sequence[str] | None, *, brings: bool = True
) -> RowMatches:
    """Match the classes of two heads by their names.

    Classes in another order are permuted; where some names are shared, their rows are matched; where none is, or the
    source has no head, the target's stays as it is. A language model has no classes; its config still names two.

    Args:
        target: The target.
        source: The source's own tensors, with its own number of classes.
        labels: The source's label names by class id; `None` where its classes have no names.
        brings: Whether the source has something to say about the head; an adapter need not.
    """
    if target.can_generate():
        return RowMatches()
    names, expected = head_tensors(target), label_names(target.config)
    if names - set(source):
        return RowMatches(left_out=names, notes=["head stays: the source has none"] if brings else [])
    match = match_labels(expected, labels or ())
    if match.is_identity:
        unnamed = len(expected) > 1 and expected == [f"LABEL_{number}" for number in range(len(expected))]
        if unnamed and "Classification" in type(target).__name__:  # the default names of others mean nothing
            return RowMatches(notes=["head: classes matched by their numbers, for they have no names"])
        return RowMatches()
    got = f"got {first_few(labels or ['classes without names'], 12)}, expected {first_few(expected, 12)}"
    if not names:
        how = "its head cannot be told from the rest of the model"
        return RowMatches(problems=[f"other label names: {got}; and {how}"])
    tensors = movable_tensors(target)
    rows = class_tensors({name: source[name] for name in names}, len(labels or ()))
    if not match.target:
        note = f"head stays: no label name is shared: {got}"
    elif rows is None or rows != class_tensors({name: tensors[name] for name in names}, len(expected)):
        note = f"head stays: which of its rows belong to a class cannot be told: {got}"
    elif any(source[name].shape[1:] != tensors[name].shape[1:] for name in rows):
        note = "head stays: it is of another width"
    else:
        how = "classes matched by name" if len(match.target) == len(expected) else "only shared classes move"
        note = f"head: {how}, {len(match.target)} of {len(expected)}: {got}"
        return RowMatches(dict.fromkeys(rows, match), notes=[note])
    return RowMatches(left_out=names, notes=[note] if brings else [])


def match_tokens(
    target: PreTrainedModel, expected: Mapping[str, int], source: Mapping[str, Tensor], got: Mapping[str, int] | None
) -> RowMatches:
    """Match the rows of two vocabularies, from token to id, by the tokens' strings."""
    if got is None:
        problem = (
            "it holds no tokenizer, so its tokens cannot be matched with the target's; save its tokenizer beside it"
        )
        return RowMatches(problems=[problem])
    tensors = movable_tensors(target)
    names = {name for name in token_tensors(target) if name in source}
    sizes = {(len(tensors[name]), len(source[name])) for name in names}
    if len(sizes) != 1 or any(tensors[name].shape[1:] != source[name].shape[1:] for name in names):
        return RowMatches()  # the shapes are refused by themselves
    size = sizes.pop()
    if got == expected and size[0] == size[1]:
        return RowMatches()
    match = match_rows(expected, got, size)
    if not match.target:
        return RowMatches(problems=["its tokenizer shares no token with the target's, so no embedding can be matched"])
    note = f"vocabulary: {len(match.target)} of {len(expected)} tokens matched by their strings"
    return RowMatches(dict.fromkeys(names, match), notes=[note])
