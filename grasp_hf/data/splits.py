"""From the `data:` section to splits with labels as class ids."""

import logging
from enum import Enum
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset, load_from_disk
from transformers import PretrainedConfig, PreTrainedModel

from ..config.recipe import Recipe
from ..errors import DataError
from ..sources.rows import label_names
from .section import FILES, SPLITS, DataSection

logger = logging.getLogger(__name__)


class Content(Enum):
    """What a model takes, as messages call it."""

    IMAGES = "images"
    TEXTS = "texts"


def load_splits(section: DataSection) -> DatasetDict:
    """Load the splits that `section` names.

    Raises:
        DataError: It cannot be loaded, has no split `train`, or a split without rows.
    """
    try:
        if section.is_saved:
            if unused := [key for key in ("name", "revision", *FILES) if getattr(section, key) is not None]:
                raise ValueError(f"it was saved by save_to_disk, where data.{unused[0]} means nothing; leave it out")
            loaded = load_from_disk(section.path)
        else:
            names = ("name", "revision", *FILES)
            options = {key: value for key in names if (value := getattr(section, key)) is not None}
            loaded = load_dataset(section.path, **options)
    except Exception as error:
        # datasets raises classes of its own, of pyarrow and of the file systems beneath; all mean the same here.
        advice = f"; say where it is with {section.where}" if isinstance(error, FileNotFoundError) else ""
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise DataError(f"data set '{section.path}' cannot be loaded: {error}{cause}{advice}") from error
    splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)
    if "train" not in splits:
        raise DataError(f"data set '{section.path}' has no split 'train'; found {', '.join(splits)}")
    for name, split in splits.items():
        if len(split) == 0:
            raise DataError(f"split '{name}' of data set '{section.path}' is empty; expected labelled samples")
    if unused := [name for name in splits if name not in SPLITS]:
        logger.warning(
            "data set '%s': %s not used; what judges is in splits named %s",
            section.path,
            unused,
            " and ".join(SPLITS[1:]),
        )
    return DatasetDict({name: splits[name] for name in SPLITS if name in splits})


def class_names(split: Dataset, column: str) -> list[str] | int:
    """Return the label names in class order (of a `ClassLabel`, or of text labels, sorted), or how many ids there are.

    Raises:
        DataError: There is no such column, or a row has no label.
    """
    if column not in split.column_names:
        raise DataError(f"the data set has no column '{column}' for labels; found {', '.join(split.column_names)}")
    if not isinstance(split.features[column], ClassLabel | Value):
        raise DataError(
            f"column '{column}' holds {type(split.features[column]).__name__} values; expected one class per row: a recipe "
            "prepares data for one class each, GraspMerger.merge takes data that you have prepared yourself"
        )
    values = split.unique(column)
    if any(value is None for value in values):
        raise DataError(
            f"column '{column}' holds rows without a label; expected one for each (of a CSV file, fields like NA, None and "
            "nan are empty, too)"
        )
    feature = split.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    if not all(type(value) is int and value >= 0 for value in values):
        raise DataError(f"column '{column}' holds {values[:3]}; expected class names or class ids from 0")
    return max(values) + 1


def names_for_model(found: list[str] | int, known: list[str]) -> list[str]:
    """Return the label names that the model should have.

    Its own (`known`) where it knows all that the data holds; else the data's, so that it gets a new head. Of class ids
    without names, only their number can be compared.
    """
    if isinstance(found, int):
        return known if found == len(known) else [f"LABEL_{index}" for index in range(found)]
    return known if set(found) <= set(known) else found


def with_label_ids(splits: DatasetDict, column: str, names: list[str]) -> DatasetDict:
    """Return the splits with a column `labels` of ids into `names`, which may be in another order than the data's.

    Raises:
        DataError: A row's label is not among `names`.
    """
    ids = {name: index for index, name in enumerate(names)}
    return DatasetDict({name: _encoded(split, name, column, ids) for name, split in splits.items()})


def _encoded(split: Dataset, split_name: str, column: str, ids: dict[str, int]) -> Dataset:
    class_names(split, column)
    feature = split.features[column]
    if isinstance(feature, ClassLabel) and any(value < 0 for value in split.unique(column)):
        raise DataError(
            f"split '{split_name}' has rows whose label is hidden (-1), as the test splits of public benchmarks do; "
            "expected a label in every row: leave the split out, with data_files or another data set"
        )
    values = [feature.int2str(value) for value in split[column]] if isinstance(feature, ClassLabel) else split[column]
    known: dict[Any, int] = {**ids, **{index: index for index in ids.values()}}
    if unknown := sorted({str(value) for value in values if value not in known}):
        raise DataError(
            f"split '{split_name}' has labels that the model does not know: {', '.join(unknown[:5])}; expected some of "
            f"{', '.join(list(ids)[:12])}"
        )
    replaced = {name for name in (column, "labels") if name in split.column_names}
    unused = max(split.column_names, key=len) + "+"
    encoded = split.add_column(unused, [known[value] for value in values])
    return encoded.remove_columns([*replaced]).rename_column(unused, "labels")


def require_column(splits: DatasetDict, column: str, content: Content) -> None:
    """Raise `DataError` where a split has no such column, or a row with nothing in it."""
    for name, split in splits.items():
        if column not in split.column_names:
            raise DataError(
                f"split '{name}' has no column '{column}' for {content.value}; found {', '.join(split.column_names)}"
            )
        feature = split.features[column]
        if content is Content.TEXTS and not (
            isinstance(feature, Value) and feature.dtype in ("string", "large_string")
        ):
            raise DataError(f"column '{column}' of split '{name}' holds {feature}; expected {content.value}")
        if split.data.column(column).null_count:
            raise DataError(
                f"split '{name}' has rows without anything in column '{column}'; expected {content.value} in every row"
            )


def labelled_splits(
    recipe: Recipe, config: PretrainedConfig, cls: type[PreTrainedModel]
) -> tuple[DatasetDict, dict[str, Any]]:
    """Return the data with labels as class ids, and the label names that a model of this `config` should take on.

    Language models have neither: the second is empty for them.

    Raises:
        ConfigError: The section of the recipe has problems.
        DataError: The data cannot be loaded, or lacks the labels, texts or images that it needs.
    """
    section = DataSection.from_recipe(recipe)
    splits = load_splits(section)
    has_images = cls.main_input_name == "pixel_values"
    inputs = (section.image, Content.IMAGES) if has_images else (section.text, Content.TEXTS)
    if cls.can_generate():
        require_column(splits, *inputs)
        return splits, {}
    found = class_names(splits["train"], section.label)
    if isinstance(found, int):  # the highest class may be rare
        numbers = [class_names(split, section.label) for split in splits.values()]
        found = max(number for number in numbers if isinstance(number, int))
        if found != len(label_names(config)) and not any(
            0 in split.unique(section.label) for split in splits.values()
        ):
            raise DataError(
                f"column '{section.label}' holds class ids up to {found - 1} and never 0; expected ids from 0, or class names"
            )
    require_column(splits, *inputs)
    names = names_for_model(found, label_names(config))
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    return with_label_ids(splits, section.label, names), labels
