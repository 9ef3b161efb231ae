"""The losses of a model, sample by sample, so that two models can be compared in pairs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..errors import DataError
from ..models.batches import IGNORED, Batch, Collator, batch_loss, is_class_ids, labelled_terms, predicts_next
from ..models.gradients import preserved_randomness, preserved_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALES = tuple(2 ** (half / 2) for half in range(-6, 9))  # of the logits, from 1/8 to 16
MOST_VALIDATION_LABELS = 512  # labels that choose among sources and judge them, at most; fine-tuning is judged by all


@dataclass(frozen=True)
class SampleLosses:
    """The losses of one model on labelled samples.

    Attributes:
        losses: Of each sample, summed over its terms; float64, shape `(n,)`.
        terms: How many terms that sum has: 1 for a class, the labelled tokens of a text.
        calibrated: The losses after all logits were multiplied by the one number that makes their sum least; the losses
            themselves where there are no classes. An average of models is right as often as its loss is low only after
            that: its logits are too small (temperature scaling, arXiv:1706.04599).
        correct: How many samples a classifier got right; `None` for other models.
    """

    losses: Tensor
    terms: Tensor
    calibrated: Tensor
    correct: int | None

    @property
    def loss(self) -> float:
        """The mean over all terms."""
        return float(self.losses.sum() / self.terms.sum())

    @property
    def calibrated_loss(self) -> float:
        """The mean of the calibrated losses over all terms."""
        return float(self.calibrated.sum() / self.terms.sum())

    def evaluation(self) -> dict[str, float]:
        """Return `loss`, and `accuracy` in [0, 1] for a classifier."""
        return {"loss": self.loss, **({} if self.correct is None else {"accuracy": self.correct / len(self.losses)})}


def concatenate(*parts: SampleLosses) -> SampleLosses:
    """Return the losses of one or several models on different samples as one."""
    correct = [part.correct for part in parts if part.correct is not None]
    return SampleLosses(
        torch.cat([part.losses for part in parts]),
        torch.cat([part.terms for part in parts]),
        torch.cat([part.calibrated for part in parts]),
        sum(correct) if len(correct) == len(parts) else None,
    )


@contextmanager
def repeatable() -> Iterator[None]:
    """Let what is random in samples and batches (masked tokens, augmentations) be the same in each such block."""
    with preserved_randomness():
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)
        yield


@torch.no_grad()
@repeatable()
def sample_losses(
    model: PreTrainedModel, dataset: Any, collator: Collator, accelerator: Accelerator, batch_size: int
) -> SampleLosses:
    """Return the losses of `model`, in its mode, on every sample of `dataset`.

    Where a model gives a whole batch one loss only (a regression, tags of tokens, spans), samples go through it one by one.
    """
    loader = accelerator.prepare_data_loader(DataLoader(dataset, batch_size=batch_size, collate_fn=collator))
    losses, terms, logits, labels = [], [], [], []
    for batch in tqdm(loader, desc="evaluating", unit="batch", leave=False, disable=None):
        if not labelled_terms(model, batch):  # texts cut before their answer, say: the mean loss would be NaN
            continue
        mean, output = batch_loss(model, batch)
        if _is_classification(batch, output):
            logits.append(output["logits"].float().cpu())
            labels.append(batch["labels"].cpu())
        elif _is_language(model, batch, output):
            own, count = _token_losses(output["logits"], batch["labels"], shifted=predicts_next(model))
            losses.append(own.cpu())
            terms.append(count.cpu())
        elif batch_size > 1:
            return sample_losses(model, dataset, collator, accelerator, 1)
        else:
            weight = labelled_terms(model, batch)
            losses.append(torch.tensor([float(mean) * weight], dtype=torch.float64))
            terms.append(torch.tensor([float(weight)], dtype=torch.float64))
    if not logits and not losses:
        raise DataError(
            f"none of the {len(dataset)} samples has a labelled token; expected labels other than {IGNORED}"
        )
    if logits and not losses:
        return _of_classes(torch.cat(logits), torch.cat(labels))
    summed = torch.cat(losses)
    return SampleLosses(summed, torch.cat(terms), summed, None)


def _of_classes(logits: Tensor, labels: Tensor) -> SampleLosses:
    scaled = [cross_entropy(logits * scale, labels, reduction="none").double() for scale in SCALES]
    losses = cross_entropy(logits, labels, reduction="none").double()
    best = min([losses, *scaled], key=lambda values: float(values.sum()))
    return SampleLosses(losses, torch.ones_like(losses), best, int((logits.argmax(-1) == labels).sum()))


def _token_losses(logits: Tensor, labels: Tensor, *, shifted: bool) -> tuple[Tensor, Tensor]:
    """Return the summed loss of each text, and how many labelled tokens it has."""
    if shifted:  # each token predicts the next
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    losses, labelled = losses.view(labels.shape).cpu(), (labels != IGNORED).cpu()  # Apple's GPUs have no float64
    return losses.double().sum(1), labelled.double().sum(1)


def _is_classification(batch: Batch, output: Any) -> bool:
    """Whether there is one class id per sample, and one logit per class for it."""
    labels, logits = batch.get("labels"), output.get("logits")
    return labels is not None and logits is not None and is_class_ids(labels) and logits.ndim == 2


def _is_language(model: PreTrainedModel, batch: Batch, output: Any) -> bool:
    """Whether there is one token id per position, and one logit per token of the vocabulary for it."""
    labels, logits = batch.get("labels"), output.get("logits")
    if not model.can_generate() or labels is None or logits is None or labels.is_floating_point():
        return False
    return logits.ndim == 3 and logits.shape[:2] == labels.shape


def evaluation_losses(model: PreTrainedModel, samples: Any, collator: Collator, batch_size: int) -> SampleLosses:
    """Return the losses of the model as it is now, in eval mode, on `samples`; its mode comes back."""
    with preserved_state(model):
        model.eval()
        return sample_losses(model, samples, collator, Accelerator(), batch_size)
