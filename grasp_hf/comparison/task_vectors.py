"""Merges by task vectors: arithmetic, TIES, DARE, GradFix."""

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
    all_sources,
    difference,
    each_source,
    finite_loss,
    moving,
    weight_names_of,
    wide_dtype,
)
from .soups import take_into_mean_

logger = logging.getLogger(__name__)

TENTHS = tuple(tenth / 10 for tenth in range(1, 11))


def task_arithmetic_(inputs: MethodInputs, *, weights: Sequence[float] = TENTHS) -> None:
    """Change the model to `base + w * sum_k (S_k - base)` (arXiv:2212.04089).

    Memory: one source at a time; 1 P of disk.

    Args:
        inputs: See `MethodInputs`.
        weights: `w` is the one of these with the lowest loss; the paper searches (0, 1] too.

    Raises:
        NonFiniteError: No weight gives a finite loss.
    """
    total, seen = inputs.room("direction"), Counter[str]()
    for values in each_source(inputs):
        for name, value in moving(inputs, values):
            vector = difference(value, inputs.start[name])
            _ = total[name].add_(vector) if seen[name] else total[name].copy_(vector)
            seen[name] += 1
    _search_(inputs, total, seen, weights)


def ties_(
    inputs: MethodInputs,
    *,
    density: float = 0.2,
    weights: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0),
) -> None:
    """Change the model to `base + w * TIES(S_k - base)` (arXiv:2306.01708), by `peft.utils.merge_utils.ties`.

    Each task vector keeps its largest elements, each element takes the sign with the larger total, and those that have
    it are averaged. As in PEFT and mergekit the largest are found per tensor (the paper: in the whole model), so that
    a tensor of fewer than `1 / density` elements stays that of the base.

    Memory: a few times K copies of the largest tensor; 1 P of disk.

    Args:
        inputs: See `MethodInputs`.
        density: Share of elements that each task vector keeps; 0.2 is the paper's.
        weights: `w` is the one of these with the lowest loss; the paper's is 1 where nothing can choose it.

    Raises:
        NonFiniteError: No weight gives a finite loss.
    """
    direction = inputs.room("direction")
    with all_sources(inputs) as sources:
        _combine_(inputs, sources, direction, lambda v: ties(v, torch.ones(len(v)), density), averages=True)
        brought = [name for values in sources for name, _ in moving(inputs, values)]
    _search_(inputs, direction, dict.fromkeys(brought, 1), weights)


def dare_(
    inputs: MethodInputs,
    *,
    densities: Sequence[float] = (0.1, 0.8),
    weights: Sequence[float] = TENTHS,
) -> None:
    """Change the model to `base + w * sum_k drop(S_k - base) / density` (arXiv:2311.03099), by `peft.utils.merge_utils`.

    Each element of each task vector is dropped with probability `1 - density` and the rest are scaled up.

    Memory: a few times K copies of the largest tensor; 1 P of disk.

    Args:
        inputs: See `MethodInputs`.
        densities: Share of elements that are kept: 0.1 is the rate that the paper advertises (90 % dropped), 0.8 the
            one that its authors' scripts merge with. The one with the lowest loss is chosen, as the paper tunes it.
        weights: `w` is the one of these with the lowest loss.

    Raises:
        NonFiniteError: No weight gives a finite loss.
    """
    direction = inputs.room("direction")
    with all_sources(inputs) as sources:
        counts = Counter(name for values in sources for name, _ in moving(inputs, values))

        def drop_(density: float) -> None:
            with torch.random.fork_rng():
                torch.manual_seed(inputs.seed)
                _combine_(
                    inputs, sources, direction, lambda v: dare_linear(v, torch.ones(len(v)), density), averages=False
                )

        found: dict[float, tuple[float, float]] = {}
        for density in densities:
            drop_(density)
            found[density] = _lowest(_losses_(inputs, direction, counts, weights))
        density = min(found, key=found.__getitem__)
        loss, weight = found[density]
        if not math.isfinite(loss):
            raise NonFiniteError(f"DARE has no finite loss with any density of {densities} and weight of {weights}")
        if density != densities[-1]:
            drop_(density)
    _move_(inputs, direction, counts, weight)
    logger.info("DARE: density %g, weight %g, loss %.4f", density, weight, loss)


def gradfix_(inputs: MethodInputs, *, weights: Sequence[float] = TENTHS) -> None:
    """Change the model to `base + a * mean_k (m * (S_k - base))`, GradFix (arXiv:2510.09658) with several sources.

    `m` keeps the elements of a task vector that go down: whose sign is opposite to that of the gradient of the labels'
    mean loss at the base, one pass. Masked, then averaged, as the authors merge; `a` is searched as they search it.

    Memory: one source at a time; 2 P of disk.

    Args:
        inputs: See `MethodInputs`.
        weights: `a` is the one of these with the lowest loss.

    Raises:
        NonFiniteError: No weight gives a finite loss.
    """
    gradients, direction, seen = inputs.room("gradients"), inputs.room("direction"), Counter[str]()
    weight_names = weight_names_of(inputs)
    with preserved_state(inputs.model):
        found, _ = mean_gradient(inputs.model, inputs.batches(inputs.epoch), gradients)
    for values in each_source(inputs):
        for name, value in moving(inputs, values):
            vector = difference(value, inputs.start[name])
            if name in found:
                vector.mul_(vector.sign() == -gradients[name].sign())
            elif name in weight_names:
                vector.zero_()
            take_into_mean_(direction, {name: vector}, seen)
    _search_(inputs, direction, dict.fromkeys(seen, 1), weights)


def _combine_(
    inputs: MethodInputs,
    sources: Sequence[Mapping[str, Tensor]],
    direction: Mapping[str, Tensor],
    merge: Callable[[list[Tensor]], Tensor],
    *,
    averages: bool,
) -> None:
    """Write what `merge` makes of the task vectors to `direction`; for statistics, their mean or their sum."""
    weight_names = weight_names_of(inputs)
    for name in inputs.start:
        vectors = [difference(v[name], inputs.start[name]) for v in sources if name in v]
        if not vectors or not inputs.start[name].is_floating_point():
            continue
        if name in weight_names:
            direction[name].copy_(merge(vectors))
        else:
            direction[name].copy_(torch.stack(vectors).sum(0) / (len(vectors) if averages else 1))


def _search_(
    inputs: MethodInputs, direction: Mapping[str, Tensor], counts: Mapping[str, int], weights: Sequence[float]
) -> None:
    """Move the model by the multiple of `direction` with the lowest loss; see `_move_`."""
    loss, weight = _lowest(_losses_(inputs, direction, counts, weights))
    if not math.isfinite(loss):
        raise NonFiniteError(f"none of the weights {', '.join(map(str, weights))} gives a finite loss on the labels")
    _move_(inputs, direction, counts, weight)
    logger.info("weight %g, loss %.4f", weight, loss)


def _losses_(
    inputs: MethodInputs, direction: Mapping[str, Tensor], counts: Mapping[str, int], weights: Sequence[float]
) -> dict[float, float]:
    """Return the loss for each multiple of `direction`; the model is left at the last of them."""
    losses = {}
    for weight in weights:
        _move_(inputs, direction, counts, weight)
        losses[weight] = finite_loss(inputs)
    return losses


def _lowest(losses: Mapping[float, float]) -> tuple[float, float]:
    """Return the lowest loss and its weight, the first one if several are equal."""
    weight = min(losses, key=losses.__getitem__)
    return losses[weight], weight


def _move_(inputs: MethodInputs, direction: Mapping[str, Tensor], counts: Mapping[str, int], weight: float) -> None:
    """Change the model to `base + weight * direction`, statistics by no more than the mean of `counts` task vectors."""
    tensors, weight_names = movable_tensors(inputs.model), weight_names_of(inputs)
    for name, count in counts.items():
        share = weight if name in weight_names else min(weight, 1 / count)
        start = inputs.start[name]
        tensors[name].data.copy_(torch.add(start.to(wide_dtype(start)), direction[name], alpha=share))
