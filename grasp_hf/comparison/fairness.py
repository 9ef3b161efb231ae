"""What would make a comparison dishonest, and is refused before it begins."""

from collections.abc import Sequence
from pathlib import Path

from ..config.recipe import Recipe
from ..data.digests import digest, sample_hashes
from ..data.samples import Samples
from ..errors import DataError, first_few
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

LEAST_VALIDATION = 50  # fewer than of the test split: it judges by the loss, in pairs of the same sample
LEAST_TEXTS = 30  # of a language model; with fewer, 1.96 standard errors are no 95 % (Student's t is 2.05 and more)


def check_fairness(recipe: Recipe, merger: GraspMerger, sources: Sequence[str], data: Samples) -> dict[str, str]:
    """Raise `DataError` where the rows of a comparison could not be compared; return a digest of each split."""
    if data.train is None or data.test is None:
        raise DataError("a comparison needs data with the splits 'train' and 'test'")
    generates = merger.model.can_generate()
    if generates:
        for name, split in {"test": data.test, "validation": data.validation}.items():
            if split is not None and len(split) < LEAST_TEXTS:
                raise DataError(
                    f"the split '{name}' has {len(split)} texts; expected at least {LEAST_TEXTS}, or the interval of what "
                    "they show is a guess; cut long texts into several"
                )
    elif len(data.test) < LEAST_SAMPLES:
        raise DataError(f"the split 'test' has {detectable_difference(len(data.test))}")
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    found = {name: sample_hashes(split) for name, split in splits.items() if split is not None}
    for name in found.keys() - {"test"}:
        if shared := found[name] & found["test"]:
            why = (
                "every method that learns the training set by heart looks good"
                if name == "train"
                else "what chose a model judges it, too"
            )
            raise DataError(
                f"{len(shared)} samples of the split 'test' also stand in the split '{name}'; expected none: remove them, "
                f"or {why}"
            )
    if shared := found["train"] & found.get("validation", set()):
        raise DataError(
            f"{len(shared)} samples of the split 'validation' also stand in the split 'train'; expected none: remove them, "
            "or they judge what they have taught"
        )
    if not generates and data.validation is not None and len(data.validation) < LEAST_VALIDATION:
        raise DataError(
            f"the split 'validation' has {detectable_difference(len(data.validation), LEAST_VALIDATION)}; without that split the "
            "labels judge"
        )
    dataset = hub_dataset(recipe)
    for source in sources:
        located, _ = look_up(source, trusted=recipe.config.trust_remote_code)
        labels, expected = own_labels(located, merger), label_names(merger.model.config)
        if labels is not None and set(labels) != set(expected):
            raise DataError(
                f"source '{source}' knows other labels than the data: got {first_few(labels, 12)}, expected "
                f"{first_few(expected, 12)}; give its config.json the names that its classes have in the data "
                "(`id2label`), or leave it out: a merge takes what fits, but a model is not judged by labels it never saw"
            )
        if dataset and (sentence := trained_on_test(located.folder, dataset)):
            raise DataError(
                f"source '{source}' was trained on the test split, says its card (\"{sentence}\"); leave it out of a "
                "comparison on that split"
            )
    return {name: digest(hashes, splits[name]) for name, hashes in found.items()}


def hub_dataset(recipe: Recipe) -> str | None:
    """Return the name of the recipe's data set on the Hub, as cards call it; `None` for files and folders."""
    path = recipe.data.get("path")
    if not isinstance(path, str) or path in file_formats() or Path(recipe.locate(path)).exists():
        return None
    return path


def own_labels(source: Source, merger: GraspMerger) -> list[str] | None:
    """Return the label names that the classes of a source have; `None` where it has no classifier of its own."""
    if merger.model.can_generate():
        return None
    if source.kind == "full":
        config = load_config(source)
        return None if is_headless(config) else label_names(config)
    if merger.base is None or not saves_head(load_adapter_config(source), merger.model):
        return None
    return adapter_labels(source, merger.base)
