"""From a recipe to a merger and its data, ready to run."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig, PreTrainedModel, default_data_collator

from .config.recipe import Recipe
from .digests import shared_samples
from .errors import ConfigError, DataError, shortened
from .hub.download import locate
from .hub.reference import Source
from .merger import GraspMerger
from .models.batches import Collator
from .models.classes import load_config, model_class, task_of
from .models.processors import load_processing_class
from .redaction import without_secrets
from .sources.rows import label_names

if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.getLogger(__name__)

PREPARED = ("image-classification", "text-classification", "text-generation")


@dataclass
class TaskData:
    """The user's data, ready for training: what `GraspMerger.merge` takes, and the test split for the end.

    Attributes:
        train: Labelled samples; `None` for a merge without data.
        validation: Held-out samples, `None` where the data set has no such split.
        test: Samples that are looked at once, when all is done.
        collator: Makes batches of them.
    """

    train: Any
    validation: Any
    test: Any
    collator: Collator

    def merge_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `GraspMerger.merge`."""
        return {"train_dataset": self.train, "eval_dataset": self.validation, "data_collator": self.collator}


def prepare(recipe: Recipe, *, token: str | None = None) -> tuple[GraspMerger, list[str], TaskData]:
    """Load the base model and the data of `recipe`, and return the merger, the sources still to merge, and the data.

    A base model that knows other labels than the data gets a new head with the data's label names. A recipe that needs
    no data may have none.

    Raises:
        GraspError: The recipe, the base model or the data is not usable; nothing has been changed or written.
    """
    sources = [recipe.locate(source) for source in recipe.sources]
    start = recipe.locate(recipe.base_model) if recipe.base_model else sources.pop(0)
    if not recipe.data and not recipe.config.needs_data:
        merger = GraspMerger.from_pretrained(start, config=recipe.config, task=recipe.task, token=token)
        if not merger.report.continues:
            merger.report.starts_from_source = recipe.base_model is None
        return merger, sources, TaskData(None, None, None, default_data_collator)
    from .data import DataSection, with_images, with_tokens  # datasets, which a merge without data never imports

    section = DataSection.from_recipe(recipe)
    base = locate(start, token=token, trusted=recipe.config.trust_remote_code)
    config = load_config(base)
    cls = model_class(config, recipe.task, str(base.ref))
    check_prepared(cls, base)
    processor = required_processing_class(base)
    splits, model_kwargs = labelled_splits(recipe, config, cls)
    names, known = list(model_kwargs.get("id2label", {}).values()), label_names(config)
    new_head = bool(names) and names != known
    if new_head and known != [f"LABEL_{index}" for index in range(len(known))]:
        logger.warning(
            "the labels of the data are %s, those of '%s' are %s: it gets a new head",
            shortened(names),
            base.ref,
            shortened(known),
        )
    if cls.main_input_name == "pixel_values":
        splits, collator = with_images(splits, section.image, processor)
    else:
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        splits, collator = with_tokens(splits, section, processor, generates=cls.can_generate(), positions=positions)
        if config.pad_token_id is None:
            model_kwargs["pad_token_id"] = processor.pad_token_id
    if shared := shared_samples(splits):
        logger.warning(
            "%s; what judges a merge then knows what it judges, and its numbers flatter: remove them",
            "; ".join(shared),
        )
    merger = GraspMerger.from_pretrained(
        start, config=recipe.config, task=recipe.task, token=token, new_head=new_head, **model_kwargs
    )
    if not merger.report.continues:
        merger.report.starts_from_source = recipe.base_model is None
    merger.report.recipe = {"task": task_of(cls), "data": without_secrets(section.given())}
    data = TaskData(splits["train"], splits.get("validation"), splits.get("test"), collator)
    return merger, sources, data


def labelled_splits(
    recipe: Recipe, config: PretrainedConfig, cls: type[PreTrainedModel]
) -> tuple["DatasetDict", dict[str, Any]]:
    """Return the data with labels as class ids, and the label names that a model of this `config` should take on.

    Language models have neither: the second is empty for them.

    Raises:
        ConfigError: The section of the recipe has problems.
        DataError: The data cannot be loaded, or lacks the labels, texts or images that it needs.
    """
    from .data import DataSection, class_names, load_splits, names_for_model, require_column, with_label_ids

    section = DataSection.from_recipe(recipe)
    splits = load_splits(section)
    has_images = cls.main_input_name == "pixel_values"
    inputs = (section.image, "images") if has_images else (section.text, "texts")
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


def check_prepared(cls: type[PreTrainedModel], base: Source) -> None:
    """Raise `ConfigError` where a recipe cannot prepare data for the task of `cls`."""
    if task_of(cls) not in PREPARED:
        raise ConfigError(
            f"a recipe prepares data for {', '.join(PREPARED)}, but '{base.ref}' is a {cls.__name__}; from Python, "
            "GraspMerger.merge takes a data set that you have prepared for it"
        )


def required_processing_class(base: Source) -> Any:
    """Return the tokenizer or image processor of `base`; raise `DataError` where it has none."""
    processor = load_processing_class(base)
    if processor is None:
        raise DataError(f"'{base.ref}' holds no tokenizer or image processor, which its data needs; add one to it")
    return processor
