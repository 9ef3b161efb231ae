"""The preparation of data for each task: images become pixels, texts become tokens."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import DatasetDict, Image
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    default_data_collator,
)

from ..errors import ConfigError, DataError
from ..hub.reference import Source
from ..models.batches import IGNORED, Batch, Collator
from ..models.classes import task_of
from .pictures import load_picture
from .section import DataSection

logger = logging.getLogger(__name__)


def prepare_images(
    splits: DatasetDict, column: str, processor: Callable, *, channels: int = 3
) -> tuple[DatasetDict, Collator]:
    """Return splits of `pixel_values` and labels, and their collator; an image is processed when it is read.

    Raises:
        DataError: The model takes neither colours nor shades of grey, but another number of `channels`.
    """
    if channels not in (1, 3):
        raise DataError(
            f"the model takes images of {channels} channels, and a recipe can prepare 1 or 3; prepare the data yourself and "
            "pass it to GraspMerger.merge"
        )

    def transform(samples: dict[str, list]) -> dict[str, Any]:
        images = [load_picture(value, "L" if channels == 1 else "RGB") for value in samples[column]]
        pixels = {"pixel_values": list(processor(images, return_tensors="pt")["pixel_values"])}
        return pixels | {name: samples[name] for name in ("labels",) if name in samples}

    # We decode the pictures ourselves, to name a file that cannot be read.
    splits = splits.cast_column(column, Image(decode=False))
    kept = {
        name: split.select_columns([name for name in (column, "labels") if name in split.column_names])
        for name, split in splits.items()
    }
    return DatasetDict(kept).with_transform(transform), default_data_collator


def tokenize_texts(
    splits: DatasetDict, section: DataSection, tokenizer: Any, *, generates: bool, positions: int | None = None
) -> tuple[DatasetDict, Collator]:
    """Return tokenized splits and their collator.

    Args:
        splits: Splits with a column of texts and, for a classifier, a column `labels`.
        section: Names the column of texts and the largest number of tokens per sample.
        tokenizer: The model's tokenizer.
        generates: Whether the model is a language model. Its labels are the tokens themselves, and texts of fewer than
            two tokens are left out, because they hold no token to predict. Another model needs one token: pipelines refuse
            an empty text too.
        positions: The largest number of tokens that the model takes; `None` for no limit.

    Raises:
        DataError: The tokenizer has no padding token, it adds so many tokens that `max_length` leaves none for the text, or
            a split has no text of enough tokens.
    """
    if tokenizer.pad_token is None:
        raise DataError(
            "the tokenizer has neither a padding token nor a token for the end of a text, so no batch can be made; set "
            "pad_token in its tokenizer_config.json"
        )
    max_length = min(section.max_length, tokenizer.model_max_length, positions or section.max_length)

    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise DataError(
            f"data.max_length: got {max_length} tokens per text, of which the tokenizer adds {special} itself; expected at "
            f"least {special + 1}"
        )

    def tokenize(samples: dict[str, list]) -> dict[str, Any]:
        return tokenizer(samples[section.text], truncation=True, max_length=max_length)

    tokenized = DatasetDict()
    for name, split in splits.items():
        removed = [column for column in split.column_names if generates or column != "labels"]
        # In memory, because datasets would write a cache file into the folder that `save_to_disk` wrote.
        tokens = split.map(tokenize, batched=True, remove_columns=removed, keep_in_memory=section.is_saved)
        lengths = [len(ids) for ids in tokens["input_ids"]]
        if cut := sum(length == max_length for length in lengths):
            logger.info(
                "split '%s': %d of %d texts fill all %d tokens; longer texts are cut",
                name,
                cut,
                len(split),
                max_length,
            )
        needed, words = (2, "two tokens") if generates else (1, "one token")
        if short := sum(length < needed for length in lengths):
            if short == len(split):
                raise DataError(f"split '{name}' has no text of {words} or more; expected texts")
            logger.warning("split '%s': %d texts of fewer than %s are left out", name, short, words)
            tokens = tokens.select([row for row, length in enumerate(lengths) if length >= needed])
        tokenized[name] = tokens
    splits = tokenized
    return splits, LanguageModelCollator(tokenizer) if generates else DataCollatorWithPadding(tokenizer)


@dataclass
class LanguageModelCollator:
    """Makes batches whose labels are the tokens themselves, without the padding.

    Padding is on the right, where no token of a text sees it. The collator of transformers would leave every token out of
    the labels that is like the padding, and often that token is the end of a text.
    """

    tokenizer: Any

    def __call__(self, samples: list[dict[str, Any]]) -> Batch:
        """Return the batch of `samples`."""
        batch = dict(self.tokenizer.pad(samples, padding_side="right", return_tensors="pt"))
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}


PREPARED = ("image-classification", "text-classification", "text-generation")


def check_prepared(cls: type[PreTrainedModel], base: Source) -> None:
    """Raise `ConfigError` if a recipe cannot prepare data for the task of `cls`."""
    if task_of(cls) not in PREPARED:
        raise ConfigError(
            f"'{base.ref}' is a {cls.__name__}, but a recipe can prepare data only for {', '.join(PREPARED)}; prepare "
            "the data yourself and pass it to GraspMerger.merge"
        )
