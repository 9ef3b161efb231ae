"""Whether a data set from Python counts its classes as the model does."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import DataError, first_few
from ..sources.rows import are_numbers, label_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

COLUMNS = ("labels", "label", "label_ids")  # where a collator of transformers finds the class ids


def check_class_names(model: PreTrainedModel, dataset: Any, name: str) -> None:
    """Check that the class ids of a data set mean what they mean in the model, if both name their classes.

    A class with a name that the model does not know is matched by its number, with a warning.

    Args:
        model: The model, whose config names its classes.
        dataset: A data set of `datasets` or torchvision, or a part of one.
        name: Name of the data set in messages.

    Raises:
        DataError: The data set gives a class of the model another id.
    """
    known = [] if model.can_generate() else label_names(model.config)
    if are_numbers(known):
        return
    ids = {_plain(label): number for number, label in enumerate(known)}
    for part, column, names in _named_classes(dataset):
        if are_numbers(names):
            continue
        moved = {number: ids.get(_plain(label), number) for number, label in enumerate(names)}
        moved = {number: other for number, other in moved.items() if number != other}
        if moved and not _maps_itself(part, column, moved):
            first = min(moved)
            raise DataError(
                f"{name} counts its classes in another order than the model: got {first_few(names, 12)}, expected "
                f"{first_few(known, 12)}; '{names[first]}' is {first} in the data and {moved[first]} in the model. "
                + _advice(part, column)
            )
        if unknown := [label for label in names if _plain(label) not in ids]:
            logger.warning(
                "%s has classes that the model does not name: %s. Its classes are matched with the model's by their "
                "numbers: %s",
                name,
                first_few(unknown),
                first_few(known, 12),
            )


def _plain(label: str) -> str:
    """Return a label name without differences in its spelling, such as `Not_Entailment` and `not entailment`."""
    return " ".join(label.casefold().replace("_", " ").replace("-", " ").split())


def _advice(dataset: Any, column: str | None) -> str:
    if column is None or dataset.format["type"] == "custom":
        return "Let the data set return the class ids of the model (model.config.label2id)"
    plain = "" if dataset.format["type"] is None else ".with_format(None)"  # datasets cannot align tensors
    return (
        f"Match them by name: dataset{plain}.align_labels_with_mapping(model.config.label2id, '{column}'). If the ids are the "
        f"model's already, say so: dataset.cast_column('{column}', datasets.Value('int64'))"
    )


def _named_classes(dataset: Any) -> Iterator[tuple[Any, str | None, Sequence[str]]]:
    """Yield each part of a data set that names its classes, with the column of the class ids and the names."""
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        for column in COLUMNS:
            feature = features.get(column)
            names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
            if names:
                yield dataset, column, names
    elif _are_names(getattr(dataset, "classes", None)):  # torchvision
        yield dataset, None, dataset.classes
    else:
        parts = getattr(dataset, "datasets", None)  # of torch's ConcatDataset
        for part in parts if isinstance(parts, list) else [getattr(dataset, "dataset", None)]:  # or of its Subset
            if part is not None:
                yield from _named_classes(part)


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, str) for item in value)


def _maps_itself(dataset: Any, column: str | None, moved: Mapping[int, int]) -> bool:
    """Whether a transform of the data set returns the model's class ids already, seen on one sample of a moved class."""
    if column is None or dataset.format["type"] != "custom":
        return False
    raw = dataset.with_format(None)
    row = next((row for row, value in enumerate(raw[column]) if value in moved), None) if len(raw) else None
    if row is None:
        return False
    sample = dataset[row]
    found = next((sample[key] for key in COLUMNS if key in sample), None)
    return found is not None and int(found) == moved[raw[row][column]]
