"""The method `blend`: coefficients that lower the loss of the mixed model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import DataError
from ..models.batches import Batch
from ..models.gradients import gradient_pass, preserved_state
from ..tensors.mixing import Mix, blend_
from ..tensors.placing import overwrite_
from ..tensors.products import Scores, UnitProducts, cosine, mean_defined
from ..tensors.scratch import Scratch
from ..tensors.units import Unit, movable_tensors
from .candidates import AVERAGE, Candidate, Inputs, Mixes
from .fisher import RunningFisher, running_fisher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

LARGEST = 2.0  # coefficient


class CoefficientDescent:
    """Projected Adam on two coefficients per unit, with a step size that falls linearly to 0.

    With weights `W = B + k (T - B) + t (S - B)` the chain rule gives `dL/dk = <dL/dW, T - B>` and
    `dL/dt = <dL/dW, S - B>`. Adam divides by the gradient's own size, so that a coefficient moves by about the step size
    per step whatever the size of its unit. Both stay in [0, 2]: more than 1 goes beyond what a model learned, as the scaled
    sums of task arithmetic do (arXiv:2212.04089).

    Args:
        initial: Shape `(units, 2)`.
        lr: Size of the first step.
        steps: How many there will be.
    """

    def __init__(self, initial: Sequence[Sequence[float]], lr: float, steps: int) -> None:
        self._values = torch.tensor(initial, dtype=torch.float64)
        self._adam = torch.optim.Adam([self._values], lr=lr)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._adam, lambda step: max(0.0, 1 - step / steps))

    @property
    def values(self) -> list[list[float]]:
        """The coefficients, two per unit."""
        return self._values.tolist()

    def step(self, slopes: Sequence[Sequence[float]]) -> None:
        """Go down along `slopes`, the derivative of the loss for each coefficient, and back into [0, 2]."""
        self._values.grad = torch.tensor(slopes, dtype=torch.float64)
        self._adam.step()
        self._schedule.step()
        self._values.clamp_(0.0, LARGEST)


def learned_coefficients(
    target: PreTrainedModel,
    source_values: Mapping[str, Tensor],
    units: Sequence[Unit],
    batches: Iterable[Batch],
    shares: Mapping[str, float],
    *,
    scratch: Scratch,
    lr: float,
    steps: int,
) -> tuple[dict[str, Mix], Scores]:
    """Learn how much of the target and how much of the source goes in, by descent on the loss of the mixed model.

    This is a learned mixture of task vectors (AdaMerging, arXiv:2310.02575, with labels) for sources that come one at a
    time. The weights of a unit are `W = B + k (T - B) + t (S - B)`, at first those of the average,
    `k, t = 1 - share, share`; after each batch `k` and `t` make one step of projected Adam, see `CoefficientDescent`.
    Statistics of normalisation layers are mixed with them but have no gradient, so that what they add to the slopes is
    left out. Inner products are taken in the gradient hook and the gradient freed, so no gradient is stored; `W` is
    written where `T` was, and `T` and `B` are read from their files. The model is in eval mode and comes back unchanged.

    Returns:
        The mix of each unit, and scores in [-1, 1]: the cosine between the source's task vector and the way down,
        `<-dL/dW, S - B>` normalised, the mean over batches; `None` where a unit had no gradient.
    """
    tensors, start, base = movable_tensors(target), scratch.start, scratch.base
    descent = CoefficientDescent([Mix.on_line(shares[unit.name]) for unit in units], lr, steps)
    scores: dict[str, list[float | None]] = {unit.name: [] for unit in units}
    moved: set[str] = set()
    differing = {name for unit in units for name in unit.tensors if not torch.equal(start[name], base[name])}

    def mixes() -> dict[str, Mix]:
        return {name: Mix(*values) for name, values in zip(scores, descent.values, strict=True)}

    with preserved_state(target):
        target.eval()
        try:
            for batch in batches:
                now = mixes()
                moving = [unit for unit in units if now[unit.name].moves or unit.name in moved]
                blend_(tensors, start, source_values, moving, now, base)
                moved |= {unit.name for unit in moving}
                of_target, of_source = UnitProducts(units), UnitProducts(units)

                def meet(
                    name: str, gradient: Tensor, kept: UnitProducts = of_target, taken: UnitProducts = of_source
                ) -> None:
                    if name in taken:
                        device = gradient.device
                        taken.add(name, gradient, source_values[name].to(device), base[name].to(device))
                        if name in differing:
                            kept.add(name, gradient, start[name].to(device), base[name].to(device))

                gradient_pass(target, batch, meet)
                kept, taken = of_target.sums(), of_source.sums()
                descent.step([[own[0] if own else 0.0 for own in (kept[name], taken[name])] for name in scores])
                for name, sums in taken.items():
                    found = cosine(*sums) if sums else None
                    scores[name].append(None if found is None else -found)
        finally:
            overwrite_(tensors, {n: start[n] for unit in units if unit.name in moved for n in unit.tensors})
    return mixes(), {name: mean_defined(values) for name, values in scores.items()}


def candidates(inputs: Inputs) -> dict[str, Candidate]:
    """Return the learned coefficients and, where something validates them, the means that they are compared with.

    The labels teach in halves where labels validate: the mean of the two fits is what may be merged, and each fit is
    validated on the labels that it has not seen.
    """
    config, labels = inputs.config, inputs.labels
    fits = []
    for (
        teacher
    ) in labels.teachers:  # no comprehension: the frames of an exception would keep its cells, and the source
        fits.append(
            learned_coefficients(
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
    validated: list[Mixes] = [mixes for mixes, _ in fits] if labels.labels_validate else []
    if labels.samples.validation is not None:
        validated.append(mean)
    learned = Candidate(mean, validated, scores)
    if not validated or not config.gate:
        return {"blend": learned}
    found = {"blend": learned, AVERAGE: inputs.candidate(inputs.average_mixes(), scores)}
    fisher = running_fisher(inputs.scratch)
    if (weighted := _fisher_mixes(inputs, fisher)) is None:
        return found
    found["fisher"] = inputs.candidate(weighted, scores, fisher.fractions)
    return {name: replace(candidate, when_merged=fisher.take) for name, candidate in found.items()}


def _fisher_mixes(inputs: Inputs, fisher: RunningFisher) -> Mixes | None:
    """Return the mixes of a mean weighted by Fisher information (arXiv:2111.09832).

    Labels do not teach this mean, only their inputs do, so all labels may validate it. There is none (`None`) where the
    plain mean takes the whole source, or where the labels are not classes.
    """
    if all(fraction == 1 for fraction in inputs.average.values()):
        return None
    batches = [*inputs.labels.batches(inputs.labels.samples.train, inputs.seed)]
    try:
        return fisher.measure(
            inputs.model, inputs.source, inputs.scratch.start, inputs.units, inputs.average, batches, seed=inputs.seed
        )
    except DataError as error:
        logger.debug("%s: no average by Fisher information: %s", inputs.name, error)
        return None
