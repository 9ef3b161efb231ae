"""The user's data, ready for training."""

from dataclasses import dataclass
from typing import Any

from ..models.batches import Collator


@dataclass(frozen=True)
class Samples:
    """The samples of the target task, under one name from the public verbs to the innermost function.

    Attributes:
        train: Labelled samples; `None` for a merge without data.
        validation: Held-out samples (`eval_dataset` of the public verbs); `None` if there are none.
        unlabeled: Inputs without labels (`unlabeled_dataset` of the public verbs); for a language model, more texts to
            train on. `None` if there are none.
        test: Samples that are evaluated once, at the end; `None` if there are none.
        collator: Makes batches of samples; `None` stands for the default collator of transformers.
    """

    train: Any = None
    validation: Any = None
    unlabeled: Any = None
    test: Any = None
    collator: Collator | None = None

    def keywords(self) -> dict[str, Any]:
        """Return the samples as the keyword arguments of `GraspMerger.merge`."""
        return {
            "train_dataset": self.train,
            "eval_dataset": self.validation,
            "unlabeled_dataset": self.unlabeled,
            "data_collator": self.collator,
        }
