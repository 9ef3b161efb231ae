"""The user's data, ready for training."""

from dataclasses import dataclass
from typing import Any

from ..models.batches import Collator


@dataclass
class TaskData:
    """The user's data, ready for training: what `GraspMerger.merge` takes, and the test split for the end.

    Attributes:
        train: Labelled samples; `None` for a merge without data.
        validation: Held-out samples, `None` where the data set has no such split.
        test: Samples that are looked at once, when all is done.
        collator: Makes batches of them.
    """

    train: Any
    validation: Any
    test: Any
    collator: Collator

    def merge_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `GraspMerger.merge`."""
        return {"train_dataset": self.train, "eval_dataset": self.validation, "data_collator": self.collator}
