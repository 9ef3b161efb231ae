"""Load the splits of a `data:` section, with labels as class ids."""

import logging
from enum import Enum
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset, load_from_disk
from transformers import PretrainedConfig, PreTrainedModel

from ..config.recipe import Recipe
from ..errors import DataError, first_few
from ..files import LFS_ADVICE, lfs_pointers
from ..internals import file_formats
from ..sources.rows import label_names
from .section import FILES, SPLITS, UNLABELED, DataSection

logger = logging.getLogger(__name__)


class Content(Enum):
    """The kind of a model's inputs; messages use the values."""

    IMAGES = "images"
    TEXTS = "texts"


def load_splits(section: DataSection) -> DatasetDict:
    """Load the splits that `section` names.

    Raises:
        DataError: The data set cannot be loaded, has no split `train`, or has an empty split.
    """
    if pointers := lfs_pointers(Path(), _file_names(section.data_files)):
        raise DataError(f"{first_few(pointers)}: got {LFS_ADVICE}")
    try:
        if section.is_saved:
            if unused := [key for key in ("name", "revision", *FILES) if getattr(section, key) is not None]:
                raise ValueError(f"save_to_disk wrote it, and data.{unused[0]} has no meaning then; remove this key")
            loaded = load_from_disk(section.path)
        else:
            names = ("name", "revision", *FILES)
            options = {key: value for key in names if (value := getattr(section, key)) is not None}
            loaded = load_dataset(section.path, **options)
    except Exception as error:
        # datasets raises its own errors and those of pyarrow and of file systems; all mean the same here.
        advice = (
            f"; set its location with {section.location_overrides}" if isinstance(error, FileNotFoundError) else ""
        )
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise DataError(f"data set '{section.path}' cannot be loaded: {error}{cause}{advice}") from error
    splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)
    if "train" not in splits:
        raise DataError(f"data set '{section.path}' has no split 'train'; found {', '.join(splits)}")
    for name, split in splits.items():
        if len(split) == 0:
            raise DataError(f"split '{name}' of data set '{section.path}' is empty; expected labelled samples")
    if section.unlabeled is not None:
        splits[UNLABELED] = splits[section.unlabeled] if section.unlabeled in splits else _load_unlabeled(section)
    if unused := [name for name in splits if name not in (*SPLITS, UNLABELED, section.unlabeled)]:
        logger.warning(
            "data set '%s': the splits %s are not used; evaluation data is read from splits named %s",
            section.path,
            unused,
            " and ".join(f"'{name}'" for name in SPLITS[1:]),
        )
    return DatasetDict({name: splits[name] for name in (*SPLITS, UNLABELED) if name in splits})


def _file_names(value: Any) -> list[str]:
    """Return the names of files in a value of `data_files`."""
    if isinstance(value, dict | list):
        return [name for item in (value.values() if isinstance(value, dict) else value) for name in _file_names(item)]
    return [value] if isinstance(value, str) else []


def _load_unlabeled(section: DataSection) -> Dataset:
    """Load the files that hold inputs without labels.

    Raises:
        DataError: They cannot be loaded, or hold no row.
    """
    if section.path not in file_formats():
        raise DataError(
            f"data.unlabeled: data set '{section.path}' has no split '{section.unlabeled}'; name one of its splits"
        )
    folder = isinstance(section.unlabeled, str) and Path(section.unlabeled).is_dir()
    if pointers := lfs_pointers(Path(), _file_names(section.unlabeled)):
        raise DataError(f"{first_few(pointers)}: got {LFS_ADVICE}")
    where = {"data_dir": section.unlabeled} if folder else {"data_files": section.unlabeled}
    try:
        options = {"drop_labels": True} if section.path in ("imagefolder", "audiofolder") else {}
        found = load_dataset(section.path, split="train", **where, **options)
    except Exception as error:
        # datasets raises its own errors and those of pyarrow and of file systems; all mean the same here.
        raise DataError(f"data.unlabeled: '{section.unlabeled}' cannot be loaded: {error}") from error
    if not len(found):
        raise DataError(f"data.unlabeled: '{section.unlabeled}' is empty; expected at least one input")
    return found


def find_label_names(split: Dataset, column: str) -> list[str] | int:
    """Return the label names in class order; for class ids without names, the number of classes.

    A `ClassLabel` has an order of its own; labels that are texts are sorted.

    Raises:
        DataError: The column is missing, a row has no label, or the labels are neither names nor class ids.
    """
    if column not in split.column_names:
        raise DataError(f"the data set has no column '{column}' for labels; found {', '.join(split.column_names)}")
    if not isinstance(split.features[column], ClassLabel | Value):
        raise DataError(
            f"column '{column}' holds {type(split.features[column]).__name__} values; expected one class per row. For "
            "other labels, prepare the data yourself and pass it to GraspMerger.merge"
        )
    values = split.unique(column)
    if any(value is None for value in values):
        raise DataError(
            f"column '{column}' holds rows without a label; expected a label in every row (in a CSV file, NA, None "
            "and nan mean an empty field)"
        )
    feature = split.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    if not all(type(value) is int and value >= 0 for value in values):
        raise DataError(f"column '{column}' holds {values[:3]}; expected class names or class ids from 0")
    return max(values) + 1


def choose_label_names(found: list[str] | int, known: list[str]) -> list[str]:
    """Return the label names for the model: its own (`known`), or those of the data (`found`).

    A model that knows all labels of the data keeps its names. Otherwise it takes the names of the data and gets a new
    head. If `found` is a number of classes without names, the numbers of classes are compared.
    """
    if isinstance(found, int):
        return known if found == len(known) else [f"LABEL_{index}" for index in range(found)]
    return known if set(found) <= set(known) else found


def encode_labels(splits: DatasetDict, column: str, names: list[str]) -> DatasetDict:
    """Return the splits with a column `labels` of class ids; `names` are the label names by class id.

    Raises:
        DataError: A row's label is hidden or not among `names`.
    """
    ids = {name: index for index, name in enumerate(names)}
    labelled = {name: _encode_split(split, name, column, ids) for name, split in splits.items() if name != UNLABELED}
    unlabeled = {name: split for name, split in splits.items() if name == UNLABELED}
    return DatasetDict(labelled | unlabeled)


def _encode_split(split: Dataset, split_name: str, column: str, ids: dict[str, int]) -> Dataset:
    find_label_names(split, column)
    feature = split.features[column]
    if isinstance(feature, ClassLabel) and any(value < 0 for value in split.unique(column)):
        raise DataError(
            f"split '{split_name}' has rows whose label is hidden (-1), as in the test splits of public benchmarks; "
            "expected a label in every row. Leave the split out, with data_files or another data set"
        )
    values = [feature.int2str(value) for value in split[column]] if isinstance(feature, ClassLabel) else split[column]
    known: dict[Any, int] = {**ids, **{index: index for index in ids.values()}}
    if unknown := sorted({str(value) for value in values if value not in known}):
        raise DataError(
            f"split '{split_name}' has labels that the model does not know: {', '.join(unknown[:5])}; expected some "
            f"of {', '.join(list(ids)[:12])}"
        )
    replaced = {name for name in (column, "labels") if name in split.column_names}
    unused = max(split.column_names, key=len) + "+"
    encoded = split.add_column(unused, [known[value] for value in values])
    return encoded.remove_columns([*replaced]).rename_column(unused, "labels")


def require_column(splits: DatasetDict, column: str, content: Content) -> None:
    """Raise `DataError` unless every split has `column` without empty rows; a column of texts must hold texts."""
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
                f"split '{name}' has rows with an empty column '{column}'; expected {content.value} in every row"
            )


def labelled_splits(
    recipe: Recipe, config: PretrainedConfig, cls: type[PreTrainedModel]
) -> tuple[DatasetDict, dict[str, Any]]:
    """Return the data with labels as class ids, and the label names for a model of `config`.

    The label names are the config's `id2label` and `label2id`. A language model has no labels: its data is returned
    without class ids, and the label names are empty.

    Raises:
        ConfigError: The section of the recipe has problems.
        DataError: The data cannot be loaded, or lacks the labels, texts or images that the model needs.
    """
    section = DataSection.from_recipe(recipe)
    splits = load_splits(section)
    has_images = cls.main_input_name == "pixel_values"
    inputs = (section.image, Content.IMAGES) if has_images else (section.text, Content.TEXTS)
    if cls.can_generate():
        require_column(splits, *inputs)
        return splits, {}
    found = find_label_names(splits["train"], section.label)
    if isinstance(found, int):  # a rare class may be missing in one of the splits
        numbers = [find_label_names(split, section.label) for name, split in splits.items() if name != UNLABELED]
        found = max(number for number in numbers if isinstance(number, int))
        if found != len(label_names(config)) and not any(
            0 in split.unique(section.label) for name, split in splits.items() if name != UNLABELED
        ):
            raise DataError(
                f"column '{section.label}' holds class ids up to {found - 1} but no 0; expected ids from 0, or class "
                "names"
            )
    require_column(splits, *inputs)
    names = choose_label_names(found, label_names(config))
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    return encode_labels(splits, section.label, names), labels
