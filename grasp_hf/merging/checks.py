"""Checks before a merge, so that a mistake is known before the first source is read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config.grasp import GraspConfig
from ..config.methods import METHODS
from ..data.samples import Samples
from ..errors import ConfigError, DataError, IncompatibleSourceError, NonFiniteLossError, first_line
from ..hub.reference import Source
from ..models.batches import batch_loss, labelled_terms
from ..models.gradients import preserved_state
from ..models.padding import check_padding
from ..record.report import MergeReport
from ..tensors.placing import overwrite_
from ..tensors.units import movable_tensors, partition
from ..validation.labels import Labels
from .step import Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

REFUSED_BY_MODELS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def check_config(config: Any) -> None:
    """Raise `ConfigError` unless `config` is a configuration or `None`."""
    if config is not None and not isinstance(config, GraspConfig):
        raise ConfigError(f"config: got a {type(config).__name__}, expected a GraspConfig: GraspConfig(**…)")


def check_continues_adapter(
    merged: Source, config: GraspConfig, record: MergeReport | None, *, new_head: bool = False
) -> None:
    """Raise an error unless an adapter can be the start of a merge: it must be the result of an earlier one.

    Args:
        merged: The adapter.
        config: How to merge.
        record: The record of the earlier merge; `None` if there is none.
        new_head: Whether the merge needs a new head.
    """
    if new_head:
        raise IncompatibleSourceError(
            f"the labels of the data are not those of '{merged.ref}', an adapter with its own head; start from its base"
        )
    if record is None:
        raise IncompatibleSourceError(
            f"'{merged.ref}' is an adapter; expected a full model to start from, with the adapter as a source"
        )
    if not config.adapts:
        raise ConfigError(f"output: got 'model', but '{merged.ref}' is an adapter; expected 'adapter'")


def check_sources(sources: Any) -> None:
    """Raise `ConfigError` unless `sources` is a list of references."""
    if isinstance(sources, str | Mapping):
        raise ConfigError(f"sources: got '{sources}', expected a list of references")
    for source in sources:
        if not isinstance(source, str | Path | Mapping):
            raise ConfigError(
                f"sources: got a {type(source).__name__}, expected references (Hub ids, or folders of saved models), or "
                "sections such as {'id': 'org/name', 'labels': ['negative', 'positive']}"
            )


def check_merge(
    model: PreTrainedModel, config: GraspConfig, report: MergeReport, sources: Any, samples: Samples
) -> None:
    """Raise an error if a merge makes no sense, and warn if the result will be worse than it seems.

    Args:
        model: The target.
        config: How to merge.
        report: The record of the merge so far.
        sources: References of the sources.
        samples: The data of the merge.

    Raises:
        ConfigError: The configuration does not fit the sources or the data.
    """
    check_sources(sources)
    for name, off in {"eval_strategy": "no", "eval_on_start": False}.items():
        value = config.training_arguments.get(name, off)
        if samples.validation is None and value != off:
            raise ConfigError(
                f"training_arguments.{name}: got {value!r}, expected none without evaluation data; pass eval_dataset, or "
                "leave the argument out"
            )
    if not sources:
        return
    check_units(model, config, report)
    learns_first = report.finetuned or config.finetunes_between
    if samples.validation is None and samples.train is not None and config.gate and learns_first:
        logger.warning(
            "no evaluation data, and the labels were already trained on: the gate is off for this merge. Pass "
            "eval_dataset to turn it on."
        )
    keeps_mean = METHODS[config.method].counts_units
    if len(sources) > 1 and keeps_mean and not config.adapts and model.dtype in (torch.float16, torch.bfloat16):
        logger.warning(
            "the target is in %s: its mean is rounded after every source, so that later sources lose weight. Load the "
            "target in float32 (the default), and convert the merged model.",
            str(model.dtype).removeprefix("torch."),
        )


def check_units(model: PreTrainedModel, config: GraspConfig, report: MergeReport) -> None:
    """Raise `ConfigError` if earlier sources were merged with other units than the next source will be."""
    if not METHODS[config.method].counts_units:
        return
    names = {unit.name for unit in partition(model, config.unit)}
    for step in report.steps:
        other = [unit.name for unit in step.units if unit.name not in names]
        if other:
            raise ConfigError(
                f"unit: got '{config.unit}', but source '{step.source}' was merged with other units, such as "
                f"'{other[0]}'; expected the same units, because the mean counts the sources of each unit. The record of "
                "the earlier merge (grasp_config.yaml) names the setting"
            )


def check_loss(labels: Labels, dataset: Any, name: str) -> None:
    """Raise an error if the model has no finite loss on a batch; the Trainer would raise one later.

    Args:
        labels: Makes the batch, and holds the model.
        dataset: The samples.
        name: Name of the data set, for the message.

    Raises:
        DataError: No batch can be made of the samples, the model cannot take it, or padding changes its predictions.
        NonFiniteLossError: The loss is NaN or infinite.
    """
    model = labels.model
    try:
        batch = next(labels.batches(dataset, labels.config.seed))
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    except REFUSED_BY_MODELS as error:
        columns = getattr(dataset, "column_names", None)
        given = f" with the columns {', '.join(columns)}" if isinstance(columns, list) else ""
        raise DataError(
            f"{name}: no batch can be made of its samples{given}: {first_line(error)}; expected "
            f"{model.main_input_name}, as the model's tokenizer or processor makes them, and labels as numbers"
        ) from error
    if name == "eval_dataset" and not labelled_terms(model, batch):  # other batches may have labels
        return
    kind = model.config.problem_type
    try:
        with torch.no_grad(), preserved_state(model):
            model.eval()
            batch_loss(model, batch)
            check_padding(model, batch)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    except NonFiniteLossError:
        raise
    except REFUSED_BY_MODELS as error:
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in batch.items() if hasattr(value, "shape"))
        raise DataError(
            f"{name}: the {type(model).__name__} cannot take a batch of {shapes}: {first_line(error)}"
        ) from error
    finally:
        model.config.problem_type = kind  # the model sets it when it sees its first labels


def check_finetuning(step: Step, epochs: float) -> None:
    """Raise an error if the Trainer would refuse to fine-tune, before the first source is merged.

    Args:
        step: An open step; its model comes back unchanged.
        epochs: Epochs of fine-tuning in the whole merge.
    """
    samples, config = step.labels.samples, step.config
    if samples.train is None or not config.trains(epochs):
        return
    from ..models.finetune import check_finetuning  # imports datasets, which a merge without data does not need

    check_finetuning(
        step.model,
        samples.train,
        samples.validation,
        step.labels.collator,
        config,
        directory=step.scratch.directory,
    )
    if config.lora is not None or config.adapts:
        overwrite_(movable_tensors(step.model), step.scratch.start)
