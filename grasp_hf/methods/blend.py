"""The method `blend`: coefficients that lower the loss of the mixed model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models.batches import Batch
from ..models.gradients import gradient_pass, preserved_state
from ..models.mixture import mixture_of
from ..tensors.mixing import Mix, blend_
from ..tensors.placing import overwrite_
from ..tensors.products import Scores, UnitProducts, cosine, mean_defined
from ..tensors.scratch import Scratch
from ..tensors.units import Unit, movable_tensors
from .candidates import AVERAGE, Candidate, Inputs, Mixes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST = 2.0  # coefficient


class CoefficientDescent:
    """Projected Adam on two coefficients per unit, with a step size that falls linearly to 0.

    With weights `W = B + k (T - B) + t (S - B)` the chain rule gives `dL/dk = <dL/dW, T - B>` and
    `dL/dt = <dL/dW, S - B>`. Adam divides a gradient by its own size. So a coefficient moves by about the step size,
    whatever the size of its unit. Both coefficients stay in [0, 2]. A value above 1 goes beyond what a model learned, as
    the scaled sums of task arithmetic do (arXiv:2212.04089).

    Args:
        initial: The first coefficients, shape `(units, 2)`.
        lr: Size of the first step.
        steps: Number of all steps.
    """

    def __init__(self, initial: Sequence[Sequence[float]], lr: float, steps: int) -> None:
        self._values = torch.tensor(initial, dtype=torch.float64)
        self._adam = torch.optim.Adam([self._values], lr=lr)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._adam, lambda step: max(0.0, 1 - step / steps))

    @property
    def values(self) -> list[list[float]]:
        """The coefficients, shape `(units, 2)`."""
        return self._values.tolist()

    def step(self, slopes: Sequence[Sequence[float]]) -> None:
        """Make one step down along `slopes`, the derivatives of the loss, and clamp the coefficients to [0, 2]."""
        self._values.grad = torch.tensor(slopes, dtype=torch.float64)
        self._adam.step()
        self._schedule.step()
        self._values.clamp_(0.0, LARGEST)


class _Slopes:
    """The derivatives of the loss for the two coefficients of each unit, from the gradients of one backward pass.

    Args:
        units: The units.
        target: The weights `T`.
        source: The weights `S`.
        base: The weights `B`.
        changed: Names of the tensors in which `T` and `B` differ; the others have `dL/dk = 0`.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        target: Mapping[str, Tensor],
        source: Mapping[str, Tensor],
        base: Mapping[str, Tensor],
        changed: Collection[str],
    ) -> None:
        self._target, self._source, self._base, self._changed = target, source, base, changed
        self._keep, self._take = UnitProducts(units), UnitProducts(units)

    def add(self, name: str, gradient: Tensor) -> None:
        """Take the inner products of the gradient `dL/dW` of one tensor with `S - B` and with `T - B`."""
        if name not in self._take:
            return
        base = self._base[name].to(gradient.device)
        self._take.add(name, gradient, self._source[name].to(gradient.device), base)
        if name in self._changed:
            self._keep.add(name, gradient, self._target[name].to(gradient.device), base)

    def sums(self) -> dict[str, tuple[float, float, float | None]]:
        """Return `dL/dk`, `dL/dt` and the cosine of `-dL/dW` and `S - B` for each unit; the cosine may be undefined."""
        keep, take = self._keep.sums(), self._take.sums()
        found = {}
        for unit, products in take.items():
            slopes = [own[0] if own else 0.0 for own in (keep[unit], products)]
            rise = cosine(*products) if products else None
            found[unit] = slopes[0], slopes[1], None if rise is None else -rise
        return found


def learn_coefficients(
    target: PreTrainedModel,
    source_values: Mapping[str, Tensor],
    units: Sequence[Unit],
    batches: Iterable[Batch],
    average: Mapping[str, float],
    *,
    scratch: Scratch,
    lr: float,
    steps: int,
) -> tuple[dict[str, Mix], Scores]:
    """Learn how much of the target and of the source each unit takes, by descent on the loss of the mixed model.

    This is a learned mixture of task vectors (AdaMerging, arXiv:2310.02575) that uses labels, for sources that come one at
    a time. The weights of a unit are `W = B + k (T - B) + t (S - B)`. The coefficients begin with those of the average,
    `k = 1 - average` and `t = average`. Each batch makes one step of projected Adam (see `CoefficientDescent`).

    The statistics of normalisation layers are mixed in the same proportions. They have no gradient, so the slopes leave
    them out. The gradient hook takes the inner products and frees the gradient, so no gradient is stored. `W` overwrites
    `T` in the model, and `T` and `B` are read from their files. The model is in eval mode and comes back unchanged.

    Args:
        target: The model with the weights `T`.
        source_values: The weights `S` by name.
        units: The units that may move.
        batches: Labelled batches, one for each step.
        average: How much of the source a mean of all sources so far takes, by unit.
        scratch: Temporary files; `scratch.start` holds `T` and `scratch.base` holds `B`.
        lr: Size of the first step.
        steps: Number of batches.

    Returns:
        The mix of each unit, and its score in [-1, 1]: the cosine of `-dL/dW` and `S - B`, the mean over batches. A score
        is `None` if the unit had no gradient.
    """
    tensors, start, base = movable_tensors(target), scratch.start, scratch.base
    descent = CoefficientDescent([Mix.on_line(average[unit.name]) for unit in units], lr, steps)
    scores: dict[str, list[float | None]] = {unit.name: [] for unit in units}
    changed = {name for unit in units for name in unit.tensors if not torch.equal(start[name], base[name])}
    moved: set[str] = set()

    with preserved_state(target):
        target.eval()
        try:
            for batch in batches:
                mixes = _name_mixes(units, descent)
                moving = [unit for unit in units if mixes[unit.name].moves or unit.name in moved]
                blend_(tensors, start, source_values, moving, mixes, base)
                moved |= {unit.name for unit in moving}
                slopes = _Slopes(units, start, source_values, base, changed)
                gradient_pass(target, batch, slopes.add)
                sums = slopes.sums()
                descent.step([sums[unit.name][:2] for unit in units])
                for unit in units:
                    scores[unit.name].append(sums[unit.name][2])
        finally:
            overwrite_(tensors, {name: start[name] for unit in units if unit.name in moved for name in unit.tensors})
    return _name_mixes(units, descent), {name: mean_defined(values) for name, values in scores.items()}


def _name_mixes(units: Sequence[Unit], descent: CoefficientDescent) -> dict[str, Mix]:
    return {unit.name: Mix(*values) for unit, values in zip(units, descent.values, strict=True)}


def candidates(inputs: Inputs) -> dict[str, Candidate]:
    """Return the learned coefficients and, if something validates them, the mean that they are compared with.

    If labels validate, each half of them teaches a fit, which the other half validates. The mean of the two fits is the
    candidate.
    """
    config, labels = inputs.config, inputs.labels
    fits = []
    # No comprehension: its cells would keep the source in memory after an error, as long as the exception lives.
    for teacher in labels.teachers:
        fits.append(
            learn_coefficients(
                inputs.model,
                inputs.source,
                inputs.units,
                inputs.batches(teacher),
                inputs.average,
                scratch=inputs.scratch,
                lr=config.coefficient_lr,
                steps=config.num_batches,
            )
        )
    mean = {unit: Mix.mean([mixes[unit] for mixes, _ in fits]) for unit in inputs.average}
    scores = {unit: mean_defined([own[unit] for _, own in fits]) for unit in inputs.average}
    if mixture_of(inputs.model) is not None:  # the norm of a gradient needs the gradient of whole weights
        scores = dict.fromkeys(scores)
    validated: list[Mixes] = [mixes for mixes, _ in fits] if labels.labels_validate else []
    if labels.samples.validation is not None:
        validated.append(mean)
    learned = Candidate(mean, validated, scores)
    if not validated or not config.gate:
        return {"blend": learned}
    return {"blend": learned, AVERAGE: inputs.candidate(inputs.average_mixes(), scores)}
