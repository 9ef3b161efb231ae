"""The inputs and the results of every method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm.auto import tqdm

from ..config.grasp import GraspConfig
from ..models.batches import Batch
from ..tensors.mixing import Mix
from ..tensors.products import Scores
from ..tensors.scratch import Scratch
from ..tensors.units import Unit
from ..validation.labels import Labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mixes = Mapping[str, Mix]

AVERAGE = "average"  # the candidate that needs no proof


@dataclass(frozen=True)
class Candidate:
    """One way to merge a source.

    Attributes:
        mixes: The mix of each unit.
        validated: The mixes evaluated on each of `Labels.validation_parts`. Learned coefficients come from the fit that did
            not see that part.
        scores: A score in [-1, 1] of each unit, for the report; `None` if it is undefined.
    """

    mixes: Mixes
    validated: Sequence[Mixes]
    scores: Scores


@dataclass(frozen=True)
class Inputs:
    """The inputs with which a method finds its candidates for one source.

    Attributes:
        name: The source, for progress bars and messages.
        model: The target, on the accelerator's device; a method that changes its weights restores them.
        source: The source's weights, by the names of the target's tensors.
        units: The units that may move.
        average: How much of the source a mean of all sources so far would take, by unit: `1 / k` for the k-th.
        config: How to merge.
        labels: The labelled samples, with the losses of the model on them.
        scratch: Temporary files. `scratch.start` holds the target before this source, `scratch.base` (for methods that
            learn) the target before the first source, and `scratch.kept` the objects that a method keeps between sources.
        seed: Seeds the shuffling of the batches.
    """

    name: str
    model: PreTrainedModel
    source: Mapping[str, Tensor]
    units: Sequence[Unit]
    average: Mapping[str, float]
    config: GraspConfig
    labels: Labels
    scratch: Scratch
    seed: int

    def candidate(self, mixes: Mixes, scores: Scores) -> Candidate:
        """Return a candidate that learned nothing from labels, so that every part validates the same mixes."""
        return Candidate(mixes, [mixes] * len(self.labels.validation_parts), scores)

    def average_mixes(self) -> dict[str, Mix]:
        """Return the mix of each unit in a mean of all sources so far."""
        return {unit: Mix.on_line(fraction) for unit, fraction in self.average.items()}

    def batches(self, labels: Any) -> Iterator[Batch]:
        """Yield `config.num_batches` batches of `labels` with a progress bar."""
        batches = self.labels.batches(labels, self.seed)
        bar = tqdm(batches, desc=f"measuring {self.name}", total=self.config.num_batches, leave=False, disable=None)
        yield from bar
