"""Merges by means: average, greedy soup, Fisher-weighted average."""

import logging
import math
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from ..errors import NonFiniteError
from ..methods.fisher import LEAST_FISHER, fisher_
from ..tensors.mixing import interpolate_
from ..tensors.placing import overwrite_, placed
from ..tensors.units import movable_tensors
from .inputs import MethodInputs, all_sources, each_source, finite_loss, moving

logger = logging.getLogger(__name__)


def average_(inputs: MethodInputs) -> None:
    """Change the model to the mean of the sources, a uniform soup (arXiv:2203.05482).

    Memory: one source at a time; 1 P of disk.
    """
    mean, seen = inputs.room("mean"), Counter[str]()
    for values in each_source(inputs):
        take_into_mean_(mean, values, seen)
    overwrite_(movable_tensors(inputs.model), {name: mean[name] for name in seen})


def greedy_soup_(inputs: MethodInputs) -> None:
    """Change the model to a greedy soup (arXiv:2203.05482): sources join the mean, best first, if the loss does not rise.

    The paper sorts and judges by held-out accuracy; a few labels have too few values of it, so the loss takes its place.

    Memory: the sources stay mapped, in no private memory; 1 P of disk.

    Raises:
        NonFiniteError: No source has a finite loss.
    """
    tensors, mean, seen = movable_tensors(inputs.model), inputs.room("mean"), Counter[str]()
    with all_sources(inputs) as sources:
        losses = []
        for values in sources:
            with placed(tensors, values, inputs.start):
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
                take_into_mean_(mean, values, seen)
                logger.info("greedy soup: took source %d, loss %.4f", index + 1, loss)
            else:
                overwrite_(tensors, {name: mean[name] if seen[name] else inputs.start[name] for name in values})


def fisher_average_(inputs: MethodInputs) -> None:
    """Change the model to the mean of the sources, each element weighted by its Fisher information (arXiv:2111.09832).

    The Fisher of each source at the labelled inputs, one pass, see `fisher_`. What has none (statistics, unused tokens)
    becomes the plain mean.

    Memory: one source at a time, the batches of one pass; 3 P of disk.

    Raises:
        DataError: The labels are no classes.
        NonFiniteError: A loss or the Fisher of a source is not finite.
    """
    tensors, batches = movable_tensors(inputs.model), list(inputs.batches(inputs.epoch))
    weighted, total, fisher, seen = inputs.room("weighted"), inputs.room("total"), inputs.room("fisher"), set[str]()
    for index, values in enumerate(each_source(inputs)):
        brought = dict(moving(inputs, values))
        try:
            with placed(tensors, values, inputs.start):
                fisher_(fisher, inputs.model, batches, brought, seed=inputs.seed)
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


def take_into_mean_(mean: Mapping[str, Tensor], values: Mapping[str, Tensor], seen: Counter[str]) -> None:
    """Change each tensor of `mean` from the mean of the `seen` ones to that with `values`, and count them."""
    for name, value in values.items():
        seen[name] += 1
        interpolate_(mean[name], mean[name], value, 1 / seen[name])
