"""Which labels teach, which validate, and the losses of the model on those that validate."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch.utils.data import Subset

from ..config.grasp import GraspConfig
from ..data.samples import Samples
from ..models.batches import Batch, Collator, sample_batches
from ..record.entries import EVALUATION_DATA
from .changes import LEAST_SAMPLES, detectable_difference
from .losses import MOST_VALIDATION_LABELS, SampleLosses, concatenate, evaluation_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class Labels:
    """The labelled samples of a merge. They teach, they validate, and no label validates coefficients that it taught.

    A source is validated by the evaluation data and, as long as the model has not been fine-tuned on them, by the labels.
    Where a method learns coefficients from labels, the labels are cut into two halves, and each half validates the
    coefficients that the other labels taught.

    This class alone keeps the losses of the model, so that they are not computed twice. Whoever changes the weights calls
    `changed`.

    Args:
        model: The target.
        samples: Its data.
        collator: Makes batches of the data.
        config: How to merge.
        learned: Whether the model was fine-tuned on the labels.

    Attributes:
        learned: See above; a fine-tuning sets it.
        floor: The mean calibrated loss before the first source since the last fine-tuning; infinite until it is known.
    """

    def __init__(
        self, model: PreTrainedModel, samples: Samples, collator: Collator, config: GraspConfig, *, learned: bool
    ) -> None:
        self.model, self.samples, self.collator, self.config = model, samples, collator, config
        self.learned = learned
        self.floor = math.inf
        self._losses: SampleLosses | None = None
        self._warned = False

    @property
    def _parts(self) -> list[list[int]]:
        """Indices of the labels that validate: one part, or two halves where labels teach; empty where none validates."""
        if not self.config.gate or self.samples.train is None or self.learned:
            return []
        indices = self._validation_indices()
        if not self.config.learns:
            return [indices]
        return [*halves(indices, self.config.seed)] if len(indices) > 1 else []

    def _validation_indices(self) -> list[int]:
        """Return the same `MOST_VALIDATION_LABELS` random labels each time, or all labels if there are no more."""
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
        """For each part of the labels that validates, the other labels; all labels where no label validates."""
        everyone = {*range(len(self.samples.train))}
        return [Subset(self.samples.train, sorted(everyone - {*part})) for part in self._parts] or [self.samples.train]

    @property
    def labels_validate(self) -> bool:
        """Whether some of the labels validate a source."""
        return bool(self._parts)

    @property
    def validated_by(self) -> str:
        """What validates a source, for the report: `labels`, `two halves of the labels`, `evaluation data`, or both."""
        names = []
        if self._parts:
            some = "the labels"
            if len(self.samples.train) > MOST_VALIDATION_LABELS:
                some = f"{MOST_VALIDATION_LABELS} of the labels"
            names.append(f"two halves of {some}" if self.config.learns else some.removeprefix("the "))
        if self.samples.validation is not None:
            names.append(EVALUATION_DATA)
        return " and ".join(names)

    def losses(self) -> SampleLosses | None:
        """Return the losses of the model on all validation parts; `None` where there are none."""
        if self._losses is None and (parts := self.validation_parts):
            self._losses = concatenate(*map(self.losses_on, parts))
        return self._losses

    def losses_before_source(self) -> SampleLosses | None:
        """Return what `losses` does, set the floor if this is the first source, and warn once of few samples."""
        before = self.losses()
        if before is None:
            return None
        few = before.correct is not None and len(before.losses) < LEAST_SAMPLES
        if few and self.config.gate and not self._warned:
            self._warned = True
            samples = detectable_difference(len(before.losses))
            logger.warning("the sources are validated by %s, %s", self.validated_by, samples)
        if self.floor == math.inf:
            self.floor = before.calibrated_loss
        return before

    def source_losses(self) -> SampleLosses:
        """Return the losses of the model while it holds a source: on the validation parts, or on labels where none are."""
        parts = self.validation_parts or [Subset(self.samples.train, self._validation_indices())]
        return concatenate(*map(self.losses_on, parts))

    def losses_on(self, dataset: Any) -> SampleLosses:
        """Return the losses of the model as it is now on `dataset`."""
        return evaluation_losses(self.model, dataset, self.collator, self.config.batch_size)

    def changed(self, losses: SampleLosses | None = None) -> None:
        """Note that the weights have changed; `losses` are those of the model now on all validation parts, if known."""
        self._losses = losses

    def finetuned(self) -> None:
        """Note that a fine-tuning changes the weights: the next source starts from another floor."""
        self.changed()
        self.floor = math.inf

    def batches(self, labels: Any, seed: int) -> Iterator[Batch]:
        """Yield `config.num_batches` batches of `labels`, shuffled by `seed`."""
        return sample_batches(labels, self.collator, Accelerator(), self.config, seed=seed)


def halves(indices: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Return two random halves of `indices`, sorted."""
    order = list(indices)
    random.Random(seed).shuffle(order)
    middle = len(order) // 2
    return sorted(order[:middle]), sorted(order[middle:])
