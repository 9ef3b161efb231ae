"""What the user's data says of a source: the cosine of gradients, or the coefficients that lower the loss."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from .alignment import PUBLISHED_EPSILON, CoefficientDescent, cosine, inner_product, mean_defined
from .batches import Batch, Collator, check_dataset, keeping_model_columns, sample_batches
from .config import GraspConfig
from .errors import NonFiniteError
from .gradients import gradient_pass, preserved_state
from .matching import Unit, movable_tensors, partition
from .transfer import interpolate, overwrite_, placed

Scores = dict[str, float | None]


class UnitProducts:
    """Inner products `<a, b>`, `<a, a>` and `<b, b>` summed over the tensors of each unit."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._unit_of = {name: unit.name for unit in units for name in unit.tensors}
        self._products: dict[str, dict[str, Tensor]] = {unit.name: {} for unit in units}

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._unit_of

    def add(self, tensor: str, a: Tensor, b: Tensor) -> None:
        """Take in the vectors of one tensor."""
        products = torch.stack([inner_product(a, b), inner_product(a, a), inner_product(b, b)])
        self._products[self._unit_of[tensor]][tensor] = products

    def sums(self) -> dict[str, tuple[float, float, float] | None]:
        """Return the three sums per unit; `None` for a unit of which no tensor was taken in.

        Raises:
            NonFiniteError: A product is NaN or infinite, so a gradient is.
        """
        found: dict[str, tuple[float, float, float] | None] = {}
        for unit, products in self._products.items():
            if not products:
                found[unit] = None
                continue
            rows = torch.stack(list(products.values())).tolist()
            for tensor, row in zip(products, rows, strict=True):
                if not all(map(math.isfinite, row)):
                    raise NonFiniteError(f"the gradient of {tensor} is NaN or infinite; expected finite numbers")
            found[unit] = (sum(r[0] for r in rows), sum(r[1] for r in rows), sum(r[2] for r in rows))
        return found


def unit_cosines(
    target: PreTrainedModel,
    source_values: Mapping[str, Tensor],
    units: Sequence[Unit],
    batches: Iterable[Batch],
    accelerator: Accelerator,
    *,
    seed: int,
    published: bool = False,
) -> Scores:
    """Return the gradient cosine of target and source per unit, the mean over `batches`; `None` where undefined.

    For each batch the target's gradient is stored (one set), the source's values take the place of the target's, and
    each of the source's gradients meets the stored one and both are freed. The mean of the cosines of single batches
    needs no second gradient set, and is 1 for a model compared with itself. It is not the cosine of the summed
    gradients: the noise of a batch is shared by both models and pulls it up.

    With `published` the target is in train mode, its dropout drawn from `seed`, and its batch statistics change; the
    denominator has 1e-8 added.
    """
    tensors = movable_tensors(target)
    scores: dict[str, list[float | None]] = {unit.name: [] for unit in units}
    epsilon = PUBLISHED_EPSILON if published else 0.0
    with preserved_state(target), torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in batches:
            stored: dict[str, Tensor] = {}
            target.train(published)
            gradient_pass(target, batch, accelerator, stored.__setitem__)
            products = UnitProducts(units)

            def meet(name: str, gradient: Tensor, products: UnitProducts = products, stored: dict = stored) -> None:
                other = stored.pop(name, None)
                if other is not None and name in products:
                    products.add(name, gradient, other)

            target.eval()
            with placed(tensors, source_values):
                gradient_pass(target, batch, accelerator, meet)
            for name, sums in products.sums().items():
                scores[name].append(None if sums is None else cosine(*sums, epsilon=epsilon))
    return {name: mean_defined(values) for name, values in scores.items()}


def learned_coefficients(
    target: PreTrainedModel,
    source_values: Mapping[str, Tensor],
    units: Sequence[Unit],
    batches: Iterable[Batch],
    accelerator: Accelerator,
    *,
    lr: float,
) -> tuple[dict[str, float], Scores]:
    """Learn how far each unit should move towards the source, by descent on the loss of the blended model.

    The weights are `W_u = T_u + c_u (S_u - T_u)`, with statistics blended alike; after each batch every `c_u` makes
    one step of projected Adam along `dL/dc_u = <dL/dW_u, S_u - T_u>`. The inner product is taken in the gradient hook
    and the gradient freed, so no gradient is stored. The model is in eval mode and comes back unchanged.

    Returns:
        The coefficients in [0, 1] per unit, and scores in [-1, 1]: the cosine between the way to the source and the
        way down, `<-dL/dW_u, S_u - T_u>` normalised, the mean over batches; `None` where a unit had no gradient.
    """
    tensors = movable_tensors(target)
    descent = CoefficientDescent(len(units), lr)
    scores: dict[str, list[float | None]] = {unit.name: [] for unit in units}
    start = {name: tensors[name].data for unit in units for name in unit.tensors}
    with preserved_state(target):
        target.eval()
        for batch in batches:
            coefficients = dict(zip(scores, descent.values, strict=True))
            products = UnitProducts(units)

            def meet(name: str, gradient: Tensor, products: UnitProducts = products) -> None:
                if name in products:
                    way = source_values[name].to(gradient.device, gradient.dtype) - start[name]
                    products.add(name, -gradient, way)

            with placed(tensors, blended(start, source_values, units, coefficients)):
                gradient_pass(target, batch, accelerator, meet)
            sums = products.sums()
            descent.step([-row[0] if row else 0.0 for row in sums.values()])
            for name, row in sums.items():
                scores[name].append(cosine(*row) if row else None)
    coefficients = dict(zip(scores, descent.values, strict=True))
    return coefficients, {name: mean_defined(values) for name, values in scores.items()}


def blended(
    start: Mapping[str, Tensor],
    source_values: Mapping[str, Tensor],
    units: Sequence[Unit],
    coefficients: Mapping[str, float],
) -> dict[str, Tensor]:
    """Return the tensors of all units, each as far from `start` towards the source as its unit's coefficient says."""
    return {
        name: interpolate(start[name], source_values[name], coefficients[unit.name])
        for unit in units
        for name in unit.tensors
    }


def gradient_alignment(
    source: PreTrainedModel,
    target: PreTrainedModel,
    dataset: Any,
    *,
    config: GraspConfig | None = None,
    data_collator: Collator | None = None,
) -> Scores:
    """Return the cosine between the gradients of two models on the same data, per unit; nothing is changed.

    Args:
        source: One model.
        target: Another of the same class and shapes.
        dataset: Labelled samples, as for `transformers.Trainer`.
        config: Says unit, number and size of batches, and seed; `GraspConfig.paper()` measures as published.
        data_collator: Makes batches from samples; `transformers.default_data_collator` where left out.

    Returns:
        Unit name -> cosine in [-1, 1], the mean over batches; `None` where a gradient is missing or zero, so that
        the cosine is undefined.

    Example:
        >>> gradient_alignment(model, model, dataset)["classifier"]  # doctest: +SKIP
        1.0
    """
    config = config or GraspConfig()
    check_dataset(dataset, "dataset")
    accelerator = Accelerator()
    collator = keeping_model_columns(target, data_collator)
    batches = sample_batches(dataset, collator, accelerator, config, seed=config.seed)
    with preserved_state(target):
        target.to(accelerator.device)
        tensors = movable_tensors(target)
        statistics = {name: t.clone() for name, t in tensors.items() if not isinstance(t, torch.nn.Parameter)}
        try:
            units = partition(target, config.unit)
            return unit_cosines(
                target,
                movable_tensors(source),
                units,
                batches,
                accelerator,
                seed=config.seed,
                published=config.published,
            )
        finally:
            overwrite_(tensors, statistics)
