"""Whether a source fits the target: tensors, ties, architecture, labels and tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config.sources import NO_OPTIONS, SourceOptions, recipe_entry
from ..errors import first_few
from ..hub.reference import Source
from ..models.processors import load_processing_class
from ..models.target import FLOATING, TRAINED_LATER, is_computed
from ..tensors.units import head_tensors, movable_tensors, tied_names
from .preparation import preparation_notes
from .rows import RowMatch, RowMatches, match_head, match_tokens, token_tensors, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


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
        labels: Label names by class id; `None` for a language model.
        problems: Problems that were found while reading.
        ranks: Rank of the difference to the base, for each tensor that a LoRA adapter changes.
        notes: Remarks for the report.
        problem_type: What the head was trained for, such as `multi_label_classification`; `None` if the config does not say.
        reference: Loads the source with its own library; `None` if that takes more memory than there is.
    """

    tensors: dict[str, Tensor]
    candidates: set[str]
    labels: list[str] | None
    problems: list[str] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problem_type: str | None = None
    reference: Callable[[], Any] | None = None


def fit_source(
    source: Source,
    files: SourceFiles,
    target: PreTrainedModel,
    processing_class: Any,
    options: SourceOptions = NO_OPTIONS,
) -> Fit:
    """Match head and vocabulary of a source with the target's, and list the problems that keep it from being merged.

    The tensors may be on the meta device.
    """
    targets = movable_tensors(target)
    brings_head = source.kind == "full" or bool(files.candidates & head_tensors(target))
    head = match_head(target, files.tensors, files.labels, brings=brings_head, problem_type=files.problem_type)
    if options.same_tokenizer:
        tokens = RowMatches(notes=["vocabulary: tokens matched by their numbers, because the user says so"])
    else:
        tokens = match_vocabularies(source, files.tensors, target, processing_class)
    tensors = {name: tensor.detach() for name, tensor in files.tensors.items() if name not in head.left_out}
    matches = {name: match for name, match in (head.rows | tokens.rows).items() if name in tensors}
    missing = [name for name in targets if name not in tensors and name not in head.left_out]
    problems = [*files.problems, *tensor_problems(targets, tensors, {*missing, *head.left_out, *matches})]
    problems += head.problems + tokens.problems
    missing = [name for name in missing if not is_computed(target, name)]
    stay = untrained_parts(missing, targets)
    missing = [name for name in missing if name not in stay]
    notes = [*files.notes, *head.notes, *tokens.notes]
    if stay and source.kind == "full":
        notes.append(f"{len(stay)} tensors stay, because the source was trained without them: {first_few(stay)}")
    if missing and source.kind == "full":
        problems.append(f"{len(missing)} tensors are not in its files, starting with {min(missing)}")
    return Fit(tensors, matches, notes, problems)


def untrained_parts(missing: Collection[str], targets: Collection[str]) -> list[str]:
    """Return those of the `missing` tensors that other tasks do not train: a whole pooler, or a token for masks."""

    def part_of(name: str) -> str:
        found = TRAINED_LATER.search(name)
        return name[: found.start(2)] + found[2].partition(".")[0] if found else ""

    present = {part_of(name) for name in targets if name not in missing}
    return [name for name in missing if part_of(name) not in present | {""}]


def match_vocabularies(
    source: Source, tensors: Mapping[str, Tensor], target: PreTrainedModel, processing_class: Any
) -> RowMatches:
    """Match the tokens of `source` with the target's by their strings; by number if the target's tokenizer is unknown.

    `tensors` are the tensors of `source`; `processing_class` is the target's tokenizer or processor.
    """
    expected = vocabulary(processing_class)
    if source.kind == "adapter":  # an adapter has the vocabulary of its base model
        return RowMatches()
    if not token_tensors(target):
        has_pictures = hasattr(processing_class, "image_mean")
        return RowMatches(
            notes=preparation_notes(processing_class, load_processing_class(source)) if has_pictures else []
        )
    if expected is None:
        return RowMatches(
            notes=["vocabulary: tokens matched by their numbers, because the target's tokenizer is unknown"]
        )
    own = load_processing_class(source)
    got = vocabulary(own)
    if got is None:
        problem = (
            "it holds no tokenizer that can be read, so its tokens cannot be matched with the target's; add its tokenizer "
            f"files, or say that both are the same: {recipe_entry(str(source.ref), same_tokenizer=True)}"
        )
        return RowMatches(problems=[problem])
    matched = match_tokens(target, expected, tensors, got)
    matched.notes += preparation_notes(processing_class, own)
    return matched


def tie_problems(target: PreTrainedModel, source: PreTrainedModel) -> list[str]:
    """Return a problem that lists the weights that are tied in the target and not in the source; empty if there are none."""
    ties, others = (tied_names(model) for model in (target, source))
    pairs = sorted(f"{a} = {b}" for a, b in set(ties.items()) - set(others.items()))
    if not pairs:
        return []
    return [f"weights are tied in the target but not in the source: {first_few(pairs)}; untie them with untie: true"]


def tensor_problems(
    target: Mapping[str, Tensor], source: Mapping[str, Tensor], ignored: Collection[str] = ()
) -> list[str]:
    """List the names, shapes and dtypes that keep the tensors of a source from replacing the target's.

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
    problems += [
        f"{name}: got weights of dtype {_dtype_name(source[name])}, expected {_dtype_name(tensor)}"
        for name, tensor in target.items()
        if name in source and not _is_kind_of(source[name], tensor)
    ]
    return problems


def _dtype_name(tensor: Tensor) -> str:
    """Return the dtype of a tensor, without its module; a layout other than the usual one is named too."""
    name = str(tensor.dtype).removeprefix("torch.")
    return name if tensor.layout == torch.strided else f"{name} ({str(tensor.layout).removeprefix('torch.')})"


def _is_kind_of(source: Tensor, target: Tensor) -> bool:
    """Whether the values of a source can replace the target's: real numbers, or integers and booleans."""
    kind = FLOATING.values() if target.is_floating_point() else INTEGERS
    return source.layout == torch.strided and source.dtype in kind
