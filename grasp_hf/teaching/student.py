"""The data and the loss with which a model learns from a teacher: labels that are probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from torch.utils.data import Dataset

from ..models.batches import IGNORED, Batch, Collator, Link
from ..validation.losses import LABEL_COLUMNS

TARGETS = "teacher_targets"


def label_column(sample: Mapping[str, Any]) -> str | None:
    """Return the name of the column that holds the label of a sample; `None` if it has another name."""
    return next((name for name in LABEL_COLUMNS if name in dict(sample)), None)


class TaughtSamples(Dataset):
    """Samples with the targets that a student learns, in place of their labels.

    Labelled and unlabelled samples take turns that are about equal: the smaller set is repeated.

    Args:
        labelled: Labelled samples.
        targets: Targets of each labelled sample, shape `(terms, classes)` each.
        unlabeled: Inputs without labels.
        unlabeled_targets: Targets of each of them, in the same form.
    """

    def __init__(
        self,
        labelled: Any,
        targets: Sequence[Tensor],
        unlabeled: Any,
        unlabeled_targets: Sequence[Tensor],
    ) -> None:
        self._parts = [(labelled, targets), (unlabeled, unlabeled_targets)]
        sizes = [len(labelled), len(unlabeled)]
        self._rows = [
            (part, row)
            for part, size in enumerate(sizes)
            for _ in range(max(1, round(max(sizes) / size)))
            for row in range(size)
        ]
        example = dict(labelled[0])
        self._column = str(label_column(example))
        self._label = example[self._column]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, row = self._rows[index]
        samples, targets = self._parts[part]
        sample = dict(samples[row])
        if part:
            # A collator needs a label in every sample. Of this one only the place counts: of which token it is.
            sample = {name: value for name, value in sample.items() if name not in LABEL_COLUMNS}
            sample[self._column] = self._placeholder(sample)
        return {**sample, TARGETS: targets[row]}

    def _placeholder(self, sample: dict[str, Any]) -> Any:
        if not isinstance(self._label, list | Tensor) or "input_ids" not in sample:
            return self._label
        if isinstance(self._label, Tensor) and (self._label.ndim == 0 or self._label.is_floating_point()):
            return self._label
        if isinstance(self._label, list) and any(isinstance(value, float) for value in self._label):
            return self._label
        mask = sample.get("attention_mask", [1] * len(sample["input_ids"]))
        places = [0 if bool(value) else IGNORED for value in mask]
        return torch.tensor(places) if isinstance(self._label, Tensor) else places


def with_targets(collator: Collator) -> Collator:
    """Return a collator for `TaughtSamples`, whose `labels` are the targets; other samples are collated as before."""

    def collate(samples: list[Any]) -> Batch:
        if TARGETS not in samples[0]:
            return collator(samples)
        targets = [sample[TARGETS] for sample in samples]
        batch = collator([{key: value for key, value in sample.items() if key != TARGETS} for sample in samples])
        labels = batch["labels"]
        if labels.ndim < 2 or labels.is_floating_point():
            batch["labels"] = torch.cat(targets)
        else:
            terms = torch.zeros(*labels.shape, targets[0].shape[-1])
            terms[labels != IGNORED] = torch.cat(targets)
            batch["labels"] = terms
        return batch

    return collate


def taught_loss(link: Link) -> Callable[..., Tensor]:
    """Return a `compute_loss_func` for `transformers.Trainer`, for targets as well as for labels.

    The cross-entropy of a label and the Kullback-Leibler divergence from a teacher have the same gradient as the
    cross-entropy of the mean of both distributions, so one loss serves all samples.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
        if link == "sigmoid":
            return binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        if link == "identity":
            return mse_loss(logits.view_as(labels), labels.to(logits.dtype))
        if not labels.is_floating_point():
            return cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
        known = labels.sum(-1) > 0
        return cross_entropy(logits[known], labels[known].to(logits.dtype))

    return loss
