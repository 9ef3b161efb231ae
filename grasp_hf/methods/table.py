"""The methods of a merge."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from ..config.grasp import GraspConfig
from ..models.batches import Batch
from ..tensors.mixing import Mix
from ..tensors.products import Scores
from ..tensors.scratch import Scratch
from ..tensors.units import Unit
from .blend import learned_coefficients
from .copy import configured_cosines

Mixes = Mapping[str, Mix]
Share = Callable[[str], Iterable[Tensor] | None]


@dataclass(frozen=True)
class Candidate:
    """A way to take in a source.

    Attributes:
        mixes: What goes in, by unit.
        judged: What goes in while each of `Step.judges` looks at it, for no labels judge what they taught.
        scores: Of the units, for the report.
        share: How much of each element of a tensor goes in, where that is no matter of the unit.
    """

    mixes: Mixes
    judged: Sequence[Mixes]
    scores: Scores
    share: Share | None = None


def measure_source(
    target: PreTrainedModel,
    source_values: Mapping[str, Tensor],
    units: Sequence[Unit],
    batches: Iterable[Batch],
    config: GraspConfig,
    *,
    shares: Mapping[str, float],
    scratch: Scratch,
    seed: int,
) -> tuple[dict[str, Mix], Scores]:
    """Return the mix and the score of each unit, as `config.method` finds them.

    `shares` are what an average of all sources so far would take.
    """
    if config.method == "blend":
        lr, steps = config.coefficient_lr, config.num_batches
        return learned_coefficients(target, source_values, units, batches, shares, scratch=scratch, lr=lr, steps=steps)
    scores = configured_cosines(target, source_values, units, batches, config, scratch=scratch, seed=seed)
    copied = {name: score is not None and score > config.threshold for name, score in scores.items()}
    return {name: Mix.on_line(float(copies)) for name, copies in copied.items()}, scores
