"""The losses of a model, sample by sample, so that two models can be compared on the same samples."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..errors import DataError
from ..models.batches import IGNORED, Batch, Collator, Link, batch_loss, labelled_terms, link_of, predicts_next
from ..models.gradients import preserved_randomness, preserved_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Factors of the logits: from 1/8 to 16, and 0, so that no calibrated loss exceeds that of a uniform guess.
SCALES = (0.0, *(2 ** (half / 2) for half in range(-6, 9)))
LABEL_COLUMNS = ("label", "label_ids", "labels")
LOSS_TOLERANCE = 1e-2  # relative; half precision rounds the loss of a model
MOST_VALIDATION_LABELS = 512  # labels that rank and validate sources, at most; all labels validate a fine-tuning


@dataclass(frozen=True)
class Outputs:
    """The outputs of one model for the terms of labelled samples: a sample or, where tokens are classified, a token.

    Attributes:
        logits: Shape `(terms, classes)`, float32, on the CPU.
        targets: The labels in the same shape: one-hot rows, 0 and 1 for several labels, or numbers; float32.
        samples: Number of the sample of each term, shape `(terms,)`.
        link: How logits become predictions.
    """

    logits: Tensor
    targets: Tensor
    samples: Tensor
    link: Link

    def losses(self, scale: float = 1.0) -> Tensor:
        """Return the loss of each term for logits times `scale`, as transformers computes it; float64, shape `(terms,)`."""
        logits = self.logits * scale
        if self.link == "softmax":
            return cross_entropy(logits, self.targets.argmax(-1), reduction="none").double()
        if self.link == "sigmoid":
            return binary_cross_entropy_with_logits(logits, self.targets, reduction="none").double().mean(-1)
        return (logits - self.targets).double().square().mean(-1)


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
        outputs: The outputs behind the losses, of a classifier or a regression; `None` for other models.
        token_losses: Loss of each labelled token of a language model, float64; `None` for other models.
    """

    losses: Tensor
    terms: Tensor
    calibrated: Tensor
    correct: Tensor | None
    outputs: Outputs | None = None
    token_losses: Tensor | None = None

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
    tokens = [part.token_losses for part in parts if part.token_losses is not None]
    return SampleLosses(
        torch.cat([part.losses for part in parts]),
        torch.cat([part.terms for part in parts]),
        torch.cat([part.calibrated for part in parts]),
        torch.cat(correct) if len(correct) == len(parts) else None,
        concatenate_outputs([part.outputs for part in parts]),
        torch.cat(tokens) if len(tokens) == len(parts) else None,
    )


def concatenate_outputs(parts: Sequence[Outputs | None]) -> Outputs | None:
    """Return the outputs for several sets of samples as one; `None` unless all sets have outputs."""
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    samples, before = [], 0
    for part in known:
        samples.append(part.samples + before)
        before += int(part.samples.max()) + 1
    return Outputs(
        torch.cat([part.logits for part in known]),
        torch.cat([part.targets for part in known]),
        torch.cat(samples),
        known[0].link,
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

    Some models return one loss for a whole batch, and no outputs from which the loss of a sample follows, as for spans.
    Such a model gets one sample at a time.

    Raises:
        DataError: No sample has a label.
        NonFiniteLossError: A loss is NaN or infinite.
    """
    loader = accelerator.prepare_data_loader(DataLoader(dataset, batch_size=batch_size, collate_fn=collator))
    losses, terms, tokens, outputs = [], [], [], []
    for batch in tqdm(loader, desc="evaluating", unit="batch", leave=False, disable=None):
        # Without a labelled token, as in a text that is cut before its answer, the mean loss would be NaN.
        if not labelled_terms(model, batch):
            continue
        mean, output = batch_loss(model, batch)
        found = batch_outputs(model, batch, output, mean)
        if found is not None:
            outputs.append(found)
        elif _is_language(model, batch, output):
            own, count, each = _token_losses(output["logits"], batch["labels"], shifted=predicts_next(model))
            losses.append(own.cpu())
            terms.append(count.cpu())
            tokens.append(each)
        elif batch_size > 1:
            return sample_losses(model, dataset, collator, accelerator, 1)
        else:
            weight = labelled_terms(model, batch)
            losses.append(torch.tensor([float(mean) * weight], dtype=torch.float64))
            terms.append(torch.tensor([float(weight)], dtype=torch.float64))
    if not outputs and not losses:
        raise DataError(
            f"none of the {len(dataset)} samples has a labelled token; expected labels other than {IGNORED}"
        )
    if outputs and not losses:
        whole = concatenate_outputs(outputs)
        assert whole is not None
        return losses_of(whole)
    if (
        outputs
    ):  # one sample alone looked like a class, because a loss did not follow from its outputs in another batch
        return sample_losses(model, dataset, collator, accelerator, 1)
    summed = torch.cat(losses)
    return SampleLosses(summed, torch.cat(terms), summed, None, None, torch.cat(tokens) if tokens else None)


@torch.no_grad()
@repeatable()
def unlabeled_logits(model: PreTrainedModel, dataset: Any, collator: Collator, batch_size: int) -> Tensor:
    """Return the logits of the model in eval mode for inputs without labels, shape `(terms, classes)`.

    A term is a sample, or a token that is not padding. Labels in `dataset` are not read.
    """
    accelerator = Accelerator()
    collate = without_labels(collator)
    loader = accelerator.prepare_data_loader(DataLoader(dataset, batch_size=batch_size, collate_fn=collate))
    found = []
    with preserved_state(model):
        model.eval()
        for batch in tqdm(loader, desc="predicting", unit="batch", leave=False, disable=None):
            logits = model(**batch)["logits"].float()
            found.append((logits[token_mask(batch, logits)] if logits.ndim == 3 else logits).cpu())
    return torch.cat(found)


def token_mask(batch: Batch, logits: Tensor) -> Tensor:
    """Return which tokens of an unlabelled batch are terms: those that are no padding; shape `(samples, tokens)`."""
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return mask.bool()


def without_labels(collator: Collator) -> Collator:
    """Return a collator that removes the labels of samples before it makes a batch."""

    def collate(samples: list[Any]) -> Batch:
        return collator([{k: v for k, v in dict(sample).items() if k not in LABEL_COLUMNS} for sample in samples])

    return collate


def losses_of(outputs: Outputs) -> SampleLosses:
    """Return the losses of samples from the outputs for their terms."""
    own = outputs.losses()
    scales = SCALES if outputs.link != "identity" else ()
    best = min([own, *(outputs.losses(scale) for scale in scales)], key=lambda values: float(values.sum()))
    number = int(outputs.samples.max()) + 1
    one_class = outputs.link == "softmax" and number == len(own)

    def sums(values: Tensor) -> Tensor:
        return torch.zeros(number, dtype=torch.float64).index_add_(0, outputs.samples, values)

    correct = outputs.logits.argmax(-1) == outputs.targets.argmax(-1) if one_class else None
    return SampleLosses(sums(own), sums(torch.ones_like(own)), sums(best), correct, outputs)


def batch_outputs(model: PreTrainedModel, batch: Batch, output: Any, mean: Tensor) -> Outputs | None:
    """Return the outputs for a batch, if the loss of the model follows from them; `None` otherwise.

    Args:
        model: The model.
        batch: A labelled batch.
        output: The output of the model.
        mean: The loss that the model returned for the batch.
    """
    link = link_of(model, batch.get("labels"), output.get("logits"))
    if link is None:
        return None
    logits, labels = output["logits"].float().cpu(), batch["labels"].cpu()
    if link == "softmax":
        labelled = labels != IGNORED
        rows = torch.arange(len(labels)).view(-1, *[1] * (labels.ndim - 1)).expand_as(labels)[labelled]
        rows = rows.unique(return_inverse=True)[1]  # a sample without a label has no number
        logits = logits[labelled]
        targets = one_hot(labels[labelled], logits.shape[-1]).float()
    else:
        targets, rows = labels.float().view_as(logits), torch.arange(len(labels))
    found = Outputs(logits, targets, rows, link)
    ours, theirs = float(found.losses().mean()), float(mean)
    # A model may have a loss of its own, such as one with weights for classes.
    return found if abs(ours - theirs) <= LOSS_TOLERANCE * max(abs(theirs), LOSS_TOLERANCE) else None


def _token_losses(logits: Tensor, labels: Tensor, *, shifted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss of each text, its number of labelled tokens, and the loss of each of them; all float64."""
    if shifted:  # each token predicts the next
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    losses, labelled = losses.view(labels.shape).cpu(), (labels != IGNORED).cpu()  # Apple's GPUs have no float64
    return losses.double().sum(1), labelled.double().sum(1), losses[labelled].double()


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
