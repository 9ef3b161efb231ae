"""Match the rows of two models: classes by label name, tokens by string; by number only if there are no names."""

from __future__ import annotations

from collections import Counter
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
        target: Numbers of the rows of the target's tensor that have a counterpart.
        source: Numbers of their counterparts in the source's tensor, in the same order.
        sizes: Number of rows of the target's tensor, and of the source's.
    """

    target: Sequence[int]
    source: Sequence[int]
    sizes: tuple[int, int]

    @property
    def is_identity(self) -> bool:
        """Whether both tensors have the same rows in the same order."""
        return self.sizes[0] == self.sizes[1] == len(self.target) and list(self.target) == list(self.source)

    @torch.no_grad()
    def fill_(self, out: Tensor, target: Tensor, source: Tensor) -> None:
        """Change `out` to the source's rows in the target's order; a row without a counterpart is the target's own."""
        out.copy_(target)
        out[torch.tensor(self.target)] = source[torch.tensor(self.source)].to(out.dtype)


@dataclass
class RowMatches:
    """The result of matching a source's head or vocabulary with the target's.

    Attributes:
        rows: The match by tensor name, for tensors whose rows are matched by name; other tensors move as they are.
        left_out: Names of the tensors that keep the target's values.
        notes: Remarks for the report.
        problems: The reasons why the source does not fit.
    """

    rows: dict[str, RowMatch] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def match_rows(target: Mapping[str, int], source: Mapping[str, int], sizes: tuple[int, int]) -> RowMatch:
    """Match rows by name.

    Args:
        target: The target's row numbers by name.
        source: The source's row numbers by name.
        sizes: Number of rows of the target's tensor, and of the source's; a higher row number has no match.
    """
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


def default_names(classes: int) -> list[str]:
    """Return the names that transformers gives to classes without names."""
    return [f"LABEL_{number}" for number in range(classes)]


def are_numbers(names: Sequence[str]) -> bool:
    """Whether label names say no more than the class ids, such as `LABEL_0`."""
    return all(name in (f"LABEL_{number}", str(number)) for number, name in enumerate(names))


def match_labels(target: Sequence[str], source: Sequence[str]) -> RowMatch:
    """Match classes by name; a name of two classes matches nothing."""

    def unique_rows(names: Sequence[str]) -> dict[str, int]:
        counts = Counter(names)
        return {name: row for row, name in enumerate(names) if counts[name] == 1}

    if list(target) == list(source):
        return RowMatch(range(len(target)), range(len(source)), (len(target), len(source)))
    return match_rows(unique_rows(target), unique_rows(source), (len(target), len(source)))


def class_tensors(head: Mapping[str, Tensor], classes: int) -> set[str] | None:
    """Return the names of a head's tensors that have a row per class; `None` if these tensors are ambiguous.

    They are ambiguous if a layer inside the head is as wide as the number of classes.
    """
    found = {name for name, tensor in head.items() if tensor.ndim and tensor.shape[0] == classes}
    inside = any(head[name].ndim > 1 and head[name].shape[1] == classes for name in found)
    return None if inside or not found else found


def vocabulary(processing_class: Any) -> dict[str, int] | None:
    """Return the token ids by token of a tokenizer, or of the tokenizer in a processor; `None` if there is none."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return dict(tokenizer.get_vocab()) if hasattr(tokenizer, "get_vocab") else None


def token_tensors(model: PreTrainedModel) -> set[str]:
    """Return the names of the tensors that have a row per token: those of the embeddings and of the output layer."""
    if type(model).__name__.endswith("ForCTC"):  # a speech model; its only token layer is the head
        tensors, rows = movable_tensors(model), model.config.vocab_size
        return {name for name in head_tensors(model) if tensors[name].shape[0] == rows}
    try:
        modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    except NotImplementedError:  # an image model
        return set()
    if not isinstance(modules[0], torch.nn.Embedding):
        return set()
    tokens = modules[0].num_embeddings
    own = {id(p) for module in modules if module is not None for p in module.parameters(recurse=False)}
    return {name for name, t in movable_tensors(model).items() if id(t) in own and t.shape[0] == tokens}


def match_head(
    target: PreTrainedModel,
    source: Mapping[str, Tensor],
    labels: Sequence[str] | None,
    *,
    brings: bool = True,
    problem_type: str | None = None,
) -> RowMatches:
    """Match the classes of two heads by their names; by their numbers if neither head names its classes.

    Classes in another order are permuted. If only some names are shared, their rows are matched. If no name is shared,
    or the source has no head, the target keeps its head.

    Args:
        target: The target.
        source: The source's own tensors, with its own number of classes.
        labels: The source's label names by class id; `None` for a language model.
        brings: Whether the source brings a head; an adapter may bring none.
        problem_type: The `problem_type` in the source's config. The logits of heads with other types mean other things.
    """
    if target.can_generate():  # a language model has no classes, although its config names two
        return RowMatches()
    names, expected, labels = head_tensors(target), label_names(target.config), labels or ()
    if names - set(source):
        return RowMatches(left_out=names, notes=["head stays: the source has none"] if brings else [])
    tensors = movable_tensors(target)
    if names and not any(tensors[name].ndim and len(tensors[name]) == len(expected) for name in names):
        return RowMatches()  # a head without classes, such as that of a masked language model
    if problem_type and target.config.problem_type not in (problem_type, None):
        note = f"head stays: it was trained for {problem_type}, expected {target.config.problem_type}"
        return RowMatches(left_out=names, notes=[note])
    by_number = are_numbers(expected) and are_numbers(labels)
    if by_number and len(labels) == len(expected):
        # Other models have default names but no classes.
        has_classes = len(expected) > 1 and "Classification" in type(target).__name__
        why = "classes matched by their numbers, because they have no names"
        return RowMatches(notes=[f"head: {why}"] if has_classes else [])
    match = match_labels(expected, labels)
    if match.is_identity:
        return RowMatches()
    got = f"got {first_few(labels, 12)}, expected {first_few(expected, 12)}"
    if not names:
        obstacle = "the head cannot be distinguished from the rest of the model"
        return RowMatches(
            problems=[f"different label names: {got}; the classes cannot be matched, because {obstacle}"]
        )
    rows = class_tensors({name: source[name] for name in names}, len(labels))
    if by_number:
        note = f"head stays: its classes have no names, and their number differs: {got}"
    elif not match.target:
        note = f"head stays: no label name is shared: {got}; the key `labels` of its entry in `sources` can rename its own"
    elif rows is None or rows != class_tensors({name: tensors[name] for name in names}, len(expected)):
        note = f"head stays: its rows cannot be assigned to classes: {got}"
    elif any(source[name].shape[1:] != tensors[name].shape[1:] for name in rows):
        note = "head stays: the source's head has another width"
    else:
        how = "classes matched by name" if len(match.target) == len(expected) else "only shared classes move"
        note = f"head: {how}, {len(match.target)} of {len(expected)}: {got}"
        return RowMatches(dict.fromkeys(rows, match), notes=[note])
    return RowMatches(left_out=names, notes=[note] if brings else [])


def match_tokens(
    target: PreTrainedModel, expected: Mapping[str, int], source: Mapping[str, Tensor], got: Mapping[str, int]
) -> RowMatches:
    """Match the rows of two vocabularies by the tokens' strings.

    Args:
        target: The target.
        expected: The target's token ids by token.
        source: The source's own tensors.
        got: The source's token ids by token.
    """
    tensors = movable_tensors(target)
    names = {name for name in token_tensors(target) if name in source}
    sizes = {(len(tensors[name]), len(source[name])) for name in names}
    if len(sizes) != 1 or any(tensors[name].shape[1:] != source[name].shape[1:] for name in names):
        return RowMatches()  # the comparison of shapes reports this problem
    size = sizes.pop()
    if got == expected and size[0] == size[1]:
        return RowMatches()
    match = match_rows(expected, got, size)
    if not match.target:
        return RowMatches(problems=["its tokenizer shares no token with the target's, so no embedding can be matched"])
    note = f"vocabulary: {len(match.target)} of {len(expected)} tokens matched by their strings"
    return RowMatches(dict.fromkeys(names, match), notes=[note])
