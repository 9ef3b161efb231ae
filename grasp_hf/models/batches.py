"""Batches of the user's data, and the loss of a model on a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import default_data_collator

from ..config.grasp import GraspConfig
from ..errors import DataError, NonFiniteLossError
from ..internals import keeping_columns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100  # the label that transformers leaves out of a loss
Batch = dict[str, Any]
Collator = Callable[[list], Batch]
Link = Literal["softmax", "sigmoid", "identity"]  # from logits to class probabilities, to several labels, to numbers


def check_dataset(dataset: Any, name: str) -> None:
    """Raise `DataError` unless `dataset` is a data set with a length and at least one row; errors call it `name`."""
    if dataset is None:
        raise DataError(
            f"{name} is missing; expected labelled samples. Only an average needs none: method='average', "
            "order='given', final_epochs=0"
        )
    if isinstance(dataset, str | Path):
        raise DataError(f"{name} is the text '{dataset}'; expected a data set; load it with datasets.load_dataset")
    if isinstance(dataset, Mapping):
        raise DataError(f"{name} holds the splits {', '.join(map(str, dataset))}; expected one of them")
    if not hasattr(dataset, "__len__"):
        raise DataError(
            f"{name} is a {type(dataset).__name__} without a length; expected a data set with a known number of rows"
        )
    if len(dataset) == 0:
        raise DataError(f"{name} is empty; expected at least one labelled sample")


def keep_model_columns(model: PreTrainedModel, collator: Collator | None) -> Collator:
    """Return a collator that gives `collator` only the columns that `model.forward` takes, and the labels.

    A `forward` that does not name its inputs gets every column. `None` stands for the default collator.
    """
    parameters = inspect.signature(model.forward).parameters
    if model.main_input_name not in parameters:
        return collator or default_data_collator
    return keeping_columns(collator or default_data_collator, [*parameters, "label", "label_ids", "labels"])


def sample_batches(
    dataset: Any, collator: Collator, accelerator: Accelerator, config: GraspConfig, *, seed: int
) -> Iterator[Batch]:
    """Yield `config.num_batches` shuffled training batches on the accelerator's device, from as many epochs as needed.

    The paper drops a last batch that is not full. We keep it, so that every sample of a small data set is used.
    """
    loader = accelerator.prepare_data_loader(
        DataLoader(
            dataset,
            batch_size=config.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(seed),
            collate_fn=collator,
            drop_last=config.published and len(dataset) >= config.batch_size,
        )
    )
    remaining = config.num_batches
    while True:
        for batch in loader:
            yield batch
            remaining -= 1
            if remaining == 0:
                return


def batch_loss(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Any]:
    """Return the loss of `model(**batch)`, a scalar, and the complete output.

    Raises:
        DataError: The batch holds no labels, or the model returns no loss.
        NonFiniteLossError: The loss is NaN or infinite.
    """
    if not {model.main_input_name, "inputs_embeds"} & set(batch):
        raise DataError(
            f"a batch holds {', '.join(sorted(batch)) or 'no column that the model takes'}, expected "
            f"{model.main_input_name}; prepare the data set with the model's tokenizer or processor"
        )
    labels, classes = batch.get("labels"), model.config.num_labels or 0
    if isinstance(labels, Tensor) and "Classification" in type(model).__name__ and is_class_ids(labels):
        if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise DataError(
                f"a batch holds labels from {int(labels.min())} to {int(labels.max())}; expected 0 to {classes - 1}, "
                f"the class ids of the {type(model).__name__}"
            )
    if not labelled_terms(model, batch):
        raise DataError(f"a batch holds no labelled token: every label is {IGNORED}; remove such samples")
    output = model(**batch)
    if output.get("loss") is None:
        raise DataError(
            f"{type(model).__name__} returned no loss for a batch with {', '.join(sorted(batch))}; expected a data "
            "set with labels (a column 'label' or 'labels')"
        )
    if not torch.isfinite(output["loss"]):
        raise NonFiniteLossError(
            f"the loss is {output['loss'].item()} on a batch of the data set; expected a finite number"
        )
    return output["loss"], output


def labelled_terms(model: PreTrainedModel, batch: Batch) -> int:
    """Return the number of terms that the loss of a batch is the mean of: labelled tokens, or samples."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim < 2 or labels.is_floating_point():
        return len(next(iter(batch.values())))
    if predicts_next(model):
        labels = labels[:, 1:]
    return int((labels != IGNORED).sum())


def predicts_next(model: PreTrainedModel) -> bool:
    """Whether the logits of a position predict the label of the next one, as in causal language models."""
    return model.can_generate() and not model.config.is_encoder_decoder


def is_class_ids(labels: Tensor) -> bool:
    """Whether `labels` holds one class id per sample."""
    return labels.ndim == 1 and not labels.is_floating_point()


def link_of(model: PreTrainedModel, labels: Any, logits: Any) -> Link | None:
    """Return how the logits of a classifier or a regression become predictions; `None` for other models.

    A model with the link `softmax` has one class id per sample, or per token. transformers takes the loss from
    `problem_type`, which the model sets when it sees its first labels.
    """
    if not isinstance(labels, Tensor) or not isinstance(logits, Tensor) or model.can_generate():
        return None
    if not labels.is_floating_point():
        return "softmax" if logits.shape[:-1] == labels.shape and logits.ndim in (2, 3) else None
    if logits.ndim != 2 or labels.numel() != logits.numel():
        return None
    kind = model.config.problem_type or ("regression" if logits.shape[1] == 1 else "multi_label_classification")
    return {"regression": "identity", "multi_label_classification": "sigmoid"}.get(kind)  # type: ignore[return-value]


def class_terms(model: PreTrainedModel, logits: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Return the terms of the mean loss: logits `(n, classes)` in float32, and class ids `(n,)`.

    Some of the ids may be `IGNORED`.

    Raises:
        DataError: The labels do not hold one class id for each row of logits.
    """
    if not (isinstance(logits, Tensor) and isinstance(labels, Tensor)):
        raise DataError(
            f"a {type(model).__name__} returned logits of type {type(logits).__name__} for labels of type "
            f"{type(labels).__name__}; expected two tensors, with one class id for each row of logits"
        )
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        raise DataError(
            f"got {labels.dtype} labels of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}; "
            "expected one class id for each row of logits"
        )
    if predicts_next(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits.flatten(0, -2).float(), labels.flatten()
