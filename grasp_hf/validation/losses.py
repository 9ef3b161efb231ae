"""The losses of a model, sample by sample, so that two models can be compared on the same samples."""

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

SCALES = tuple(2 ** (half / 2) for half in range(-6, 9))  # factors of the logits, from 1/8 to 16
MOST_VALIDATION_LABELS = 512  # labels that rank and validate sources, at most; all labels validate a fine-tuning


@dataclass(frozen=True)
class SampleLosses:
    """The losses of one model on labelled samples.

    Attributes:
        losses: Loss of each sample, summed over its terms; float64, shape `(n,)`.
        terms: Number of terms of each sample: 1 for a class, the number of labelled tokens for a text; shape `(n,)`.
        calibrated: Losses after all logits were multiplied by the one scale of `SCALES` with the smallest sum (temperature
            scaling, arXiv:1706.04599); shape `(n,)`. Without classes they equal `losses`. A mean of models is
            under-confident: its logits are too small, so that its loss is high although its answers are right.
        correct: Whether a classifier got each sample right, shape `(n,)`; `None` for other models.
    """

    losses: Tensor
    terms: Tensor
    calibrated: Tensor
    correct: Tensor | None

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
        if self.correct is None:
            return {"loss": self.loss}
        return {"loss": self.loss, "accuracy": int(self.correct.sum()) / len(self.losses)}


def concatenate(*parts: SampleLosses) -> SampleLosses:
    """Return the losses on several sets of samples as one."""
    correct = [part.correct for part in parts if part.correct is not None]
    return SampleLosses(
        torch.cat([part.losses for part in parts]),
        torch.cat([part.terms for part in parts]),
        torch.cat([part.calibrated for part in parts]),
        torch.cat(correct) if len(correct) == len(parts) else None,
    )


@contextmanager
def repeatable() -> Iterator[None]:
    """Make randomness in samples and batches (masked tokens, augmentations) the same in each such block."""
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
    """Return the losses of `model`, in its present mode, on every sample of `dataset`.

    For a regression, tags of tokens or spans, a model returns one loss for a whole batch. Such a model gets one sample at
    a time.

    Raises:
        DataError: No sample has a label.
        NonFiniteLossError: A loss is NaN or infinite.
    """
    loader = accelerator.prepare_data_loader(DataLoader(dataset, batch_size=batch_size, collate_fn=collator))
    losses, terms, logits, labels = [], [], [], []
    for batch in tqdm(loader, desc="evaluating", unit="batch", leave=False, disable=None):
        # Without a labelled token, as in a text that is cut before its answer, the mean loss would be NaN.
        if not labelled_terms(model, batch):
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
        return _class_losses(torch.cat(logits), torch.cat(labels))
    summed = torch.cat(losses)
    return SampleLosses(summed, torch.cat(terms), summed, None)


def _class_losses(logits: Tensor, labels: Tensor) -> SampleLosses:
    scaled = [cross_entropy(logits * scale, labels, reduction="none").double() for scale in SCALES]
    losses = cross_entropy(logits, labels, reduction="none").double()
    best = min([losses, *scaled], key=lambda values: float(values.sum()))
    return SampleLosses(losses, torch.ones_like(losses), best, logits.argmax(-1) == labels)


def _token_losses(logits: Tensor, labels: Tensor, *, shifted: bool) -> tuple[Tensor, Tensor]:
    """Return the summed loss of each text and its number of labelled tokens; both float64, shape `(n,)`."""
    if shifted:  # each token predicts the next
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    losses, labelled = losses.view(labels.shape).cpu(), (labels != IGNORED).cpu()  # Apple's GPUs have no float64
    return losses.double().sum(1), labelled.double().sum(1)


def _is_classification(batch: Batch, output: Any) -> bool:
    """Return whether the batch has one class id per sample, and the output one logit per class."""
    labels, logits = batch.get("labels"), output.get("logits")
    return labels is not None and logits is not None and is_class_ids(labels) and logits.ndim == 2


def _is_language(model: PreTrainedModel, batch: Batch, output: Any) -> bool:
    """Return whether the batch has one token id per position, and the output one logit per token of the vocabulary."""
    labels, logits = batch.get("labels"), output.get("logits")
    if not model.can_generate() or labels is None or logits is None or labels.is_floating_point():
        return False
    return logits.ndim == 3 and logits.shape[:2] == labels.shape


def evaluation_losses(model: PreTrainedModel, samples: Any, collator: Collator, batch_size: int) -> SampleLosses:
    """Return the losses of the model in eval mode on `samples`; its mode is restored."""
    with preserved_state(model):
        model.eval()
        return sample_losses(model, samples, collator, Accelerator(), batch_size)
