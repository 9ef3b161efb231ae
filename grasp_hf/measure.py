"""What the user's data says of a source: the cosine of gradients, or the coefficients that lower the loss."""

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from .alignment import PUBLISHED_EPSILON, CoefficientDescent, cosine, inner_products, mean_defined
from .batches import Batch, Collator, check_dataset, keeping_model_columns, sample_batches
from .config import GraspConfig
from .errors import IncompatibleSourceError, NonFiniteError
from .gradients import gradient_pass, preserved_state
from .mapped import MappedTensors
from .matching import Unit, movable_tensors, partition, tensor_problems
from .transfer import interpolate_, overwrite_, placed

Scores = dict[str, float | None]


class Scratch:
    """The files of one step: the target as it was at its start, and room for one set of its gradients.

    Args:
        directory: Where the files are made.
        tensors: The target's tensors, copied to a file now.

    Attributes:
        directory: See above.
        start: The target's tensors as they were.
    """

    def __init__(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        self.directory = directory
        self.start = MappedTensors.copy_of(directory / "start", tensors)
        self._parameters = {name: t for name, t in tensors.items() if isinstance(t, torch.nn.Parameter)}

    @cached_property
    def gradients(self) -> MappedTensors:
        """Room for the gradient of each parameter; the file is made when it is first needed."""
        return MappedTensors(self.directory / "gradients", self._parameters)


class UnitProducts:
    """Inner products `<a, b>`, `<a, a>` and `<b, b>` summed over the tensors of each unit."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._unit_of = {name: unit.name for unit in units for name in unit.tensors}
        self._products: dict[str, dict[str, Tensor]] = {unit.name: {} for unit in units}

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._unit_of

    def add(self, tensor: str, a: Tensor, b: Tensor) -> None:
        """Take in the vectors of one tensor."""
        self._products[self._unit_of[tensor]][tensor] = inner_products(a, b)

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
    *,
    scratch: Scratch,
    seed: int,
    published: bool = False,
) -> Scores:
    """Return the gradient cosine of target and source per unit, the mean over `batches`; `None` where undefined.

    For each batch the target's gradient is stored in a file (one set, no private memory), the source's values take the
    place of the target's, and each of the source's gradients meets the stored one and is freed. The mean of the cosines
    of single batches needs no second gradient set, and is 1 for a model compared with itself. It is not the cosine of
    the summed gradients: the noise of a batch is shared by both models and pulls it up.

    With `published` the target is in train mode, its dropout drawn from `seed`, and its batch statistics change; the
    denominator has 1e-8 added.
    """
    tensors = movable_tensors(target)
    scores: dict[str, list[float | None]] = {unit.name: [] for unit in units}
    epsilon = PUBLISHED_EPSILON if published else 0.0
    with preserved_state(target), torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in batches:
            stored: set[str] = set()
            products = UnitProducts(units)

            def store(name: str, gradient: Tensor, stored: set[str] = stored) -> None:
                scratch.gradients[name].copy_(gradient)
                stored.add(name)

            def meet(name: str, gradient: Tensor, products: UnitProducts = products, stored: set = stored) -> None:
                if name in stored and name in products:
                    products.add(name, gradient, scratch.gradients[name].to(gradient.device))

            target.train(published)
            gradient_pass(target, batch, store)
            target.eval()
            with placed(tensors, source_values, scratch.start):
                gradient_pass(target, batch, meet)
            for name, sums in products.sums().items():
                scores[name].append(None if sums is None else cosine(*sums, epsilon=epsilon))
    return {name: mean_defined(values) for name, values in scores.items()}


def learned_coefficients(
    target: PreTrainedModel,
    source_values: Mapping[str, Tensor],
    units: Sequence[Unit],
    batches: Iterable[Batch],
    *,
    scratch: Scratch,
    lr: float,
) -> tuple[dict[str, float], Scores]:
    """Learn how far each unit should move towards the source, by descent on the loss of the blended model.

    The weights are `W_u = T_u + c_u (S_u - T_u)`; after each batch every `c_u` makes one step of projected Adam along
    `<dL/dW_u, S_u - T_u>`, which is `dL/dc_u` through the parameters. Statistics of normalisation layers are blended
    with them but have no gradient, so that what they add to the slope is left out. The inner product is taken in the gradient hook
    and the gradient freed, so no gradient is stored; `W` is written where `T` was, and `T` is read from its file. The
    model is in eval mode and comes back unchanged.

    Returns:
        The coefficients in [0, 1] per unit, and scores in [-1, 1]: the cosine between the way to the source and the
        way down, `<-dL/dW_u, S_u - T_u>` normalised, the mean over batches; `None` where a unit had no gradient.
    """
    tensors = movable_tensors(target)
    descent = CoefficientDescent(len(units), lr)
    scores: dict[str, list[float | None]] = {unit.name: [] for unit in units}
    moved: set[str] = set()
    with preserved_state(target):
        target.eval()
        try:
            for batch in batches:
                coefficients = dict(zip(scores, descent.values, strict=True))
                moving = [unit for unit in units if coefficients[unit.name] > 0 or unit.name in moved]
                blend_(tensors, scratch.start, source_values, moving, coefficients)
                moved |= {unit.name for unit in moving}
                products = UnitProducts(units)

                def meet(name: str, gradient: Tensor, products: UnitProducts = products) -> None:
                    if name in products:
                        device, dtype = gradient.device, gradient.dtype
                        way = source_values[name].to(device, dtype) - scratch.start[name].to(device)
                        products.add(name, -gradient, way)

                gradient_pass(target, batch, meet)
                sums = products.sums()
                descent.step([-row[0] if row else 0.0 for row in sums.values()])
                for name, row in sums.items():
                    scores[name].append(cosine(*row) if row else None)
        finally:
            overwrite_(tensors, {n: scratch.start[n] for unit in units if unit.name in moved for n in unit.tensors})
    coefficients = dict(zip(scores, descent.values, strict=True))
    return coefficients, {name: mean_defined(values) for name, values in scores.items()}


def blend_(
    tensors: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    source_values: Mapping[str, Tensor],
    units: Sequence[Unit],
    coefficients: Mapping[str, float],
) -> None:
    """Change the tensors of `units` in place: as far from `start` towards the source as each unit's coefficient says."""
    for unit in units:
        for name in unit.tensors:
            interpolate_(tensors[name], start[name], source_values[name], coefficients[unit.name])


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

    Raises:
        IncompatibleSourceError: The models differ in tensors or shapes; all differences are listed.
        DataError, NonFiniteError: The data set is empty or has no labels; a loss or a gradient is not finite.

    Example:
        >>> gradient_alignment(model, model, dataset)["classifier"]  # doctest: +SKIP
        1.0
    """
    config = config or GraspConfig()
    check_dataset(dataset, "dataset")
    if problems := tensor_problems(target, source):
        raise IncompatibleSourceError("the two models cannot be compared:\n- " + "\n- ".join(problems))
    accelerator = Accelerator()
    collator = keeping_model_columns(target, data_collator)
    batches = sample_batches(dataset, collator, accelerator, config, seed=config.seed)
    with tempfile.TemporaryDirectory(prefix="grasp_hf-") as directory, preserved_state(target):
        target.to(accelerator.device)
        tensors = movable_tensors(target)
        scratch = Scratch(Path(directory), tensors)
        try:
            return unit_cosines(
                target,
                movable_tensors(source),
                partition(target, config.unit),
                batches,
                scratch=scratch,
                seed=config.seed,
                published=config.published,
            )
        finally:
            statistics = {name for name, tensor in tensors.items() if not isinstance(tensor, torch.nn.Parameter)}
            overwrite_(tensors, {name: scratch.start[name] for name in statistics})
