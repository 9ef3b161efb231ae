"""The method `copy`: each unit whose gradients agree with the target's is copied from the source."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config.grasp import GraspConfig
from ..errors import IncompatibleSourceError
from ..files import workspace
from ..models.batches import Batch, Collator, check_dataset, keep_model_columns, sample_batches
from ..models.gradients import gradient_pass, mean_gradient, preserved_state
from ..sources.fit import tensor_problems, tie_problems
from ..tensors.mixing import Mix
from ..tensors.placing import overwrite_, placed
from ..tensors.products import PAPER_EPSILON, Scores, UnitProducts, cosine, mean_defined
from ..tensors.scratch import Scratch
from ..tensors.units import Unit, movable_tensors, partition
from .candidates import Candidate, Inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unit_cosines(
    target: PreTrainedModel,
    source_values: Mapping[str, Tensor],
    units: Sequence[Unit],
    batches: Iterable[Batch],
    *,
    scratch: Scratch,
    seed: int,
    paper: bool = False,
) -> Scores:
    """Return the cosine `<g_T, g_S> / (|g_T| |g_S|)` of the gradients of target and source, the mean over `batches`.

    For each batch, a file stores the gradient `g_T` of the target. Then the source's values replace the target's, and each
    gradient of the source is multiplied by the stored one and freed. The mean of the cosines of single batches needs no
    second set of gradients, and is 1 for a model compared with itself. It is higher than the cosine of the summed
    gradients (`summed_cosines`), because both models share the noise of a batch.

    Args:
        target: The model; its weights come back unchanged.
        source_values: The source's weights by name.
        units: The units.
        batches: Labelled batches.
        scratch: Temporary files; `scratch.start` holds the target's weights.
        seed: Seeds the dropout of the target, which `paper` turns on.
        paper: Whether to measure as the paper does: the target is in train mode, so that its batch statistics change, and
            1e-8 is added to the denominator.

    Returns:
        The cosine of each unit; `None` if it is undefined, because a gradient is missing or zero.
    """
    tensors = movable_tensors(target)
    scores: dict[str, list[float | None]] = {unit.name: [] for unit in units}
    epsilon = PAPER_EPSILON if paper else 0.0
    with preserved_state(target), torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in batches:
            stored: set[str] = set()
            products = UnitProducts(units)

            def store(name: str, gradient: Tensor, stored: set[str] = stored) -> None:
                scratch.gradients[name].copy_(gradient)
                stored.add(name)

            def multiply(name: str, gradient: Tensor, products: UnitProducts = products, stored: set = stored) -> None:
                if name in stored and name in products:
                    products.add(name, gradient, scratch.gradients[name].to(gradient.device))

            target.train(paper)
            gradient_pass(target, batch, store)
            target.eval()
            with placed(tensors, source_values, scratch.start):
                gradient_pass(target, batch, multiply)
            for name, sums in products.sums().items():
                scores[name].append(None if sums is None else cosine(*sums, epsilon=epsilon))
    return {name: mean_defined(values) for name, values in scores.items()}


def summed_cosines(
    target: PreTrainedModel,
    source_values: Mapping[str, Tensor],
    units: Sequence[Unit],
    batches: Iterable[Batch],
    *,
    scratch: Scratch,
) -> Scores:
    """Return the cosine of the summed gradients over all `batches`, which is exactly that of one large batch.

    This needs a file for a second set of gradients, because the norm of a sum is not the sum of the norms. Arguments and
    result are those of `unit_cosines`.
    """
    batches = list(batches)
    products = UnitProducts(units)
    with preserved_state(target):
        target.eval()
        in_target, _ = mean_gradient(target, batches, scratch.gradients)
        with placed(movable_tensors(target), source_values, scratch.start):
            in_source, _ = mean_gradient(target, batches, scratch.source_gradients)
        for name in scratch.gradients:  # one order, so that sums repeat
            if name in in_target & in_source and name in products:
                products.add(name, scratch.source_gradients[name], scratch.gradients[name])
    return {name: cosine(*sums) if sums else None for name, sums in products.sums().items()}


def configured_cosines(
    target: PreTrainedModel,
    source_values: Mapping[str, Tensor],
    units: Sequence[Unit],
    batches: Iterable[Batch],
    config: GraspConfig,
    *,
    scratch: Scratch,
    seed: int,
) -> Scores:
    """Return the cosines of the summed gradients if `config` accumulates them, otherwise those of single batches."""
    if config.accumulate_gradients:
        return summed_cosines(target, source_values, units, batches, scratch=scratch)
    return unit_cosines(target, source_values, units, batches, scratch=scratch, seed=seed, paper=config.published)


def candidates(inputs: Inputs) -> dict[str, Candidate]:
    """Return a candidate that copies each unit whose cosine is above `config.threshold`; the other units stay."""
    config, batches = inputs.config, inputs.batches(inputs.labels.samples.train)
    scores = configured_cosines(
        inputs.model, inputs.source, inputs.units, batches, config, scratch=inputs.scratch, seed=inputs.seed
    )
    copied = {unit: score is not None and score > config.threshold for unit, score in scores.items()}
    mixes = {unit: Mix.on_line(1.0 if is_copied else 0.0) for unit, is_copied in copied.items()}
    return {"copy": inputs.candidate(mixes, scores)}


def gradient_alignment(
    source: PreTrainedModel,
    target: PreTrainedModel,
    dataset: Any,
    *,
    config: GraspConfig | None = None,
    data_collator: Collator | None = None,
) -> Scores:
    """Return the cosine between the gradients of two models on the same data, per unit; both models stay unchanged.

    Args:
        source: One model.
        target: Another of the same class and shapes.
        dataset: Labelled samples, as for `transformers.Trainer`.
        config: Sets the unit, the number and size of batches, and the seed; `GraspConfig.paper()` measures as the paper
            does. If left out, the defaults.
        data_collator: Makes batches from samples; if left out, `transformers.default_data_collator`.

    Returns:
        Unit name -> cosine in [-1, 1], the mean over batches; `None` if it is undefined, because a gradient is missing or
        zero.

    Raises:
        IncompatibleSourceError: The models differ in tensors or shapes; the error lists all differences.
        DataError: The data set is empty, or has no labels.
        NonFiniteError: A loss or a gradient is NaN or infinite.

    Example:
        >>> gradient_alignment(model, model, dataset)["classifier"]  # doctest: +SKIP
        1.0
    """
    config = config or GraspConfig()
    check_dataset(dataset, "dataset")
    problems = tie_problems(target, source) + tensor_problems(movable_tensors(target), movable_tensors(source))
    if problems:
        raise IncompatibleSourceError("the two models cannot be compared", problems=problems)
    accelerator = Accelerator()
    collator = keep_model_columns(target, data_collator)
    batches = sample_batches(dataset, collator, accelerator, config, seed=config.seed)
    with workspace(Path(tempfile.gettempdir()), "grasp_hf-") as directory, preserved_state(target):
        target.to(accelerator.device)
        tensors = movable_tensors(target)
        scratch = Scratch(directory, tensors)
        scratch.start.copy_(tensors)
        values, units = movable_tensors(source), partition(target, config.unit)
        try:
            return configured_cosines(target, values, units, batches, config, scratch=scratch, seed=config.seed)
        finally:
            statistics = {name for name, tensor in tensors.items() if not isinstance(tensor, torch.nn.Parameter)}
            overwrite_(tensors, {name: scratch.start[name] for name in statistics})
