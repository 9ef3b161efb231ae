"""Merging by task vectors `S_k - base`: task arithmetic, TIES, DARE, GradFix.

All of them move the base by a multiple of one direction, and choose the multiple by the loss on the labels.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from peft.utils.merge_utils import dare_linear, ties
from torch import Tensor

from ..errors import NonFiniteError
from ..models.gradients import mean_gradient, preserved_state
from ..tensors.units import movable_tensors
from .inputs import (
    MethodInputs,
    finite_loss,
    float_tensors,
    open_checked_sources,
    parameter_names,
    stream_checked_sources,
    task_vector,
    wide_dtype,
)
from .soups import add_to_mean_

logger = logging.getLogger(__name__)

TENTHS = tuple(tenth / 10 for tenth in range(1, 11))


def task_arithmetic_(inputs: MethodInputs, *, weights: Sequence[float] = TENTHS) -> None:
    """Change the model to `base + w * sum_k (S_k - base)` (arXiv:2212.04089).

    Memory: one source at a time; 1 P of disk.

    Args:
        inputs: The model, the sources and the labels.
        weights: Candidates for `w`; the one with the lowest loss is chosen. The paper searches (0, 1] too.

    Raises:
        NonFiniteError: No weight gives a finite loss.
    """
    total, seen = inputs.buffer("direction"), Counter[str]()
    for values in stream_checked_sources(inputs):
        for name, value in float_tensors(inputs, values):
            vector = task_vector(value, inputs.base[name])
            if seen[name]:
                total[name].add_(vector)
            else:
                total[name].copy_(vector)
            seen[name] += 1
    _search_weight_(inputs, total, seen, weights)


def ties_(
    inputs: MethodInputs,
    *,
    density: float = 0.2,
    weights: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0),
) -> None:
    """Change the model to `base + w * TIES(S_k - base)` (arXiv:2306.01708), as PEFT computes it.

    Each task vector keeps its largest elements. Each element takes the sign with the larger total, and the values with
    that sign are averaged. As in PEFT and mergekit, the largest elements are found per tensor; the paper finds them in
    the whole model. A tensor with fewer than `1 / density` elements therefore stays that of the base.

    Memory: a few times K copies of the largest tensor; 1 P of disk.

    Args:
        inputs: The model, the sources and the labels.
        density: Fraction of elements that each task vector keeps; 0.2 is the paper's.
        weights: Candidates for `w`; the one with the lowest loss is chosen. The paper takes 1 if nothing can choose.

    Raises:
        NonFiniteError: No weight gives a finite loss.
    """
    direction = inputs.buffer("direction")
    with open_checked_sources(inputs) as sources:
        _combine_(inputs, sources, direction, lambda v: ties(v, torch.ones(len(v)), density), averages=True)
        names = [name for values in sources for name, _ in float_tensors(inputs, values)]
    _search_weight_(inputs, direction, dict.fromkeys(names, 1), weights)


def dare_(
    inputs: MethodInputs,
    *,
    densities: Sequence[float] = (0.1, 0.8),
    weights: Sequence[float] = TENTHS,
) -> None:
    """Change the model to `base + w * sum_k drop(S_k - base) / density` (arXiv:2311.03099), as PEFT computes it.

    Each element of each task vector is dropped with probability `1 - density`, and the others are scaled up.

    Memory: a few times K copies of the largest tensor; 1 P of disk.

    Args:
        inputs: The model, the sources and the labels.
        densities: Candidates for the fraction of elements that are kept. The paper advertises 0.1 (90 % dropped), and
            the scripts of its authors merge with 0.8. The one with the lowest loss is chosen, as the paper tunes it.
        weights: Candidates for `w`; the one with the lowest loss is chosen.

    Raises:
        NonFiniteError: No weight gives a finite loss.
    """
    direction = inputs.buffer("direction")
    with open_checked_sources(inputs) as sources:
        counts = Counter(name for values in sources for name, _ in float_tensors(inputs, values))

        def drop_(density: float) -> None:
            with torch.random.fork_rng():
                torch.manual_seed(inputs.seed)
                _combine_(
                    inputs, sources, direction, lambda v: dare_linear(v, torch.ones(len(v)), density), averages=False
                )

        found: dict[float, tuple[float, float]] = {}
        for density in densities:
            drop_(density)
            found[density] = _lowest_loss(_losses_(inputs, direction, counts, weights))
        density = min(found, key=found.__getitem__)
        loss, weight = found[density]
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"DARE: no finite loss on the labels; tried the densities {_listed(densities)} with the weights "
                f"{_listed(weights)}"
            )
        if density != densities[-1]:
            drop_(density)
    _add_direction_(inputs, direction, counts, weight)
    logger.info("DARE: density %g, weight %g, loss %.4f", density, weight, loss)


def gradfix_(inputs: MethodInputs, *, weights: Sequence[float] = TENTHS) -> None:
    """Change the model to `base + a * mean_k (m * (S_k - base))`, GradFix (arXiv:2510.09658) with several sources.

    The mask `m` keeps the elements of a task vector that lower the loss: their sign is opposite to that of the
    gradient of the mean loss at the base, over one pass. The vectors are masked and then averaged, as the authors
    merge. `a` is searched as they search it.

    Memory: one source at a time; 2 P of disk.

    Args:
        inputs: The model, the sources and the labels.
        weights: Candidates for `a`; the one with the lowest loss is chosen.

    Raises:
        NonFiniteError: No weight gives a finite loss.
    """
    gradients, direction, seen = inputs.buffer("gradients"), inputs.buffer("direction"), Counter[str]()
    parameters = parameter_names(inputs)
    with preserved_state(inputs.model):
        found, _ = mean_gradient(inputs.model, inputs.batches(inputs.batches_per_epoch), gradients)
    for values in stream_checked_sources(inputs):
        for name, value in float_tensors(inputs, values):
            vector = task_vector(value, inputs.base[name])
            if name in found:
                vector.mul_(vector.sign() == -gradients[name].sign())
            elif name in parameters:
                vector.zero_()
            add_to_mean_(direction, {name: vector}, seen)
    _search_weight_(inputs, direction, dict.fromkeys(seen, 1), weights)


def _combine_(
    inputs: MethodInputs,
    sources: Sequence[Mapping[str, Tensor]],
    direction: Mapping[str, Tensor],
    merge: Callable[[list[Tensor]], Tensor],
    *,
    averages: bool,
) -> None:
    """Write `merge` of the task vectors of each parameter to `direction`; of statistics, their mean or their sum."""
    parameters = parameter_names(inputs)
    for name in inputs.base:
        vectors = [task_vector(v[name], inputs.base[name]) for v in sources if name in v]
        if not vectors or not inputs.base[name].is_floating_point():
            continue
        if name in parameters:
            direction[name].copy_(merge(vectors))
        else:
            direction[name].copy_(torch.stack(vectors).sum(0) / (len(vectors) if averages else 1))


def _search_weight_(
    inputs: MethodInputs, direction: Mapping[str, Tensor], counts: Mapping[str, int], weights: Sequence[float]
) -> None:
    """Change the model by the multiple of `direction` that has the lowest loss; see `_add_direction_`."""
    loss, weight = _lowest_loss(_losses_(inputs, direction, counts, weights))
    if not math.isfinite(loss):
        raise NonFiniteError(f"no finite loss on the labels; tried the weights {_listed(weights)}")
    _add_direction_(inputs, direction, counts, weight)
    logger.info("weight %g, loss %.4f", weight, loss)


def _losses_(
    inputs: MethodInputs, direction: Mapping[str, Tensor], counts: Mapping[str, int], weights: Sequence[float]
) -> dict[float, float]:
    """Return the loss of each multiple of `direction`; leaves the model at the last of them."""
    losses = {}
    for weight in weights:
        _add_direction_(inputs, direction, counts, weight)
        losses[weight] = finite_loss(inputs)
    return losses


def _lowest_loss(losses: Mapping[float, float]) -> tuple[float, float]:
    """Return the lowest loss and its weight; the first weight if several have that loss."""
    weight = min(losses, key=losses.__getitem__)
    return losses[weight], weight


def _listed(values: Sequence[float]) -> str:
    return ", ".join(map(str, values))


def _add_direction_(
    inputs: MethodInputs, direction: Mapping[str, Tensor], counts: Mapping[str, int], weight: float
) -> None:
    """Change the model to `base + weight * direction`.

    Statistics move by at most the mean of the task vectors, because beyond it a variance may become negative.

    Args:
        inputs: The model and the base.
        direction: A tensor by name.
        counts: Number of task vectors in each tensor of `direction` that moves.
        weight: Multiple of the direction.
    """
    tensors, parameters = movable_tensors(inputs.model), parameter_names(inputs)
    for name, count in counts.items():
        fraction = weight if name in parameters else min(weight, 1 / count)
        base = inputs.base[name]
        tensors[name].data.copy_(torch.add(base.to(wide_dtype(base)), direction[name], alpha=fraction))
