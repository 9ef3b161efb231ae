"""From a recipe's `data:` section to what training takes: splits, label names, processor, collator."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset, load_from_disk
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as FILE_BUILDERS
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding, default_data_collator

from .config.recipe import Recipe
from .errors import ConfigError, DataError
from .models.batches import Collator
from .pictures import picture

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
FILES = ("data_dir", "data_files")


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """The keys of `data:` in a recipe.

    Attributes:
        path: What `datasets.load_dataset` takes (`imagefolder`, `csv`, `json`, `parquet`, a Hub id), or a folder that
            `save_to_disk` wrote. There must be a split `train`; `validation` and `test` are used where they are.
        name: Configuration of a data set on the Hub.
        revision: Its branch, tag or commit.
        data_dir: Folder of an `imagefolder`, relative to the recipe.
        data_files: Files per split, relative to the recipe.
        image: Column of the images.
        text: Column of the texts.
        label: Column of the labels: class ids or names. Not used by language models.
        max_length: Tokens per sample; longer texts are cut.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    data_dir: str | None = None
    data_files: Any = None
    image: str = "image"
    text: str = "text"
    label: str = "label"
    max_length: int = 128

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> "DataSection":
        """Read the section and look its files up in the recipe's folder.

        Raises:
            ConfigError: `path` is missing, or a key is unknown; all problems are listed.
        """
        known = {f.name for f in fields(cls)}
        problems = [
            f"data.{key}: unknown key, expected one of {', '.join(sorted(known))}"
            for key in recipe.data
            if key not in known
        ]
        if "path" not in recipe.data:
            problems.append("data.path: missing, expected imagefolder, csv, json, parquet, a folder or a Hub id")
        problems += [problem for key in recipe.data if (problem := cls._type_problem(key, recipe.data[key]))]
        if recipe.data.get("path") in FILE_BUILDERS and not any(recipe.data.get(key) for key in FILES):
            problems.append(
                f"data.{' or data.'.join(FILES)}: missing, expected where the files for '{recipe.data['path']}' are"
            )
        if problems:
            raise ConfigError("the recipe has problems:\n- " + "\n- ".join(problems))

        def located(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: located(item) for key, item in value.items()}
            return [located(item) for item in value] if isinstance(value, list) else recipe.locate_pattern(value)

        return cls(**{key: located(value) if key in ("path", *FILES) else value for key, value in recipe.data.items()})

    def given(self) -> dict[str, Any]:
        """Return the keys that have a value, as they stand in a recipe."""
        return {key: value for key, value in vars(self).items() if value is not None}

    @property
    def is_saved(self) -> bool:
        """Whether it is a folder that `save_to_disk` wrote."""
        return any((Path(self.path) / file).exists() for file in ("dataset_dict.json", "state.json"))

    @property
    def where(self) -> str:
        """The overrides that say where the files are, such as `data.data_dir=…`."""
        if isinstance(self.data_files, dict):
            return " ".join(f"data.data_files.{split}=…" for split in self.data_files)
        return f"data.{next((key for key in FILES[::-1] if getattr(self, key)), 'path')}=…"

    @staticmethod
    def _type_problem(key: str, value: Any) -> str | None:
        """Say what is wrong with the value of a known key; unknown keys have their own message."""

        def is_files(files: Any) -> bool:
            if isinstance(files, dict):
                return all(isinstance(name, str) and is_files(item) for name, item in files.items())
            return isinstance(files, str) or (isinstance(files, list) and all(isinstance(f, str) for f in files))

        if key == "data_files":
            fits, expected = is_files(value), "a file, a list of files, or files per split"
            if fits and isinstance(value, dict) and not value.keys() <= {*SPLITS}:
                fits, expected = False, f"no other splits than {', '.join(SPLITS)}"
        elif key == "max_length":
            fits, expected = type(value) is int and value > 0, "a number of tokens above 0"
        else:
            fits, expected = isinstance(value, str) or key not in {f.name for f in fields(DataSection)}, "text"
        return None if fits else f"data.{key}: got {value!r}, expected {expected}"


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


def with_images(splits: DatasetDict, column: str, processor: Callable) -> tuple[DatasetDict, Collator]:
    """Return splits of images, which become `pixel_values` when a sample is read, and labels; and their collator."""

    def transform(samples: dict[str, list]) -> dict[str, Any]:
        images = [picture(value) for value in samples[column]]
        return {
            "pixel_values": list(processor(images, return_tensors="pt")["pixel_values"]),
            "labels": samples["labels"],
        }

    # Decoded here, a picture that cannot be read is named.
    splits = splits.cast_column(column, Image(decode=False))
    return splits.select_columns([column, "labels"]).with_transform(transform), default_data_collator


def with_tokens(
    splits: DatasetDict, section: DataSection, tokenizer: Any, *, generates: bool, positions: int | None = None
) -> tuple[DatasetDict, Collator]:
    """Return tokenized splits and their collator; for a language model the labels are the tokens themselves.

    Its texts of less than two tokens, of which none is predicted, are left out. `positions` are those that the model has.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    max_length = min(section.max_length, tokenizer.model_max_length, positions or section.max_length)

    def tokenize(samples: dict[str, list]) -> dict[str, Any]:
        return tokenizer(samples[section.text], truncation=True, max_length=max_length)

    tokenized = DatasetDict()
    for name, split in splits.items():
        removed = [column for column in split.column_names if generates or column != "labels"]
        # What `save_to_disk` wrote would else get a file beside it.
        tokens = split.map(tokenize, batched=True, remove_columns=removed, keep_in_memory=section.is_saved)
        lengths = [len(ids) for ids in tokens["input_ids"]]
        if cut := sum(length == max_length for length in lengths):
            logger.info(
                "split '%s': %d of %d texts fill all %d tokens; what is longer is cut",
                name,
                cut,
                len(split),
                max_length,
            )
        if generates and (short := [row for row, length in enumerate(lengths) if length < 2]):
            if len(short) == len(split):
                raise DataError(f"split '{name}' has no text of two tokens or more; expected some to predict")
            logger.warning("split '%s': %d texts of less than two tokens are left out", name, len(short))
            tokens = tokens.select([row for row, length in enumerate(lengths) if length > 1])
        tokenized[name] = tokens
    splits = tokenized
    collator = (
        DataCollatorForLanguageModeling(tokenizer, mlm=False) if generates else DataCollatorWithPadding(tokenizer)
    )
    return splits, collator


def require_column(splits: DatasetDict, column: str, what: str) -> None:
    """Raise `DataError` where a split has no such column, or a row with nothing in it."""
    for name, split in splits.items():
        if column not in split.column_names:
            raise DataError(
                f"split '{name}' has no column '{column}' for {what}; found {', '.join(split.column_names)}"
            )
        feature = split.features[column]
        if what == "texts" and not (isinstance(feature, Value) and feature.dtype in ("string", "large_string")):
            raise DataError(f"column '{column}' of split '{name}' holds {feature}; expected {what}")
        if split.data.column(column).null_count:
            raise DataError(
                f"split '{name}' has rows without anything in column '{column}'; expected {what} in every row"
            )
