"""Checks that a comparison is fair, before it begins."""

from collections.abc import Sequence
from pathlib import Path

from ..config.recipe import Recipe
from ..data.digests import digest, sample_hashes
from ..data.samples import Samples
from ..errors import DataError, first_few
from ..files import exists
from ..hub.download import look_up
from ..hub.reference import Source
from ..internals import file_formats
from ..merger import GraspMerger
from ..models.classes import is_headless, load_config
from ..record.card import trained_on_test
from ..sources.adapters import load_adapter_config
from ..sources.load import adapter_labels, saves_head
from ..sources.rows import label_names
from ..validation.changes import LEAST_SAMPLES, detectable_difference

LEAST_VALIDATION = 50  # fewer than test samples: methods are compared by their losses on the same validation samples
USES = {"train": "trained", "validation": "chose"}
LEAST_TEXTS = 30  # for a language model; for fewer texts, 1.96 standard errors are less than a 95 % interval


def check_fairness(recipe: Recipe, merger: GraspMerger, sources: Sequence[str], data: Samples) -> dict[str, str]:
    """Check the data and the sources of a comparison.

    Args:
        recipe: The recipe.
        merger: Holds the base model.
        sources: References of the sources.
        data: All samples.

    Returns:
        A digest of each split.

    Raises:
        DataError: A split is missing, too small, or shares samples with another split; or a source has other labels,
            or was trained on the test split.
    """
    if data.train is None or data.test is None:
        missing = [name for name, split in {"train": data.train, "test": data.test}.items() if split is None]
        raise DataError(
            f"the data lacks the split '{missing[0]}'; a comparison needs data with the splits 'train' and 'test'"
        )
    generates = merger.model.can_generate()
    if generates:
        for name, split in {"test": data.test, "validation": data.validation}.items():
            if split is not None and len(split) < LEAST_TEXTS:
                raise DataError(
                    f"the split '{name}' has {len(split)} texts; expected at least {LEAST_TEXTS}, because with fewer "
                    "texts the interval of a difference is wrong; cut long texts into several"
                )
    elif len(data.test) < LEAST_SAMPLES:
        raise DataError(f"the split 'test' has {detectable_difference(len(data.test))}")
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    found = {name: sample_hashes(split) for name, split in splits.items() if split is not None}
    for name in found.keys() - {"test"}:
        if shared := found[name] & found["test"]:
            raise DataError(
                f"{len(shared)} samples of the split 'test' are also in the split '{name}'; expected none, because "
                f"the scores on samples that {USES[name]} a model are too good; remove them from one of the splits"
            )
    if shared := found["train"] & found.get("validation", set()):
        raise DataError(
            f"{len(shared)} samples of the split 'validation' are also in the split 'train'; expected none, because "
            "the losses on samples that trained a model are too low; remove them from one of the splits"
        )
    if not generates and data.validation is not None and len(data.validation) < LEAST_VALIDATION:
        raise DataError(
            f"the split 'validation' has {detectable_difference(len(data.validation), LEAST_VALIDATION)}; or remove "
            "the split, and methods choose by the training labels"
        )
    dataset = hub_dataset(recipe)
    for source in sources:
        located, _ = look_up(source, trusted=recipe.config.trust_remote_code)
        named = recipe.config.options_of(str(located.ref)).labels
        labels, expected = named or labels_of(located, merger), label_names(merger.model.config)
        if labels is not None and set(labels) != set(expected):
            raise DataError(
                f"source '{source}' has other labels than the data: got {first_few(labels, 12)}, expected "
                f"{first_few(expected, 12)}; name its classes as the data does, with the key `labels` of its entry in "
                "`sources`, or leave the source out: a merge can use the tensors that fit, but a score on labels that "
                "a model never saw says nothing"
            )
        if dataset and (sentence := trained_on_test(located.folder, dataset)):
            raise DataError(
                f"the card of source '{source}' says that it was trained on the test split: \"{sentence}\"; leave the "
                "source out of a comparison on that split"
            )
    return {name: digest(hashes, splits[name]) for name, hashes in found.items()}


def hub_dataset(recipe: Recipe) -> str | None:
    """Return the Hub id of the recipe's data set, as model cards name it; `None` for files and folders."""
    path = recipe.data.get("path")
    if not isinstance(path, str) or path in file_formats() or exists(Path(recipe.locate(path))):
        return None
    return path


def labels_of(source: Source, merger: GraspMerger) -> list[str] | None:
    """Return the label names of a source's own classifier; `None` if it has none."""
    if merger.model.can_generate():
        return None
    if source.kind == "full":
        config = load_config(source)
        return None if is_headless(config) else label_names(config)
    if merger.base is None or not saves_head(load_adapter_config(source), merger.model):
        return None
    return adapter_labels(source, merger.base)
