"""The method `softmax`: a mean that weighs each source by `exp(-loss)` on the labels."""

import math
from dataclasses import replace

from ..tensors.mixing import Mix
from ..tensors.placing import placed
from ..tensors.units import movable_tensors
from .candidates import Candidate, Inputs


def candidates(inputs: Inputs) -> dict[str, Candidate]:
    """Return the mean of all sources so far with the weights `softmax(-loss)`.

    The sum of the weights so far is kept between the sources, so that no earlier source is read again.
    """
    tensors = movable_tensors(inputs.model)
    with placed(tensors, inputs.source, inputs.scratch.start):
        weight = math.exp(-inputs.labels.source_losses().loss)
    total = inputs.scratch.kept.get("softmax", 0.0) + weight
    fraction = weight / total
    mixes = {unit: Mix.on_line(fraction) for unit in inputs.average}

    def count() -> None:
        inputs.scratch.kept["softmax"] = total

    candidate = inputs.candidate(mixes, dict.fromkeys(mixes))
    return {"softmax": replace(candidate, when_merged=count)}
