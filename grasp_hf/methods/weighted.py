"""The method `weighted`: the mean of all accepted sources so far, weighted by what their predictions are worth.

The weights come from `grasp_hf.teaching.predictions`; they reach a method as `Inputs.average`.
"""

from itertools import islice
from math import ceil

from ..errors import NonFiniteError
from ..models.gradients import mean_gradient, preserved_state
from ..models.mixture import mixture_of
from ..tensors.products import Scores, UnitProducts, cosine
from .candidates import AVERAGE, Candidate, Inputs

GRADIENT = "gradient"  # in `Scratch.kept`: the names of the parameters that have one


def candidates(inputs: Inputs) -> dict[str, Candidate]:
    """Return the weighted mean of all sources so far, unit by unit, with the alignment of each unit as its score."""
    mixes = inputs.average_mixes()
    return {AVERAGE: inputs.candidate(mixes, find_alignment(inputs))}


def find_alignment(inputs: Inputs) -> Scores:
    """Return the cosine of `-g` and `S - T` in each unit: `g` is a gradient of the target `T`, `S` the source.

    A run computes the gradient once, after its first source: a gradient through an untrained head says little. Each source
    is then read once, without a pass through it. The scores are `None` for the first source, and in a mixture of adapters.
    """
    nothing: Scores = dict.fromkeys(inputs.average)
    labels, kept = inputs.labels, inputs.scratch.kept
    if mixture_of(inputs.model) is not None:  # the norm of a gradient needs the gradient of whole weights
        return nothing
    if labels.samples.train is None or all(fraction == 1 for fraction in inputs.average.values()):
        return nothing
    if GRADIENT not in kept:
        count = min(inputs.config.num_batches, ceil(len(labels.samples.train) / inputs.config.batch_size))
        with preserved_state(inputs.model):
            inputs.model.eval()
            batches = islice(labels.batches(labels.samples.train, inputs.seed), count)
            names, _ = mean_gradient(inputs.model, batches, inputs.scratch.gradients)
        kept[GRADIENT] = [name for name in inputs.scratch.gradients if name in names]  # one order, so that sums repeat
    products = UnitProducts(inputs.units)
    for name in kept[GRADIENT]:
        if name in products:
            products.add(name, inputs.scratch.gradients[name], inputs.source[name], inputs.scratch.start[name])
    try:
        sums = products.sums()
    except NonFiniteError:
        return nothing
    found = {unit: cosine(*row) if row else None for unit, row in sums.items()}
    return {unit: None if value is None else -value for unit, value in found.items()}
