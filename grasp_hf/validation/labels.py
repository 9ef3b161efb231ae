"""The labels that teach and those that validate, with the losses of the model on the latter."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Subset

from ..config.grasp import GraspConfig
from ..data.samples import Samples
from ..models.batches import Batch, Collator, sample_batches
from ..record.entries import EVALUATION_DATA
from .changes import LEAST_SAMPLES, detectable_difference
from .losses import (
    MOST_VALIDATION_LABELS,
    SampleLosses,
    concatenate,
    evaluation_losses,
    unlabeled_logits,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)


class Labels:
    """The labelled samples of a merge. They teach and validate, but no label validates coefficients that it taught.

    A source is validated by the evaluation data and, as long as the model has not been fine-tuned on them, by the labels.
    Where a method learns coefficients from labels, the labels are cut into two halves, and each half validates the
    coefficients that the other labels taught.

    This class alone caches the losses of the model. Code that changes the weights calls `changed`.

    Args:
        model: The target.
        samples: The data of the merge.
        collator: Makes batches from samples.
        config: How to merge.
        learned: Whether the model was fine-tuned on the labels.

    Attributes:
        learned: Whether the model was fine-tuned on the labels; a fine-tuning sets it.
    """

    def __init__(
        self, model: PreTrainedModel, samples: Samples, collator: Collator, config: GraspConfig, *, learned: bool
    ) -> None:
        self.model, self.samples, self.collator, self.config = model, samples, collator, config
        self.learned = learned
        self._losses: SampleLosses | None = None
        self._warned = False

    @property
    def _parts(self) -> list[list[int]]:
        """Indices of the labels that validate: one part, or two halves if labels teach; empty if no label validates."""
        if not self.config.gate or self.samples.train is None or self.learned:
            return []
        indices = self.validation_indices
        if not self.config.learns:
            return [indices]
        return [*halves(indices, self.config.seed)] if len(indices) > 1 else []

    @property
    def validation_indices(self) -> list[int]:
        """The indices of the labels that validate: the same `MOST_VALIDATION_LABELS` random labels each time, or all labels if there are no more."""
        number = len(self.samples.train)
        some = random.Random(self.config.seed).sample(range(number), min(number, MOST_VALIDATION_LABELS))
        return sorted(some)

    @property
    def validation_parts(self) -> list[Any]:
        """The samples that validate a source: parts of the labels, then the evaluation data."""
        parts = [Subset(self.samples.train, part) for part in self._parts]
        return parts if self.samples.validation is None else [*parts, self.samples.validation]

    @property
    def teachers(self) -> list[Any]:
        """For each part of the labels that validates, the other labels; all labels if no label validates."""
        every_label = set(range(len(self.samples.train)))
        teachers = [Subset(self.samples.train, sorted(every_label - set(part))) for part in self._parts]
        return teachers or [self.samples.train]

    @property
    def labels_validate(self) -> bool:
        """Whether some of the labels validate a source."""
        return bool(self._parts)

    @property
    def validated_by(self) -> str:
        """The samples that validate a source, such as `labels` or `two halves of the labels and evaluation data`."""
        names = []
        if self._parts:
            some = "labels"
            if len(self.samples.train) > MOST_VALIDATION_LABELS:
                some = f"{MOST_VALIDATION_LABELS} of the labels"
            elif self.config.learns:
                some = "the labels"
            names.append(f"two halves of {some}" if self.config.learns else some)
        if self.samples.validation is not None:
            names.append(EVALUATION_DATA)
        return " and ".join(names)

    def losses(self) -> SampleLosses | None:
        """Return the losses of the model on all validation parts; `None` if there are none."""
        if self._losses is None:
            parts = self.validation_parts
            if parts:
                self._losses = concatenate(*map(self.losses_on, parts))
        return self._losses

    def losses_before_source(self) -> SampleLosses | None:
        """Return `losses()`; warn once if the samples are few."""
        before = self.losses()
        if before is None:
            return None
        few = before.correct is not None and len(before.losses) < LEAST_SAMPLES
        if few and self.config.gate and not self._warned:
            self._warned = True
            difference = detectable_difference(len(before.losses))
            logger.warning("the sources are validated by %s, %s", self.validated_by, difference)
        return before

    @property
    def some_labels(self) -> Any:
        """The labels that rank and weigh sources: at most `MOST_VALIDATION_LABELS`, the same ones each time."""
        return Subset(self.samples.train, self.validation_indices)

    def unlabeled_logits(self) -> Tensor | None:
        """Return the logits of the present model for the terms of the unlabelled inputs, shape `(terms, classes)`."""
        if self.unlabeled is None:
            return None
        return unlabeled_logits(self.model, self.unlabeled, self.collator, self.config.batch_size)

    @cached_property
    def unlabeled(self) -> Any:
        """The unlabelled inputs that can teach, in one order: at most as many as the fine-tuning reads."""
        inputs = self.samples.unlabeled
        if inputs is None or self.samples.train is None or self.model.can_generate():
            return None
        most = math.ceil(len(self.samples.train) * max(1.0, self.config.final_epochs))
        chosen = random.Random(self.config.seed).sample(range(len(inputs)), min(len(inputs), most))
        return Subset(inputs, sorted(chosen))

    def losses_on(self, dataset: Any) -> SampleLosses:
        """Return the losses of the present model on `dataset`."""
        return evaluation_losses(self.model, dataset, self.collator, self.config.batch_size)

    def changed(self, losses: SampleLosses | None = None) -> None:
        """Note that the weights have changed.

        Args:
            losses: Losses of the changed model on all validation parts; `None` if they are not known.
        """
        self._losses = losses

    def batches(self, labels: Any, seed: int) -> Iterator[Batch]:
        """Yield `config.num_batches` batches of `labels`, shuffled by `seed`."""
        return sample_batches(labels, self.collator, Accelerator(), self.config, seed=seed)


def halves(indices: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Return two random halves of `indices`, sorted."""
    order = list(indices)
    random.Random(seed).shuffle(order)
    middle = len(order) // 2
    return sorted(order[:middle]), sorted(order[middle:])
