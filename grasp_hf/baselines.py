"""The existing ways to make one model of many that `compare` runs beside ours, on the same labels.

Each is its paper's rule on the tensors that a source brings. Three things are the same in all of them:

- A source that brings only some tensors (an adapter) equals the base elsewhere: its task vector is 0 there, and a mean
  counts a tensor once per source that brings it.
- Statistics of normalisation layers are no weights, and no multiple of them beyond the sources is a statistic (a
  variance would become negative): where weights move by coefficients that sum to more than 1, statistics move by those
  coefficients divided by their sum. A rule for single elements (trimming, dropping, masking) leaves them alone.
- Integer tensors, such as the batch count of a BatchNorm, have no direction: those of the base stay, except in a mean,
  which follows `interpolate_`.

All is computed in float32 or better, tensor by tensor. Memory is given in models (P), beside the P of the model itself.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from peft.utils.merge_utils import dare_linear, ties
from torch import Tensor

from .errors import NonFiniteError
from .methods.fisher import LEAST_FISHER, fisher_
from .models.gradients import mean_gradient, preserved_state
from .tensors.mixing import interpolate_
from .tensors.placing import overwrite_, placed
from .tensors.units import movable_tensors
from .trial import (
    Trial,
    all_sources,
    difference,
    each_source,
    finite_loss,
    moving,
    weight_names_of,
    wide_dtype,
)

logger = logging.getLogger(__name__)

TENTHS = tuple(tenth / 10 for tenth in range(1, 11))


def average_(trial: Trial) -> None:
    """Change the model to the mean of the sources, a uniform soup (arXiv:2203.05482).

    Memory: one source at a time; 1 P of disk.
    """
    mean, seen = trial.room("mean"), Counter[str]()
    for values in each_source(trial):
        _take_into_mean_(mean, values, seen)
    overwrite_(movable_tensors(trial.model), {name: mean[name] for name in seen})


def greedy_soup_(trial: Trial) -> None:
    """Change the model to a greedy soup (arXiv:2203.05482): sources join the mean, best first, if the loss does not rise.

    The paper sorts and judges by held-out accuracy; a few labels have too few values of it, so the loss takes its place.

    Memory: the sources stay mapped, in no private memory; 1 P of disk.

    Raises:
        NonFiniteError: No source has a finite loss.
    """
    tensors, mean, seen = movable_tensors(trial.model), trial.room("mean"), Counter[str]()
    with all_sources(trial) as sources:
        losses = []
        for values in sources:
            with placed(tensors, values, trial.start):
                losses.append(finite_loss(trial))
        order = sorted(range(len(sources)), key=losses.__getitem__)
        if not math.isfinite(losses[order[0]]):
            raise NonFiniteError(f"none of the {len(sources)} sources has a finite loss on the labels")
        best = math.inf
        for index in order:
            values = sources[index]
            for name, value in values.items():
                interpolate_(tensors[name], mean[name], value, 1 / (seen[name] + 1))
            loss = finite_loss(trial)
            if loss <= best:
                best = loss
                _take_into_mean_(mean, values, seen)
                logger.info("greedy soup: took source %d, loss %.4f", index + 1, loss)
            else:
                overwrite_(tensors, {name: mean[name] if seen[name] else trial.start[name] for name in values})


def task_arithmetic_(trial: Trial, *, weights: Sequence[float] = TENTHS) -> None:
    """Change the model to `base + w * sum_k (S_k - base)` (arXiv:2212.04089).

    Memory: one source at a time; 1 P of disk.

    Args:
        trial: See `Trial`.
        weights: `w` is the one of these with the lowest loss; the paper searches (0, 1] too.

    Raises:
        NonFiniteError: No weight gives a finite loss.
    """
    total, seen = trial.room("direction"), Counter[str]()
    for values in each_source(trial):
        for name, value in moving(trial, values):
            vector = difference(value, trial.start[name])
            _ = total[name].add_(vector) if seen[name] else total[name].copy_(vector)
            seen[name] += 1
    _search_(trial, total, seen, weights)


def ties_(
    trial: Trial,
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
        trial: See `Trial`.
        density: Share of elements that each task vector keeps; 0.2 is the paper's.
        weights: `w` is the one of these with the lowest loss; the paper's is 1 where nothing can choose it.

    Raises:
        NonFiniteError: No weight gives a finite loss.
    """
    direction = trial.room("direction")
    with all_sources(trial) as sources:
        _combine_(trial, sources, direction, lambda v: ties(v, torch.ones(len(v)), density), averages=True)
        brought = [name for values in sources for name, _ in moving(trial, values)]
    _search_(trial, direction, dict.fromkeys(brought, 1), weights)


def dare_(
    trial: Trial,
    *,
    densities: Sequence[float] = (0.1, 0.8),
    weights: Sequence[float] = TENTHS,
) -> None:
    """Change the model to `base + w * sum_k drop(S_k - base) / density` (arXiv:2311.03099), by `peft.utils.merge_utils`.

    Each element of each task vector is dropped with probability `1 - density` and the rest are scaled up.

    Memory: a few times K copies of the largest tensor; 1 P of disk.

    Args:
        trial: See `Trial`.
        densities: Share of elements that are kept: 0.1 is the rate that the paper advertises (90 % dropped), 0.8 the
            one that its authors' scripts merge with. The one with the lowest loss is chosen, as the paper tunes it.
        weights: `w` is the one of these with the lowest loss.

    Raises:
        NonFiniteError: No weight gives a finite loss.
    """
    direction = trial.room("direction")
    with all_sources(trial) as sources:
        counts = Counter(name for values in sources for name, _ in moving(trial, values))

        def drop_(density: float) -> None:
            with torch.random.fork_rng():
                torch.manual_seed(trial.seed)
                _combine_(
                    trial, sources, direction, lambda v: dare_linear(v, torch.ones(len(v)), density), averages=False
                )

        found: dict[float, tuple[float, float]] = {}
        for density in densities:
            drop_(density)
            found[density] = _lowest(_losses_(trial, direction, counts, weights))
        density = min(found, key=found.__getitem__)
        loss, weight = found[density]
        if not math.isfinite(loss):
            raise NonFiniteError(f"DARE has no finite loss with any density of {densities} and weight of {weights}")
        if density != densities[-1]:
            drop_(density)
    _move_(trial, direction, counts, weight)
    logger.info("DARE: density %g, weight %g, loss %.4f", density, weight, loss)


def fisher_average_(trial: Trial) -> None:
    """Change the model to the mean of the sources, each element weighted by its Fisher information (arXiv:2111.09832).

    The Fisher of each source at the labelled inputs, one pass, see `fisher_`. What has none (statistics, unused tokens)
    becomes the plain mean.

    Memory: one source at a time, the batches of one pass; 3 P of disk.

    Raises:
        DataError: The labels are no classes.
        NonFiniteError: A loss or the Fisher of a source is not finite.
    """
    tensors, batches = movable_tensors(trial.model), list(trial.batches(trial.epoch))
    weighted, total, fisher, seen = trial.room("weighted"), trial.room("total"), trial.room("fisher"), set[str]()
    for index, values in enumerate(each_source(trial)):
        brought = dict(moving(trial, values))
        try:
            with placed(tensors, values, trial.start):
                fisher_(fisher, trial.model, batches, brought, seed=trial.seed)
        except NonFiniteError as error:
            raise NonFiniteError(f"source {index + 1}: {error}") from error
        for name, value in brought.items():
            fisher[name].add_(LEAST_FISHER)
            if name not in seen:
                weighted[name].zero_()
                total[name].zero_()
            weighted[name].addcmul_(fisher[name], value.to(fisher[name].dtype))
            total[name].add_(fisher[name])
            seen.add(name)
    for name in seen:
        tensors[name].data.copy_(weighted[name].div_(total[name]))


def gradfix_(trial: Trial, *, weights: Sequence[float] = TENTHS) -> None:
    """Change the model to `base + a * mean_k (m * (S_k - base))`, GradFix (arXiv:2510.09658) with several sources.

    `m` keeps the elements of a task vector that go down: whose sign is opposite to that of the gradient of the labels'
    mean loss at the base, one pass. Masked, then averaged, as the authors merge; `a` is searched as they search it.

    Memory: one source at a time; 2 P of disk.

    Args:
        trial: See `Trial`.
        weights: `a` is the one of these with the lowest loss.

    Raises:
        NonFiniteError: No weight gives a finite loss.
    """
    gradients, direction, seen = trial.room("gradients"), trial.room("direction"), Counter[str]()
    weight_names = weight_names_of(trial)
    with preserved_state(trial.model):
        found, _ = mean_gradient(trial.model, trial.batches(trial.epoch), gradients)
    for values in each_source(trial):
        for name, value in moving(trial, values):
            vector = difference(value, trial.start[name])
            if name in found:
                vector.mul_(vector.sign() == -gradients[name].sign())
            elif name in weight_names:
                vector.zero_()
            _take_into_mean_(direction, {name: vector}, seen)
    _search_(trial, direction, dict.fromkeys(seen, 1), weights)


def _combine_(
    trial: Trial,
    sources: Sequence[Mapping[str, Tensor]],
    direction: Mapping[str, Tensor],
    merge: Callable[[list[Tensor]], Tensor],
    *,
    averages: bool,
) -> None:
    """Write what `merge` makes of the task vectors to `direction`; for statistics, their mean or their sum."""
    weight_names = weight_names_of(trial)
    for name in trial.start:
        vectors = [difference(v[name], trial.start[name]) for v in sources if name in v]
        if not vectors or not trial.start[name].is_floating_point():
            continue
        if name in weight_names:
            direction[name].copy_(merge(vectors))
        else:
            direction[name].copy_(torch.stack(vectors).sum(0) / (len(vectors) if averages else 1))


def _search_(
    trial: Trial, direction: Mapping[str, Tensor], counts: Mapping[str, int], weights: Sequence[float]
) -> None:
    """Move the model by the multiple of `direction` with the lowest loss; see `_move_`."""
    loss, weight = _lowest(_losses_(trial, direction, counts, weights))
    if not math.isfinite(loss):
        raise NonFiniteError(f"none of the weights {', '.join(map(str, weights))} gives a finite loss on the labels")
    _move_(trial, direction, counts, weight)
    logger.info("weight %g, loss %.4f", weight, loss)


def _losses_(
    trial: Trial, direction: Mapping[str, Tensor], counts: Mapping[str, int], weights: Sequence[float]
) -> dict[float, float]:
    """Return the loss for each multiple of `direction`; the model is left at the last of them."""
    losses = {}
    for weight in weights:
        _move_(trial, direction, counts, weight)
        losses[weight] = finite_loss(trial)
    return losses


def _lowest(losses: Mapping[float, float]) -> tuple[float, float]:
    """Return the lowest loss and its weight, the first one if several are equal."""
    weight = min(losses, key=losses.__getitem__)
    return losses[weight], weight


def _move_(trial: Trial, direction: Mapping[str, Tensor], counts: Mapping[str, int], weight: float) -> None:
    """Change the model to `base + weight * direction`, statistics by no more than the mean of `counts` task vectors."""
    tensors, weight_names = movable_tensors(trial.model), weight_names_of(trial)
    for name, count in counts.items():
        share = weight if name in weight_names else min(weight, 1 / count)
        start = trial.start[name]
        tensors[name].data.copy_(torch.add(start.to(wide_dtype(start)), direction[name], alpha=share))


def _take_into_mean_(mean: Mapping[str, Tensor], values: Mapping[str, Tensor], seen: Counter[str]) -> None:
    """Change each tensor of `mean` from the mean of the `seen` ones to that with `values`, and count them."""
    for name, value in values.items():
        seen[name] += 1
        interpolate_(mean[name], mean[name], value, 1 / seen[name])
