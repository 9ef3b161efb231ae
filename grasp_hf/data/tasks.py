"""What a model of each task takes: images as pixels, texts as tokens."""

import logging
from collections.abc import Callable
from typing import Any

from datasets import DatasetDict, Image
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
    default_data_collator,
)

from ..errors import ConfigError, DataError
from ..hub.reference import Source
from ..models.batches import Collator
from ..models.classes import task_of
from .pictures import picture
from .section import DataSection

logger = logging.getLogger(__name__)


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


PREPARED = ("image-classification", "text-classification", "text-generation")


def check_prepared(cls: type[PreTrainedModel], base: Source) -> None:
    """Raise `ConfigError` where a recipe cannot prepare data for the task of `cls`."""
    if task_of(cls) not in PREPARED:
        raise ConfigError(
            f"a recipe prepares data for {', '.join(PREPARED)}, but '{base.ref}' is a {cls.__name__}; from Python, "
            "GraspMerger.merge takes a data set that you have prepared for it"
        )
