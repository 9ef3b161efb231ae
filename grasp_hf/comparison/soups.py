"""Merging by means of weights: average, LM-Cocktail, greedy soup, Fisher-weighted average."""

import logging
import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from ..errors import NonFiniteError
from ..tensors.mixing import interpolate_
from ..tensors.placing import overwrite_, placed
from ..tensors.units import movable_tensors
from .fisher import LEAST_FISHER, fisher_
from .inputs import MethodInputs, finite_loss, float_tensors, open_checked_sources, stream_checked_sources

logger = logging.getLogger(__name__)


def average_(inputs: MethodInputs) -> None:
    """Change the model to the mean of the sources, a uniform soup (arXiv:2203.05482).

    Memory: one source at a time; 1 P of disk.
    """
    mean, seen = inputs.buffer("mean"), Counter[str]()
    for values in stream_checked_sources(inputs):
        add_to_mean_(mean, values, seen)
    overwrite_(movable_tensors(inputs.model), {name: mean[name] for name in seen})


def cocktail_(inputs: MethodInputs, *, temperature: float = 5.0) -> None:
    """Change the model to the mean of the sources, weighted by softmax(-loss / temperature): LM-Cocktail (arXiv:2311.13534).

    The losses are those on the labels. A source without a finite loss has the weight 0. A tensor that some sources lack
    is the mean of the others.

    Memory: one source at a time; 1 P of disk.

    Args:
        inputs: The model, the sources and the labels.
        temperature: 5 is the value of the paper. With it, losses of 0 and 1 have weights of 0.55 and 0.45.

    Raises:
        NonFiniteError: No source has a finite loss.
    """
    tensors, mean = movable_tensors(inputs.model), inputs.buffer("mean")
    totals: dict[str, float] = {}  # the logarithm of the sum of weights so far, for each tensor
    for values in stream_checked_sources(inputs):
        with placed(tensors, values, inputs.base):
            weight = -finite_loss(inputs) / temperature
        if not math.isfinite(weight):
            continue
        for name, value in values.items():
            before = totals.get(name, -math.inf)
            totals[name] = float(np.logaddexp(before, weight))
            interpolate_(mean[name], mean[name], value, math.exp(weight - totals[name]))
    if not totals:
        raise NonFiniteError("no source has a finite loss on the labels")
    overwrite_(tensors, {name: mean[name] for name in totals})


def greedy_soup_(inputs: MethodInputs) -> None:
    """Change the model to a greedy soup (arXiv:2203.05482).

    The sources join the mean in the order of their losses, the lowest first. A source stays unless the loss rises. The
    paper sorts and chooses by held-out accuracy. With few labels many accuracies are equal, so this uses the loss.

    Memory: the sources stay mapped, outside private memory; 1 P of disk.

    Raises:
        NonFiniteError: No source has a finite loss.
    """
    tensors, mean, seen = movable_tensors(inputs.model), inputs.buffer("mean"), Counter[str]()
    with open_checked_sources(inputs) as sources:
        losses = []
        for values in sources:
            with placed(tensors, values, inputs.base):
                losses.append(finite_loss(inputs))
        order = sorted(range(len(sources)), key=losses.__getitem__)
        if not math.isfinite(losses[order[0]]):
            raise NonFiniteError(f"none of the {len(sources)} sources has a finite loss on the labels")
        best = math.inf
        for index in order:
            values = sources[index]
            for name, value in values.items():
                interpolate_(tensors[name], mean[name], value, 1 / (seen[name] + 1))
            loss = finite_loss(inputs)
            if loss <= best:
                best = loss
                add_to_mean_(mean, values, seen)
                logger.info("greedy soup: kept source %d, loss %.4f", index + 1, loss)
            else:
                overwrite_(tensors, {name: mean[name] if seen[name] else inputs.base[name] for name in values})


def fisher_average_(inputs: MethodInputs) -> None:
    """Change the model to the mean of the sources, each element weighted by its Fisher information (arXiv:2111.09832).

    One pass over the labelled inputs gives the Fisher information of each source, see `fisher_`. Elements without any
    (statistics, unused tokens) become the plain mean.

    Memory: one source at a time, and the batches of one pass; 3 P of disk.

    Raises:
        DataError: The labels are not classes.
        NonFiniteError: A loss or the Fisher information of a source is not finite.
    """
    tensors, batches = movable_tensors(inputs.model), list(inputs.batches(inputs.batches_per_epoch))
    weighted_sum, total, fisher = (inputs.buffer(name) for name in ("weighted", "total", "fisher"))
    seen = set[str]()
    for index, values in enumerate(stream_checked_sources(inputs)):
        source = dict(float_tensors(inputs, values))
        try:
            with placed(tensors, values, inputs.base):
                fisher_(fisher, inputs.model, batches, source, seed=inputs.seed)
        except NonFiniteError as error:
            raise NonFiniteError(f"source {index + 1}: {error}") from error
        for name, value in source.items():
            fisher[name].add_(LEAST_FISHER)
            if name not in seen:
                weighted_sum[name].zero_()
                total[name].zero_()
            weighted_sum[name].addcmul_(fisher[name], value.to(fisher[name].dtype))
            total[name].add_(fisher[name])
            seen.add(name)
    for name in seen:
        tensors[name].data.copy_(weighted_sum[name].div_(total[name]))


def add_to_mean_(mean: Mapping[str, Tensor], values: Mapping[str, Tensor], seen: Counter[str]) -> None:
    """Change `mean`, over `seen[name]` values of each tensor, to the mean that includes `values`, and count them."""
    for name, value in values.items():
        seen[name] += 1
        interpolate_(mean[name], mean[name], value, 1 / seen[name])
