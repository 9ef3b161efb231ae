"""Loads the base model and the data of a recipe, ready for a merge."""

import logging

from transformers import default_data_collator

from ..config.recipe import Recipe
from ..data.digests import shared_samples
from ..data.samples import Samples
from ..errors import first_few
from ..hub.download import locate
from ..merger import GraspMerger
from ..models.classes import load_config, model_class, task_of
from ..models.padding import max_tokens
from ..models.processors import required_processing_class
from ..record.redaction import without_secrets
from ..sources.rows import label_names

logger = logging.getLogger(__name__)


def prepare(recipe: Recipe, *, token: str | None = None) -> tuple[GraspMerger, list[str], Samples]:
    """Load the base model and the data of `recipe`.

    A base model with other labels than the data gets a new head with the label names of the data. A recipe that needs
    no data may have none.

    Args:
        recipe: The recipe of the merge.
        token: Hub token.

    Returns:
        The merger, the references of the sources to merge, and the samples.

    Raises:
        GraspError: The recipe, the base model or the data cannot be used; nothing is changed or written.
    """
    sources = [recipe.locate(source) for source in recipe.sources]
    start = recipe.locate(recipe.base_model) if recipe.base_model else sources.pop(0)
    if not recipe.data and not recipe.config.needs_data:
        merger = GraspMerger.from_pretrained(start, config=recipe.config, task=recipe.task, token=token)
        merger.describe_run(starts_from_source=recipe.base_model is None)
        return merger, sources, Samples(collator=default_data_collator)
    from ..data.section import UNLABELED, DataSection  # imports datasets, which a merge without data does not need
    from ..data.splits import labelled_splits
    from ..data.tasks import check_prepared, prepare_images, tokenize_texts

    section = DataSection.from_recipe(recipe)
    base = locate(start, token=token, trusted=recipe.config.trust_remote_code)
    config = load_config(base, recipe.config.options_of(str(base.ref)).labels, quantized=recipe.config.adapts)
    cls = model_class(config, recipe.task, str(base.ref))
    check_prepared(cls, base)
    required_processing_class(base)
    splits, model_kwargs = labelled_splits(recipe, config, cls)
    names, known = list(model_kwargs.get("id2label", {}).values()), label_names(config)
    new_head = bool(names) and names != known
    if new_head and known != [f"LABEL_{index}" for index in range(len(known))]:
        logger.warning(
            "'%s' gets a new head, because its labels are %s and those of the data are %s",
            base.ref,
            first_few(known),
            first_few(names),
        )
    merger = GraspMerger.from_pretrained(
        start, config=recipe.config, task=recipe.task, token=token, new_head=new_head, **model_kwargs
    )
    processor = merger.processing_class
    if cls.main_input_name == "pixel_values":
        channels = getattr(config, "num_channels", 3)
        splits, collator = prepare_images(splits, section.image, processor, channels=channels)
    else:
        splits, collator = tokenize_texts(
            splits, section, processor, generates=cls.can_generate(), positions=max_tokens(merger.model)
        )
    if shared := shared_samples({name: split for name, split in splits.items() if name != UNLABELED}):
        logger.warning(
            "%s; the reported losses will be too low. Remove the duplicates",
            "; ".join(shared),
        )
    merger.describe_run(
        starts_from_source=recipe.base_model is None,
        recipe={"task": task_of(cls), "data": without_secrets(section.given())},
    )
    data = Samples(splits["train"], splits.get("validation"), splits.get(UNLABELED), splits.get("test"), collator)
    return merger, sources, data
